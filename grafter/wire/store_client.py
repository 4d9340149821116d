"""The rendezvous store: a `torch.distributed.TCPStore` that holds sealed text, with a client for each thread.

Costs on loopback, for orientation: `set` is fire-and-forget (3 us), `compare_set` one round trip (60 us), `get` two
(110 us). A client serves one thread: its `set` would block behind another thread's `get`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import DistError, TCPStore

from grafter import errors
from grafter.core.messages.wire import PROTOCOL_VERSION, Seal, Sealed, read_unproven
from grafter.core.process_identity import own_identity
from grafter.core.processes import is_from_signal_handler
from grafter.errors import GrafterError, JoinError, PeerLostError, ProtocolError, RunError
from grafter.wire.bounded_calls import BoundedCalls, Patience, Unanswered

ABORT = "abort"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_REASONABLE_BACKLOG = 4096
# Known of this version on; a `set` more costs little where it is not needed.
_COMPARE_SET_ROUSES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
_NEVER_STORED = "grafter: never stored"
# JSON escapes it.
_END_OF_RECORD = "\x1e"
_NEVER = timedelta(days=365)
_POLL_SECONDS = 0.05
# So much is given to the connection without an answer of the store in between: what its buffers take, also where the
# store's process is stopped.
_MOST_UNDERWAY_BYTES = 1 << 18
# Whoever writes a key as often between two round trips keeps it.
_MOST_REPLACED = 100

Value = TypeVar("Value")


def listening_socket(address: str, port: int) -> socket.socket:
    """A socket bound to `address` alone: given none, TCPStore would bind every interface."""
    host = "127.0.0.1" if address in _LOOPBACK else address
    try:
        family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        # A port that a finished run left in TIME_WAIT may be taken at once; one that is listened on may not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(_REASONABLE_BACKLOG)
    except OSError as error:
        raise JoinError(
            f"cannot host the rendezvous store on {address}:{port}: {error.strerror or error}. If the port is in use, "
            f"choose another GRAFTER_MASTER_PORT (in both jobs); the address must be one of this machine, where "
            f"baseline rank 0 or `grafter run` is."
        ) from error
    return listener


def serve(address: str, port: int) -> TCPStore:
    """Host a store; the returned object is also its first client. Port 0 takes a free one (`.port` tells)."""
    with listening_socket(address, port) as listener:
        real_port = listener.getsockname()[1]
        try:
            return _serve_on(listener, address, real_port)
        except NotImplementedError:
            # torch before 2.7: only its older server takes a socket that is bound already.
            return _serve_on(listener, address, real_port, use_libuv=False)


def _serve_on(listener: socket.socket, address: str, port: int, **backend: bool) -> TCPStore:
    return TCPStore(
        "127.0.0.1" if address in _LOOPBACK else address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
        master_listen_fd=os.dup(listener.fileno()),
        **backend,
    )


def connect(address: str, port: int, *, timeout: float, keep_trying: Callable[[], bool]) -> TCPStore:
    """A client of a store that may not be there yet. `timeout` in seconds; `keep_trying` is asked between tries.

    The waiting is done here with plain connects, since a waiting TCPStore logs a warning with a DNS lookup per try.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        except (OSError, DistError) as error:
            if time.monotonic() > deadline or not keep_trying():
                raise JoinError(
                    f"no rendezvous store at {address}:{port} after {timeout:.0f} s ({error}). It is hosted by "
                    "`grafter "
                    f"run`, else by baseline rank 0. Check that the baseline job has started, that both jobs have the "
                    f"same GRAFTER_MASTER_ADDRESS and GRAFTER_MASTER_PORT, and that no firewall lies between."
                ) from error
            time.sleep(0.1)


def encode_abort(error: RunError) -> str:
    return f"{type(error).__name__}\n{error}"


def decode_abort(payload: str) -> RunError:
    """The error that ended the run, of the class that the first to diagnose it gave it."""
    name, _, text = payload.partition("\n")
    kind = getattr(errors, name, RunError)
    if not (isinstance(kind, type) and issubclass(kind, RunError)):
        kind = RunError
    return kind(text)


