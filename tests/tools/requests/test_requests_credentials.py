"""Credentials: whatever the place in which one is planted, a recording does not have it."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafter.store.dumps.snapshot import Buffers
from grafter.tools.requests.batch_file import encode_json, encode_part
from grafter.tools.requests.credentials import (
    is_secret_header,
    names_a_secret,
    safe_value,
    without_secrets_in_path,
    without_secrets_in_query,
    without_secrets_in_value,
)
from grafter.tools.requests.proxy import _recorded

SECRETS = st.text("abcdefghijkmnopqrstuvwxyz0123456789", min_size=8, max_size=20).map(lambda text: f"Zq{text}")
PARAMETERS = st.sampled_from(
    [
        *("access_token", "token", "id_token", "refresh-token", "api_key", "apikey", "key", "X-Amz-Signature", "sig"),
        *("X-Amz-Credential", "password", "passwd", "pwd", "pass", "client_secret", "code", "auth", "authToken"),
        *("sessionId", "JSESSIONID", "sid", "jwt", "SAMLResponse", "otp", "auth[token]", "user.password", "csrf_token"),
        *("t%6Fken", "ACCESS_TOKEN", "accessKey", "sas", "login"),
    ]
)
HEADERS = st.sampled_from(
    ["referer", "x-forwarded-uri", "origin", "location", "link", "x-original-url", "x-note", "via"]
)


def encoded(text: str, times: int) -> str:
    for _ in range(times):
        text = quote(text, safe="")
    return text


@st.composite
def urls_with(draw: st.DrawFn, secret: str) -> str:
    """A URL, or a part of one, that carries the secret as a parameter, as its user, or in a URL that it carries."""
    place = draw(st.sampled_from(["parameter", "user", "password", "broken password"]))
    scheme = draw(st.sampled_from(["https://", "//", "wss://"]))
    if place != "parameter":
        user = {"user": secret, "password": f"u:{secret}", "broken password": f"u:{secret}/x"}[place]
        url = f"{scheme}{user}@host/path?a=1"
    else:
        before = draw(st.sampled_from([f"{scheme}host:80/a/b", "/a/b", "a/b", ""]))
        mark = draw(st.sampled_from(["?", "?a=1&", "?a=1;", ";", ";a=1;", "#", "#a=1&", "#/a?"]))
        url = f"{before}{mark}{draw(PARAMETERS)}={secret}{draw(st.sampled_from(['', '&b=2', ';b=2', '#c', '/d']))}"
    times = draw(st.integers(0, 3))
    return f"https://outer/?next={encoded(url, times)}" if times else url


@st.composite
def credentials_with(draw: st.DrawFn, secret: str) -> str:
    """The secret with what makes it one: a scheme, a name before it, or its form."""
    return draw(
        st.sampled_from(
            [
                f"Bearer {secret}", f"bearer, {secret}", f"bearer.{secret}", f"base64url.bearer.auth.x.{secret}",
                f"Basic {secret}", f"Digest username={secret}", f"Token {secret}", f"apikey={secret}", f"NTLM {secret}",
                f"a=1; token={secret}", f'{{"token": "{secret}"}}', f"password: {secret}", f"eyJ{secret}.e30.x",
                f"sk-{secret}abcdefgh", f"ghp_{secret}abcdefgh", f"x, Bearer {secret}",
                f"<https://h/p?token={secret}>; rel=next",
            ]
        )
    )  # fmt: skip


@given(st.data(), HEADERS, SECRETS)
def test_no_header_brings_a_planted_secret_into_a_record(data: st.DataObject, name: str, secret: str) -> None:
    """Neither in a URL, at any depth of encoding, nor as a credential of its own; in the proxy, an object, JSON."""
    value = data.draw(urls_with(secret) | credentials_with(secret))
    headers = {name: value, "x-ok": "told"}
    pairs = [(name.encode(), value.encode()), (b"x-ok", b"told")]
    written = [
        json.dumps(_recorded(pairs)),
        encode_part({"deep": [{"extra_headers": headers}]}, "meta", frozenset(), Buffers(1 << 20)).text,
        encode_part({"headers": pairs}, "meta", frozenset(), Buffers(1 << 20)).text,
        encode_json({"deep": [{"Headers": headers}]}, "request", frozenset()).text,
        encode_json({"header": {name: [value], "x-ok": "told"}}, "request", frozenset()).text,
        encode_json({"headers": f"{name}: {value}\r\nx-ok: told"}, "request", frozenset()).text,
        encode_json({"headers": [f"{name}: {value}", "x-ok: told"]}, "request", frozenset()).text,
    ]
    for text in written:
        assert secret not in text and secret.encode().hex() not in text
        assert "told" in text


@given(st.data(), SECRETS)
def test_no_request_line_brings_a_planted_secret_into_a_record(data: st.DataObject, secret: str) -> None:
    """As a parameter of the query or of the path, after `&` or `;`, inside of another URL, and as a URL's user."""
    name, nested = data.draw(PARAMETERS), data.draw(urls_with(secret) | credentials_with(secret))
    separator = data.draw(st.sampled_from(["&", ";"]))
    times = data.draw(st.integers(1, 3))
    query = separator.join(["a=1", f"{name}={secret}", f"next={encoded(nested, times)}", "b=2"])
    assert without_secrets_in_query(query) == f"a=1{separator}b=2"
    path = f"https://{secret}:{secret}@host/v1;a=1;{name}={secret}/Bearer%20{secret}/chat;b=2"
    assert without_secrets_in_path(path) == "https://host/v1;a=1/REMOVED/chat;b=2"
    meta = encode_part({"path": path, "query": query}, "meta", frozenset(), Buffers(1 << 20)).text
    assert secret not in meta and "REMOVED" in meta


