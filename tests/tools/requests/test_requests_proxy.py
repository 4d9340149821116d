"""The recording proxy before a real server: what passes, what is recorded, and what a kill in the middle leaves."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import multiprocessing
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from jobs import PRELOAD
from request_files import lines_in, wait_until
from request_parts import Engine, proxied, served, tcp_socket
from starlette.responses import Response

from grafter.tools.requests.proxy import Kept, Room
from grafter.tools.requests.reading import Recording
from grafter.tools.requests.recorder import RequestRecorder
from grafter.tools.requests.serving import make_config, serve

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    with served(engine.app()) as found:
        yield found


def test_requests_and_answers_pass_unchanged(url: str, engine: Engine, tmp_path: Path) -> None:
    """Method, path, query, body, status and headers are the same as without the proxy, double headers included."""
    body = bytes(range(256)) * 3
    headers = {"Content-Type": "application/x-odd", "X-Own": "ü".encode("latin-1"), "Accept-Encoding": "br"}
    with proxied(url, tmp_path) as (proxy, _):
        for method in ("POST", "GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
            sent = {} if method in ("GET", "HEAD") else {"content": body}
            answers = [
                httpx.request(method, f"{base}/echo?a=%2F&b=1+2", headers=headers, **sent) for base in (url, proxy)
            ]
            direct, through = answers
            assert (direct.status_code, direct.content) == (through.status_code, through.content)
            dated = [[pair for pair in answer.headers.raw if pair[0] != b"date"] for answer in answers]
            assert sorted(dated[0]) == sorted(dated[1])
            assert direct.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert engine.seen[0::2] == engine.seen[1::2]
    for one, other in zip(engine.headers[0::2], engine.headers[1::2], strict=True):
        one.pop("connection")
        assert {**one, "host": ""} == {**other, "host": ""}


def test_headers_of_one_hop_stay_there(url: str, engine: Engine, tmp_path: Path) -> None:
    """`connection`, what it names, `te` and their like reach neither the server nor the file."""
    hop = {"Connection": "keep-alive, X-Hop", "X-Hop": "1", "TE": "trailers", "Proxy-Authorization": "Basic x"}
    with proxied(url, tmp_path) as (proxy, _):
        httpx.post(f"{proxy}/echo", headers={**hop, "X-End": "2"}, content=b"x")
    (came,) = engine.headers
    assert came["x-end"] == "2"
    assert not {"x-hop", "te", "proxy-authorization", "connection"} & came.keys()


def test_chunked_requests_pass_as_they_come(url: str, engine: Engine, tmp_path: Path) -> None:
    """A body of unknown length, in pieces, and one much larger than what is recorded: both arrive whole."""
    large = os.urandom(3 << 20)
    with proxied(url, tmp_path, limit_bytes=1000) as (proxy, _), httpx.Client() as client:
        answer = client.post(f"{proxy}/echo", content=iter([b"a" * 10, b"b" * 20, b"c"]))
        assert answer.content == b"a" * 10 + b"b" * 20 + b"c"
        assert client.post(f"{proxy}/echo", content=large).content == large
    small, cut = lines_in(tmp_path)
    assert small["request"] == "a" * 10 + "b" * 20 + "c" and "kept_bytes" not in small["meta"]
    for part in (cut["meta"], cut["output"]):
        assert (part["bytes"], part["kept_bytes"]) == (3 << 20, 1000)


def test_what_is_kept_of_all_bodies_together_is_bounded() -> None:
    """Of two bodies the second keeps what the first has left, and of itself only the beginning."""
    room = Room(10)
    first, second = Kept(8, room), Kept(8, room)
    for piece in (b"12345", b"6789"):
        first.add(piece)
    for piece in (b"a", b"bcd", b"e"):
        second.add(piece)
    assert (b"".join(first.pieces), first.nbytes, first.kept_bytes) == (b"12345678", 9, 8)
    assert (b"".join(second.pieces), second.nbytes, second.kept_bytes) == (b"ab", 5, 2)
    first.give_back()
    second.add(b"f")
    assert second.kept_bytes == 2 and room.left == 8


def test_a_stream_passes_while_it_is_made(url: str, engine: Engine, tmp_path: Path) -> None:
    """The client has the first event before the server makes the second."""
    with proxied(url, tmp_path) as (proxy, _):
        body = {"messages": [1], "stream": True, "hold": True}
        with httpx.stream("POST", f"{proxy}/v1/chat/completions", json=body) as answer:
            pieces = answer.iter_raw()
            first = next(pieces)
            assert first.startswith(b"data: ") and not engine.held.is_set()
            engine.held.set()
            rest = b"".join(pieces)
    assert rest.endswith(b"data: [DONE]\n\n")
    (line,) = lines_in(tmp_path)
    assert line["state"] == "finished" and line["output"]["kind"] == "events"
    assert line["output"]["body"][-1] == "[DONE]" and len(line["output"]["body"]) == 7
    assert line["output"]["first_piece_seconds"] <= line["output"]["seconds"]


def test_a_client_that_leaves_ends_the_servers_work(url: str, engine: Engine, tmp_path: Path) -> None:
    """In the middle of a stream and before the first byte: the server hears of it, and the request is unfinished."""
    with proxied(url, tmp_path) as (proxy, _):
        with httpx.stream("POST", f"{proxy}/generate", json={"text": "a", "stream": True, "hold": True}) as answer:
            next(answer.iter_raw())
        assert engine.gone.wait(250)
        engine.gone.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{proxy}/silent", json={}, timeout=0.2)
        assert engine.gone.wait(250)
    streamed, silent = lines_in(tmp_path)
    for line in (streamed, silent):
        assert line["state"] == "unfinished" and "client disconnected" in line["reason"]
    assert len(streamed["output"]["body"]) == 1
    assert silent["output"] is None


def test_an_answer_that_breaks_off_breaks_off_for_the_client(url: str, tmp_path: Path) -> None:
    """The client sees an incomplete answer, not a short one; the record has what came, and why no more."""
    with proxied(url, tmp_path) as (proxy, _), pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{proxy}/broken", json={})
    (line,) = lines_in(tmp_path)
    assert line["state"] == "failed" and "ended early" in line["reason"]
    assert (line["output"]["status"], line["output"]["body"]) == (200, [1])


def test_errors_of_the_server_are_answers(url: str, tmp_path: Path) -> None:
    """A status of 400 passes with its body; a server that is not there is 502, and told in the record."""
    with proxied(url, tmp_path) as (proxy, _):
        answer = httpx.post(f"{proxy}/error", json={"messages": []})
        assert (answer.status_code, answer.json()) == (400, {"error": "too long"})
    (line,) = lines_in(tmp_path)
    assert (line["state"], line["output"]["status"]) == ("finished", 400)
    nobody = tcp_socket()
    dead = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    nobody.close()
    with proxied(dead, tmp_path / "dead") as (proxy, _):
        answer = httpx.post(f"{proxy}/generate", json={"text": "a"})
        assert answer.status_code == 502 and "no connection" in answer.json()["error"]["message"]
    (line,) = lines_in(tmp_path / "dead")
    assert line["state"] == "failed" and line["output"] is None and line["request"] == {"text": "a"}


def test_what_speaks_no_http_is_502(tmp_path: Path) -> None:
    """Garbage, and a connection that is closed without a word."""
    for said in (b"SSH-2.0-OpenSSH\r\n\r\n", b""):
        listening = tcp_socket()

        def answer(said: bytes = said, listening: socket.socket = listening) -> None:
            connection, _ = listening.accept()
            connection.recv(1 << 16)
            connection.sendall(said)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with proxied(f"http://127.0.0.1:{listening.getsockname()[1]}", tmp_path / str(len(said))) as (proxy, _):
            assert httpx.post(f"{proxy}/generate", json={}).status_code == 502
        thread.join()
        listening.close()


def test_secrets_are_never_written(url: str, tmp_path: Path) -> None:
    """Neither of the request nor of the answer, however the header is spelt, nor in the query; other headers are."""
    secret = "s3cr3t-value"
    names = [
        *(
            "authorization",
            "AUTHORIZATION",
            "cookie",
            "X-API-Key",
            "proxy-authorization",
            "x-my-token",
            "X-Secret-Thing",
        ),
        *("openai-api-key", "x-amz-security-token", "X-Auth-User", "x-session-id", "x-signature", "password-hint"),
    ]
    with proxied(url, tmp_path) as (proxy, _), httpx.Client() as client:
        for name in names:
            answer = client.post(
                f"{proxy}/echo?api_key={secret}&key={secret}&max_tokens=3", headers={name: secret, "x-ok": "told"},
                content=b"{}",
            )  # fmt: skip
            assert answer.status_code == 201
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert secret not in written and "a=1" not in written
    for line in lines_in(tmp_path):
        assert line["meta"]["headers"]["x-ok"] == "told" and line["output"]["headers"]["x-own"] == "kept"
        assert line["meta"]["query"] == "max_tokens=3"


def test_secrets_in_other_headers_reach_the_server_and_not_the_record(tmp_path: Path) -> None:
    """URLs in headers, of the request and of the answer, websocket protocols and passwords pass; the file has none."""
    secret = "s3cr3t-value"
    seen: list[dict[bytes, bytes]] = []
    headers = {
        "Referer": f"https://app/chat?access_token={secret}", "X-Forwarded-Uri": f"/v1/chat;token={secret}",
        "Sec-WebSocket-Protocol": f"bearer, {secret}", "X-Pass": secret, "X-Note": f"Bearer {secret}",
        "Origin": f"https://user:{secret}@app", "X-Next": f"https%3A%2F%2Fa%2F%3Ftoken%3D{secret}", "x-ok": "told",
    }  # fmt: skip

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))
        answer = {
            "location": f"/done#id_token={secret}",
            "link": f"</a?page=2&sig={secret}>; rel=next",
            "x-own": "kept",
        }
        await Response(b"{}", 201, answer)(scope, receive, send)

    with served(app) as url, proxied(url, tmp_path) as (proxy, _):
        answer = httpx.post(f"{proxy}/v1/chat;token={secret}?a=1;token={secret}", headers=headers, content=b"{}")
    assert all(seen[0][name.lower().encode()] == value.encode() for name, value in headers.items())
    assert answer.headers["location"].endswith(secret)
    assert secret not in "".join(file.read_text() for file in tmp_path.iterdir())
    (line,) = lines_in(tmp_path)
    assert (line["meta"]["path"], line["meta"]["query"]) == ("/v1/chat", "a=1")
    told = line["meta"]["headers"]
    assert (told["referer"], told["origin"], told["x-ok"]) == ("https://app/chat", "https://app", "told")
    assert (line["output"]["headers"]["location"], line["output"]["headers"]["x-own"]) == ("/done", "kept")


def test_keys_are_left_out_of_the_record_and_not_of_what_passes(url: str, tmp_path: Path) -> None:
    """hidden_states reach the client, and by default not the file; "" keeps them."""
    for exclude, kept in ((("hidden_states",), False), ("", True)):
        directory = tmp_path / str(kept)
        with proxied(url, directory, exclude=exclude) as (proxy, _):
            answer = httpx.post(f"{proxy}/generate", json={"text": "a"}).json()
        assert len(answer["meta_info"]["hidden_states"][0]) == 64
        (line,) = lines_in(directory)
        assert ("hidden_states" in line["output"]["body"]["meta_info"]) is kept
        assert line["excluded"] == ([] if kept else ["output.body.meta_info.hidden_states"])


def test_packed_answers_pass_packed_and_are_recorded_unpacked(tmp_path: Path) -> None:
    """gzip passes byte by byte; the record has the JSON. One that unpacks to far more is recorded as it came."""
    bodies = {"/a": gzip.compress(b'{"text": "hi"}'), "/b": gzip.compress(bytes(80 << 20), 1)}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        await Response(bodies[scope["path"]], headers=headers)(scope, receive, send)

    with served(app) as url, proxied(url, tmp_path) as (proxy, _):
        for path, body in bodies.items():
            with httpx.stream("GET", proxy + path) as answer:
                assert b"".join(answer.iter_raw()) == body
    told, bomb = (line["output"] for line in lines_in(tmp_path))
    assert (told["kind"], told["body"]) == ("json", {"text": "hi"})
    assert (bomb["kind"], bomb["content_encoding"]) == ("base64", "gzip")


def test_bodies_are_recorded_as_deep_and_odd_as_they_are(url: str, tmp_path: Path) -> None:
    """Sixty levels of a schema, a lone surrogate in a body and in a header's place, and secrets inside of a body."""
    deep: Any = {"odd": "\ud800", "extra_headers": {"Authorization": "hush", "x-ok": "told"}}
    for _ in range(60):
        deep = {"properties": [deep]}
    with proxied(url, tmp_path) as (proxy, _):
        body = json.dumps(deep)
        answer = httpx.post(f"{proxy}/echo", content=body, headers={"content-type": "application/json"})
        assert answer.text == body
    (line,) = lines_in(tmp_path)
    for read in (line["request"], line["output"]["body"]):
        for _ in range(60):
            read = read["properties"][0]
        assert read == {"odd": "\ud800", "extra_headers": {"x-ok": "told"}}


