"""Runs of a table as processes of their own: several at a time, each with its share of the threads, stopped together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from utils.base.errors import UserError
from utils.compare.own_runs import ROOT
from utils.jobs.table_plan import Row, state

TRAIN = (sys.executable, str(ROOT / "cifar10_resnet_test.py"))
CONSOLE = "console.txt"
POLL_SECONDS = 0.2
# A child that is asked to stop finishes its mini-batch and writes a checkpoint.
STOP_SECONDS = 60


@dataclass
class Child:
    """A running row."""

    row: Row
    process: subprocess.Popen
    begin: float = field(default_factory=time.monotonic)


@dataclass
class SideBySide:
    """Runs every row that is not done yet, as soon as what it needs is done. A row that fails does not stop the others.

    Attributes:
        rows: of utils.jobs.table_plan.make_plan.
        jobs: processes at a time.
        threads: CPU threads of each.
        report: gets a line for every row that begins or ends.
        tick: called with this object several times a second.
        train: the command that takes a row's flags.
        done: folders of rows that are done.
        failed: {folder: why} of rows that failed or could not begin.
        children: what runs now.
    """

    rows: list[Row]
    jobs: int
    threads: int
    report: Callable[[str], None]
    tick: Callable[[SideBySide], None] = lambda running: None
    train: tuple[str, ...] = TRAIN
    done: set[Path] = field(default_factory=set)
    failed: dict[Path, str] = field(default_factory=dict)
    children: list[Child] = field(default_factory=list)

    def run(self) -> None:
        """Returns when no row is left. However it ends, no child is left either.

        Raises:
            KeyboardInterrupt: a signal asked to stop, and every child has.
        """
        waiting = list(self.rows)
        with Signals() as signals:
            try:
                while (waiting or self.children) and not signals.count:
                    for child in [child for child in self.children if child.process.poll() is not None]:
                        self.children.remove(child)
                        self.finish(child)
                    waiting = [row for row in waiting if not self.begins(row)]
                    self.tick(self)
                    time.sleep(POLL_SECONDS if self.children else 0)
            finally:
                self.stop(signals)
        if signals.count:
            raise KeyboardInterrupt

    def begins(self, row: Row) -> bool:
        """Begins a row when its turn has come; whether it is off the list of those that wait."""
        broken = [path.name for path in row.needs if path in self.failed]
        if broken:
            self.fail(row, f"needs {broken[0]}, which failed")
            return True
        if not set(row.needs) <= self.done or len(self.children) >= self.jobs:
            return False
        there, remark = state(row)
        if there == "done":
            self.done.add(row.folder)
            self.report(f"done already: {row.name}, last epoch {remark}")
            return True
        try:
            if there == "other":
                raise UserError(remark)
            command = [*self.train, *row.command()]
        except UserError as error:
            self.fail(row, str(error))
            return True
        row.folder.mkdir(parents=True, exist_ok=True)
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with open(row.folder / CONSOLE, "ab") as console:
            # In a session of its own, so that a Ctrl-C at the terminal reaches it once, through us.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads},
                start_new_session=True,
            )
        self.children.append(Child(row, process))
        self.report(f"begun: {row.name}{f' ({remark})' if remark else ''}")
        return True

    def finish(self, child: Child) -> None:
        """Notes how a row ended: well only when its results say so."""
        row, status = child.row, child.process.returncode
        there, remark = state(row)
        if status == 0 and there == "done":
            self.done.add(row.folder)
            self.report(f"done: {row.name}, last epoch {remark}, {(time.monotonic() - child.begin) / 60:.1f} minutes")
            return
        lines = (row.folder / CONSOLE).read_text(errors="replace").strip().splitlines()
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        last = lines[-1].strip() if lines else "nothing printed"
        self.fail(row, f"ended with {ended}: {last} (all of it in {row.folder / CONSOLE})")

    def fail(self, row: Row, why: str) -> None:
        self.failed[row.folder] = why
        self.report(f"FAILED: {row.name}: {why}")

    def stop(self, signals: Signals) -> None:
        """Asks every child to stop as by Ctrl-C and waits; a second signal, or too long a time, kills what is left."""
        left = [child for child in self.children if child.process.poll() is None]
        if left:
            self.report(f"stopping {', '.join(child.row.name for child in left)}; repeat the command to go on")
        for child in left:
            child.process.send_signal(signal.SIGINT)
        end, asked = time.monotonic() + STOP_SECONDS, signals.count
        while any(child.process.poll() is None for child in left):
            if time.monotonic() > end or signals.count > asked:
                for child in left:
                    kill_session(child.process)
            time.sleep(0.05)


class Signals:
    """Counts Ctrl-C, SIGTERM and SIGHUP instead of letting them break in anywhere, above all between the start of a child and its
    entry in the list. A context manager; the handlers of before come back."""

    def __init__(self):
        self.count = 0

    def __enter__(self) -> Signals:
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, signum, frame) -> None:
        self.count += 1


def kill_session(process: subprocess.Popen) -> None:
    """Kills a child and its worker processes, which are in its session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
