"""Headers by what may become of them: secrets are never written, and those of one connection are not passed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

# Of one connection, not of the message (RFC 9110, 7.6.1); `connection` names more of them.
HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)

# Parts of names. `auth` stands for authorization, proxy-authorization, x-auth-...; `key` for x-api-key.
_SECRET_PARTS = ("auth", "cookie", "token", "secret", "key", "passw", "credential", "signature", "session", "jwt")
# A URL also has harmless names with these parts (max_tokens), so that here whole words count.
_SECRET_PARAMETERS = frozenset(
    {
        *("key", "apikey", "api_key", "token", "access_token", "id_token", "refresh_token", "auth", "authorization"),
        *("secret", "client_secret", "password", "passwd", "sig", "signature", "session", "jwt", "code"),
    }
)
_HEADERS = "headers"


def is_secret_header(name: str) -> bool:
    """Whether the value of this header is never written, however the name is spelt."""
    lowered = name.lower()
    return any(part in lowered for part in _SECRET_PARTS)


def holds_headers(key: str) -> bool:
    """Whether what stands under this key of a dict is headers, such as `headers` or `response_headers`."""
    return key.lower().endswith(_HEADERS)


def without_secret_headers(headers: Any) -> Any:
    """A copy without secret headers: of a mapping, of a sequence of pairs, or of anything with `items()`.

    What is neither is returned as it is.
    """
    if not isinstance(headers, Mapping) and callable(getattr(headers, "multi_items", None)):
        headers = list(headers.multi_items())  # Starlette's and httpx's own types
    elif not isinstance(headers, (Mapping, list, tuple)) and callable(getattr(headers, "items", None)):
        headers = list(headers.items())
    if isinstance(headers, Mapping):
        return {name: value for name, value in headers.items() if not is_secret_header(_text(name))}
    if isinstance(headers, (list, tuple)):
        return [pair for pair in headers if not (_is_pair(pair) and is_secret_header(_text(pair[0])))]
    return headers


def without_secret_parameters(query: str) -> str:
    """The query of a URL without parameters that are named as secrets; the others are unchanged."""
    kept = []
    for part in query.split("&"):
        names = [name for name, _ in parse_qsl(part, keep_blank_values=True)]
        if not any(name.lower().replace("-", "_") in _SECRET_PARAMETERS for name in names):
            kept.append(part)
    return "&".join(kept)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2


def _text(name: Any) -> str:
    return name.decode("latin-1") if isinstance(name, bytes) else str(name)
