"""Recordings read without trust, requests made of them, answers understood, and what differs between two: all pure."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafter.cli.requests import read_headers
from grafter.errors import DumpError, GrafterError, UsageError
from grafter.tools.requests import reading
from grafter.tools.requests.answers import read_answer
from grafter.tools.requests.call import Forcing, NoCall, api_of, make_call, recorded_length
from grafter.tools.requests.entry import body_bytes, body_fields, read_events
from grafter.tools.requests.judgement import Outcome, judge, recorded_reply, summarise
from grafter.tools.requests.reading import Place, Recorded, Recording
from grafter.tools.requests.recorder import RequestRecorder
from grafter.tools.requests.replay import choose
from grafter.tools.requests.sending import Reply
from grafter.tools.requests.serving import check_url

HEADER = {"format": "grafter.tools.requests", "format_version": 1, "recorder": "r"}
LINE = {
    "index": 0,
    "id": "a",
    "time": 1.0,
    "state": "finished",
    "request": {"text": "x"},
    "meta": {"path": "/generate"},
}
PLACE = Place(0, "a", 1.0, "finished", "f", 2, 0, 0)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def write(directory: Path, *lines: Any, name: str = "requests-x.jsonl", end: str = "\n") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path = directory / name
    path.write_text("\n".join(texts) + end)
    return path


def recorded(**fields: Any) -> Recorded:
    return Recorded.model_validate({**LINE, **fields})


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], ":1: its first line is not the header"),
        (["{"], ":1: its first line is not the header"),
        (["[" * 100_000], ":1: its first line is not the header"),
        ([{**HEADER, "format": "other"}], "of the format 'other'"),
        ([{**HEADER, "format_version": 2}], "Update grafter here"),
        ([{**HEADER, "format_version": "1"}], ":1: its first line is not the header"),
        ([HEADER, "nonsense"], ":2: it is not JSON"),
        ([HEADER, LINE, {**LINE, "index": -1}], ":3: it is not a request: index"),
        ([HEADER, LINE, {**LINE, "state": "odd"}], ":3: it is not a request: state"),
        ([HEADER, {**LINE, "time": float("nan")}], ":2: its time is nan"),
        ([HEADER, {**LINE, "time": float("inf")}], ":2: its time is inf"),
        ([HEADER, '{"index": ' + "9" * 10_000 + "}"], ":2: it is no"),
        ([HEADER, "[" * 100_000], ":2: it is nested too deep"),
        ([HEADER, "[]"], ":2: it is not a request"),
        ([HEADER, {**LINE, "request": None, "id": 5}], ":2: it is not a request: id"),
    ],
)
def test_what_is_no_recording_is_an_error_with_its_line(lines: list[Any], told: str, tmp_path: Path) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(DumpError) as caught:
        Recording(path)
    assert told in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there, an empty directory, an empty file, a half line, a line too long, a pipe, a link in a directory."""
    with pytest.raises(DumpError, match="no such file"):
        Recording(tmp_path / "absent.jsonl")
    with pytest.raises(DumpError, match="nothing was recorded"):
        Recording(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DumpError, match="it is empty"):
        Recording(empty)
    with pytest.raises(DumpError, match=":2: it is incomplete"):
        Recording(write(tmp_path, HEADER, LINE, end="", name="half.jsonl"))
    monkeypatch.setattr(reading, "LONGEST_LINE", 200)
    with pytest.raises(DumpError, match=":2: it is longer than 200 bytes"):
        Recording(write(tmp_path, HEADER, {**LINE, "request": "x" * 1000}, name="long.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DumpError, match="no plain file"):
        Recording(tmp_path / "pipe.jsonl")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "requests-l.jsonl").symlink_to(write(tmp_path, HEADER, LINE))
    with pytest.raises(DumpError, match="symbolic link"):
        Recording(tmp_path / "d")


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_grafter_error(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.jsonl"
    path.write_bytes(json.dumps(HEADER).encode() + b"\n" + noise)
    try:
        Recording(path)
    except GrafterError as error:
        assert str(path) in str(error)


def test_requests_of_several_files_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    """Of two recorders in one directory; and an unfinished line gives way to the finished one of the same request."""
    write(tmp_path, HEADER, {**LINE, "time": 3.0, "state": "unfinished"}, {**LINE, "index": 1, "id": "b", "time": 1.0})
    write(tmp_path, {**HEADER, "recorder": "s"}, {**LINE, "id": "c", "time": 2.0}, name="requests-y.jsonl")
    write(tmp_path, HEADER, {**LINE, "time": 3.0, "output": 1}, name="requests-z.jsonl")
    (tmp_path / "requests-w.jsonl.tmp").write_text("half")
    recording = Recording(tmp_path)
    assert [(place.number, place.id, place.state) for place in recording.places] == [
        (0, "b", "finished"), (1, "c", "finished"), (2, "a", "finished"),
    ]  # fmt: skip
    assert recording.read(recording.places[2]).output == 1
    write(tmp_path, HEADER, {**LINE, "time": 4.0, "output": 2}, name="requests-z.jsonl")
    with pytest.raises(DumpError, match="changed while it was read"):
        recording.read(recording.places[2])


def test_tensors_are_read_from_beside_the_lines_alone(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER, {**LINE, "tensor_file": "../secret.safetensors"})
    recording = Recording(path)
    with pytest.raises(DumpError, match="does not name a file of tensors"):
        recording.tensor(recording.read(recording.places[0]), "request", 0)


def test_requests_are_chosen_by_id_or_number() -> None:
    """Number 0 included; in recorded order, each once; what is not there is named."""
    places = [Place(number, id, 0.0, "finished", "f", 1, 0, 0) for number, id in enumerate("abcb")]
    assert [place.number for place in choose(places, [])] == [0, 1, 2, 3]
    assert [place.number for place in choose(places, ["#0"])] == [0]
    assert [place.number for place in choose(places, ["c", "#0", "c"])] == [0, 2]
    assert [place.number for place in choose(places, ["b"])] == [1, 3]
    for absent in ("d", "#4", "#", "#-1", "#٣", "#" + "9" * 5000):
        with pytest.raises(UsageError, match="no request of the recording"):
            choose(places, [absent])


# Requests made of records.


def test_a_call_has_what_was_recorded_and_no_secret() -> None:
    meta = {
        "method": "PUT", "path": "/v1/x", "query": "a=1", "kind": "text",
        "headers": {"x-a": "b", "host": "old", "content-length": "9", "Authorization": "hush", "b\n": "x", "y": "a\nb"},
    }  # fmt: skip
    call = make_call(recorded(request="hi", meta=meta), Forcing())
    assert (call.method, call.target, call.body, call.api) == ("PUT", "/v1/x?a=1", b"hi", "other")
    assert call.headers == {"x-a": "b", "content-type": "application/json"}


@pytest.mark.parametrize(
    ("request_body", "path", "api"),
    [
        ({"messages": []}, "/v1/chat/completions", "chat"),
        ({"prompt": "x"}, "/v1/completions", "completions"),
        ({"text": "x"}, "/generate", "generate"),
        ({"input_ids": [1]}, "/generate", "generate"),
    ],
)
def test_a_record_without_a_path_is_known_by_its_fields(request_body: Any, path: str, api: str) -> None:
    call = make_call(recorded(request=request_body, meta=None), Forcing())
    assert (call.target, call.api, call.method) == (path, api, "POST")
    assert api_of(f"/prefix{path}/?x=1") == api


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"meta": {"path": "http://evil/"}}, "does not begin with /"),
        ({"meta": {"path": 5}}, "does not begin with /"),
        ({"meta": {"path": "/a b"}}, "its path"),
        ({"meta": {"path": "/a\r\nx: y"}}, "its path"),
        ({"meta": {"path": "/a", "query": "x#y"}}, "its path"),
        ({"meta": {"path": "/a", "method": "GET /"}}, "its method"),
        ({"meta": {"path": "/a", "method": "CONNECT"}}, "its method"),
        ({"meta": {"path": "/a", "kind": "odd"}}, "kind 'odd'"),
        ({"meta": {"path": "/a", "kind": "base64"}, "request": "%"}, "base64"),
        ({"meta": {"path": "/a", "kept_bytes": 5, "bytes": 9}}, "only 5 of its 9 bytes"),
        ({"meta": None, "request": {}}, "names no path"),
        ({"meta": None, "request": "x"}, "names no path"),
        ({"request": {"text": "x", "image": {"__grafter_tensor__": 0}}}, "tensor"),
        ({"not_encoded": {"request.params": "<X>"}}, "request.params was not recorded"),
        ({"excluded": ["request.a", "request.b"]}, "nor were 1 more"),
    ],
)
def test_what_cannot_be_sent_says_why(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(NoCall, match=why):
        make_call(recorded(**fields), Forcing())


@given(st.dictionaries(st.sampled_from(["path", "method", "headers", "query", "kind"]), JSON), JSON)
def test_no_record_raises_anything_else(meta: dict[str, Any], body: Any) -> None:
    try:
        call = make_call(recorded(meta=meta, request=body), Forcing())
    except NoCall:
        return
    assert call.target.startswith("/") and "\n" not in "".join([call.method, call.target, *call.headers.values()])


# The output's length.


def answered(body: Any, kind: str = "json", status: int = 200) -> dict[str, Any]:
    return {"status": status, "kind": kind, "body": body}


def test_the_recorded_length_is_forced_in_the_apis_own_words() -> None:
    """OpenAI: the limit under the name that the request uses, and other fields only where asked; SGLang: exactly."""
    chat = answered({"choices": [{"message": {"content": "a b"}}], "usage": {"completion_tokens": 7}})
    meta = {"path": "/v1/chat/completions"}

    def sent(request: Any, output: Any, meta: Any, forcing: Forcing) -> tuple[Any, int | None]:
        call = make_call(recorded(request=request, output=output, meta=meta), forcing)
        return json.loads(call.body), call.forced

    assert sent({"messages": []}, chat, meta, Forcing()) == ({"messages": [], "max_tokens": 7}, 7)
    newer = {"messages": [], "max_completion_tokens": 100}
    assert sent(newer, chat, meta, Forcing())[0] == {"messages": [], "max_completion_tokens": 7}
    exactly = sent({"messages": []}, chat, meta, Forcing(ignore_eos=True, min_tokens=True))[0]
    assert exactly == {"messages": [], "max_tokens": 7, "ignore_eos": True, "min_tokens": 7}
    assert sent({"messages": []}, chat, meta, Forcing(is_on=False)) == ({"messages": []}, None)
    generated = answered(
        [
            {"text": "a", "meta_info": {"completion_tokens": 1}},
            {"text": "ab", "meta_info": {"completion_tokens": 2}},
            "[DONE]",
        ],
        "events",
    )
    request = {"text": "x", "sampling_params": {"temperature": 0, "max_new_tokens": 50, "stop": ["z"]}}
    assert sent(request, generated, {"path": "/generate"}, Forcing()) == (
        {"text": "x", "sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True, "stop": ["z"]}}, 2,
    )  # fmt: skip
    assert request["sampling_params"]["max_new_tokens"] == 50


@pytest.mark.parametrize(
    ("output", "api"),
    [
        (None, "chat"),
        (answered({"error": "x"}, status=400), "chat"),
        ({**answered({"choices": [{"text": "a"}], "usage": {"completion_tokens": 3}}), "kept_bytes": 5}, "completions"),
        (answered({"choices": [{"index": 0}, {"index": 1}], "usage": {"completion_tokens": 9}}), "completions"),
        (answered({"choices": [{"text": "a"}], "usage": {"completion_tokens": True}}), "completions"),
        (answered({"choices": [{"text": "a"}], "usage": {"completion_tokens": 1 << 40}}), "completions"),
        (answered([{"text": "a", "meta_info": {"completion_tokens": 1}}] * 2), "generate"),
    ],
)
def test_a_length_that_is_not_known_is_not_forced(output: Any, api: str) -> None:
    assert recorded_length(output, api) is None


def test_an_unfinished_requests_length_is_not_forced() -> None:
    half = answered([{"text": "a", "meta_info": {"completion_tokens": 1}}], "events")
    assert make_call(recorded(output=half, state="unfinished"), Forcing()).forced is None


# Answers.


def test_streams_and_plain_answers_are_read_alike() -> None:
    chat = read_answer({"choices": [{"message": {"content": "a b"}, "finish_reason": "stop"}]}, "chat", False)
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant"}}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}}]},
        {"choices": [{"index": 0, "delta": {"content": " b"}, "finish_reason": "stop"}]},
        "[DONE]",
    ]
    assert chat is not None and read_answer(events, "chat", True) == chat


@pytest.mark.parametrize("is_cumulative", [True, False])
def test_streams_of_generate_tell_all_so_far_or_what_is_new(is_cumulative: bool) -> None:
    """Both are understood, also where a token is repeated."""
    texts, ids = ["a", "a", "a", "b"], [5, 5, 5, 6]
    events: list[Any] = []
    for count in range(1, 5):
        since = 0 if is_cumulative else count - 1
        pairs = [[-0.1 * n, ids[n], None] for n in range(since, count)]
        meta = {"completion_tokens": count, "output_token_logprobs": pairs, "finish_reason": None}
        events.append({"text": "".join(texts[since:count]), "output_ids": ids[since:count], "meta_info": meta})
    answer = read_answer([*events, "[DONE]"], "generate", True)
    assert answer is not None
    (output,) = answer.outputs
    assert (output.text, output.tokens, output.token_count) == ("aaab", ids, 4)
    assert output.logprobs == [-0.1 * n for n in range(4)]


@given(JSON, st.sampled_from(["chat", "completions", "generate", "other"]), st.booleans())
def test_no_answer_raises(body: Any, api: str, is_stream: bool) -> None:
    for wrapped in (body, {"choices": [body, {"delta": body, "logprobs": body}]}, {"text": body, "meta_info": body}):
        read_answer(wrapped, api, is_stream)
        read_answer([wrapped, wrapped], api, is_stream)


# Bodies.


def test_events_are_read_by_their_rules() -> None:
    text = ': hi\r\n\r\ndata: {"a":\r\ndata: 1}\r\n\r\nevent: x\ndata:two\n\ndata: cut off'
    assert read_events(text) == [{"a": 1}, "two"]


@given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "", "image/png"]))
def test_any_body_is_sent_again_as_it_was(data: bytes, content_type: str) -> None:
    """Byte by byte, or, where it is JSON, as the same JSON."""
    fields = body_fields([data], len(data), content_type)
    again = body_bytes(fields["kind"], fields["body"])
    if fields["kind"] == "json":
        one, other = json.loads(data), json.loads(again)
        assert one == other or (isinstance(one, float) and math.isnan(one)) or str(one) == str(other)
    else:
        assert again == data


