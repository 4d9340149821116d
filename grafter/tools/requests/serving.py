"""`grafter record` as a program: a socket, the proxy behind uvicorn, and a normal end, which writes everything."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from grafter.errors import UsageError
from grafter.tools.requests.proxy import RecordingProxy
from grafter.tools.requests.recorder import RequestRecorder
from grafter.tools.requests.upstream import LONGEST_HEAD_BYTES

# How long pending answers have after SIGTERM or Ctrl-C.
ANSWER_GRACE_SECONDS = 5
_BACKLOG = 2048
# As long as the servers behind the proxy keep idle connections.
_KEEP_SECONDS = 75


def check_url(url: str, option: str) -> str:
    """An http(s) URL with a host, without its last slash. Raises UsageError, which never shows a password."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        has_user = "@" in parts.netloc
        parts.netloc.encode("idna")
    except ValueError:
        sound = has_user = False
    if has_user:
        raise UsageError(f"{option}: a URL with a user or a password in it is not accepted, because it would be shown.")
    if not sound or parts.query or parts.fragment:
        raise UsageError(f"{option} {url}: write it as http://HOST:PORT or https://HOST/PREFIX.")
    return url.rstrip("/")


def serve(
    upstream: str, host: str, port: int, recorder: RequestRecorder, limit_bytes: int, say: Callable[[str], None],
    grace_seconds: int = ANSWER_GRACE_SECONDS,
) -> None:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C, which end the process as they would without the proxy, with everything written.

    SIGUSR1 writes what is in memory, and the proxy continues. say: called with the address once it is served.
    grace_seconds: the time for pending answers. Call it on the main thread. Raises UsageError if the port cannot be
    listened on.
    """
    # Ignore SIGUSR1 until a handler is installed; otherwise it would end the process.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    listening = _listen(host, port)
    proxy = RecordingProxy(upstream, recorder, limit_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, recorder.dump_soon)
        shown = f"[{host}]" if ":" in host else host
        say(f"grafter record: http://{shown}:{listening.getsockname()[1]} -> {upstream}, into {recorder.directory}")
        yield
        proxy.close()
        # The signal is raised again before `run` returns.
        recorder.dump_now()

    app = Starlette(routes=[Route("/{path:path}", proxy)], lifespan=lifespan)
    uvicorn.Server(make_config(app, grace_seconds)).run(sockets=[listening])


def make_config(app: Any, grace_seconds: int = ANSWER_GRACE_SECONDS) -> uvicorn.Config:
    """uvicorn's configuration, without the headers that it would add and the messages about interrupted answers."""
    return uvicorn.Config(
        app,
        ws="none",
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_SECONDS,
        h11_max_incomplete_event_size=LONGEST_HEAD_BYTES,
        timeout_graceful_shutdown=grace_seconds,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--host {host} --port {port}: it cannot be listened on: {error}. Choose another.") from error
    return listening


def default_directory(when: str) -> Path:
    """Where a recording goes that has no --out."""
    return Path("grafter_out") / f"requests-{when}"
