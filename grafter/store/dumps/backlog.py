"""The backlog: what was snapshot and is not on disk yet. One thread works it off, in order; its bytes are bounded."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger("grafter")

_TELL_AFTER_SECONDS = 10.0


class Backlog:
    """Jobs of one rank. What is used from several threads: all of it."""

    def __init__(self, limit_bytes: int, who: str) -> None:
        self._limit, self._who = limit_bytes, who
        self._jobs: deque[Callable[[], None]] = deque()
        self._bytes = self._done = 0
        # Whether a job is under way.
        self._is_working = False
        self._marks: tuple[int, int] = (0, 0)
        # A lock that may be taken again by the thread that holds it: a signal handler runs in the middle of anything.
        lock = threading.RLock()
        self._has_work, self._changed = threading.Condition(lock), threading.Condition(lock)
        # What threads wait for. They are woken once one of it is so, and not by every job that is done: that would cost
        # a small one as much again.
        self._awaited: list[Callable[[], bool]] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="grafter-dump", daemon=True)
        # At once, and not with the first job: a signal may come between any two steps of `put`.
        self._thread.start()

    @property
    def _put(self) -> int:
        """How many jobs there were. Not counted, since a signal may come between the job and its count."""
        return self._done + self._is_working + len(self._jobs)

    def reserve(self, nbytes: int) -> None:
        """Wait for room. One point that is larger than all of it passes alone."""
        with self._changed:
            self._wait(lambda: self._bytes + nbytes <= self._limit or self._done == self._put)
            self._bytes += nbytes

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._wake()

    def put(self, job: Callable[[], None]) -> None:
        """job: never raises. What it reserved, it releases itself."""
        with self._changed:
            self._jobs.append(job)
            self._has_work.notify()

    def wait_for_last_step(self) -> None:
        """Wait until what was put before the previous call of this is done: one step's worth may be under way."""
        with self._changed:
            due = self._marks[1]
            self._wait(lambda: self._done >= due)
            self._marks = (self._marks[1], self._put)

    def flush(self, patience_seconds: float | None = None) -> None:
        """Wait until all that was put so far is done; at most so long for one job."""
        with self._changed:
            due = self._put
            self._wait(lambda: self._done >= due, patience_seconds)

    def close(self) -> None:
        """The last call: works off what is there, and ends the thread."""
        with self._changed:
            self._is_closing = True
            self._has_work.notify()
        self._thread.join()

    def _wait(self, is_enough: Callable[[], bool], patience_seconds: float | None = None) -> None:
        """Wait, and say so where it takes long: a run that is slow for its disk shall not look hung."""
        if is_enough():
            return
        self._awaited.append(is_enough)
        try:
            told = time.monotonic() + _TELL_AFTER_SECONDS
            done, since = self._done, time.monotonic()
            while not is_enough():
                self._changed.wait(1.0)
                if self._done != done:
                    done, since = self._done, time.monotonic()
                if patience_seconds is not None and time.monotonic() > since + patience_seconds:
                    return
                if time.monotonic() > told:
                    told = time.monotonic() + _TELL_AFTER_SECONDS
                    logger.warning(
                        "grafter: %s waits for the disk: %d dumped points (%d MiB) are not written yet",
                        self._who, self._put - self._done, self._bytes >> 20,
                    )  # fmt: skip
        finally:
            self._awaited.remove(is_enough)

    def _wake(self) -> None:
        if any(is_enough() for is_enough in self._awaited):
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._has_work:
                while not self._jobs:
                    if self._is_closing:
                        return
                    self._has_work.wait()
                self._is_working = True
                job = self._jobs.popleft()
            job()
            del job
            with self._changed:
                self._is_working = False
                self._done += 1
                self._wake()
