"""The recorder: requests in flight, requests that are over but not on disk yet, and when they are written.

    record   a request begins: encoded at the call           in flight
    finish   its output; enough of them are a batch          over, in memory
    writer   one thread, in the background                   on disk

A server calls `record` and `finish` on its own path, so neither waits for the disk, and neither raises because of its
arguments. The memory is limited; requests that do not fit are counted and reported, in the log and in the next batch.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from grafter.config.control.recorders import forget_recorder, register_recorder
from grafter.errors import UsageError
from grafter.store.dumps.record import safe_repr
from grafter.store.dumps.snapshot import Buffers
from grafter.tools.requests.batch_file import BatchWriter, encode_part
from grafter.tools.requests.entry import Entry, Later, Part, State
from grafter.tools.requests.process_end import ProcessEnd

logger = logging.getLogger("grafter")

DEFAULT_EXCLUDE = ("routed_experts", "hidden_states")
# A dump without batches holds what finished in this time.
RECENT_SECONDS = 300.0
_PATIENCE_SECONDS = 60.0
_STATES = ("finished", "unfinished", "failed")

Method = TypeVar("Method", bound=Callable[..., None])


def _never_raises(method: Method) -> Method:
    """Make sure that an internal error loses the request's record and never disturbs the server."""

    @functools.wraps(method)
    def careful(self: RequestRecorder, *arguments: Any, **named: Any) -> None:
        try:
            method(self, *arguments, **named)
        except Exception as error:
            self._lose("failed", f"{method.__name__} failed: {safe_repr(error)}")

    return careful  # type: ignore[return-value]


