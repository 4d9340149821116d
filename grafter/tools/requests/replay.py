"""A recording sent again: in order, with the recorded gaps, to one server, or to two at the same time.

A request starts when its time has come, a slot is free, and the previous request has left for every server. With two
servers, one slot covers both, so that neither gets ahead of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from grafter.errors import UsageError
from grafter.tools.requests.call import Call, Forcing, NoCall, make_call
from grafter.tools.requests.judgement import Outcome, judge, recorded_reply
from grafter.tools.requests.reading import Place, Recording
from grafter.tools.requests.sending import Reply, Server, ask_all

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReplayOptions:
    """The options of a replay.

    speed: relative to the recording; 0 leaves no gaps. concurrency: requests in flight at the same time, per server.
    headers: sent with every request.
    tolerance: the largest allowed difference of logprobs.
    """

    speed: float = 1.0
    concurrency: int = 64
    forcing: Forcing = field(default_factory=Forcing)
    headers: dict[str, str] = field(default_factory=dict)
    tolerance: float = 0.0


def choose(places: Sequence[Place], only: Sequence[str]) -> list[Place]:
    """The requests to send, in recorded order. only: ids, or `#N` for the N-th from 0; empty: all.
    Raises UsageError.
    """
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
    recording: Recording, places: Sequence[Place], urls: Sequence[str], options: ReplayOptions, progress: Progress,
    outcomes: list[Outcome],
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
                sending = _Sending(recording, place, options, late)
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


class _Sending:
    """One request on its way to all servers and back."""

    def __init__(self, recording: Recording, place: Place, options: ReplayOptions, late: float) -> None:
        self._place, self._options, self._late = place, options, late
        recorded = recording.read(place)
        self._recorded: Reply | None = recorded_reply(recorded)
        self._call: Call | None = None
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

    async def end(self, outcomes: list[Outcome]) -> None:
        if self._call is None or self._replies is None:
            outcomes.append(Outcome(self._place.number, self._place.id, "not_sent", reasons=[self._why_not]))
            return
        try:
            replies = await self._replies
        except asyncio.CancelledError:
            self._replies.cancel()
            raise
        outcome = judge(self._place, self._call.api, replies, self._recorded, self._options.tolerance)
        outcome.path, outcome.forced, outcome.late = self._call.target, self._call.forced, round(self._late, 6)
        outcomes.append(outcome)
