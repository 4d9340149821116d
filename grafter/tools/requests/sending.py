"""One call to one server. Whatever the server does is an outcome of this request; nothing raises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from grafter.tools.requests.call import Call
from grafter.tools.requests.entry import body_fields

_LONGEST_ANSWER = 1 << 26
# A model may compute for a long time before its first token.
_TIMEOUT = httpx.Timeout(connect=30.0, read=3600.0, write=300.0, pool=None)


@dataclass(frozen=True)
class Reply:
    """What one server answered, or what the recording has: `status`, and the body as `body_fields` returns it.

    error: why there is no answer, or no complete one. status None: not known (recorded inside a server). seconds: until
    the answer was complete; first_seconds: until its first piece.
    """

    status: int | None = None
    kind: str = "none"
    body: Any = None
    error: str | None = None
    seconds: float | None = None
    first_seconds: float | None = None


class Server:
    """One of the servers that requests are sent to. Used inside one event loop; `close` ends it."""

    def __init__(self, url: str, headers: dict[str, str], connections: int) -> None:
        self.url = url
        self._base = httpx.URL(url)
        self._headers = headers
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=4.0)
        self._client = httpx.AsyncClient(
            limits=limits,
            timeout=_TIMEOUT,
            follow_redirects=False,
            trust_env=False,
            headers={"accept-encoding": "identity"},
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, call: Call, written: Callable[[], None]) -> Reply:
        """Send the call and return the server's reply.

        written: called once, as soon as the request has left this process, or can no longer leave it.
        """

        async def trace(event: str, info: Any) -> None:
            if event.endswith("send_request_body.complete"):
                written()

        start = time.monotonic()
        try:
            return await self._ask(call, start, trace)
        except httpx.HTTPError as error:
            told = str(error) or "no answer"
            return Reply(error=f"{type(error).__name__}: {told}"[:500], seconds=time.monotonic() - start)
        except (httpx.InvalidURL, httpx.StreamError, ValueError, OSError) as error:
            return Reply(error=f"{type(error).__name__}: {error}"[:500], seconds=time.monotonic() - start)
        finally:
            written()

    async def _ask(self, call: Call, start: float, trace: Any) -> Reply:
        target = self._base.raw_path.rstrip(b"/") + call.target.encode("ascii")
        request = self._client.build_request(
            call.method,
            self._base.copy_with(raw_path=target),
            headers={**call.headers, **self._headers},
            content=call.body,
            extensions={"trace": trace},
        )
        response = await self._client.send(request, stream=True)
        pieces: list[bytes] = []
        nbytes, first = 0, None
        try:
            async for piece in response.aiter_bytes():
                first = time.monotonic() - start if first is None else first
                nbytes += len(piece)
                if nbytes > _LONGEST_ANSWER:
                    return Reply(response.status_code, error=f"its answer is longer than {_LONGEST_ANSWER} bytes")
                pieces.append(piece)
        except httpx.HTTPError as error:
            # The status is known, and so is that the answer is incomplete.
            told = f"the answer ended early, after {nbytes} bytes: {type(error).__name__}: {error}"
            return Reply(response.status_code, error=told[:500], seconds=time.monotonic() - start, first_seconds=first)
        finally:
            await response.aclose()
        fields = body_fields(pieces, nbytes, response.headers.get("content-type", ""))
        done = time.monotonic() - start
        return Reply(response.status_code, fields["kind"], fields["body"], seconds=done, first_seconds=first)


async def ask_all(servers: list[Server], call: Call) -> tuple[asyncio.Task[list[Reply]], asyncio.Event]:
    """Send to all servers at the same time. The event is set when the request has left for all of them."""
    left = asyncio.Event()
    missing = [True] * len(servers)

    def written(number: int) -> None:
        missing[number] = False
        if not any(missing):
            left.set()

    async def ask() -> list[Reply]:
        return await asyncio.gather(
            *(server.ask(call, partial(written, number)) for number, server in enumerate(servers))
        )

    return asyncio.create_task(ask()), left
