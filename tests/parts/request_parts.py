"""What tests of recorded requests share: a server that answers as engines do, and the proxy, both in threads."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from grafter.tools.requests.proxy import RecordingProxy
from grafter.tools.requests.recorder import RequestRecorder
from grafter.tools.requests.serving import make_config

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def words_of(prompt: str, count: int, fault_at: int = -1) -> list[str]:
    """The "model": a function of the prompt. At `fault_at` it says another word."""
    digest = hashlib.sha256(prompt.encode()).digest()
    words = [WORDS[digest[number % 32] % len(WORDS)] for number in range(count)]
    if 0 <= fault_at < count:
        words[fault_at] = "wrong"
    return words


class Engine:
    """An OpenAI-style and SGLang-style server. What tests look at: `seen` (requests as they came), `gone` (a stream's
    client left), `held` (streams wait for it between their events, where a request says so)."""

    def __init__(self, fault_at: int = -1, logprob: float = -0.5, natural_length: int = 5) -> None:
        self.fault_at, self.logprob, self.natural_length = fault_at, logprob, natural_length
        self.seen: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gone = threading.Event()
        self.held = threading.Event()

    def app(self) -> Starlette:
        every = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/generate", self.generate, methods=["POST"]),
                Route("/echo", self.echo, methods=every),
                Route("/error", self.error, methods=["POST"]),
                Route("/broken", self.broken, methods=["POST"]),
                Route("/silent", self.silent, methods=["POST"]),
            ]
        )

    async def _read(self, request: Request) -> Any:
        body = json.loads(await request.body())
        self.seen.append((request.url.path, body))
        self.headers.append(dict(request.headers))
        return body

    def _words(self, body: Any, prompt: str) -> list[str]:
        given = body.get("sampling_params", {}).get("max_new_tokens") if "sampling_params" in body else None
        limit = given or body.get("max_completion_tokens") or body.get("max_tokens")
        eos = not (body.get("ignore_eos") or body.get("sampling_params", {}).get("ignore_eos"))
        count = min(limit or self.natural_length, self.natural_length) if eos else limit
        return words_of(prompt, count, self.fault_at)

    async def chat(self, request: Request) -> Response:
        body = await self._read(request)
        words = self._words(body, str(body.get("messages")))
        usage = {"completion_tokens": len(words)}
        if not body.get("stream"):
            logprobs = {"content": [{"token": f"{word} ", "logprob": self.logprob} for word in words]}
            message = {"role": "assistant", "content": "".join(f"{word} " for word in words)}
            choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "length"}
            if body.get("logprobs"):
                choice["logprobs"] = logprobs
            return JSONResponse({"id": "x", "choices": [choice], "usage": usage})
        events = [{"choices": [{"index": 0, "delta": {"content": f"{word} "}}]} for word in words]
        return self._stream([*events, {"choices": [], "usage": usage}, "[DONE]"], body.get("hold", False))

    async def completions(self, request: Request) -> Response:
        body = await self._read(request)
        words = self._words(body, str(body.get("prompt")))
        choice = {"index": 0, "text": " ".join(words), "finish_reason": "length"}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": len(words)}})

    async def generate(self, request: Request) -> Response:
        body = await self._read(request)
        words = self._words(body, str(body.get("text")))
        ids = [WORDS.index(word) if word in WORDS else 99 for word in words]
        meta = {"completion_tokens": len(ids), "finish_reason": {"type": "length"}, "hidden_states": [[0.5] * 64]}
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[self.logprob, token, None] for token in ids]
        answer = {"text": " ".join(words), "output_ids": ids, "meta_info": meta}
        if not body.get("stream"):
            return JSONResponse(answer)
        events: list[Any] = []
        for count in range(1, len(ids) + 1):
            so_far = {**meta, "completion_tokens": count}
            events.append({"text": " ".join(words[:count]), "output_ids": ids[:count], "meta_info": so_far})
        return self._stream([*events, "[DONE]"], body.get("hold", False))

    def _stream(self, events: list[Any], hold: bool) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                for number, event in enumerate(events):
                    if number == 1 and hold:
                        while not self.held.is_set():
                            await asyncio.sleep(0.005)
                    text = event if isinstance(event, str) else json.dumps(event)
                    yield f"data: {text}\n\n".encode()
            except asyncio.CancelledError:
                self.gone.set()
                raise

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def echo(self, request: Request) -> Response:
        """What came, in headers; the same body back."""
        body = await request.body()
        self.headers.append(dict(request.headers))
        self.seen.append((f"{request.method} {request.url.path}?{request.url.query}", body))
        response = Response(body, 201, media_type=request.headers.get("content-type", "text/plain"))
        response.raw_headers += [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"x-own", b"kept")]
        return response

    async def error(self, request: Request) -> Response:
        await self._read(request)
        return JSONResponse({"error": "too long"}, 400)

    async def broken(self, request: Request) -> Response:
        """Begins an answer and breaks off."""
        await self._read(request)

        async def pieces() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            raise ConnectionAbortedError("broken on purpose")

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def silent(self, request: Request) -> Response:
        """Thinks until its client has left."""
        await self._read(request)
        while not await request.is_disconnected():
            await asyncio.sleep(0.005)
        self.gone.set()
        return Response()


def tcp_socket() -> socket.socket:
    """Listening on a free port of this machine; asyncio sends small pieces at once only where the protocol is told."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(512)
    return listening


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL of an ASGI application that runs in a thread."""
    listening = tcp_socket()
    config = make_config(app, grace_seconds=1)
    config.lifespan = "off"
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@contextlib.contextmanager
def proxied(url: str, directory: Path, **options: Any) -> Iterator[tuple[str, RequestRecorder]]:
    """The proxy before `url`, in a thread: its URL, and its recorder, which is closed at the end."""
    limit = options.pop("limit_bytes", 1 << 20)
    with RequestRecorder(directory, **options) as recorder:
        proxy = RecordingProxy(url, recorder, limit)
        with served(Starlette(routes=[Route("/{path:path}", proxy)])) as proxy_url:
            yield proxy_url, recorder
