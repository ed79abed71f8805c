"""SIGTERM and Ctrl-C: a run that has to stop finishes its mini-batch and writes a checkpoint."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Two signals within these seconds are one request: `timeout` signals the process and its group, torchrun passes on the
# Ctrl-C that the terminal has sent to every process.
SAME_REQUEST_SECONDS = 1.0


class Stopped(BaseException):
    """The run has stopped because of a signal. Not an Exception: code that expects errors must not catch it.

    Attributes:
        signum: SIGTERM or SIGINT; 128 + signum is the process's exit status.
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
    """Whether this process has to stop. One per process, `stop` below, as signals are.

    Under `handled` the first signal raises Stopped at once; under `deferred` it is only noted, and the training loop
    calls `pending` after every mini-batch. A second signal, later than SAME_REQUEST_SECONDS, ends the process at once.

    Attributes:
        signum: the signal that came, 0 for none.
        reduce: None, or with several ranks: takes this rank's signum and returns the largest of all ranks, now or at a
            later call, so that all stop after the same mini-batch.
    """

    def __init__(self):
        self.signum, self._since, self._agreed = 0, 0.0, 0
        self.reduce: Callable[[int], int] | None = None
        self._deferred, self._pid = False, None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles SIGTERM and SIGINT, in a program's main thread; the handlers of before are restored afterwards."""
        self.signum, self._agreed, self._pid = 0, 0, os.getpid()
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it a signal waits until `pending` is called."""
        outer, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = outer

    def pending(self) -> int:
        """The signal that came, 0 for none; the same on each rank, so each must call this equally often."""
        self._agreed = max(self._agreed, self.signum if self.reduce is None else self.reduce(self.signum))
        return self._agreed

    def _on_signal(self, signum: int, frame) -> None:
        if os.getpid() != self._pid:
            return  # a worker process that was forked a moment ago and still has its parent's handler
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
            if not self._deferred:
                raise Stopped(signum)
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this mini-batch, with a checkpoint (the same again: at once)\n")
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            os.write(2, b"\nstopped at once; the last checkpoint is intact\n")
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + signum)


stop = StopRequest()