class StoreClient:
    """Sealed values under one group's prefix. One client serves one thread at a time.

    No call blocks for longer than `set_timeout` allows, also where the store's process is stopped. With a secret, what
    was not written by this run counts as absent (`IgnoredValues`); without one, it raises ProtocolError.
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
        """is_server: `raw` is the store's server in this very process, which cannot be stopped alone."""
        self.raw = raw
        self.seal = seal
        self.hosted_by = hosted_by
        # What else the waiting thread looks after while the store does not answer.
        self.patience: Patience | None = None
        # Unversioned, so that a peer of another protocol version is told apart instead of waited for.
        self.job_prefix = f"grafter/{group_name}"
        self._calls = None if is_server else BoundedCalls()
        self._seconds = 30.0
        # What was written since the store has answered last.
        self._underway_bytes = 0
        if not is_server:
            # Bounded here instead: where time is up in torch, it writes its stack to stderr.
            raw.set_timeout(_NEVER)

    def set_timeout(self, seconds: float) -> None:
        """How long a wait for a value, or an answer, may take."""
        self._seconds = seconds

    @property
    def silent_seconds(self) -> float:
        """For how long the store has owed an answer; 0 where it owes none."""
        since = self._calls.blocked_since if self._calls is not None else None
        return 0.0 if since is None else time.monotonic() - since

    @property
    def run_prefix(self) -> str:
        """The prefix of everything after the handshake."""
        return f"{self.job_prefix}/v{PROTOCOL_VERSION}/{self.seal.run_id}"

    def set(self, key: str, kind: str, payload: str) -> None:
        """Put a value, without waiting for the store, as long as the connection takes it."""
        sealed = self.seal.seal(key, kind, payload)
        if self.silent_seconds:
            raise self._unanswered()
        self._write(lambda: self.raw.set(key, sealed), sealed)

    def append(self, key: str, kind: str, payload: str) -> None:
        """Append a sealed record to a key, which need not exist, without waiting for the store. payload: JSON.

        Where an earlier call still blocks, that is waited for first; the end of the run does not end this wait. Raises
        PeerLostError where the store is lost, or has been silent for as long as this client allows. The server appends
        records one at a time, and whatever this client asks for next finds this one there.
        """
        record = self.seal.seal(key, kind, payload)
        # On both sides: what a stranger appends then spoils no record that comes behind it.
        text = f"{_END_OF_RECORD}{record}{_END_OF_RECORD}"
        # torch's stubs lack it.
        self._write(lambda: self.raw.append(key, text), text, insists=True)  # type: ignore[attr-defined]

    def _write(self, operation: Callable[[], Value], text: str, *, insists: bool = False) -> None:
        """What the store does not answer. The connection may not take it at once, if much is underway."""
        underway = self._underway_bytes + len(text)
        blocks = underway > _MOST_UNDERWAY_BYTES or self.silent_seconds > 0
        self._guard(operation, waits=blocks, insists=insists)
        self._underway_bytes = underway

    def read_appended(self, key: str) -> list[Sealed]:
        """All records that were appended to a key, in their order; none if it does not exist. Two round trips.

        Waits, and raises, as `append` does.
        What no process of the run has written there is left out, and counted where there is a secret.
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
        """None if the value was put; else what was there already. One round trip. Raises what an abort there says."""
        found = self._put(key, self.seal.seal(key, kind, payload))
        return found if found is None else _checked(found)

    def _put(self, key: str, mine: str) -> Sealed | None:
        """None if this text was put; else what was there. What is to be ignored is replaced."""
        expected: str | bytes = ""
        for _ in range(_MOST_REPLACED):
            there = self._compare_set(key, expected, mine)
            if there == mine.encode():
                self._rouse(key, mine)
                return None
            found = self._taken(key, there)
            if found is not None:
                return found
            expected = there
        raise ProtocolError(f"another program writes {key!r} in the store again and again: {self.seal.ignored.note}")

    def exchange(self, key: str, expected: Sealed, kind: str, payload: str) -> Sealed | None:
        """Put a value in the place of the one that was found there: None if that is done, else what is there now.

        One round trip. A key that was deleted meanwhile stays so, and the expected value comes back; the same where
        what is there is to be ignored.
        """
        mine = self.seal.seal(key, kind, payload)
        there = self._compare_set(key, self.seal.sealed_as(key, expected), mine)
        return None if there == mine.encode() else self._taken(key, there) or expected

    def find_other(self, key: str, expected: Sealed) -> Sealed | None:
        """What is there in the place of the expected value; None if that is still there, or nothing is. One round trip.

        For keys that nobody waits for (see `peek`).
        """
        text = self.seal.sealed_as(key, expected)
        there = self._compare_set(key, text, text)
        return None if there == text.encode() else self._taken(key, there)

    def get(self, key: str) -> Sealed:
        """Wait for a value. Ended early only by what the housekeeping thread puts there, or by `patience`."""
        return self._awaited(key, self._guard(lambda: self.raw.get(key)))

    def get_all(self, keys: Sequence[str]) -> list[Sealed]:
        """Wait for several values: two round trips in all."""
        if not keys:
            return []
        values = self._guard(lambda: self.raw.multi_get(list(keys)))
        return [self._awaited(key, value) for key, value in zip(keys, values, strict=True)]

    def _awaited(self, key: str, value: bytes) -> Sealed:
        """The value that came, or the one that comes after it, where it is to be ignored."""
        found = self._taken(key, value)
        until = time.monotonic() + self._seconds
        while found is None:
            # The store wakes nobody for a key that has a value.
            time.sleep(_POLL_SECONDS)
            if self.patience is not None:
                self.patience.look(0.0)
            if time.monotonic() > until:
                raise ProtocolError(f"{key!r} got no value within {self._seconds:.0f} s. {self.seal.ignored.note}")
            found = self.peek(key)
        return _checked(found)

    def peek(self, key: str) -> Sealed | None:
        """A value if it is there; never waits. Two round trips if it is, else one. An abort is returned, not raised."""
        there = self._look_up(key)
        return None if there is None else self._taken(key, there)

    def peek_all(self, keys: Sequence[str]) -> list[Sealed | None]:
        """The same for several. Two round trips where all are there."""
        if not keys:
            return []
        if not self._guard(lambda: self.raw.check(list(keys))):
            return [self.peek(key) for key in keys]
        values = self._guard(lambda: self.raw.multi_get(list(keys)))
        return [self._taken(key, value) for key, value in zip(keys, values, strict=True)]

    def peek_at_other(self, key: str) -> Sealed | None:
        """What somebody without this run's secret has written there, as far as it is a message; else None."""
        there = self._look_up(key)
        if there is None or not isinstance(self.seal.read(key, there), str):
            return None
        return read_unproven(there)

    def exists(self, key: str) -> bool:
        """Whether a value is there that `get` would return. One round trip, with a secret three."""
        if self.seal.has_secret:
            return self.peek(key) is not None
        return bool(self._guard(lambda: self.raw.check([key])))

    def all_exist(self, keys: Sequence[str]) -> bool:
        """Whether all of these are there. One round trip, with a secret two."""
        if self.seal.has_secret:
            return None not in self.peek_all(keys)
        return bool(self._guard(lambda: self.raw.check(list(keys))))

    def delete(self, key: str) -> None:
        self._guard(lambda: self.raw.delete_key(key))

    def wake(self, key: str, error: RunError) -> None:
        """End the wait of whoever waits for `key`, unless a value came first."""
        self._put(key, self.seal.seal(key, ABORT, encode_abort(error)))

    def close(self) -> None:
        """Nobody uses it any more."""
        if self._calls is not None:
            self._calls.close()

    def _rouse(self, key: str, value: str) -> None:
        """The older server that torch 2.6 needs does not wake those who wait for a key in a `compare_set`, only in a
        `set`. Nobody else writes a key that is taken, so writing it again changes nothing."""
        if not _COMPARE_SET_ROUSES:
            self._write(lambda: self.raw.set(key, value), value)

    def _look_up(self, key: str) -> bytes | None:
        """What is there, whoever wrote it."""
        # Asked for first: a `compare_set` that finds its key absent and changes nothing wakes whoever waits for that
        # key, with an empty value (torch 2.13).
        if not self._guard(lambda: self.raw.check([key])):
            return None
        # Not `get`, which would wait if the key were deleted in between. A failed exchange returns what is there.
        there = self._compare_set(key, _NEVER_STORED, _NEVER_STORED)
        return None if there == _NEVER_STORED.encode() else there

    def _compare_set(self, key: str, expected: str | bytes, value: str) -> bytes:
        # torch's stubs do not know that it takes bytes.
        return self._guard(lambda: self.raw.compare_set(key, expected, value))  # type: ignore[arg-type]

    def _taken(self, key: str, value: bytes) -> Sealed | None:
        """What a value holds; None where it is to be ignored."""
        found = self.seal.read(key, value)
        if not isinstance(found, str):
            return found
        if not self.seal.has_secret:
            raise ProtocolError(found)
        self.seal.ignored.add(key, value, found)
        return None

    def _guard(self, operation: Callable[[], Value], *, waits: bool = True, insists: bool = False) -> Value:
        """waits: whether the operation may block. insists: see `BoundedCalls.call`."""
        try:
            if self._calls is None or not waits:
                return operation()
            value = self._calls.call(operation, self._seconds, self.patience, insists=insists)
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