# A thousand requests, and kills in the middle. Server and proxy are processes of their own.


def run_engine(pipe: Any) -> None:
    listening = tcp_socket()
    pipe.send(listening.getsockname()[1])
    config = make_config(Engine().app())
    config.lifespan = "off"
    uvicorn.Server(config).run(sockets=[listening])


def run_proxy(pipe: Any, upstream: str, directory: Path, threshold: int) -> None:
    recorder = RequestRecorder(directory, threshold)
    try:
        serve(upstream, "127.0.0.1", 0, recorder, 1 << 20, lambda told: pipe.send(told), grace_seconds=1)
    finally:
        recorder.close()


class Process:
    """A process that tells its port."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        here, there = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=function, args=(there, *arguments), daemon=True)
        self.process.start()
        there.close()
        told = here.recv()
        self.url = f"http://127.0.0.1:{told}" if isinstance(told, int) else told.split(" ")[2]

    def kill(self, number: int) -> int | None:
        os.kill(self.process.pid, number)
        self.process.join(250)
        return self.process.exitcode

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(250)


def ask(connections: threading.local, url: str, number: int) -> str:
    """One of the thousand: "ok", a status, or the name of the error. Every third is a stream, checked to its end."""
    place = urlsplit(url)
    if getattr(connections, "one", None) is None:
        connections.one = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    body = {"text": f"prompt {number}", "number": number, "stream": number % 3 == 0}
    try:
        connections.one.request("POST", "/generate", json.dumps(body), {"content-type": "application/json"})
        answer = connections.one.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as error:
        connections.one.close()
        connections.one = None
        return type(error).__name__
    if answer.status != 200:
        return str(answer.status)
    is_whole = text.endswith(b"data: [DONE]\n\n") if body["stream"] else "text" in json.loads(text)
    return "ok" if is_whole else "cut"


def hold_stream(url: str, number: int) -> http.client.HTTPResponse:
    """A stream that has begun and stands still."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    body = {"text": "held", "number": number, "stream": True, "hold": True}
    connection.request("POST", "/generate", json.dumps(body))
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data:")
    return answer