# What differs.


def generated(text: str = "abc", ids: Any = (1, 2, 3), logprobs: Any = None, status: int = 200, **more: Any) -> Reply:
    meta: dict[str, Any] = {"completion_tokens": len(ids)}
    if logprobs is not None:
        meta["output_token_logprobs"] = [[value, id, None] for value, id in zip(logprobs, ids, strict=True)]
    return Reply(status, "json", {"text": text, "output_ids": list(ids), "meta_info": meta, **more})


def test_the_first_difference_is_named() -> None:
    """Character and token from 0, and the largest logprob difference before the first differing token."""
    a = generated("abc", (1, 2, 3), (-0.5, -0.25, -0.5))
    b = generated("abd", (1, 2, 4), (-0.5, -0.75, -9.0))
    outcome = judge(PLACE, "generate", [a, b], None, 0.0)
    assert outcome.verdict == "different"
    assert (outcome.first_char, outcome.first_token, outcome.logprob) == (2, 2, 0.5)
    assert judge(PLACE, "generate", [a, a], None, 0.0).verdict == "same"
    shorter = judge(PLACE, "generate", [a, generated("ab", (1, 2))], None, 0.0)
    assert (shorter.first_char, shorter.first_token) == (2, 2) and "the end" in "; ".join(shorter.reasons)


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "verdict"),
    [
        (-0.5, -0.5, 0.0, "same"),
        (-0.5, -0.6, 0.0, "different"),
        (-0.5, -0.6, 0.2, "same"),
        (float("-inf"), float("-inf"), 0.0, "same"),
        (float("-inf"), -1.0, 9.0, "different"),
        (float("nan"), -1.0, 9.0, "different"),
        (float("nan"), float("nan"), 0.0, "same"),
    ],
)
def test_logprobs_differ_beyond_the_tolerance(a: float, b: float, tolerance: float, verdict: str) -> None:
    replies = [generated("x", (1,), (value,)) for value in (a, b)]
    assert judge(PLACE, "generate", replies, None, tolerance).verdict == verdict


