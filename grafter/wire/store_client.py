"""The client of the rendezvous store: a `torch.distributed.TCPStore` that holds sealed text. One client for each
thread.

Costs on loopback: `set` does not wait for an answer (3 us), `compare_set` is one round trip (60 us), `get` two (110
us). A client serves one thread, since its `set` would block behind another thread's `get`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import DistError, TCPStore

from grafter import errors
from grafter.core.messages.wire import PROTOCOL_VERSION, Seal, Sealed, read_unproven
from grafter.core.processes import is_from_signal_handler
from grafter.errors import GrafterError, PeerLostError, ProtocolError, RunError
from grafter.wire.bounded_calls import BoundedCalls, CallMonitor, Unanswered

ABORT = "abort"
# True of torch 2.13 and later. In older versions a `set` after a `compare_set` wakes the ranks that wait.
_COMPARE_SET_WAKES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
_NEVER_STORED = "grafter: never stored"
# A separator that is in no record, since JSON escapes it.
_END_OF_RECORD = "\x1e"
_NEVER = timedelta(days=365)
_POLL_SECONDS = 0.05
# How much is written without an answer of the store in between: what the connection's buffers take even if the store's
# process is stopped.
_MOST_UNDERWAY_BYTES = 1 << 18
# How often a foreign value is replaced before a put gives up.
_MOST_REPLACED = 100

Value = TypeVar("Value")


def encode_abort(error: RunError) -> str:
    """The payload of an abort."""
    return f"{type(error).__name__}\n{error}"


def decode_abort(payload: str) -> RunError:
    """The error that ended the run, of the class that the rank which diagnosed it gave it."""
    name, _, text = payload.partition("\n")
    kind = getattr(errors, name, RunError)
    if not (isinstance(kind, type) and issubclass(kind, RunError)):
        kind = RunError
    return kind(text)


class JobKeys:
    """The keys of one group that do not belong to a run: those of the handshake, and of its end."""

    def __init__(self, prefix: str) -> None:
        # The run's id and name; the error that ended it; the process that hosts the store.
        self.run, self.abort, self.host = f"{prefix}/run", f"{prefix}/abort", f"{prefix}/host"
        self._prefix = prefix

    def hello(self, role: str, role_rank: int) -> str:
        """The announcement of one rank."""
        return f"{self._prefix}/hello/{role}/{role_rank}"

    def roster(self, role: str) -> str:
        """All announcements of one job."""
        return f"{self._prefix}/roster/{role}"

    def exit(self, role: str) -> str:
        """How one job has exited, reported by the launcher."""
        return f"{self._prefix}/exit/{role}"


class StoreClient:
    """A client of the store: sealed values under the prefix of one group. One client serves one thread at a time.

    No call blocks for longer than `set_timeout` allows, even if the store's process is stopped. Every call raises
    PeerLostError if the store is lost or has not answered for that long, and what `call_monitor` raises. With a secret,
    a value that was not written by this run counts as absent (`IgnoredValues`); without one, it raises ProtocolError.
    """

    def __init__(
        self,
        raw: TCPStore,
        seal: Seal,
        group_name: str,
        hosted_by: str = "the process that hosts it",
        *,
        is_server: bool = False,
    ) -> None:
        """is_server: `raw` is the store's server, in this process, so that calls never block for ever."""
        self.raw = raw
        self.seal = seal
        self.hosted_by = hosted_by
        # What the calling thread does while the store does not answer.
        self.call_monitor: CallMonitor | None = None
        # Without a version, so that a peer of another protocol version is recognised instead of waited for.
        self.job_prefix = f"grafter/{group_name}"
        self.job_keys = JobKeys(self.job_prefix)
        self._calls = None if is_server else BoundedCalls()
        self._seconds = 30.0
        # How much was written since the store's last answer.
        self._underway_bytes = 0
        if not is_server:
            # Bounded here instead: when torch's own timeout expires, it writes a stack trace to stderr.
            raw.set_timeout(_NEVER)

    def set_timeout(self, seconds: float) -> None:
        """How long a wait for a value, or for an answer, may take."""
        self._seconds = seconds

    @property
    def silent_seconds(self) -> float:
        """How long the store has not answered a call, in seconds; 0 if no call blocks."""
        since = self._calls.blocked_since if self._calls is not None else None
        return 0.0 if since is None else time.monotonic() - since

    @property
    def run_prefix(self) -> str:
        """The prefix of all keys after the handshake."""
        return f"{self.job_prefix}/v{PROTOCOL_VERSION}/{self.seal.run_id}"

    def set(self, key: str, kind: str, payload: str) -> None:
        """Put a value. Does not wait for the store as long as the connection's buffers have room."""
        sealed = self.seal.seal(key, kind, payload)
        if self.silent_seconds:
            raise self._unanswered()
        self._write(lambda: self.raw.set(key, sealed), sealed)

    def append(self, key: str, kind: str, payload: str) -> None:
        """Append a sealed record to a key, which need not exist. Does not wait for the store. payload: JSON.

        If an earlier call still blocks, that one is waited for first; the end of the run does not end this wait. The
        server appends records one at a time, and every later call of this client finds this one there.
        """
        record = self.seal.seal(key, kind, payload)
        # On both sides: so what another program appends damages no record that follows it.
        text = f"{_END_OF_RECORD}{record}{_END_OF_RECORD}"
        # torch's stubs lack it.
        self._write(lambda: self.raw.append(key, text), text, insists=True)  # type: ignore[attr-defined]

    def _write(self, operation: Callable[[], Value], text: str, *, insists: bool = False) -> None:
        """A call without an answer. It may block if much is under way."""
        underway = self._underway_bytes + len(text)
        blocks = underway > _MOST_UNDERWAY_BYTES or self.silent_seconds > 0
        self._guard(operation, waits=blocks, insists=insists)
        self._underway_bytes = underway

    def read_appended(self, key: str) -> list[Sealed]:
        """All records that were appended to a key, in their order; none if it does not exist. Two round trips.

        Waits as `append` does. Records that no process of the run has written are left out, and counted if there is a
        secret.
        """
        if not self._guard(lambda: self.raw.check([key]), insists=True):
            return []
        text = self._guard(lambda: self.raw.get(key), insists=True)
        records = []
        for record in filter(None, text.split(_END_OF_RECORD.encode())):
            found = self.seal.read(key, record)
            if not isinstance(found, str):
                records.append(found)
            elif self.seal.has_secret:
                self.seal.ignored.add(key, record, found)
        return records

    def put_if_absent(self, key: str, kind: str, payload: str) -> Sealed | None:
        """Put a value if the key is absent: None if that is done, else the value that is there. One round trip.

        Raises the error of an abort that is there.
        """
        found = self._put(key, self.seal.seal(key, kind, payload))
        return found if found is None else _checked(found)

    def _put(self, key: str, mine: str) -> Sealed | None:
        """None if this text was put; else what is there. A value that is to be ignored is replaced."""
        expected: str | bytes = ""
        for _ in range(_MOST_REPLACED):
            there = self._compare_set(key, expected, mine)
            if there == mine.encode():
                self._wake_waiting(key, mine)
                return None
            found = self._message_in(key, there)
            if found is not None:
                return found
            expected = there
        raise ProtocolError(f"another program writes {key!r} in the store again and again: {self.seal.ignored.note}")

    def exchange(self, key: str, expected: Sealed, kind: str, payload: str) -> Sealed | None:
        """Replace the expected value: None if that is done, else the value that is there. One round trip.

        If the key has been deleted, or holds a value that is to be ignored, nothing is put and `expected` is returned.
        """
        mine = self.seal.seal(key, kind, payload)
        there = self._compare_set(key, self.seal.sealed_as(key, expected), mine)
        return None if there == mine.encode() else self._message_in(key, there) or expected

    def find_other(self, key: str, expected: Sealed) -> Sealed | None:
        """The value that has replaced the expected one; None if that is still there, or the key is absent. One round
        trip.

        For keys that no rank waits for (see `_look_up`).
        """
        text = self.seal.sealed_as(key, expected)
        there = self._compare_set(key, text, text)
        return None if there == text.encode() else self._message_in(key, there)

    def get(self, key: str) -> Sealed:
        """Wait for a value. Only an abort or a kind `absent` under the key, or `call_monitor`, ends the wait
        earlier."""
        return self._awaited(key, self._guard(lambda: self.raw.get(key)))

    def get_all(self, keys: Sequence[str]) -> list[Sealed]:
        """Wait for several values: two round trips in all."""
        if not keys:
            return []
        values = self._guard(lambda: self.raw.multi_get(list(keys)))
        return [self._awaited(key, value) for key, value in zip(keys, values, strict=True)]

    def _awaited(self, key: str, value: bytes) -> Sealed:
        """This value, or a later one if it is to be ignored."""
        found = self._message_in(key, value)
        until = time.monotonic() + self._seconds
        while found is None:
            # The store wakes no one for a key that has a value already.
            time.sleep(_POLL_SECONDS)
            if self.call_monitor is not None:
                self.call_monitor.look(0.0)
            if time.monotonic() > until:
                raise ProtocolError(f"{key!r} got no value within {self._seconds:.0f} s. {self.seal.ignored.note}")
            found = self.peek(key)
        return _checked(found)

    def peek(self, key: str) -> Sealed | None:
        """The value of a key, or None. Never waits. Two round trips if it is there, else one. Returns an abort."""
        there = self._look_up(key)
        return None if there is None else self._message_in(key, there)

    def peek_all(self, keys: Sequence[str]) -> list[Sealed | None]:
        """The same for several keys. Two round trips if all are there."""
        if not keys:
            return []
        if not self._guard(lambda: self.raw.check(list(keys))):
            return [self.peek(key) for key in keys]
        values = self._guard(lambda: self.raw.multi_get(list(keys)))
        return [self._message_in(key, value) for key, value in zip(keys, values, strict=True)]

    def peek_at_other(self, key: str) -> Sealed | None:
        """The message that a process without this run's secret has written there; else None. Never waits."""
        there = self._look_up(key)
        if there is None or not isinstance(self.seal.read(key, there), str):
            return None
        return read_unproven(there)

    def exists(self, key: str) -> bool:
        """Whether the key has a value that `get` would return. One round trip; up to three with a secret."""
        if self.seal.has_secret:
            return self.peek(key) is not None
        return bool(self._guard(lambda: self.raw.check([key])))

    def all_exist(self, keys: Sequence[str]) -> bool:
        """The same for several keys at once. One round trip; two with a secret."""
        if self.seal.has_secret:
            return None not in self.peek_all(keys)
        return bool(self._guard(lambda: self.raw.check(list(keys))))

    def delete(self, key: str) -> None:
        """Delete a key, which need not exist. One round trip."""
        self._guard(lambda: self.raw.delete_key(key))

    def wake(self, key: str, error: RunError) -> None:
        """Put an abort under a key, unless it has a value: whichever rank waits for the key raises the error."""
        self._put(key, self.seal.seal(key, ABORT, encode_abort(error)))

    def close(self) -> None:
        """End the helper thread. The client is not used any more."""
        if self._calls is not None:
            self._calls.close()

    def _wake_waiting(self, key: str, value: str) -> None:
        """Wake the ranks that wait for a key. The older server that torch 2.6 needs wakes them only in a `set`, not in
        a `compare_set`. No other rank writes a key that has a value, so writing it again changes nothing."""
        if not _COMPARE_SET_WAKES:
            self._write(lambda: self.raw.set(key, value), value)

    def _look_up(self, key: str) -> bytes | None:
        """The raw value of a key, whichever program wrote it."""
        # `check` first: a `compare_set` that finds its key absent and changes nothing wakes the ranks that wait for the
        # key, with an empty value (torch 2.13).
        if not self._guard(lambda: self.raw.check([key])):
            return None
        # Not `get`, which would wait if the key were deleted in between. A failed `compare_set` returns the value.
        there = self._compare_set(key, _NEVER_STORED, _NEVER_STORED)
        return None if there == _NEVER_STORED.encode() else there

    def _compare_set(self, key: str, expected: str | bytes, value: str) -> bytes:
        # torch's stubs lack that it takes bytes.
        return self._guard(lambda: self.raw.compare_set(key, expected, value))  # type: ignore[arg-type]

    def _message_in(self, key: str, value: bytes) -> Sealed | None:
        """The message in a value; None if it is to be ignored."""
        found = self.seal.read(key, value)
        if not isinstance(found, str):
            return found
        if not self.seal.has_secret:
            raise ProtocolError(found)
        self.seal.ignored.add(key, value, found)
        return None

    def _guard(self, operation: Callable[[], Value], *, waits: bool = True, insists: bool = False) -> Value:
        """Make a call of the store. waits: whether it may block. insists: see `BoundedCalls.call`."""
        try:
            if self._calls is None or not waits:
                return operation()
            value = self._calls.call(operation, self._seconds, self.call_monitor, insists=insists)
            self._underway_bytes = 0
            return value
        except Unanswered:
            raise self._unanswered() from None
        except (DistError, RuntimeError) as error:
            if isinstance(error, GrafterError) or is_from_signal_handler(error):
                raise
            raise PeerLostError(
                f"the rendezvous store, hosted by {self.hosted_by}, is lost ({_first_line(error)}). Its process has "
                "ended, or cannot be reached any more, and without it the two jobs cannot agree on anything. Look at "
                "the end of that process's output first."
            ) from error

    def _unanswered(self) -> PeerLostError:
        return PeerLostError(
            f"the rendezvous store, hosted by {self.hosted_by}, has not answered for {self.silent_seconds:.0f} s. Its "
            "process is stopped, or cannot be reached any more, and without it the two jobs cannot agree on anything."
        )


def _checked(found: Sealed) -> Sealed:
    if found.kind == ABORT:
        raise decode_abort(found.payload)
    return found


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]
