"""The rendezvous store: a `torch.distributed.TCPStore` that holds sealed text, with a client for each thread.

Costs on loopback, for orientation: `set` is fire-and-forget (3 us), `compare_set` one round trip (60 us), `get` two
(110 us). A client serves one thread: its `set` would block behind another thread's `get`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import DistError, TCPStore

from grafter import errors
from grafter.errors import GrafterError, JoinError, PeerLostError, ProtocolError, RunError
from grafter.rendezvous.wire import PROTOCOL_VERSION, Seal, Sealed

ABORT = "abort"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_REASONABLE_BACKLOG = 4096
# Known of this version on; a `set` more costs little where it is not needed.
_COMPARE_SET_ROUSES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
_NEVER_STORED = "grafter: never stored"
# JSON escapes it.
_END_OF_RECORD = "\x1e"

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


def connect(address: str, port: int, *, timeout: float, keep_trying: Callable[[], bool]) -> Connection:
    """A client of a store that may not be there yet. `timeout` in seconds; `keep_trying` is asked between tries.

    The waiting is done here with plain connects, since a waiting TCPStore logs a warning with a DNS lookup per try.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return _open_client(address, port)
        except (OSError, DistError) as error:
            if time.monotonic() > deadline or not keep_trying():
                raise JoinError(
                    f"no rendezvous store at {address}:{port} after {timeout:.0f} s ({error}). It is hosted by "
                    "`grafter "
                    f"run`, else by baseline rank 0. Check that the baseline job has started, that both jobs have the "
                    f"same GRAFTER_MASTER_ADDRESS and GRAFTER_MASTER_PORT, and that no firewall lies between."
                ) from error
            time.sleep(0.1)


# One at a time, so that the socket which a new client opens can be told from the others.
_opening = threading.Lock()


@dataclass(frozen=True)
class Connection:
    """A TCPStore client and a second handle of its socket: the only way to bound how long an answer may take."""

    store: TCPStore
    socket: socket.socket | None

    def set_timeout(self, seconds: float) -> None:
        """For the whole of a wait, and for each answer: a store whose process is stopped would never give one."""
        self.store.set_timeout(timedelta(seconds=seconds))
        if self.socket is not None:
            bound = struct.pack("ll", int(seconds) + 1, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)


def _open_client(address: str, port: int) -> Connection:
    with _opening:
        before = _sockets_to(port)
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        opened = [fd for fd in _sockets_to(port) if fd not in before]
        # Elsewhere than on Linux a stopped store is noticed by the user alone.
        handle = socket.socket(fileno=os.dup(opened[0])) if len(opened) == 1 else None
    return Connection(store, handle)


