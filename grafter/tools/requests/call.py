"""A recorded request as one HTTP call, or the reason why it is none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from grafter.tools.requests.answers import read_answer
from grafter.tools.requests.credentials import HOP_BY_HOP, is_secret_header
from grafter.tools.requests.entry import body_bytes
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


# The recorded output's length, and how each API is made to generate the same number of tokens.
#
# OpenAI's own servers refuse unknown fields, so only the limit is set there by default. Servers of the open engines
# also accept `ignore_eos` and `min_tokens`.


@dataclass(frozen=True)
class Forcing:
    """How to force the length.

    is_on: force the recorded length.
    ignore_eos, min_tokens: also set these fields in requests of OpenAI's form.
    """

    is_on: bool = True
    ignore_eos: bool = False
    min_tokens: bool = False


def recorded_length(output: Any, api: str) -> int | None:
    """The number of tokens in the output; None if it is not known, or if several outputs share one number."""
    if isinstance(output, dict) and "kind" in output and "status" in output:
        if output["status"] != 200 or "kept_bytes" in output:
            return None
        output, is_stream = output.get("body"), output["kind"] == "events"
    else:
        is_stream = False
    answer = read_answer(output, api, is_stream)
    if answer is None or len(answer.outputs) != 1:
        return None
    count = answer.outputs[0].token_count
    return count if count is not None and 0 < count < 1 << 31 else None


def force_length(body: dict[str, Any], api: str, count: int, forcing: Forcing) -> dict[str, Any]:
    """A copy of the request that asks for exactly `count` tokens, as far as the API can."""
    forced = dict(body)
    if api == "generate":
        given = body.get("sampling_params")
        params = dict(given) if isinstance(given, dict) else {}
        params |= {"max_new_tokens": count, "ignore_eos": True}
        return {**forced, "sampling_params": params}
    limit = "max_completion_tokens" if "max_completion_tokens" in body and api == "chat" else "max_tokens"
    forced[limit] = count
    if forcing.ignore_eos:
        forced["ignore_eos"] = True
    if forcing.min_tokens:
        forced["min_tokens"] = count
    return forced
