"""What the recording proxy costs: requests straight to a server, through `grafter record`, and through a bare relay.

    .venv/bin/python -m benchmarks.proxying

Server, proxy, relay and client are processes of their own on one machine, and each client connection is kept. The
overhead of a request is its time through the proxy less its time without, until the last byte of the answer. The relay
hands bytes on and knows nothing of HTTP: what it adds is the price of one more process in between, in Python, on this
machine at this moment. On a busy machine compare the two; the proxy's processor time per request hardly depends on it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.units import time_text

OVERHEAD_SECONDS = 0.001
CASES = ("answer", "stream")
STREAM_EVENTS = 20
_BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
# The last bytes of an answer, and of a stream.
_END = {"answer": b'"end":true}', "stream": b"0\r\n\r\n"}


@dataclass(frozen=True)
class ProxyResult:
    """Seconds of one request. `overhead` and `relay_overhead` are taken within rounds, less the direct time;
    `over_relay` is their ratio. `processor`: the proxy's own processor time a request, recording included."""

    case: str
    direct: Spread
    overhead: Spread
    relay_overhead: Spread
    over_relay: Spread
    processor: Spread

    @property
    def met(self) -> bool:
        return self.overhead.median <= OVERHEAD_SECONDS


def serve(pipe: Any) -> None:
    """The server: an answer at once, or a stream of events that are written one by one."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def answer(request: Request) -> Response:
        await request.body()
        return JSONResponse({"choices": [{"message": {"content": "y" * 500}}], "end": True})

    async def stream(request: Request) -> Response:
        await request.body()

        async def events() -> Any:
            for number in range(STREAM_EVENTS):
                yield f'data: {{"choices": [{{"delta": {{"content": "{number}"}}}}]}}\n\n'.encode()

        return StreamingResponse(events(), media_type="text/event-stream")

    # asyncio sends small pieces at once only where it is told that this is TCP.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    pipe.send(listening.getsockname()[1])
    app = Starlette(routes=[Route("/answer", answer, methods=["POST"]), Route("/stream", stream, methods=["POST"])])
    config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_keep_alive=600)
    uvicorn.Server(config).run(sockets=[listening])


def relay(pipe: Any, port: int) -> None:
    """Bytes from one connection to another, as they come."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer), return_exceptions=True)

    async def main() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@dataclass(frozen=True)
class Ports:
    direct: int
    relayed: int
    proxied: int
    proxy_process_id: int


@contextlib.contextmanager
def servers(directory: Path) -> Iterator[Ports]:
    with contextlib.ExitStack() as stack:
        direct = stack.enter_context(_process(serve))
        relayed = stack.enter_context(_process(relay, direct))
        command = [sys.executable, "-m", "grafter.cli.main", "record", "--upstream", f"http://127.0.0.1:{direct}"]
        command += ["--port", "0", "--out", str(directory)]
        proxy = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        stack.callback(proxy.wait)
        stack.callback(proxy.terminate)
        told = proxy.stderr.readline() if proxy.stderr is not None else ""
        found = re.search(r"http://127\.0\.0\.1:(\d+) ->", told)
        if found is None:
            raise RuntimeError(f"the proxy did not start: {told}")
        yield Ports(direct, relayed, int(found[1]), proxy.pid)


@contextlib.contextmanager
def _process(function: Any, *arguments: Any) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=function, args=(there, *arguments), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.kill()
        process.join()


class Client:
    """One kept connection, and no more Python than that needs."""

    def __init__(self, port: int, case: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._place, self._end = (port, case), _END[case]
        head = f"POST /{case} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(_BODY)}\r\n"
        self._request = head.encode() + b"\r\n" + _BODY

    def ask(self) -> float:
        start = time.perf_counter()
        self._socket.sendall(self._request)
        tail = b""
        while not tail.endswith(self._end):
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise RuntimeError(f"the connection was closed after {tail!r}")
            tail = (tail + piece)[-len(self._end) :]
        return time.perf_counter() - start

    def batch(self, count: int) -> float:
        """Seconds of one request: the median of so many, on a new connection, whose first is not counted."""
        self._socket.close()
        self.__init__(*self._place)  # type: ignore[misc]
        self.ask()
        return statistics.median(self.ask() for _ in range(count))


def _processor_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_proxy(rounds: int, count: int) -> list[ProxyResult]:
    """Per case, `rounds` rounds of `count` requests each way."""
    results = []
    with tempfile.TemporaryDirectory() as directory, servers(Path(directory)) as ports:
        for case in CASES:
            clients = {
                way: Client(port, case)
                for way, port in (("direct", ports.direct), ("relayed", ports.relayed), ("proxied", ports.proxied))
            }
            for client in clients.values():
                client.batch(count)
            processor: list[float] = []

            def proxied(client: Client = clients["proxied"], processor: list[float] = processor) -> float:
                before = _processor_seconds(ports.proxy_process_id)
                seconds = client.batch(count)
                processor.append((_processor_seconds(ports.proxy_process_id) - before) / (count + 1))
                return seconds

            ways = {way: partial(client.batch, count) for way, client in clients.items()} | {"proxied": proxied}
            seconds = interleaved(ways, rounds)
            over = {
                way: [with_it - without for with_it, without in zip(seconds[way], seconds["direct"], strict=True)]
                for way in ("relayed", "proxied")
            }
            results.append(
                ProxyResult(
                    case, spread(seconds["direct"]), spread(over["proxied"]), spread(over["relayed"]),
                    ratio(over["proxied"], over["relayed"]), spread(processor),
                )
            )  # fmt: skip
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxying")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=100, help="requests a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    given = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    results = measure_proxy(given.rounds, given.count)
    table = Table("request", "direct", "overhead", "±", "relay's overhead", "proxy / relay", "processor", "1 ms met")
    for result in results:
        table.add_row(
            result.case if result.case == "answer" else f"stream of {STREAM_EVENTS}",
            time_text(result.direct.median),
            time_text(result.overhead.median),
            f"{result.overhead.noise:.0%}",
            time_text(result.relay_overhead.median),
            f"{result.over_relay.median:.1f}",
            time_text(result.processor.median),
            "yes" if result.met else "no",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"load average before: {load:.1f} on {os.cpu_count()} CPUs")
    if given.json is not None:
        given.json.write_text(
            json.dumps({"load_before": load, "proxy": [asdict(result) for result in results]}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
