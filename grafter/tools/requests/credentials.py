"""What is, or may hold, a credential: by the name that it stands under, or by its own form. Pure functions over texts.

Names and forms are denied by kind. To leave out too much costs a field of a recording; to leave out too little would
write somebody's key into a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_plus

# Anywhere in a name without its punctuation. `auth` also stands for authorization and x-auth-...
_PARTS = (
    *("auth", "cookie", "token", "secret", "pass", "pwd", "credential", "signature", "session", "jwt", "bearer"),
    *("csrf", "xsrf", "saml", "assertion", "apikey", "hmac"),
)
# Whole words of a name: too short, or too common in others, to be looked for everywhere.
_WORDS = frozenset(
    {
        *("key", "keys", "pw", "pin", "otp", "totp", "mfa", "sig", "sid", "sas", "pat", "cred", "creds", "cert", "psk"),
        *("ticket", "login", "nonce", "principal"),
    }
)
_WHOLE_NAMES = frozenset({"code"})  # of OAuth
# Numbers of an engine's parameters, such as eos_token_id=2. `tokens` alone is a count, too: max_tokens.
_COUNTING_WORDS = frozenset(
    {
        *(
            "id",
            "ids",
            "count",
            "max",
            "min",
            "num",
            "n",
            "stop",
            "eos",
            "bos",
            "pad",
            "unk",
            "new",
            "special",
            "limit",
        ),
        *("ignore", "skip", "budget", "per"),
    }
)
_COUNT = re.compile(r"[-\d.,\s\[\]]{1,200}|true|false", re.IGNORECASE)

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_FORMS = re.compile(
    r"\bbearer\b[\s:=,.]*\S"
    r"|(?:^|[,;=:\"'\s])(?:basic|digest|negotiate|ntlm|hawk|dpop|token|apikey|api-key|sharedkey|aws4-hmac-sha256)[\s:=]+\S"
    r"|\beyJ[\w-]{8}"  # a JSON Web Token
    r"|-----BEGIN "
    r"|\bsk-[\w-]{12}|\bgh[pousr]_\w{16}|\bgithub_pat_|\bxox[abeoprs]-|\bA[KS]IA[0-9A-Z]{12}|\bAIza[\w-]{20}"
    r"|\bhf_[A-Za-z0-9]{16}|\bglpat-|\bya29\.|\bnvapi-|\bgsk_\w{8}|\bxai-\w{8}|\bpplx-\w{8}|\b[prs]k_(?:live|test)_"
    r"|\br8_\w{16}|\bnpm_\w{16}|\bSG\.[\w-]{8}|\bbot\d{6,}:[\w-]{16}|^[^\s:/@]+:[^\s/@]+@",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"//[^/?#\s]*@")
# The same where the password has a character that ends a host's name: what stands after the colon is no port.
_BROKEN_USER_INFO = re.compile(r"//(?!\[)[^/?#:\s]*:(?!\d{0,5}(?:[/?#\s,;\"'>)]|$))")
_AUTHOR = re.compile(r"author(?!i)")
# A name before what it names, as in `a=b`, `a: b` and `"a": "b"`.
_NAMED = re.compile(r"(?<![\w.$\[\]-])([A-Za-z_$][\w.$\[\]-]{0,99})[\"']?\s{0,9}[=:]\s{0,9}(?=\S)")
# With a digit, and as long as no plain word: what programs make.
_OPAQUE = re.compile(r"(?=\D*\d)[\w.~%:+=-]{8,}")
_MOST_ENCODINGS = 8
REMOVED = "REMOVED"


def names_a_secret(name: str, value: str = "") -> bool:
    """Whether what stands under this name is a credential. value: with it, counts such as `eos_token_id=2` are none."""
    decoded = _decoded(name)[-1]
    words = [word.lower() for word in _WORD.findall(decoded)]
    flat = _AUTHOR.sub("", "".join(words))
    if flat in _WHOLE_NAMES or not _WORDS.isdisjoint(words) or flat.endswith("key"):
        return True
    others = [word for word in words if word not in ("token", "tokens")]
    is_count = (
        len(others) < len(words)
        and _COUNTING_WORDS.issuperset(others)
        and (others or "tokens" in words)
        and _COUNT.fullmatch(value.strip())
    )
    return not is_count and any(part in flat for part in _PARTS)


def holds_a_secret(text: str) -> bool:
    """Whether a credential stands in a text: by its form, or after a name of one; also where the text, or a part of it,
    is percent-encoded, several times over."""
    forms = _decoded(text)
    if len(forms) > _MOST_ENCODINGS:
        return True
    for form in forms:
        if _FORMS.search(form) or _USER_INFO.search(form) or _BROKEN_USER_INFO.search(form):
            return True
        if any(names_a_secret(found[1], _value_at(form, found.end())) for found in _NAMED.finditer(form)):
            return True
    return False


def without_secrets_in_query(query: str) -> str:
    """The query of a URL without the parameters that hold a credential; the others are unchanged."""
    kept = ""
    for part in re.findall(r"[&;]?[^&;]*", query):
        name, _, value = part.lstrip("&;").partition("=")
        if not names_a_secret(name, value) and not holds_a_secret(value):
            kept += part
    return kept.lstrip("&;") if kept[:1] != query[:1] else kept


def without_secrets_in_path(path: str) -> str:
    """The path of a request: parameters after `;` that hold a credential are left out, and so is the user before `@`.

    A segment that has the form of one is REMOVED, and so is what follows a segment that names one, as in
    `/token/8f3a91c0`, where it looks made by a machine.
    """
    segments, is_named = [], False
    for segment in _USER_INFO.sub("//", path).split("/"):
        own, *parameters = segment.split(";")
        sound = [text for text in parameters if not _is_secret_parameter(text)]
        is_secret = holds_a_secret(own) or (is_named and _OPAQUE.fullmatch(own) is not None)
        segments.append(";".join([REMOVED if is_secret else own, *sound]))
        is_named = names_a_secret(own)
    return "/".join(segments)


def without_secrets_in_value(value: str) -> str | None:
    """A header's value; None where it is, or holds, a credential.

    Of a URL, the user, and all from the first `?`, `#` or `;` on, is cut off: that is where URLs carry credentials.
    """
    if value.lstrip().startswith("/") or "//" in value:
        value = re.split(r"[?#;]", _USER_INFO.sub("//", value), maxsplit=1)[0]
    return None if holds_a_secret(value) else value


def _is_secret_parameter(text: str) -> bool:
    name, _, value = text.partition("=")
    return names_a_secret(name, value) or holds_a_secret(value)


def _value_at(text: str, start: int) -> str:
    return re.split(r"[&;,\"'\s]", text[start : start + 200], maxsplit=1)[0]


def _decoded(text: str) -> list[str]:
    """The text, and what it is percent-decoded, until nothing changes."""
    forms = [text]
    while len(forms) <= _MOST_ENCODINGS and (decoded := unquote_plus(forms[-1])) != forms[-1]:
        forms.append(decoded)
    return forms


# Headers by what may become of them: credentials are never written, and those of one connection are not passed on.

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
