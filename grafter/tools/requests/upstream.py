"""The proxy's connections to the server behind it: h11, which uvicorn uses as well, over asyncio's streams.

httpx is not used: with its client and pool, the proxy took twice the processor time (benchmarks/README.md), which is
more than the millisecond that it may take. Here, an answer's pieces are passed on as they arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import h11

Headers = list[tuple[bytes, bytes]]

_CONNECT_SECONDS = 30.0
# Servers close a connection that is idle for 5 s (uvicorn) or longer; no request should use it at that moment.
_KEPT_IDLE_SECONDS = 4.0
_MOST_IDLE = 1000
_READ_BYTES = 1 << 16
LONGEST_HEAD_BYTES = 1 << 20


class UpstreamError(Exception):
    """The server cannot be reached, disconnected, or does not speak HTTP. The text says which."""


class Upstream:
    """The server, http or https, and the idle connections to it. url: as `check_url` returns it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host = parts.netloc.encode("idna")
        self.prefix = parts.path.rstrip("/").encode()
        self._name = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._idle: deque[tuple[float, UpstreamConnection]] = deque()

    async def call(self) -> UpstreamConnection:
        """A connection for one request. Its `leave` ends it. Raises UpstreamError."""
        while self._idle:
            since, call = self._idle.pop()
            if since > time.monotonic() - _KEPT_IDLE_SECONDS and call.is_usable:
                return call
            call.close()
        try:
            opening = asyncio.open_connection(self._name, self._port, ssl=self._tls, limit=_READ_BYTES)
            return UpstreamConnection(self, *await asyncio.wait_for(opening, _CONNECT_SECONDS))
        except asyncio.TimeoutError:
            raise UpstreamError(f"no connection in {_CONNECT_SECONDS:g} s") from None
        except OSError as error:
            raise UpstreamError(f"no connection: {error}") from error

    def keep(self, call: UpstreamConnection) -> None:
        self._idle.append((time.monotonic(), call))
        while len(self._idle) > _MOST_IDLE:
            self._idle.popleft()[1].close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()


class UpstreamConnection:
    """A connection to the server, for one request after another: `send`, `read_head`, `pieces`, `leave`."""

    def __init__(self, upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._upstream, self._reader, self._writer = upstream, reader, writer
        self._state = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_HEAD_BYTES)

    @property
    def is_usable(self) -> bool:
        return not self._writer.is_closing() and not self._reader.at_eof() and self._reader.exception() is None

    async def send(self, method: str, target: bytes, headers: Headers, body: AsyncIterator[bytes]) -> None:
        """Send the request, with each piece of its body as it arrives. Raises UpstreamError, and what `body` raises."""
        try:
            head = self._state.send(h11.Request(method=method, target=target, headers=headers))
            async for piece in body:
                data = self._state.send(h11.Data(data=piece))
                self._write((head or b"") + (data or b""))
                head = b""
                await self._writer.drain()
            self._write((head or b"") + (self._state.send(h11.EndOfMessage()) or b""))
            await self._writer.drain()
        except h11.ProtocolError as error:
            raise UpstreamError(f"this request cannot be passed on: {error}") from error
        except OSError:
            # The server may have answered before it had read everything (413, for example). If not, reading reports the
            # error.
            pass

    def _write(self, data: bytes) -> None:
        if data:
            self._writer.write(data)

    async def read_head(self) -> tuple[int, Headers]:
        """The answer's status and headers, names in lower case. Raises UpstreamError."""
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Response):
                return event.status_code, list(event.headers)
            if not isinstance(event, h11.InformationalResponse):
                raise UpstreamError("it closed the connection without an answer")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The answer's body as it arrives.

        All bytes that have arrived by now are one piece, so that a burst of small ones costs little. Raises
        UpstreamError if the connection ends too early.
        """
        is_over = False
        while not is_over:
            event = await self._next_event()
            gathered = []
            while isinstance(event, h11.Data):
                gathered.append(event.data)
                try:
                    event = self._state.next_event()
                except h11.RemoteProtocolError:
                    break  # Bytes that arrived earlier are passed on first; the next turn reports the error.
            is_over = not isinstance(event, h11.Data) and event is not h11.NEED_DATA
            if gathered:
                yield bytes(gathered[0]) if len(gathered) == 1 else b"".join(gathered)

    async def _next_event(self) -> h11.Event | type[h11.PAUSED] | type[h11.NEED_DATA]:
        try:
            while (event := self._state.next_event()) is h11.NEED_DATA:
                self._state.receive_data(await self._reader.read(_READ_BYTES))
        except (OSError, h11.RemoteProtocolError) as error:
            raise UpstreamError(f"the connection ended early: {error}") from error
        return event

    def leave(self) -> None:
        """End this request.

        A connection on which nothing more will arrive is kept. Any other is closed, so that the server learns that the
        client has left.
        """
        if self._state.our_state is h11.DONE and self._state.their_state is h11.DONE and self.is_usable:
            self._state.start_next_cycle()
            self._upstream.keep(self)
        else:
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.transport.abort()
