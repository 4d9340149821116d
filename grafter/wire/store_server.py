"""The server of the rendezvous store, hosted by `grafter run` or by one rank, and the connection of a client to it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from grafter.core.messages.wire import Seal
from grafter.core.process_identity import own_identity
from grafter.errors import JoinError
from grafter.wire.store_client import StoreClient

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_REASONABLE_BACKLOG = 4096


def listening_socket(address: str, port: int) -> socket.socket:
    """A listening socket that is bound to `address` alone: TCPStore itself would bind every interface.

    Raises JoinError if it cannot listen there.
    """
    host = "127.0.0.1" if address in _LOOPBACK else address
    try:
        family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        # Reuses a port that a finished run has left in TIME_WAIT, but not one on which a process listens.
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
    """Host a store; the returned object is also its first client. Port 0 takes a free port, which is in `.port`.

    Raises JoinError if it cannot listen there.
    """
    with listening_socket(address, port) as listener:
        real_port = listener.getsockname()[1]
        try:
            return _serve_on(listener, address, real_port)
        except NotImplementedError:
            # In torch before 2.7 only the older server takes a socket that is bound already.
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
    """Connect to a store that may not be there yet. timeout: in seconds. keep_trying: asked between two tries.

    Raises JoinError if there is none. It waits with plain connects, since a waiting TCPStore logs a warning and makes a
    DNS lookup at every try.
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
                    "`grafter run`, else by baseline rank 0. Check that the baseline job has started, that both jobs "
                    "have the same GRAFTER_MASTER_ADDRESS and GRAFTER_MASTER_PORT, and that no firewall lies between."
                ) from error
            time.sleep(0.1)


def local_address_towards(address: str, port: int) -> str:
    """The address of this host from which the store is reached, which other hosts can reach, too. Raises OSError."""
    with socket.create_connection((address, port), timeout=10) as connection:
        return str(connection.getsockname()[0])


class HostedStore:
    """The store of a whole run, hosted by this process. Its methods may be called from any thread."""

    def __init__(
        self, address: str = "127.0.0.1", port: int = 0, *, group_name: str = "graft", secret: str | None = None
    ) -> None:
        """Opens the store; port 0 takes a free one. Raises JoinError if it cannot listen there."""
        self._store = serve(address, port)
        self.address, self.port = address, self._store.port
        self._client = StoreClient(self._store, Seal("launcher", secret), group_name, "this process", is_server=True)
        # Every rank watches the process that it depends on.
        self._client.set(self._client.job_keys.host, "host", own_identity().model_dump_json())
        self._lock = threading.Lock()

    def report_job_exit(self, role: str, text: str) -> None:
        """Report to the waiting ranks that a job has ended. text: follows its name, such as `exited with code 1`."""
        with self._lock:
            self._client.put_if_absent(self._client.job_keys.exit(role), "exit", text)

    def close(self) -> None:
        """Close the port."""
        with self._lock:
            del self._client, self._store