class RequestRecorder:
    """Records the requests of a server: call `record` when one arrives and `finish` when it is answered.

    A background thread writes batches of `threshold` finished requests, as JSON lines with tensors in a second file
    (docs/requests.md). On a crash, on SIGTERM, at exit, and at `dump_now()`, everything that is not on disk yet is
    written, including unfinished requests. It may be used from any thread. A forked child starts empty, with its own
    files.

    Args:
        dir: where the files go; created if it does not exist.
        threshold: how many finished requests make a batch. 0: no batches; the last five minutes are kept in memory, and
            only a crash, SIGTERM or `dump_now()` writes them.
        exclude: keys of dicts that are left out, at any depth, unread; names separated by commas, or an iterable.
            Default: routed_experts, hidden_states. "" keeps all. The caller's objects are never changed.
        enabled: False: `record` does nothing until `configure(enabled=True)`.
        limit_bytes: the limit on memory. Once half of it is used, a batch is written. What exceeds it is lost, counted
            and logged.

    Raises UsageError for an illegal argument, and OSError if the directory cannot be created.
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        threshold: int = 1000,
        *,
        exclude: str | Iterable[str] = DEFAULT_EXCLUDE,
        enabled: bool = True,
        limit_bytes: int = 256 << 20,
    ) -> None:
        self.directory = Path(dir)
        self._threshold, self._exclude, self._is_enabled = _threshold(threshold), _keys(exclude), bool(enabled)
        self._limit = limit_bytes
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.start_afresh()
        self._end = ProcessEnd(self.dump_now)
        self._end.install()
        register_recorder(self)

    def start_afresh(self) -> None:
        """Reset everything in a forked child, which must not write its parent's requests."""
        self._process_id = os.getpid()
        self._buffers = Buffers(self._limit)
        self._writer = BatchWriter(self.directory)
        # A thread may acquire this lock again while it holds it: a signal handler can interrupt any code.
        self._changed = threading.Condition()
        self._open: dict[str, Entry] = {}
        self._over: deque[Entry] = deque()
        self._thread: threading.Thread | None = None
        self._next_index = self._bytes = 0
        self._asked = self._answered = 0
        self._is_closing = False
        self._counts: Counter[str] = Counter()
        self._has_told: set[str] = set()

    # On the server's threads.

    @_never_raises
    def record(self, id: str, request: Any, meta: Any = None) -> None:
        """A request begins.

        id: names it for `finish`; concurrent requests need distinct ids. request: the request, any object. meta: what
        belongs to it; `replay` reads `method`, `path`, `query` and `headers`. Both may be changed once this returns.
        """
        if not self._is_enabled:
            return
        came = time.time()
        parts: dict[str, Part | Later] = {"request": self._encode(request, "request")}
        if meta is not None:
            parts["meta"] = self._encode(meta, "meta")
        with self._changed:
            entry = Entry(self._next_index, _id(id), came, self._exclude, parts)
            self._next_index += 1
            self._counts["recorded"] += 1
            earlier = self._open.pop(entry.id, None)
            if earlier is not None:
                self._end_entry(earlier, "unfinished", "another request with its id arrived before it was finished")
            if self._bytes + entry.nbytes > self._limit and not self._displace(entry.nbytes):
                self._lose("did not fit", "the memory for requests is full; raise limit_bytes, or record less of each")
                self._give_back(entry)
                return
            self._bytes += entry.nbytes
            self._open[entry.id] = entry
            if self._is_due():
                self._wake()

    @_never_raises
    def finish(self, id: str, output: Any = None, *, state: State = "finished", reason: str | None = None) -> None:
        """A request is over.

        output: the answer, any object; it may be changed once this returns. state: `unfinished` if its client or the
        server abandoned it, `failed` if there is no answer. reason: why, in words.
        """
        if state not in _STATES:
            raise ValueError(f"the state {safe_repr(state)} is not one of {', '.join(_STATES)}")
        with self._changed:
            entry = self._open.get(_id(id))
        if entry is None:
            if self._is_enabled:
                self._lose("unknown", f"{safe_repr(id)} was finished, but no open request has this id")
            return
        part = self._encode(output, "output", entry.exclude)
        with self._changed:
            if self._open.pop(entry.id, None) is not entry:
                return
            if self._bytes + part.nbytes > self._limit and not self._displace(part.nbytes):
                self._lose("output did not fit", "the memory for requests is full: outputs are left out")
                part = Part("null", {"output": "left out: the memory for requests was full"})
            self._bytes += part.nbytes
            entry.parts["output"] = part
            self._end_entry(entry, state, reason)

    def dump_now(self) -> None:
        """Write everything that is not on disk yet: finished requests, and unfinished ones as they are. Never raises.

        Returns when it is on disk, or after a minute. An unfinished request that is finished later is written again,
        and then counts as finished.
        """
        try:
            mine = self._ask_for_dump()
            if self._thread is None:
                self._write_due()
            with self._changed:
                self._changed.wait_for(lambda: self._answered >= mine, timeout=_PATIENCE_SECONDS)
        except Exception as error:
            logger.error("grafter: the requests in memory could not be written: %s", safe_repr(error))

    def dump_soon(self) -> None:
        """Like `dump_now`, but returns immediately: for an event loop, or the thread of a scheduler."""
        try:
            self._ask_for_dump()
        except Exception as error:
            logger.error("grafter: the requests in memory could not be written: %s", safe_repr(error))

    def _ask_for_dump(self) -> int:
        """The number of this request for a dump; the dump is complete once that many are answered."""
        with self._changed:
            if self._open or self._over or self._thread is not None:
                self._asked += 1
                self._wake()
            return self._asked

    def configure(
        self,
        *,
        exclude: str | Iterable[str] | None = None,
        threshold: int | None = None,
        enabled: bool | None = None,
    ) -> None:
        """Change the given settings for later requests, all or none. Raises UsageError.

        After `enabled=False`, requests that are in flight are still finished and written.
        """
        keys = self._exclude if exclude is None else _keys(exclude)
        count = self._threshold if threshold is None else _threshold(threshold)
        if enabled is not None and not isinstance(enabled, bool):
            raise UsageError(f"enabled={enabled!r}: it is True or False.")
        with self._changed:
            self._exclude, self._threshold = keys, count
            if enabled is not None:
                self._is_enabled = enabled
            if self._is_due():
                self._wake()

    @property
    def settings(self) -> dict[str, Any]:
        """The current values of the settings that `configure` changes."""
        return {"exclude": sorted(self._exclude), "threshold": self._threshold, "enabled": self._is_enabled}

    @property
    def counts(self) -> dict[str, int]:
        """How many requests were `recorded`, are `open`, `finished` (over in any way) and `written`; what was lost, by
        reason.
        """
        with self._changed:
            return {**self._counts, "open": len(self._open)}

    def close(self) -> None:
        """Write everything that is not on disk yet, and remove the handlers of signals and exit. Later requests are not
        recorded.
        """
        self._is_enabled = False
        self.dump_now()
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        self._end.uninstall()
        forget_recorder(self)

    def __enter__(self) -> RequestRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, value: Any, name: str, exclude: frozenset[str] | None = None) -> Part | Later:
        if isinstance(value, Later):
            return value
        return encode_part(value, name, self._exclude if exclude is None else exclude, self._buffers)

    # Under the lock.

    def _end_entry(self, entry: Entry, state: State, reason: str | None) -> None:
        entry.state, entry.reason, entry.finished_time = state, reason, time.time()
        self._over.append(entry)
        self._counts["finished"] += 1
        self._forget_old()
        if self._is_due():
            self._wake()

    def _forget_old(self) -> None:
        """Without batches: drop requests that finished too long ago."""
        while (
            not self._threshold and self._over and (self._over[0].finished_time or 0.0) < time.time() - RECENT_SECONDS
        ):
            self._drop(self._over.popleft())

    def _is_due(self) -> bool:
        if not self._threshold:
            return False
        return len(self._over) >= self._threshold or self._bytes > self._limit // 2

    def _displace(self, nbytes: int) -> bool:
        """Without batches: drop the oldest finished requests to make room. Returns whether there is enough."""
        while not self._threshold and self._over and self._bytes + nbytes > self._limit:
            self._drop(self._over.popleft())
            self._counts["displaced"] += 1
        return self._bytes + nbytes <= self._limit

    def _drop(self, entry: Entry) -> None:
        self._bytes -= entry.nbytes
        self._give_back(entry)

    def _give_back(self, entry: Entry) -> None:
        for part in entry.parts.values():
            for snapshot in part.snapshots.values() if isinstance(part, Part) else ():
                self._buffers.give_back(snapshot.buffer)

    def _lose(self, what: str, why: str) -> None:
        with self._changed:
            self._counts[what] += 1
            is_news = what not in self._has_told
            self._has_told.add(what)
        if is_news:
            logger.warning("grafter: recording of requests: %s (others like it are only counted)", why)

    def _wake(self) -> None:
        if self._thread is None and not self._is_closing:
            thread = threading.Thread(target=self._work, name="grafter-requests", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # The interpreter is ending and starts no more threads: `dump_now` writes by itself.
            self._thread = thread
        self._changed.notify_all()

    # On the writer's thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._asked > self._answered or self._is_due())
                if self._is_closing and self._asked == self._answered:
                    return
            self._write_due()

    def _write_due(self) -> None:
        with self._changed:
            asked, is_dump = self._asked, self._asked > self._answered
            batch = self._take_dump() if is_dump else self._take_batch()
        if batch:
            self._write(batch, "dump" if is_dump else "batch")
        with self._changed:
            self._answered = max(self._answered, asked)
            self._changed.notify_all()

    def _take_dump(self) -> list[Entry]:
        self._forget_old()
        batch = self._take_batch(give_up=False)
        for entry in self._open.values():
            if not entry.is_written:
                entry.is_written = True
                # A copy, because the server may finish the request while it is written.
                batch.append(Entry(entry.index, entry.id, entry.time, entry.exclude, dict(entry.parts)))
        return sorted(batch, key=lambda entry: entry.index)

    def _take_batch(self, give_up: bool = True) -> list[Entry]:
        batch = list(self._over)
        self._over.clear()
        freed = sum(entry.nbytes for entry in batch)
        # If open requests fill the memory, the oldest of them are written as they are.
        while give_up and self._open and self._bytes - freed > self._limit // 2:
            entry = self._open.pop(next(iter(self._open)))
            entry.reason = "written before it was finished: the memory was needed for other requests"
            self._counts["given up"] += 1
            batch.append(entry)
            freed += entry.nbytes
        return batch

    def _write(self, batch: list[Entry], why: str) -> None:
        # A copy of an open request has neither; its bytes stay in memory.
        gone = [entry for entry in batch if entry.finished_time is not None or entry.reason is not None]
        try:
            facts = {"time": time.time(), "why": why, "exclude": sorted(self._exclude), "counts": self.counts}
            self._writer.write(batch, facts)
            with self._changed:
                self._counts["written"] += len(batch)
        except BaseException as error:
            with self._changed:
                self._counts["lost"] += len(batch) - 1
            self._lose("lost", f"{len(batch)} requests could not be written to {self.directory}: {safe_repr(error)}")
        finally:
            with self._changed:
                for entry in gone:
                    self._drop(entry)


def _id(id: Any) -> str:
    return id if type(id) is str else safe_repr(id)


def _threshold(threshold: Any) -> int:
    if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0:
        raise UsageError(f"threshold={threshold!r}: give a number of requests, or 0 for no batches.")
    return threshold


def _keys(exclude: Any) -> frozenset[str]:
    keys = exclude.split(",") if isinstance(exclude, str) else exclude
    try:
        listed = list(keys)
    except TypeError:
        listed = [None]
    if not all(isinstance(key, str) for key in listed):
        raise UsageError(f"exclude={exclude!r}: give names of keys, separated by commas, or an iterable of them.")
    return frozenset(key.strip() for key in listed if key.strip())
