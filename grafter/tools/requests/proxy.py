"""The recording proxy, an ASGI application: it forwards bytes in both directions and gives a copy to the recorder.

The steps of one exchange: the headers, without those of a single hop; the request's body, as it arrives; the upstream's
answer, headers first, then each piece as it arrives; the end. If one side leaves early, the other side learns it by the
means of HTTP: when a client is gone, the upstream's request ends; when the upstream is gone, the client's connection
ends before its body is complete. The proxy never delays a body and never holds a whole one.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from grafter.tools.requests.credentials import HOP_BY_HOP, safe_value, without_secrets_in_path, without_secrets_in_query
from grafter.tools.requests.entry import Later, State, body_fields
from grafter.tools.requests.recorder import RequestRecorder
from grafter.tools.requests.upstream import Call, Headers, Upstream, UpstreamError

_HOP_BY_HOP = frozenset(name.encode() for name in HOP_BY_HOP)
_ABANDONED = "the client disconnected before the answer was complete"
_LONGEST_HEADER = 1000
_MOST_UNDER_WAY = 256 << 20


class Room:
    """The number of bytes that all active bodies may keep together."""

    def __init__(self, limit: int) -> None:
        self.left = limit


class Kept:
    """The first bytes of a body, and the total number of its bytes. limit: for this body; room: for all bodies."""

    def __init__(self, limit: int, room: Room) -> None:
        self._limit, self._room = limit, room
        self.pieces: list[bytes] = []
        self.nbytes = self.kept_bytes = 0

    def add(self, piece: bytes) -> None:
        self.nbytes += len(piece)
        left = min(self._limit, self._room.left)
        # What follows a part that was left out is of no use.
        if left > 0 and self.kept_bytes + len(piece) == self.nbytes:
            kept = piece if len(piece) <= left else piece[:left]
            self.pieces.append(kept)
            self.kept_bytes += len(kept)
            self._limit -= len(kept)
            self._room.left -= len(kept)

    def give_back(self) -> None:
        """Release the bytes; from now on the recorder holds and counts them."""
        self._room.left += self.kept_bytes


class RecordingProxy:
    """An ASGI application for HTTP.

    upstream: http(s)://host[:port][/prefix]. limit_bytes: how much of each request's and each answer's body is
    recorded; all of it is passed on. If the upstream cannot be reached, the answer is 502.
    """

    def __init__(self, upstream: str, recorder: RequestRecorder, limit_bytes: int = 16 << 20) -> None:
        self._recorder, self._limit, self._upstream = recorder, limit_bytes, Upstream(upstream)
        self._room = Room(_MOST_UNDER_WAY)
        # Ids of one recording are distinct in a directory with several recordings.
        self._prefix, self._count = f"{secrets.token_hex(4)}-", 0

    def close(self) -> None:
        self._upstream.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._count += 1
        exchange = _Exchange(
            f"{self._prefix}{self._count:x}", scope, receive, send, self._limit, self._room, self._recorder
        )
        try:
            await self._pass_on(exchange)
        except _ClientGone:
            exchange.end("unfinished", _ABANDONED)
        except asyncio.CancelledError:
            exchange.end("unfinished", _ABANDONED if exchange.client_is_gone else "the proxy was ended")
            if not exchange.client_is_gone:
                raise
        finally:
            exchange.stop_watching()
            exchange.end("failed", "the proxy failed")
            exchange.record_answer()

    async def _pass_on(self, exchange: _Exchange) -> None:
        await exchange.read_first_piece()
        call: Call | None = None
        try:
            call = await self._upstream.call()
            headers = [(b"host", self._upstream.host), *exchange.request_headers()]
            target = self._upstream.prefix + exchange.target
            await call.send(exchange.method, target, headers, exchange.request_body())
            await exchange.begin_answer(*await call.read_head())
            async for piece in call.pieces():
                await exchange.pass_piece(piece)
            await exchange.end_answer()
        except UpstreamError as error:
            await exchange.tell_failure(error)
        finally:
            if call is not None:
                call.leave()


class _ClientGone(Exception):
    """The client has disconnected."""


class _Exchange:
    """One request and its answer: what passes through, and what is recorded."""

    def __init__(
        self, id: str, scope: Scope, receive: Receive, send: Send, limit: int, room: Room, recorder: RequestRecorder
    ) -> None:
        self._scope, self._receive, self._send, self._recorder = scope, receive, send, recorder
        self._headers: Headers = scope["headers"]
        self._id = id
        self._start = time.monotonic()
        self._asked, self._answered = Kept(limit, room), Kept(limit, room)
        self._first_piece = b""
        self._has_more = self._is_recorded = False
        self._status: int | None = None
        self._answer_headers: Headers = []
        self._first_seconds: float | None = None
        self._state: State | None = None
        self._reason: str | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.client_is_gone = False

    # The request, on its way to the upstream.

    @property
    def method(self) -> str:
        return str(self._scope["method"])

    @property
    def target(self) -> bytes:
        """Path and query as the client wrote them."""
        path: bytes = self._scope.get("raw_path") or self._scope["path"].encode()
        query: bytes = self._scope["query_string"]
        return b"%b?%b" % (path, query) if query else path

    def request_headers(self) -> Headers:
        headers = [header for header in _end_to_end(self._headers) if header[0] != b"host"]
        if any(name == b"transfer-encoding" for name, _ in self._headers):
            headers.append((b"transfer-encoding", b"chunked"))
        return headers

    async def read_first_piece(self) -> None:
        """Read the first piece of the body, which for most requests is all of it."""
        self._first_piece, self._has_more = await self._next_piece()
        if not self._has_more:
            self._record_request()

    async def request_body(self) -> AsyncIterator[bytes]:
        if self._first_piece:
            yield self._first_piece
        while self._has_more:
            piece, self._has_more = await self._next_piece()
            if not self._has_more:
                self._record_request()
            if piece:
                yield piece

    async def _next_piece(self) -> tuple[bytes, bool]:
        message: Message = await self._receive()
        if message["type"] == "http.disconnect":
            self.client_is_gone = True
            raise _ClientGone
        piece: bytes = message.get("body", b"")
        self._asked.add(piece)
        return piece, message.get("more_body", False)

    def _record_request(self) -> None:
        """Record the request, whose body is complete. From now on the client can only report that it is gone."""
        self._is_recorded = True
        asked = self._asked
        content_type, encoding = _header(self._headers, b"content-type"), _header(self._headers, b"content-encoding")
        fields = _Once(lambda: body_fields(asked.pieces, asked.nbytes, content_type, encoding))
        self._recorder.record(
            self._id,
            Later(lambda: fields()["body"], asked.kept_bytes),
            Later(lambda: self._meta(fields()), 1024),
        )
        if self._watcher is None and not self.client_is_gone:
            task = asyncio.current_task()
            self._watcher = asyncio.create_task(self._watch_client(task))

    def _meta(self, body: dict[str, Any]) -> dict[str, Any]:
        """On the writer's thread. body: its fields."""
        path, _, query = self.target.decode("latin-1").partition("?")
        meta: dict[str, Any] = {"method": self.method, "path": without_secrets_in_path(path)}
        meta["headers"] = _recorded(self._headers)
        if query:
            meta["query"] = without_secrets_in_query(query)
        return meta | {name: value for name, value in body.items() if name != "body"}

    async def _watch_client(self, task: asyncio.Task[Any] | None) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._state is None and task is not None:
            self.client_is_gone = True
            task.cancel()

    def stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    # The answer, on its way to the client.

    async def begin_answer(self, status: int, headers: Headers) -> None:
        self._status, self._answer_headers = status, headers
        await self._send({"type": "http.response.start", "status": status, "headers": _end_to_end(headers)})

    async def pass_piece(self, piece: bytes) -> None:
        if self._first_seconds is None:
            self._first_seconds = time.monotonic() - self._start
        self._answered.add(piece)
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end_answer(self) -> None:
        self.end("finished")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def tell_failure(self, error: Exception) -> None:
        """Report a failure of the upstream to the client.

        Before the answer's head, this is a 502 with the reason. After it, the answer stays incomplete: the server then
        closes the connection, and the client sees what the proxy saw.
        """
        self.end("failed", f"upstream: {error}"[:500])
        if self._status is not None:
            return
        text = json.dumps({"error": {"message": f"grafter record: {self._reason}", "type": "bad_gateway", "code": 502}})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text.encode()))]
        await self._send({"type": "http.response.start", "status": 502, "headers": headers})
        await self._send({"type": "http.response.body", "body": text.encode()})

    # What is recorded.

    def end(self, state: State, reason: str | None = None) -> None:
        """Record how the exchange ended. Only the first call counts."""
        if self._state is None:
            self._state, self._reason = state, reason

    def record_answer(self) -> None:
        if not self._is_recorded:
            self._record_request()
            self.stop_watching()
        answered, status, seconds = self._answered, self._status, time.monotonic() - self._start
        headers, first_seconds = self._answer_headers, self._first_seconds

        def output() -> dict[str, Any]:
            kinds = _header(headers, b"content-type"), _header(headers, b"content-encoding")
            return {
                "status": status,
                "headers": _recorded(headers),
                "seconds": round(seconds, 6),
                "first_piece_seconds": None if first_seconds is None else round(first_seconds, 6),
                **body_fields(answered.pieces, answered.nbytes, *kinds),
            }

        made = None if status is None else Later(output, answered.kept_bytes + 1024)
        self._asked.give_back()
        self._answered.give_back()
        self._recorder.finish(self._id, made, state=self._state or "failed", reason=self._reason)


class _Once:
    """A function's result, computed once, because two parts of one record come from one body."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self._make: Callable[[], dict[str, Any]] | None = make
        self._made: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made


def _end_to_end(headers: Headers) -> Headers:
    """The headers without those of a single hop. Names are in lower case, as uvicorn and h11 give them."""
    named = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in headers if name not in _HOP_BY_HOP and name not in named]


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1") for given, value in headers if given == name), "")


def _recorded(headers: Headers) -> dict[str, str]:
    """The headers as they are recorded: without secrets, each with a bounded length."""
    texts = [(name.decode("latin-1"), value[:_LONGEST_HEADER].decode("latin-1")) for name, value in headers]
    safe = {name: safe_value(name, value) for name, value in texts}
    return {name: value for name, value in safe.items() if value is not None}