def test_a_servers_error_is_an_outcome_and_no_equality() -> None:
    """Two equal errors are no success, unless the recording has the same status; a missing answer never is."""
    error, fine = Reply(500, "text", "no"), generated()
    assert judge(PLACE, "generate", [error, error], fine, 0.0).verdict == "failed"
    assert judge(PLACE, "generate", [error, error], None, 0.0).verdict == "failed"
    assert judge(PLACE, "generate", [fine, error], fine, 0.0).reasons == ["B: status 500: 'no'"]
    assert judge(PLACE, "generate", [error, error], error, 0.0).verdict == "same"
    assert judge(PLACE, "generate", [error], error, 0.0).verdict == "same"
    assert judge(PLACE, "generate", [fine], error, 0.0).verdict == "different"
    assert judge(PLACE, "generate", [fine, error], error, 0.0).verdict == "different"
    assert judge(PLACE, "generate", [Reply(200, error="broke off")], fine, 0.0).verdict == "failed"


def test_other_answers_are_compared_as_json() -> None:
    """The first path that differs; what servers make anew (id, created) does not count."""
    a, b = (
        Reply(200, "json", {"id": n, "created": n, "data": [{"x": 1}, {"x": value}]}) for n, value in ((1, 2), (2, 3))
    )
    assert judge(PLACE, "other", [a, b], None, 0.0).reasons == [".data[1].x: 2, 3"]
    assert judge(PLACE, "other", [a, Reply(200, "json", {**a.body, "id": 5})], None, 0.0).verdict == "same"
    deep: Any = 0
    other: Any = 1
    for _ in range(50_000):
        deep, other = [deep], [other]
    assert (
        judge(PLACE, "other", [Reply(200, "json", deep), Reply(200, "json", other)], None, 0.0).verdict == "different"
    )


