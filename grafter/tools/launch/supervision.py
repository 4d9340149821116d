"""Supervises the jobs of a run: reports deaths and waits, and ends all jobs normally."""

from __future__ import annotations

import selectors
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from grafter.errors import GrafterError
from grafter.tools.launch.job import Job
from grafter.tools.launch.run_output import RunOutput

_TICK_SECONDS = 0.25
_STATUS_SECONDS = 1.0
# Without a terminal, a wait is reported after this long, and again each minute.
_REPORT_WAIT_AFTER_SECONDS = 10.0
_REPORT_WAIT_EVERY_SECONDS = 60.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RendezvousStore(Protocol):
    """The part of `WatchedStore` that the launcher needs."""

    @property
    def address(self) -> str: ...
    @property
    def port(self) -> int: ...
    def report_job_exit(self, role: str, text: str) -> None: ...
    def waiting_summary(self) -> str | None: ...
    def has_announced(self, role: str) -> bool: ...
    def close(self) -> None: ...


class Supervisor:
    """The supervisor of the jobs of a run, until their end. Jobs are added first, then watched.

    `grace_seconds`: how long a job may continue after the other one failed. `store` is None if another machine hosts
    it.
    """

    def __init__(self, store: RendezvousStore | None, output: RunOutput, grace_seconds: float) -> None:
        self.jobs: list[Job] = []
        self.signals: list[int] = []
        self.first_failure: Job | None = None
        self._store = store
        self._output = output
        self._grace_seconds = grace_seconds
        self._reported: set[str] = set()
        self._end_others_at = float("inf")
        self._reported_signals = 0
        self._wait_reporter = WaitReporter()
        self._next_status = 0.0

    @contextmanager
    def stop_signals_handled(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP end the jobs normally; a second one kills them.

        Main thread only. In other threads, and where the signals are ignored (nohup, a shell's background job), nothing
        changes.
        """
        handled = {}
        if threading.current_thread() is threading.main_thread():
            handled = {n: signal.getsignal(n) for n in _STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
        for number in handled:
            signal.signal(number, self._handle_signal)
        try:
            yield
        finally:
            for number, previous in handled.items():
                signal.signal(number, previous)

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        # The handler acts here and not in the loop, which may be blocked in a write to a paused terminal.
        self.signals.append(number)
        for job in self.jobs:
            job.end() if len(self.signals) == 1 else job.kill()

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        if self.signals:  # a signal that arrived while the job was being started
            job.end()

    def watch(self) -> None:
        """Return when no process of any job is left and all their output has been passed on."""
        with selectors.DefaultSelector() as selector:
            for job in self.jobs:
                selector.register(job, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(_TICK_SECONDS):
                    job = next(job for job in self.jobs if job is key.fileobj)
                    job.read_status()
                    self._notice_end(job)
                    if job.gone:
                        selector.unregister(job)
                self._notice_stop()
                self._end_others()
                self._show_waiting()
        self._output.status(None)
        for job in self.jobs:
            # A paused terminal or pager may block this as long as its user likes, but not after a second Ctrl-C.
            while not job.output_is_read(_TICK_SECONDS) and len(self.signals) < 2:
                self._notice_stop()

    def linger(self, seconds: float) -> None:
        """Keep the store for ranks on another machine that still have to leave; a signal ends the wait."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.signals:
            time.sleep(0.05)

    def kill_all(self) -> None:
        """Kill all running jobs after a failure of the launcher itself, and wait until they are gone."""
        for job in self.jobs:
            job.kill()
        for job in self.jobs:
            while not job.gone:
                job.read_status()

    def _notice_end(self, job: Job) -> None:
        if job.role in self._reported or (job.exit_code is None and not job.gone):
            return
        self._reported.add(job.role)
        text = job.describe_exit()
        if self._store is not None:
            try:
                self._store.report_job_exit(job.role, text)
            except GrafterError as error:
                self._output.say(f"could not notify the other job that the {job.role} job {text}: {error}")
        others = [other for other in self.jobs if other.exit_code is None and not other.gone]
        if job.exit_code != 0 and not job.ended_by_launcher:
            self.first_failure = self.first_failure or job
            message = f"the {job.role} job {text}."
            if others:
                self._end_others_at = min(self._end_others_at, time.monotonic() + self._grace_seconds)
                message += f" The {others[0].role} job has {self._grace_seconds:.0f} s to end by itself."
            self._output.say(message)
        elif others and not self.signals:
            self._output.say(f"the {job.role} job {text}; the {others[0].role} job continues.")

    def _notice_stop(self) -> None:
        if self._output.broken is not None and not self.signals:
            # As in a shell's pipeline: if the reader is gone, the run ends.
            self._handle_signal(signal.SIGPIPE, None)
        if len(self.signals) > self._reported_signals:
            self._reported_signals = len(self.signals)
            name = signal.Signals(self.signals[-1]).name
            if len(self.signals) == 1:
                self._output.say(f"{name}: ending what runs (SIGTERM, after 5 s SIGKILL); again to kill at once.")
            else:
                self._output.say(f"{name}: killing what runs.")

    def _end_others(self) -> None:
        if time.monotonic() < self._end_others_at:
            return
        self._end_others_at = float("inf")
        for job in self.jobs:
            if job.exit_code is None and not job.gone:
                self._output.say(f"ending the {job.role} job (SIGTERM, after 5 s SIGKILL).")
                job.end()

    def _show_waiting(self) -> None:
        now = time.monotonic()
        if self._store is None or now < self._next_status:
            return
        self._next_status = now + _STATUS_SECONDS
        try:
            summary = self._store.waiting_summary()
        except GrafterError as error:
            summary = f"the state of the jobs cannot be read: {error}"
        self._output.status(summary)
        if not self._output.is_terminal and self._wait_reporter.is_due(summary, now):
            self._output.say(str(summary))


class WaitReporter:
    """The rule when to report a wait in a pipe: after 10 s, then every 60 s; a new wait starts again at 10 s. Pure."""

    def __init__(self) -> None:
        self._report_at: float | None = None

    def is_due(self, summary: str | None, now: float) -> bool:
        """Whether to report now. Called about once per second; `now`: seconds of any monotonic clock."""
        if summary is None:
            self._report_at = None
            return False
        if self._report_at is None:
            self._report_at = now + _REPORT_WAIT_AFTER_SECONDS
        if now < self._report_at:
            return False
        self._report_at = now + _REPORT_WAIT_EVERY_SECONDS
        return True
