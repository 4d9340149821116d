"""Replays to real servers: order, gaps, concurrency, lengths, what is told of differences, and the exit code."""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from jobs import PRELOAD
from request_files import lines_in
from request_parts import Engine, proxied, served, tcp_socket
from starlette.responses import JSONResponse
from typer.testing import CliRunner, Result

from grafter.cli import requests as commands
from grafter.cli.command_options import progress_bar
from grafter.cli.main import app
from grafter.tools.requests.judgement import Outcome
from grafter.tools.requests.reading import Recording
from grafter.tools.requests.recorder import RequestRecorder
from grafter.tools.requests.replay import ReplayOptions, replay

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


def grafter(*arguments: object) -> Result:
    # Wide enough that no word is folded.
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})


def replayed(directory: Path, urls: list[str], **options: Any) -> list[Outcome]:
    recording, outcomes = Recording(directory), list[Outcome]()
    options = {"speed": 0.0, **options}
    asyncio.run(replay(recording, recording.places, urls, ReplayOptions(**options), lambda done, of: None, outcomes))
    return outcomes


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve requests as the proxy recorded them: chat, completions and /generate, streams included, one refused."""
    directory = tmp_path_factory.mktemp("recorded")
    with served(Engine().app()) as url, proxied(url, directory) as (proxy, _), httpx.Client() as client:
        for number in range(3):
            messages = [{"role": "user", "content": f"question {number}"}]
            client.post(f"{proxy}/v1/chat/completions", json={"messages": messages, "logprobs": True})
            client.post(f"{proxy}/v1/chat/completions", json={"messages": messages, "stream": True})
            client.post(f"{proxy}/v1/completions", json={"prompt": f"prompt {number}", "max_tokens": 4})
            client.post(f"{proxy}/generate", json={"text": f"p{number}", "stream": number == 1, "return_logprob": True})
        client.post(f"{proxy}/error", json={"messages": []})
    return directory


def test_the_same_server_gives_the_same(recorded: Path) -> None:
    """Every API, streams, and the error that was recorded: exit code 0, and the table has no row."""
    with served(Engine().app()) as url:
        done = grafter("replay", recorded, "--to", url, "--speed", "0")
    assert done.exit_code == 0, done.output
    assert "13 requests, the recording and the server: 13 same: the same." in done.output
    assert "12 requests were sent with the recorded output's length." in done.output


def test_two_servers_are_compared_with_each_other(recorded: Path) -> None:
    """Both see every request once, in one order; what differs is named by its first word; exit code 1."""
    right, wrong = Engine(), Engine(fault_at=2)
    with served(right.app()) as a, served(wrong.app()) as b:
        done = grafter("replay", recorded, "--to", a, "--to", b, "--speed", 0, "--concurrency", 1, "--json")
    assert done.exit_code == 1
    *outcomes, summary = [json.loads(line) for line in done.output.splitlines()]
    assert summary["counts"] == {"different": 12, "same": 1} and summary["exit_code"] == 1
    assert right.seen == wrong.seen and len(right.seen) == 13
    assert [outcome["number"] for outcome in outcomes] == list(range(13))
    told = {outcome["path"]: outcome for outcome in outcomes}
    assert told["/generate"]["first_token"] == 2 and told["/v1/chat/completions"]["first_char"] > 5
    assert told["/generate"]["logprob"] == 0.0
    # The recording has the same status, too.
    assert (told["/error"]["verdict"], told["/error"]["statuses"]) == ("same", [400, 400])


def test_errors_that_were_recorded_are_no_failure_of_two_servers(recorded: Path) -> None:
    with served(Engine().app()) as a, served(Engine().app()) as b:
        done = grafter("replay", recorded, "--to", a, "--to", b, "--speed", 0)
    assert done.exit_code == 0, done.output
    assert "13 same" in done.output


def test_logprobs_are_compared_where_they_are_given(recorded: Path) -> None:
    with served(Engine(logprob=-0.75).app()) as url:
        done = grafter("replay", recorded, "--to", url, "--speed", 0, "--json")
        near = grafter("replay", recorded, "--to", url, "--speed", 0, "--logprob-tolerance", 0.3)
    outcomes = [json.loads(line) for line in done.output.splitlines()][:-1]
    different = [outcome for outcome in outcomes if outcome["verdict"] == "different"]
    assert len(different) == 6 and all(outcome["logprob"] == 0.25 for outcome in different)
    assert (done.exit_code, near.exit_code) == (1, 0)


def test_the_recorded_length_is_forced(recorded: Path) -> None:
    """A server that would say more is held to the recorded length; --no-force-length lets it go on."""
    talkative = Engine(natural_length=9)
    with served(talkative.app()) as url:
        forced = grafter("replay", recorded, "--to", url, "--speed", 0)
        free = grafter("replay", recorded, "--to", url, "--speed", 0, "--no-force-length", "--json")
    assert forced.exit_code == 0, forced.output
    assert free.exit_code == 1
    by_path = [body for path, body in talkative.seen[:13] if path == "/generate"]
    assert all(body["sampling_params"] == {"max_new_tokens": 5, "ignore_eos": True} for body in by_path)
    # One that would end earlier is made to go on, where the server knows the fields.
    terse = Engine(natural_length=2)
    with served(terse.app()) as url:
        assert grafter("replay", recorded, "--to", url, "--speed", 0).exit_code == 1
        exact = grafter("replay", recorded, "--to", url, "--speed", 0, "--ignore-eos", "--min-tokens")
    assert exact.exit_code == 0, exact.output
    assert [body["min_tokens"] for path, body in terse.seen[13:] if path == "/v1/completions"] == [4, 4, 4]


def test_only_what_was_asked_for_is_sent(recorded: Path) -> None:
    """By id and by number, the first included."""
    engine = Engine()
    places = Recording(recorded).places
    with served(engine.app()) as url:
        done = grafter("replay", recorded, "--to", url, "--only", "#0", "--only", places[2].id, "--concurrency", 1)
        assert done.exit_code == 0, done.output
        absent = grafter("replay", recorded, "--to", url, "--only", "#13")
    assert [path for path, _ in engine.seen] == ["/v1/chat/completions", "/v1/completions"]
    assert absent.exit_code == 2 and "#0 to #12" in absent.output


def write_requests(directory: Path, times: list[float], body: Any = None) -> None:
    """Requests that came at these times, in seconds."""
    lines = [json.dumps({"format": "grafter.tools.requests", "format_version": 1, "recorder": "r"})]
    for index, at in enumerate(times):
        output = {"status": 200, "kind": "json", "body": {"ok": True}}
        line = {"index": index, "id": f"r{index}", "time": 1000.0 + at, "state": "finished", "output": output}
        lines.append(json.dumps({**line, "request": body or {"n": index}, "meta": {"path": "/any"}}))
    (directory / "requests-x.jsonl").write_text("\n".join(lines) + "\n")


class Counting:
    """A server that tells in which order requests came, and how many were there at once."""

    def __init__(self, until: int = 0) -> None:
        self.until, self.order, self.most, self._now = until, list[int](), 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.order.append(body["n"])
        self._now += 1
        self.most = max(self.most, self._now)
        # Held until so many have been here at once: without time, and without end if they never are.
        while self.most < self.until:
            await asyncio.sleep(0.002)
        self._now -= 1
        await JSONResponse({"ok": True})(scope, receive, send)


@pytest.mark.parametrize(("speed", "gaps"), [(1.0, [0, 10, 20]), (2.0, [0, 5, 10]), (0.0, [0, 0, 0])])
def test_gaps_are_kept_and_speed_divides_them(
    speed: float, gaps: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only the replay's own waiting moves: 10 and 20 s as recorded, or half of it, or none."""
    from grafter.tools.requests import replay as replay_module

    write_requests(tmp_path, [0.0, 10.0, 30.0])
    now, waited = [100.0], list[float]()

    async def wait_until(due: float) -> None:
        waited.append(due - now[0])
        now[0] = due

    monkeypatch.setattr(replay_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(replay_module, "wait_until", wait_until)
    counting = Counting()
    with served(counting) as url:
        outcomes = replayed(tmp_path, [url], speed=speed, concurrency=1)
    assert [outcome.verdict for outcome in outcomes] == ["same"] * 3 and counting.order == [0, 1, 2]
    assert waited == pytest.approx(gaps)
    assert [outcome.late for outcome in outcomes] == [0, 0, 0]


def test_as_many_are_in_flight_as_allowed(tmp_path: Path) -> None:
    """Eight where eight are allowed, and never more than that; one at a time keeps the order exactly."""
    write_requests(tmp_path, [0.0] * 24)
    eight = Counting(until=8)
    with served(eight) as url:
        assert {outcome.verdict for outcome in replayed(tmp_path, [url], concurrency=8)} == {"same"}
    assert eight.most == 8
    single = Counting()
    with served(single) as url:
        replayed(tmp_path, [url], concurrency=1)
    assert single.order == list(range(24)) and single.most == 1


def test_a_slow_server_holds_the_other_back(tmp_path: Path) -> None:
    """With one place, neither of two servers sees a request before both have answered the one before."""
    write_requests(tmp_path, [0.0] * 6)
    seen: list[tuple[str, int]] = []

    def server(name: str, seconds: float) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            number = json.loads((await receive())["body"])["n"]
            seen.append((name, number))
            await asyncio.sleep(seconds)
            await JSONResponse({"ok": True})(scope, receive, send)

        return answer

    with served(server("fast", 0)) as a, served(server("slow", 0.02)) as b:
        replayed(tmp_path, [a, b], concurrency=1)
    assert [number for _, number in seen] == [number for n in range(6) for number in (n, n)]


def test_a_server_that_dies_is_an_outcome_of_each_request(recorded: Path, tmp_path: Path) -> None:
    """What was answered is compared, what was not is failed and counted; nothing hangs."""
    write_requests(tmp_path, [0.0] * 5)
    nobody = tcp_socket()
    dead = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    nobody.close()
    counting = Counting()
    with served(counting) as url:
        half = grafter("replay", tmp_path, "--to", url, "--to", dead, "--speed", 0, "--json")
    none = grafter("replay", tmp_path, "--to", dead, "--speed", 0)
    assert json.loads(half.output.splitlines()[-1])["counts"] == {"failed": 5}
    assert sorted(counting.order) == list(range(5))
    assert "B: ConnectError" in half.output and half.exit_code == none.exit_code == 2
    assert "nothing could be compared" in none.output
    with served(Engine().app()) as url:
        write_requests(tmp_path, [0.0])
        broken = (tmp_path / "requests-x.jsonl").read_text().replace('"/any"', '"/broken"')
        (tmp_path / "requests-x.jsonl").write_text(broken)
        (outcome,) = replayed(tmp_path, [url])
    assert outcome.verdict == "failed" and "ended early, after" in outcome.reasons[0] and outcome.statuses == [200]


def test_a_recording_that_was_replayed_through_the_proxy_is_the_same_again(recorded: Path, tmp_path: Path) -> None:
    """Recorded, sent through another recording proxy, and recorded once more: the same requests in the same order."""
    with served(Engine().app()) as url, proxied(url, tmp_path) as (proxy, _):
        outcomes = replayed(recorded, [proxy], concurrency=1, forcing=_not_forced())
    assert {outcome.verdict for outcome in outcomes} == {"same"}
    first, second = lines_in(recorded), lines_in(tmp_path)
    assert [line["request"] for line in first] == [line["request"] for line in second]
    assert [line["output"]["body"] for line in first] == [line["output"]["body"] for line in second]


def _not_forced() -> Any:
    from grafter.tools.requests.call import Forcing

    return Forcing(is_on=False)


def test_own_headers_are_sent_with_every_request(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "hush")
    engine = Engine()
    with served(engine.app()) as url:
        done = grafter("replay", recorded, "--to", url, "--speed", 0, "--header", "Authorization: Bearer $ENGINE_KEY")
    assert done.exit_code == 0 and "hush" not in done.output
    assert {headers["authorization"] for headers in engine.headers} == {"Bearer hush"}


def test_requests_that_cannot_be_sent_are_told_and_not_counted_as_the_same(tmp_path: Path) -> None:
    """A configuration object and an unfinished request: exit code 2 for the first, and the second is sent."""
    engine = Engine()
    with RequestRecorder(tmp_path) as recorder:
        recorder.record("odd", {"text": "x", "config": object()})
        recorder.record("open", {"text": "y"})
        recorder.record("fine", {"text": "z", "sampling_params": {}})
    text = "".join((tmp_path / name.name).read_text() for name in tmp_path.iterdir())
    assert "unfinished" in text
    with served(engine.app()) as url:
        done = grafter("replay", tmp_path, "--to", url, "--speed", 0, "--concurrency", 1)
        both = grafter("replay", tmp_path, "--to", url, "--to", url, "--speed", 0, "--concurrency", 1)
    assert [body["text"] for _, body in engine.seen] == ["y", "z", "y", "y", "z", "z"]
    assert done.exit_code == 2 and "request.config was not recorded" in done.output
    assert both.exit_code == 2 and "2 same, 1 not sent" in both.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("replay", "absent.jsonl", "--to", "http://x"), "there is no such file"),
        (("replay", ".", "--to", "x"), "--to x: write it as http://HOST:PORT"),
        (("replay", ".", "--to", "http://a", "--to", "http://b", "--to", "http://c"), "--to is given 3 times"),
        (("record", "--upstream", "x", "--port", "0"), "--upstream x: write it"),
        (("record", "--upstream", "http://u:hush@x", "--port", "0"), "a user or a password"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = grafter(*arguments)
    assert done.exit_code == 2 and told in done.output and "hush" not in done.output


@pytest.mark.parametrize("command", ["record", "replay"])
def test_a_missing_extra_says_what_to_install(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "uvicorn" else object())
    arguments = {"record": ("--upstream", "http://x", "--port", 0), "replay": (".", "--to", "http://x")}[command]
    done = grafter(command, *arguments)
    assert done.exit_code == 2
    assert f"grafter {command} needs uvicorn: pip install httpx starlette uvicorn h11" in done.output


def test_a_bar_shows_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, with how many of how many are done; in a pipe, nothing."""
    for is_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with progress_bar("replaying", "requests", 3) as progress:
            progress(2, 3)
        assert ("2/3" in stream.getvalue() and "replaying" in stream.getvalue()) is is_terminal
        assert is_terminal or not stream.getvalue()


def test_ctrl_c_shows_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, with the outcomes so far."""
    from grafter.tools.requests import replay as replay_module

    write_requests(tmp_path, [0.0, 0.0, 5000.0])
    real = replay_module.wait_until

    async def interrupted(due: float) -> None:
        if due > time.monotonic() + 1000:
            await asyncio.sleep(0.2)
            raise KeyboardInterrupt
        await real(due)

    monkeypatch.setattr(replay_module, "wait_until", interrupted)
    with served(Counting()) as url:
        done = grafter("replay", tmp_path, "--to", url)
    assert done.exit_code == 130 and "2 requests" in done.output and "2 same" in done.output


def test_the_recorder_needs_no_extra() -> None:
    """grafter.RequestRecorder, and reading a recording, import none of the extra's packages."""
    code = """
import sys, grafter
from grafter.tools.requests import reading
assert grafter.RequestRecorder
pipe.send([name for name in ("httpx", "starlette", "uvicorn", "h11") if name in sys.modules])
"""
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=exec, args=(code, {"pipe": there}))
    process.start()
    assert here.recv() == []
    process.join()


def test_nothing_of_a_replay_is_left_running(recorded: Path) -> None:
    before = threading.active_count()
    with served(Engine().app()) as url:
        replayed(recorded, [url])
    assert threading.active_count() <= before