def test_without_a_whole_recorded_answer_nothing_is_compared() -> None:
    for fields in (
        {"state": "unfinished"},
        {"state": "failed"},
        {"output": None},
        {"output": {**answered("x"), "kept_bytes": 3}},
    ):
        assert recorded_reply(recorded(**{"output": answered("x"), **fields})) is None
    assert judge(PLACE, "generate", [generated()], None, 0.0).verdict == "not_compared"


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (["same", "same"], 0),
        (["same", "not_compared"], 0),
        (["same", "different"], 1),
        (["same", "failed"], 1),
        (["same", "not_sent"], 2),
        (["different", "not_sent"], 1),
        (["failed", "failed"], 2),
        (["not_compared"], 2),
        ([], 2),
    ],
)
def test_exit_codes(verdicts: list[Any], code: int) -> None:
    """0 the same, 1 something differs or failed, 2 not to be judged."""
    assert summarise([Outcome(0, "a", verdict) for verdict in verdicts], 1).exit_code == code


# The command line's own words.


def test_headers_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hush")
    assert read_headers(["Authorization: Bearer $API_KEY", "x-a:b"]) == {"Authorization": "Bearer hush", "x-a": "b"}
    for wrong in ("no colon", ": x", "a b: x", "a: $NOT_THERE_AT_ALL", "a: b\nc"):
        with pytest.raises(UsageError) as caught:
            read_headers([wrong])
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:1", "ftp://x", "http://", "http://x:99999", "http://x/?q=1", "http://[x", "http://" + "a" * 70],
)
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--to"):
        check_url(url, "--to")
    with pytest.raises(UsageError) as caught:
        check_url("http://user:hush@x/", "--to")
    assert "hush" not in str(caught.value)


def test_a_recording_from_inside_of_a_server_can_be_sent(tmp_path: Path) -> None:
    """Fields of a request without meta data of HTTP, an output without status."""
    with RequestRecorder(tmp_path) as recorder:
        recorder.record("a", {"text": "x", "sampling_params": {"temperature": 0}})
        recorder.finish("a", {"text": "y", "output_ids": [1], "meta_info": {"completion_tokens": 1}})
    recording = Recording(tmp_path)
    call = make_call(recording.read(recording.places[0]), Forcing())
    assert call.target == "/generate" and json.loads(call.body)["sampling_params"]["max_new_tokens"] == 1
    assert recorded_reply(recording.read(recording.places[0])) == Reply(
        None, "json", {"text": "y", "output_ids": [1], "meta_info": {"completion_tokens": 1}}
    )
