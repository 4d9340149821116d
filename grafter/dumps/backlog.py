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

    def __init__(self, limit_bytes: int, in_idle_time: Callable[[], bool], who: str) -> None:
        """in_idle_time: called while there is no job; whether it had something to do."""
        self._limit, self._in_idle_time, self._who = limit_bytes, in_idle_time, who
        self._jobs: deque[Callable[[], None]] = deque()
        self._bytes = self._put = self._done = 0
        self._marks: tuple[int, int] = (0, 0)
        # Its lock may be taken again by the thread that holds it: a signal handler runs in the middle of anything.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def reserve(self, nbytes: int) -> None:
        """Wait for room. One point that is larger than all of it passes alone."""
        with self._changed:
            self._wait(lambda: self._bytes + nbytes <= self._limit or self._done == self._put)
            self._bytes += nbytes

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._changed.notify_all()

    def put(self, job: Callable[[], None]) -> None:
        """job: never raises. What it reserved, it releases itself."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="grafter-dump", daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._put += 1
            self._changed.notify_all()

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
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _wait(self, is_enough: Callable[[], bool], patience_seconds: float | None = None) -> None:
        """Wait, and say so where it takes long: a run that is slow for its disk shall not look hung."""
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

    def _work(self) -> None:
        while True:
            with self._changed:
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                job()
                del job
                with self._changed:
                    self._done += 1
                    self._changed.notify_all()
            elif not self._in_idle_time():
                with self._changed:
                    if self._is_closing and not self._jobs:
                        return
                    if not self._jobs:
                        self._changed.wait()