def ask_thousand(url: str, numbers: range) -> Counter[str]:
    connections = threading.local()
    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(lambda number: ask(connections, url, number), numbers))


def test_a_thousand_requests_with_the_server_killed_in_the_middle(tmp_path: Path) -> None:
    """SIGKILL of the server with a stream under way: its client sees it break off, later ones get 502, and every one of
    the thousand is recorded once, with what became of it. The proxy goes on, and SIGTERM ends it with all written."""
    with Process(run_engine) as server, Process(run_proxy, server.url, tmp_path, 300) as proxy:
        told = ask_thousand(proxy.url, range(600))
        assert told == {"ok": 600}
        held = hold_stream(proxy.url, 600)
        server.kill(signal.SIGKILL)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            held.read()
        told = ask_thousand(proxy.url, range(601, 1000))
        assert told == {"502": 399}
        assert proxy.kill(signal.SIGTERM) == -signal.SIGTERM
    recording = Recording(tmp_path)
    assert len(recording) == len(lines_in(tmp_path)) == 1000
    requests = [recording.read(place) for place in recording.places]
    assert sorted(request.request["number"] for request in requests) == list(range(1000))
    states = Counter(request.state for request in requests)
    assert states == {"finished": 600, "failed": 400}
    (broken,) = [request for request in requests if request.request["number"] == 600]
    assert broken.state == "failed" and len(broken.output["body"]) == 1
    assert all(len(r.output["body"]) == 6 for r in requests if r.state == "finished" and r.request["stream"])
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_proxy_killed_in_the_middle(number: int, tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C write all finished requests and the unfinished one; SIGKILL leaves whole batches only."""
    with Process(run_engine) as server, Process(run_proxy, server.url, tmp_path, 20) as proxy:
        assert ask_thousand(proxy.url, range(45)) == {"ok": 45}
        held = hold_stream(proxy.url, 45)
        # Written in the background: how soon is nobody's promise.
        wait_until(lambda: len(lines_in(tmp_path)) >= 20)
        proxy.kill(number)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            held.read()
        # The server has lost nothing by it.
        assert httpx.post(f"{server.url}/generate", json={"text": "a"}).status_code == 200
    recording = Recording(tmp_path)
    requests = [recording.read(place) for place in recording.places]
    if number == signal.SIGKILL:
        assert 20 <= len(requests) <= 45 and {request.state for request in requests} == {"finished"}
    else:
        assert Counter(request.state for request in requests) == {"finished": 45, "unfinished": 1}
        assert [r.request["number"] for r in requests if r.state == "unfinished"] == [45]


def test_sigusr1_writes_what_is_in_memory_and_the_proxy_goes_on(tmp_path: Path) -> None:
    """Finished requests and one whose stream is under way, which is then written again as what it came to."""
    with Process(run_engine) as server, Process(run_proxy, server.url, tmp_path, 1000) as proxy:
        assert ask_thousand(proxy.url, range(3)) == {"ok": 3}
        held = hold_stream(proxy.url, 3)
        os.kill(proxy.process.pid, signal.SIGUSR1)
        wait_until(lambda: len(lines_in(tmp_path)) == 4)
        assert Counter(line["state"] for line in lines_in(tmp_path)) == {"finished": 3, "unfinished": 1}
        assert ask_thousand(proxy.url, range(4, 6)) == {"ok": 2}
        assert proxy.kill(signal.SIGTERM) == -signal.SIGTERM
        held.close()
    assert len(Recording(tmp_path)) == 6


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    from grafter.errors import UsageError

    taken = tcp_socket()
    refused = pytest.raises(UsageError, match="cannot be listened on")
    with contextlib.closing(taken), RequestRecorder(tmp_path) as recorder, refused:
        serve("http://127.0.0.1:1", "127.0.0.1", taken.getsockname()[1], recorder, 1, lambda told: None)


def test_the_cost_is_measured_through_the_real_command() -> None:
    """benchmarks/proxying.py starts `grafter record` itself, and has times of every way; none is asserted."""
    from benchmarks.proxying import CASES, measure_proxy

    results = measure_proxy(1, 2)
    assert [result.case for result in results] == list(CASES)
    assert all(result.direct.median > 0 for result in results)
