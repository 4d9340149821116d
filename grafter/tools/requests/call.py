"""A recorded request as one HTTP call, or the reason why it is none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from grafter.tools.requests.bodies import body_bytes
from grafter.tools.requests.forcing import Forcing, force_length, recorded_length
from grafter.tools.requests.headers import HOP_BY_HOP, is_secret_header
from grafter.tools.requests.reading import Recorded, holds_tensor

Api = Literal["chat", "completions", "generate", "other"]

_METHOD = re.compile(r"[A-Z]{1,20}")
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,200}")
_PLACES = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "generate": "/generate"}
# Made anew for what is sent now.
_OWN_HEADERS = frozenset({"host", "content-length", "accept-encoding", "expect", *HOP_BY_HOP})


class NoCall(Exception):
    """This request cannot be sent; the text says why."""


@dataclass(frozen=True)
class Call:
    """What is sent: `target` is path and query. `forced`: the output's length in tokens, where it is forced."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    api: Api
    forced: int | None = None


def make_call(recorded: Recorded, forcing: Forcing) -> Call:
    """Raises NoCall."""
    meta = recorded.meta if isinstance(recorded.meta, dict) else {}
    if "kept_bytes" in meta:
        raise NoCall(f"only {meta['kept_bytes']} of its {meta.get('bytes')} bytes were recorded (--body-mib)")
    if holds_tensor(recorded.request):
        raise NoCall("it holds a tensor, which JSON cannot send")
    lost = [path for path in (*recorded.not_encoded, *recorded.excluded) if path.partition(".")[0] == "request"]
    if lost:
        raise NoCall(f"{lost[0]} was not recorded" + (f", nor were {len(lost) - 1} more" if lost[1:] else ""))
    api, path = _place(recorded.request, meta)
    body, forced = recorded.request, None
    if forcing.is_on and recorded.state == "finished" and isinstance(body, dict) and api != "other":
        forced = recorded_length(recorded.output, api)
        if forced is not None:
            body = force_length(body, api, forced, forcing)
    try:
        sent = body_bytes(meta.get("kind", "json"), body)
    except ValueError as error:
        raise NoCall(str(error)) from None
    query = meta.get("query")
    target = f"{path}?{query}" if isinstance(query, str) and query else path
    if not target.isprintable() or not target.isascii() or " " in target or "#" in target:
        raise NoCall("its path is none that can be sent")
    return Call(_method(meta), target, _headers(meta, bool(sent)), sent, api, forced)


def api_of(path: str) -> Api:
    """Which API answers there, by the end of the path: servers may have a prefix."""
    plain = path.partition("?")[0].rstrip("/")
    if plain.endswith("/chat/completions"):
        return "chat"
    if plain.endswith("/completions"):
        return "completions"
    return "generate" if plain.endswith("/generate") else "other"


def _place(request: Any, meta: dict[str, Any]) -> tuple[Api, str]:
    path = meta.get("path")
    if path is None and isinstance(request, dict):
        if "messages" in request:
            path = _PLACES["chat"]
        elif "prompt" in request:
            path = _PLACES["completions"]
        elif "text" in request or "input_ids" in request:
            path = _PLACES["generate"]
    if path is None:
        raise NoCall("its record names no path (meta.path), and its fields are those of no API that is known here")
    if not isinstance(path, str) or not path.startswith("/"):
        raise NoCall(f"its path {str(path)[:80]!r} does not begin with /")
    return api_of(path), path


def _method(meta: dict[str, Any]) -> str:
    method = meta.get("method", "POST")
    if not isinstance(method, str) or not _METHOD.fullmatch(method) or method == "CONNECT":
        raise NoCall(f"its method {str(method)[:40]!r} is none that can be sent")
    return method


def _headers(meta: dict[str, Any], has_body: bool) -> dict[str, str]:
    """Those that were recorded and may be sent again, without what belongs to a connection or is a secret."""
    headers = {}
    given = meta.get("headers")
    for name, value in given.items() if isinstance(given, dict) else ():
        sound = isinstance(value, str) and _NAME.fullmatch(name) and value.isprintable()
        if sound and name.lower() not in _OWN_HEADERS and not is_secret_header(name):
            headers[name.lower()] = value
    if has_body:
        headers.setdefault("content-type", "application/json")
    headers.pop("content-encoding", None)  # The body was unpacked for the record.
    return headers