class HostedStore:
    """The store of a whole run, hosted by the process that starts both jobs. Its calls may come from any thread."""

    def __init__(
        self, address: str = "127.0.0.1", port: int = 0, *, group_name: str = "graft", secret: str | None = None
    ) -> None:
        """Opens the store; port 0 takes a free one. Raises JoinError if it cannot listen there."""
        self._store = serve(address, port)
        self.address, self.port = address, self._store.port
        self._client = StoreClient(self._store, Seal("launcher", secret), group_name, "this process", is_server=True)
        # Who it is that every rank depends on.
        self._client.set(host_place(self._client), "host", own_identity().model_dump_json())
        self._lock = threading.Lock()

    def report_job_exit(self, role: str, text: str) -> None:
        """Tell the ranks that wait that a job has ended. `text` follows its name, as in `exited with code 1`."""
        with self._lock:
            self._client.put_if_absent(f"{self._client.job_prefix}/exit/{role}", "exit", text)

    def peek_run(self) -> tuple[StoreClient, str] | None:
        """(client, payload of the run) once the run is open, for `waiting_summary`."""
        record = self._client.peek(f"{self._client.job_prefix}/run")
        return (self._client, record.payload) if record is not None else None

    def close(self) -> None:
        """Close the port."""
        with self._lock:
            del self._client, self._store


def host_place(client: StoreClient) -> str:
    """Where the process that hosts the store for both jobs says which one it is."""
    return f"{client.job_prefix}/host"


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]
