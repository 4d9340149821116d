"""Sends a recording again: in order, with the recorded gaps, to one server, or to two at the same time.

A request starts when its time has come, a slot is free, and the previous request has left for every server. With two
servers, one slot covers both, so that neither gets ahead of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from grafter.errors import UsageError
from grafter.tools.requests.answers import Reply
from grafter.tools.requests.call import Forcing, HttpCall, NoCall, make_call
from grafter.tools.requests.entry import body_fields
from grafter.tools.requests.reading import RequestPlace, RequestRecording
from grafter.tools.requests.reply_comparison import ReplayOutcome, judge, recorded_reply

Progress = Callable[[int, int], None]
_LONGEST_ANSWER = 1 << 26
# A model may compute for a long time before its first token.
_TIMEOUT = httpx.Timeout(connect=30.0, read=3600.0, write=300.0, pool=None)


@dataclass(frozen=True)
class ReplayOptions:
    """The options of a replay.

    speed: relative to the recording; 0 leaves no gaps. concurrency: requests in flight at the same time, per server.
    headers: sent with every request. tolerance: the largest allowed difference of logprobs.
    """

    speed: float = 1.0
    concurrency: int = 64
    forcing: Forcing = field(default_factory=Forcing)
    headers: dict[str, str] = field(default_factory=dict)
    tolerance: float = 0.0


def choose(places: Sequence[RequestPlace], only: Sequence[str]) -> list[RequestPlace]:
    """The requests to send, in recorded order. only: ids, or `#N` for number N; empty: all. Raises UsageError."""
    if not only:
        return list(places)
    chosen: set[int] = set()
    for wanted in only:
        number = wanted[1:]
        if wanted.startswith("#") and number.isascii() and number.isdigit() and len(number) < 10:
            found = [place.number for place in places if place.number == int(number)]
        else:
            found = [place.number for place in places if place.id == wanted]
        if not found:
            last = f"#0 to #{len(places) - 1}" if places else "none"
            raise UsageError(f"--only {wanted}: no request of the recording has this id; by number there are {last}.")
        chosen.update(found)
    return [place for place in places if place.number in chosen]


async def replay(
    recording: RequestRecording, places: Sequence[RequestPlace], urls: Sequence[str], options: ReplayOptions,
    progress: Progress, outcomes: list[ReplayOutcome],
) -> None:  # fmt: skip
    """Send all of `places`. outcomes: filled as they arrive, so that none is lost when this is cancelled.

    Raises DumpError if the recording can no longer be read. Nothing that a server does raises.
    """
    free = asyncio.Semaphore(options.concurrency)
    running: set[asyncio.Task[None]] = set()
    faults: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        running.discard(task)
        free.release()
        fault = None if task.cancelled() else task.exception()
        if fault is not None:
            faults.append(fault)
        progress(len(outcomes), len(places))

    async with _servers(urls, options) as servers:
        start, first = time.monotonic(), places[0].time if places else 0.0
        try:
            for place in places:
                due = start + (place.time - first) / options.speed if options.speed else start
                await wait_until(due)
                await free.acquire()
                late = max(0.0, time.monotonic() - due) if options.speed else 0.0
                sending = _SentRequest(recording, place, options, late)
                left = await sending.begin(servers)
                task = asyncio.create_task(sending.end(outcomes))
                running.add(task)
                task.add_done_callback(ended)
                if left is not None:
                    await left.wait()
            await asyncio.gather(*running)
            if faults:
                raise faults[0]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    outcomes.sort(key=lambda outcome: outcome.number)


async def wait_until(due: float) -> None:
    """Sleep until `due`, in seconds of `time.monotonic`."""
    await asyncio.sleep(max(0.0, due - time.monotonic()))


@contextlib.asynccontextmanager
async def _servers(urls: Sequence[str], options: ReplayOptions) -> AsyncIterator[list[Server]]:
    servers = [Server(url, options.headers, options.concurrency) for url in urls]
    try:
        yield servers
    finally:
        for server in servers:
            await server.close()


class Server:
    """One of the servers that requests are sent to. Used inside one event loop; `close` ends its connections."""

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

    async def ask(self, call: HttpCall, written: Callable[[], None]) -> Reply:
        """Send the call and return the server's reply. Whatever the server does is a reply, too; nothing raises.

        written: called once, as soon as the request has left this process, or can no longer leave it.
        """

        async def trace(event: str, info: Any) -> None:
            if event.endswith("send_request_body.complete"):
                written()

        start = time.monotonic()
        try:
            return await self._ask(call, start, trace)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError, OSError) as error:
            text = f"{type(error).__name__}: {str(error) or 'no answer'}"
            return Reply(error=text[:500], seconds=time.monotonic() - start)
        finally:
            written()

    async def _ask(self, call: HttpCall, start: float, trace: Any) -> Reply:
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
            why = f"the answer ended early, after {nbytes} bytes: {type(error).__name__}: {error}"
            return Reply(response.status_code, error=why[:500], seconds=time.monotonic() - start, first_seconds=first)
        finally:
            await response.aclose()
        fields = body_fields(pieces, nbytes, response.headers.get("content-type", ""))
        done = time.monotonic() - start
        return Reply(response.status_code, fields["kind"], fields["body"], seconds=done, first_seconds=first)


async def ask_all(servers: list[Server], call: HttpCall) -> tuple[asyncio.Task[list[Reply]], asyncio.Event]:
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


class _SentRequest:
    """One request, sent to all servers at the same time."""

    def __init__(self, recording: RequestRecording, place: RequestPlace, options: ReplayOptions, late: float) -> None:
        self._place, self._options, self._late = place, options, late
        recorded = recording.read(place)
        self._recorded: Reply | None = recorded_reply(recorded)
        self._call: HttpCall | None = None
        self._why_not = ""
        try:
            self._call = make_call(recorded, options.forcing)
        except NoCall as reason:
            self._why_not = str(reason)
        self._replies: asyncio.Task[list[Reply]] | None = None

    async def begin(self, servers: list[Server]) -> asyncio.Event | None:
        if self._call is None:
            return None
        self._replies, left = await ask_all(servers, self._call)
        return left

    async def end(self, outcomes: list[ReplayOutcome]) -> None:
        if self._call is None or self._replies is None:
            outcomes.append(ReplayOutcome(self._place.number, self._place.id, "not_sent", reasons=[self._why_not]))
            return
        try:
            replies = await self._replies
        except asyncio.CancelledError:
            self._replies.cancel()
            raise
        outcome = judge(self._place, self._call.api, replies, self._recorded, self._options.tolerance)
        outcome.path, outcome.forced, outcome.late = self._call.target, self._call.forced, round(self._late, 6)
        outcomes.append(outcome)