@pytest.mark.parametrize(
    "name",
    [
        *(
            "X-Pass",
            "x-userpass",
            "X-Passphrase",
            "X-Pwd",
            "X-PW",
            "x-pin",
            "x-otp-code",
            "X-Sig",
            "X-Hub-Signature-256",
        ),
        *("Sec-WebSocket-Protocol", "Sec-WebSocket-Key", "X-CSRF-Token", "x-xsrf", "X-Goog-IAP-JWT-Assertion", "X-SAS"),
        *(
            "X-Forwarded-Client-Cert",
            "X-MS-CLIENT-PRINCIPAL",
            "api-key",
            "apikey",
            "Authentication-Info",
            "X-PAT",
            "hmac",
        ),
    ],
)
def test_headers_that_are_named_as_secrets_have_none_of_their_value_written(name: str) -> None:
    """Passwords, pins, signatures, tickets and websocket protocols, under the names in use."""
    assert is_secret_header(name) and is_secret_header(name.lower()) and is_secret_header(name.upper())
    assert safe_value(name, "anything") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("content-type", "multipart/form-data; boundary=abc"),
        ("accept", "text/html;q=0.9, */*;q=0.8"),
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:109.0) Gecko/20100101 Firefox/115.0"),
        ("cache-control", "no-cache, max-age=0"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("x-request-id", "3f6c1b1e-9d5e-4a57-8f0e-0d5b3a2c1f00"),
        ("x-model", "meta-llama/Llama-3.1-8B-Instruct"),
        ("location", "https://host:8080/v1/chat"),
        ("origin", "http://[::1]:8000"),
        ("referer", "http://localhost:8000/a/b"),
        ("x-question", "is this kept?"),
    ],
)
def test_harmless_headers_are_written_whole(name: str, value: str) -> None:
    """What servers and clients usually say of themselves is no credential."""
    assert safe_value(name, value) == value


def test_urls_in_headers_keep_what_they_point_at() -> None:
    """Only the user, and what stands from `?`, `#` or `;` on, is cut."""
    assert without_secrets_in_value("https://u:p@host:80/a/b?c=1#d") == "https://host:80/a/b"
    assert without_secrets_in_value("/v1/chat;token=x") == "/v1/chat"


@pytest.mark.parametrize(
    "query",
    [
        *(
            "max_tokens=3",
            "a=1&b=2;c=3",
            "eos_token_id=2",
            "stop_token_ids=[1,2]",
            "skip_special_tokens=true",
            "author=x",
        ),
        *("keyword=x", "a", "", "a=&b", "q=what+is+this", "monkeys=1"),
    ],
)
def test_parameters_that_are_no_secrets_stay_as_they_are(query: str) -> None:
    """Counts and ids of tokens, and words that only contain the name of a secret."""
    assert without_secrets_in_query(query) == query
    assert names_a_secret("eos_token_id", "Zq-no-number")


@pytest.mark.parametrize(
    "body",
    [
        {"headers": ["Key", "Value", "What is it?"]},
        {"header": "What is a token? See https://host/?a=1"},
        {"headers": {"title": "What?", "n": 3, "none": None}},
        {"prompt": "Bearer of news; password: none"},
    ],
)
def test_what_stands_in_a_body_is_written(body: Any) -> None:
    """A body's texts are prompts; a table's headers are no headers of HTTP."""
    assert json.loads(encode_json(body, "request", frozenset()).text) == body


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("/v1/token/8f3a91c0de", "/v1/token/REMOVED"),
        ("/reset-password/AbCd12345", "/reset-password/REMOVED"),
        ("/bot123456:AAHabcdefghijklmnop/send", "/REMOVED/send"),
        ("/v1/auth/login", "/v1/auth/login"),
        ("/v1/chat/completions", "/v1/chat/completions"),
    ],
)
def test_a_segment_of_a_path_that_follows_the_name_of_a_secret_is_removed(path: str, written: str) -> None:
    """Where it looks made by a machine."""
    assert without_secrets_in_path(path) == written


@pytest.mark.parametrize(
    "value", ["nvapi-x", "gsk_12345678", "xai-12345678", "sk_live_x", "user:pw@host", "SG.12345678"]
)
def test_keys_of_known_services_are_left_out(value: str) -> None:
    """Under any header's name."""
    assert without_secrets_in_value(value) is None
