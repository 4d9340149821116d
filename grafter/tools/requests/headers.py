"""Headers by what may become of them: credentials are never written, and those of one connection are not passed on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from grafter.tools.requests.credentials import holds_a_secret, names_a_secret, without_secrets_in_value

# Of one connection, not of the message (RFC 9110, 7.6.1); `connection` names more of them.
HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)

# Beside the names of secrets anywhere: a subprotocol of a websocket may be a token, and no header that has `key` in its
# name is worth a risk.
_SECRET_PARTS = ("sec-websocket", "key")
_HEADERS = ("headers", "header")
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def is_secret_header(name: str) -> bool:
    """Whether the value of this header is never written, however the name is spelt."""
    lowered = name.lower()
    return any(part in lowered for part in _SECRET_PARTS) or names_a_secret(lowered)


def holds_headers(key: str) -> bool:
    """Whether what stands under this key of a dict is headers, such as `headers` or `response_headers`."""
    return key.lower().endswith(_HEADERS)


def safe_value(name: str, value: str) -> str | None:
    """The part of a header's value that may be written; None where none of it may."""
    return None if is_secret_header(name) else without_secrets_in_value(value)


def without_secret_headers(headers: Any) -> Any:
    """A copy without secrets: of a mapping, of a sequence of pairs or of `name: value` lines, of such lines as one
    text, or of anything with `items()`. What is none of them is returned as it is.
    """
    if not isinstance(headers, Mapping) and callable(getattr(headers, "multi_items", None)):
        headers = list(headers.multi_items())  # Starlette's and httpx's own types
    elif not isinstance(headers, (Mapping, list, tuple)) and callable(getattr(headers, "items", None)):
        headers = list(headers.items())
    if isinstance(headers, Mapping):
        safe = {name: _safe(name, value) for name, value in headers.items()}
        return {name: value for name, value in safe.items() if value is not _NOTHING}
    if isinstance(headers, (list, tuple)):
        made = [_safe_item(item) for item in headers]
        return [item for item in made if item is not _NOTHING]
    if isinstance(headers, str):
        return "".join(line for line in headers.splitlines(keepends=True) if not _is_secret_line(line))
    return headers


_NOTHING = object()


def _safe_item(item: Any) -> Any:
    if isinstance(item, (list, tuple)) and len(item) == 2:
        value = _safe(item[0], item[1])
        return _NOTHING if value is _NOTHING else (item[0], value)
    if isinstance(item, (str, bytes)):
        return _NOTHING if _is_secret_line(_text(item)) else item
    return without_secret_headers(item)


def _is_secret_line(line: str) -> bool:
    """Of `name: value`. A line without a header's name is text."""
    name, colon, value = line.partition(":")
    is_header = colon and _NAME.fullmatch(name.strip())
    return bool(is_header) and (is_secret_header(name) or holds_a_secret(value))


def _safe(name: Any, value: Any) -> Any:
    if isinstance(value, (str, bytes)):
        text = _text(value)
        safe = safe_value(_text(name), text)
        if safe is None:
            return _NOTHING
        return value if safe == text else _like(value, safe)
    if is_secret_header(_text(name)):
        return _NOTHING
    if isinstance(value, (list, tuple)):
        made = [_safe(name, item) for item in value]
        return [item for item in made if item is not _NOTHING]
    return without_secret_headers(value)


def _like(original: str | bytes, text: str) -> str | bytes:
    return text.encode("latin-1", "replace") if isinstance(original, bytes) else text


def _text(name: Any) -> str:
    return name.decode("latin-1") if isinstance(name, bytes) else str(name)
