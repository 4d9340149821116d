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

from grafter.core.messages.roster import ANNOUNCEMENTS, Announcement
from grafter.core.roles import RoleName
from grafter.errors import GrafterError, RunError
from grafter.tools.launch.job import Job
from grafter.tools.launch.run_output import RunOutput
from grafter.wire.monitor.status_board import BoardLine, board_key
from grafter.wire.store_client import ABORT, HostedStore, StoreClient

_TICK_SECONDS = 0.25
_LOOK_EVERY_SECONDS = 1.0
# Without a terminal, a wait is reported after this long, and again each minute.
_TELL_WAIT_AFTER_SECONDS = 10.0
_TELL_WAIT_EVERY_SECONDS = 60.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RendezvousStore(Protocol):
    """What the launcher needs from `grafter.wire.store_client.HostedStore`."""

    @property
    def address(self) -> str: ...
    @property
    def port(self) -> int: ...
    def report_job_exit(self, role: str, text: str) -> None: ...
    def waiting_summary(self) -> str | None: ...
    def has_announced(self, role: str) -> bool: ...
    def close(self) -> None: ...


class Supervisor:
    """Runs the jobs to their end. Jobs are added first, then watched.

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
        self._told_signals = 0
        self._wait_teller = WaitTeller()
        self._next_look = 0.0

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
        if len(self.signals) > self._told_signals:
            self._told_signals = len(self.signals)
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
        if self._store is None or now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY_SECONDS
        try:
            summary = self._store.waiting_summary()
        except GrafterError as error:
            summary = f"the state of the jobs cannot be read: {error}"
        self._output.status(summary)
        if not self._output.is_terminal and self._wait_teller.is_due(summary, now):
            self._output.say(str(summary))


class WaitTeller:
    """When to report a wait in a pipe: after 10 s, then every 60 s; a new wait starts again at 10 s. Pure."""

    def __init__(self) -> None:
        self._tell_at: float | None = None

    def is_due(self, summary: str | None, now: float) -> bool:
        """Whether to report now. Called about once per second; `now`: seconds of any monotonic clock."""
        if summary is None:
            self._tell_at = None
            return False
        if self._tell_at is None:
            self._tell_at = now + _TELL_WAIT_AFTER_SECONDS
        if now < self._tell_at:
            return False
        self._tell_at = now + _TELL_WAIT_EVERY_SECONDS
        return True


# The hosted store, with a one-line summary of the ranks that wait and what they wait for.

_ROLES: tuple[RoleName, ...] = ("baseline", "target")
_RANKS_NAMED = 8


class WatchedStore(HostedStore):
    """The store that `grafter run` hosts."""

    def __init__(
        self, address: str = "127.0.0.1", port: int = 0, *, group_name: str = "graft", secret: str | None = None
    ) -> None:
        """Opens the store; port 0 takes a free one. Raises JoinError if it cannot listen there."""
        super().__init__(address, port, group_name=group_name, secret=secret)
        # The number of ranks per role, once the role has joined.
        self._world_sizes: dict[RoleName, int] = {}
        self._joined_since: float | None = None

    def waiting_summary(self) -> str | None:
        """Which rank waits, for which rank or point, and for how long; None while no rank waits. Call it from one
        thread.

        It takes about 60 us per rank of both jobs and never waits. Raises RunError if the store cannot be read.
        """
        client = self._client
        run = client.peek(f"{client.job_prefix}/run")
        if run is None:
            return "waiting for the baseline job to join; a job joins at its first call of grafter"
        if run.kind == ABORT:
            # The run ended before it was opened, and no rank waits any more.
            return None
        client.seal.run_id = run.payload.partition(" ")[0]
        missing = [summary for role in _ROLES if (summary := self._missing(client, role)) is not None]
        if missing:
            if self._joined_since is None:
                self._joined_since = time.monotonic()
            return f"{' and '.join(missing)}, since {time.monotonic() - self._joined_since:.0f} s"
        return summarize_lines(self._read_lines(client), time.time())

    def has_announced(self, role: str) -> bool:
        """Whether any rank of the role has reached its join, however the run ended. False if the store is broken."""
        client = self._client
        try:
            # Ranks of one job start together, so if any rank is there, one of the first ones is.
            return any(client.exists(f"{client.job_prefix}/hello/{role}/{rank}") for rank in range(8))
        except RunError:
            return False

    def _missing(self, client: StoreClient, role: RoleName) -> str | None:
        """Which ranks of a role have not joined; None once all have."""
        if role in self._world_sizes:
            return None
        roster = client.peek(f"{client.job_prefix}/roster/{role}")
        if roster is not None and roster.kind == ABORT:
            # The run ended before it began; the ranks themselves report why.
            return None
        if roster is not None:
            self._world_sizes[role] = len(ANNOUNCEMENTS.validate_json(roster.payload))
            return None
        first = client.peek(f"{client.job_prefix}/hello/{role}/0")
        if first is None:
            return f"waiting for the {role} job to join"
        world_size = Announcement.model_validate_json(first.payload).role_world_size
        absent = [
            rank for rank in range(1, world_size) if not client.exists(f"{client.job_prefix}/hello/{role}/{rank}")
        ]
        named = ", ".join(map(str, absent[:_RANKS_NAMED])) + (", ..." if len(absent) > _RANKS_NAMED else "")
        return f"waiting for {role} rank{'s' * (len(absent) != 1)} {named} to join" if absent else None

    def _read_lines(self, client: StoreClient) -> list[BoardLine]:
        found = [
            client.peek(board_key(client, role, rank))
            for role, world_size in self._world_sizes.items()
            for rank in range(world_size)
        ]
        return [BoardLine.model_validate_json(sealed.payload) for sealed in found if sealed is not None]


def summarize_lines(lines: list[BoardLine], now: float) -> str | None:
    """The longest wait, and how many other ranks wait; None if none does. `now`: seconds since 1970."""
    waits = sorted((line for line in lines if line.state == "waiting"), key=lambda line: line.since)
    if not waits:
        return None
    longest = waits[0]
    others = len(waits) - 1
    more = f" ({others} more rank{'s' * (others != 1)} wait{'s' * (others == 1)})" if others else ""
    return f"{longest.who} waits for {longest.point} since {max(0.0, now - longest.since):.0f} s{more}"
