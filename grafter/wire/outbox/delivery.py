"""Delivery: snapshots for receivers that cannot open this process's memory: on another machine, or of another user.

    receiver -> sender   length, sealed request: which entry, from which byte, how many
    sender -> receiver   the bytes, and one more: whether the entry was there until the last of them
                         (or the end of the connection: no such entry, no such bytes, or not of this run)

A thread that listens, and one for each connection, so that a receiver that is slow keeps nobody waiting. Sizes are
those of this rank's own snapshot; what a request says is only compared with them.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from grafter.core.messages.wire import Seal, read_message
from grafter.core.processes import Abandoned, is_from_signal_handler
from grafter.errors import ProtocolError
from grafter.wire.outbox.entries import Entry

_LENGTH = struct.Struct(">I")
_LONGEST_REQUEST_BYTES = 4096
_STRANGERS_SECONDS = 5.0
# Of silence: a receiver waits no longer for a sender that is stopped, nor a sender for a receiver.
_SILENT_SECONDS = 10.0
# How soon it sees that it is to end.
_LOOK_UP_SECONDS = 0.25
_COMPLETE, _GONE = b"\1", b"\0"
_PULL = "pull"


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True)

    offset: int = Field(ge=0)
    nbytes: int = Field(ge=0)


class Delivery:
    """One per rank. Listens on `address` alone, on a port that the headers of what it posts name."""

    def __init__(self, address: str, seal: Seal, find_entry: Callable[[str], Entry | None]) -> None:
        """find_entry: by the base of its store keys. Raises OSError where it cannot listen there."""
        self.address = address
        self._seal, self._find_entry = seal, find_entry
        serve = self._serve

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError, ProtocolError):
                    serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                """A request that makes no sense ends its connection, and nothing else."""

        self._server = Server((address, 0), Handler)
        self.port: int = self._server.server_address[1]
        looks = {"poll_interval": _LOOK_UP_SECONDS}
        threading.Thread(target=self._server.serve_forever, kwargs=looks, name="grafter-delivery", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # Before it has shown that it is of this run; each later request has as long to come.
        connection.settimeout(_STRANGERS_SECONDS)
        while True:
            (length,) = _LENGTH.unpack(_read_exactly(connection, _LENGTH.size))
            if length > _LONGEST_REQUEST_BYTES:
                return
            base, sealed = self._seal.open_letter(_read_exactly(connection, length))
            entry = self._find_entry(base)
            if sealed.kind != _PULL or entry is None or entry.slot is None:
                return
            request = read_message(_Request.model_validate_json, sealed.payload, "a request")
            slot = entry.slot
            if request.offset + request.nbytes > slot.nbytes:
                return
            first = slot.place.offset + request.offset
            connection.settimeout(_SILENT_SECONDS)
            with memoryview(slot.block.mapped) as memory, memory[first : first + request.nbytes] as part:
                _send(connection, part)
            connection.sendall(_GONE if entry.is_over else _COMPLETE)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Fetcher:
    """A receiver's connections to the senders of one point; closed at the end of a `with` block."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal
        self._connections: dict[tuple[str, int], socket.socket] = {}

    def fetch(self, base: str, address: str, port: int, offset: int, nbytes: int, who: str) -> torch.Tensor:
        """Bytes of a snapshot, uint8. Raises Abandoned where they cannot be had."""
        value = torch.empty(nbytes, dtype=torch.uint8)
        request = self._seal.seal(base, _PULL, _Request(offset=offset, nbytes=nbytes).model_dump_json()).encode()
        try:
            connection = self._connections.get((address, port))
            if connection is None:
                connection = socket.create_connection((address, port), timeout=_SILENT_SECONDS)
                self._connections[address, port] = connection
            connection.sendall(_LENGTH.pack(len(request)) + request)
            _read_into(connection, value.numpy().data)
            complete = _read_exactly(connection, 1) == _COMPLETE
        except OSError as error:
            if is_from_signal_handler(error):
                raise
            reason = error.strerror or str(error) or type(error).__name__
            raise Abandoned(f"the outbox of {who} at {address}:{port} cannot be read: {reason}") from error
        if not complete:
            raise Abandoned(f"the entry went from the outbox of {who} while it was read")
        return value

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()


def _send(connection: socket.socket, part: memoryview) -> None:
    """Piece by piece, since the time that `sendall` may take is for all of it."""
    while part:
        part = part[connection.send(part) :]


def _read_exactly(connection: socket.socket, nbytes: int) -> bytes:
    read = bytearray(nbytes)
    _read_into(connection, memoryview(read))
    return bytes(read)


def _read_into(connection: socket.socket, memory: memoryview) -> None:
    while memory:
        count = connection.recv_into(memory)
        if not count:
            raise ConnectionError("the connection was closed")
        memory = memory[count:]