def _sockets_to(port: int) -> set[int]:
    """The descriptors of this process that are connected to a port."""
    found: set[int] = set()
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return found
    for name in names:
        try:
            # Asked first: a failed attempt to take something else for a socket would leave the duplicate open.
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as candidate:
                if candidate.family in (socket.AF_INET, socket.AF_INET6) and candidate.getpeername()[1] == port:
                    found.add(int(name))
        except OSError:
            continue
    return found


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
    """Sealed values under one group's prefix. One client serves one thread at a time."""

    def __init__(
        self, connection: Connection, seal: Seal, group_name: str, hosted_by: str = "the process that hosts it"
    ) -> None:
        self.raw = connection.store
        self._connection = connection
        self.seal = seal
        self.hosted_by = hosted_by
        # Unversioned, so that a peer of another protocol version is told apart instead of waited for.
        self.lobby = f"grafter/{group_name}"

    def set_timeout(self, seconds: float) -> None:
        self._connection.set_timeout(seconds)

    @property
    def hall(self) -> str:
        """The prefix of everything after the handshake."""
        return f"{self.lobby}/v{PROTOCOL_VERSION}/{self.seal.run_id}"

    def set(self, key: str, kind: str, payload: str) -> None:
        """Put a value, without waiting for the store."""
        self._guard(lambda: self.raw.set(key, self.seal.seal(key, kind, payload)))

    def append(self, key: str, kind: str, payload: str) -> None:
        """Append a sealed record to a key, which need not exist, without waiting for the store. payload: JSON.

        The server appends records one at a time, and whatever this client asks for next finds this one there.
        """
        record = self.seal.seal(key, kind, payload)
        # On both sides: what a stranger appends then spoils no record that comes behind it.
        text = f"{_END_OF_RECORD}{record}{_END_OF_RECORD}"
        # torch's stubs lack it.
        self._guard(lambda: self.raw.append(key, text))  # type: ignore[attr-defined]

    def read_appended(self, key: str) -> list[Sealed]:
        """All records that were appended to a key, in their order; none if it does not exist. Three round trips.

        What no process of the run has written there is left out.
        """
        if not self.exists(key):
            return []
        text = self._guard(lambda: self.raw.get(key))
        records = []
        for record in filter(None, text.split(_END_OF_RECORD.encode())):
            with contextlib.suppress(ProtocolError):
                records.append(self.seal.open(key, record))
        return records

    def put_if_absent(self, key: str, kind: str, payload: str) -> Sealed | None:
        """None if the value was put; else what was there already. One round trip. Raises what an abort there says."""
        mine = self.seal.seal(key, kind, payload)
        found = self._guard(lambda: self.raw.compare_set(key, "", mine))
        if found == mine.encode():
            self._rouse(key, mine)
            return None
        return self._opened(key, found)

    def exchange(self, key: str, expected: Sealed, kind: str, payload: str) -> Sealed | None:
        """Put a value in the place of the one that was found there: None if that is done, else what is there now.

        One round trip. A key that was deleted meanwhile stays so, and the expected value comes back.
        """
        mine = self.seal.seal(key, kind, payload)
        found = self._guard(lambda: self.raw.compare_set(key, self.seal.sealed_as(key, expected), mine))
        return None if found == mine.encode() else self.seal.open(key, found)

    def find_other(self, key: str, expected: Sealed) -> Sealed | None:
        """What is there in the place of the expected value; None if that is still there, or nothing is. One round trip.

        For keys that nobody waits for (see `peek`).
        """
        text = self.seal.sealed_as(key, expected)
        found = self._guard(lambda: self.raw.compare_set(key, text, text))
        return None if found == text.encode() else self.seal.open(key, found)

    def get(self, key: str) -> Sealed:
        """Wait for a value. Ended early only by what the housekeeping thread puts there."""
        return self._opened(key, self._guard(lambda: self.raw.get(key)))

    def get_all(self, keys: Sequence[str]) -> list[Sealed]:
        """Wait for several values: two round trips in all."""
        if not keys:
            return []
        values = self._guard(lambda: self.raw.multi_get(list(keys)))
        return [self._opened(key, value) for key, value in zip(keys, values, strict=True)]

    def peek(self, key: str) -> Sealed | None:
        """A value if it is there; never waits. Two round trips if it is, else one. An abort is returned, not raised."""
        # Asked for first: a `compare_set` that finds its key absent and changes nothing wakes whoever waits for that
        # key, with an empty value (torch 2.13).
        if not self.exists(key):
            return None
        # Not `get`, which would wait if the key were deleted in between. A failed exchange returns what is there.
        found = self._guard(lambda: self.raw.compare_set(key, _NEVER_STORED, _NEVER_STORED))
        return None if found == _NEVER_STORED.encode() else self.seal.open(key, found)

    def exists(self, key: str) -> bool:
        return bool(self._guard(lambda: self.raw.check([key])))

    def all_exist(self, keys: Sequence[str]) -> bool:
        """Whether all of these are there. One round trip."""
        return bool(self._guard(lambda: self.raw.check(list(keys))))

    def delete(self, key: str) -> None:
        self._guard(lambda: self.raw.delete_key(key))

    def wake(self, key: str, error: RunError) -> None:
        """End the wait of whoever waits for `key`, unless a value came first."""
        abort = self.seal.seal(key, ABORT, encode_abort(error))
        if self._guard(lambda: self.raw.compare_set(key, "", abort)) == abort.encode():
            self._rouse(key, abort)

    def _rouse(self, key: str, value: str) -> None:
        """The older server that torch 2.6 needs does not wake those who wait for a key in a `compare_set`, only in a
        `set`. Nobody else writes a key that is taken, so writing it again changes nothing."""
        if not _COMPARE_SET_ROUSES:
            self._guard(lambda: self.raw.set(key, value))

    def _opened(self, key: str, value: bytes) -> Sealed:
        sealed = self.seal.open(key, value)
        if sealed.kind == ABORT:
            raise decode_abort(sealed.payload)
        return sealed

    def _guard(self, operation: Callable[[], Value]) -> Value:
        try:
            return operation()
        except (DistError, RuntimeError) as error:
            if isinstance(error, GrafterError):
                raise
            raise PeerLostError(
                f"the rendezvous store, hosted by {self.hosted_by}, is lost or does not answer ({_first_line(error)}). "
                f"Its process has ended, is stopped, or cannot be reached any more; without it the two jobs cannot "
                f"agree on anything. Look at the end of that process's output first."
            ) from error


class HostedStore:
    """The store of a whole run, hosted by the process that starts both jobs. Its calls may come from any thread."""

    def __init__(
        self, address: str = "127.0.0.1", port: int = 0, *, group_name: str = "graft", secret: str | None = None
    ) -> None:
        """Opens the store; port 0 takes a free one. Raises JoinError if it cannot listen there."""
        self._store = serve(address, port)
        self.address, self.port = address, self._store.port
        self._client = StoreClient(Connection(self._store, None), Seal("launcher", secret), group_name, "this process")
        self._lock = threading.Lock()

    def report_job_exit(self, role: str, text: str) -> None:
        """Tell the ranks that wait that a job has ended. `text` follows its name, as in `exited with code 1`."""
        with self._lock:
            self._client.put_if_absent(f"{self._client.lobby}/exit/{role}", "exit", text)

    def peek_run(self) -> tuple[StoreClient, str] | None:
        """(client, payload of the run) once the run is open. For `waiting_summary` in `grafter.watching.board`."""
        record = self._client.peek(f"{self._client.lobby}/run")
        return (self._client, record.payload) if record is not None else None

    def close(self) -> None:
        """Close the port."""
        with self._lock:
            del self._client, self._store


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]
