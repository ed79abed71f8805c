"""SIGTERM and Ctrl-C: a run that is asked to stop finishes its mini-batch, writes a checkpoint and says how to go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Two signals within these seconds are one request: `timeout` sends SIGTERM to the process and to its group, torchrun passes on
# the Ctrl-C that the terminal has sent to everybody.
SAME_REQUEST_SECONDS = 1.0


class Stopped(BaseException):
    """The run has stopped as it was asked to.

    No Exception, so that code which expects mistakes (a damaged file, an unknown layer) does not take it for one.

    Attributes:
        signum: the signal, SIGTERM or SIGINT; 128 + signum is the process's exit status.
        saved: what is on the disk now, in words.
        command: what continues the run; None where there is nothing to continue.
    """

    def __init__(self, signum: int, saved: str = "nothing had been trained yet", command: str | None = None):
        super().__init__(signum, saved, command)
        self.signum, self.saved, self.command = signum, saved, command

    def __str__(self) -> str:
        name = "interrupted" if self.signum == signal.SIGINT else f"stopped by {signal.Signals(self.signum).name}"
        return f"{name}: {self.saved}" + (f"; this continues the run:\n{self.command}" if self.command else "")


class StopRequest:
    """Whether this process was asked to stop. One per process, `stop` below, as signals are.

    Under `handled` the first signal raises Stopped where the program stands; under `deferred` as well it is only noted, and the
    training loop asks `pending` after every mini-batch. A second signal, later than SAME_REQUEST_SECONDS, ends the process on
    the spot: every file is written beside its place and renamed, so nothing on the disk is harmed.

    Attributes:
        reduce: takes this rank's signal number (0: none) and returns the largest of all ranks, at this call or a later one; see
            distributed.Agreement. All ranks stop after the same mini-batch this way. None: there is one rank.
    """

    def __init__(self):
        self.signum = 0
        self._agreed = 0
        self.reduce: Callable[[int], int] | None = None
        self._since = 0.0
        self._deferred = False
        self._pid = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Takes over SIGTERM and SIGINT; the handlers of before come back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            # Only a program's main thread may set handlers.
            yield
            return
        self.signum, self._agreed, self._pid = 0, 0, os.getpid()
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._pid = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In here a signal waits for someone to ask `pending`."""
        outer, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = outer

    def pending(self) -> int:
        """The signal that asks to stop, 0 for none; with several ranks the same on each, so each must ask equally often."""
        self._agreed = max(self._agreed, self.signum if self.reduce is None else self.reduce(self.signum))
        return self._agreed

    def _on_signal(self, signum: int, frame) -> None:
        if os.getpid() != self._pid:
            # A worker process that was forked a moment ago and still has its parent's handler.
            return
        now = time.monotonic()
        if not self.signum:
            self.signum, self._since = signum, now
            if not self._deferred:
                raise Stopped(signum)
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this mini-batch, with a checkpoint (the same again: at once)\n")
        elif now - self._since > SAME_REQUEST_SECONDS:
            os.write(2, b"\nstopped at once; the last checkpoint is intact\n")
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + signum)


stop = StopRequest()
