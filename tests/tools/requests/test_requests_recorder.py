"""The recorder inside of a server: what is written, when, what is left out, and what the end of a process leaves."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import PRELOAD
from pydantic import BaseModel
from request_files import lines_in, wait_until

import grafter
from grafter.errors import UsageError
from grafter.store.dumps.snapshot import Buffers
from grafter.tools.requests import recorder as recorder_module
from grafter.tools.requests.batch_file import encode_part
from grafter.tools.requests.reading import Recording
from grafter.tools.requests.recorder import RequestRecorder

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


def records(directory: Path) -> list[Any]:
    recording = Recording(directory)
    return [recording.read(place) for place in recording.places]


def test_a_request_its_meta_data_and_output_are_read_back(tmp_path: Path) -> None:
    """All that JSON has, tensors of any dtype with their values, and times."""
    before = time.time()
    tensors = {"f": torch.randn(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor([1 + 2j])}
    with grafter.RequestRecorder(tmp_path) as recorder:
        recorder.record("a", {"text": "ü☃", "n": [1, 2.5, None, True], "t": tensors["f"]}, {"path": "/generate"})
        recorder.finish("a", {"b": tensors["b"], "c": tensors["c"], "array": np.arange(3)})
    (record,) = records(tmp_path)
    assert record.request == {"text": "ü☃", "n": [1, 2.5, None, True], "t": {"__grafter_tensor__": 0}}
    assert record.meta == {"path": "/generate"} and record.state == "finished"
    assert before <= record.time <= record.finished_time <= time.time()
    recording = Recording(tmp_path)
    assert torch.equal(recording.tensor(record, "request", 0), tensors["f"])
    assert torch.equal(recording.tensor(record, "output", 0), tensors["b"])
    assert torch.equal(recording.tensor(record, "output", 1), tensors["c"])
    assert recording.tensor(record, "output", 2).tolist() == [0, 1, 2]


def test_the_caller_may_change_everything_once_record_returns(tmp_path: Path) -> None:
    request: dict[str, Any] = {"ids": list(range(100)), "t": torch.zeros(20_000)}
    with RequestRecorder(tmp_path) as recorder:
        recorder.record("a", request)
        request["ids"][:] = [7]
        request["t"].fill_(1)
        request["new"] = 1
        recorder.finish("a")
    (record,) = records(tmp_path)
    assert record.request["ids"] == list(range(100)) and "new" not in record.request
    assert Recording(tmp_path).tensor(record, "request", 0).sum() == 0


class Colour(enum.IntEnum):
    RED = 3


@dataclasses.dataclass
class Params:
    temperature: float
    config: Any


class Model(BaseModel):
    text: str
    n: int = 1


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __iter__(self) -> Any:
        raise RuntimeError("no")


def test_what_cannot_be_encoded_costs_only_itself(tmp_path: Path) -> None:
    """A configuration object whose class was made at run time, a cycle, an object that raises: each is named."""
    cycle: list[Any] = []
    cycle.append(cycle)
    made = types.new_class("Made")()
    with RequestRecorder(tmp_path) as recorder:
        recorder.record("a", {"params": Params(0.5, made), "model": Model(text="x"), "hostile": Hostile(), "c": cycle})
        recorder.finish("a", {1: "x", "red": Colour.RED, "surrogate": "\ud800"})
        recorder.record("\udfff", 1)
        recorder.finish("\udfff", 1)
    record, odd = records(tmp_path)
    assert odd.id == "\udfff"
    assert record.request["params"]["temperature"] == 0.5 and record.request["model"] == {"text": "x", "n": 1}
    assert {"request.params.config", "request.hostile"} <= record.not_encoded.keys()
    assert "Made object" in record.request["params"]["config"]
    assert record.output["red"] == 3
    assert {"output[1]", "output.surrogate"} <= record.not_encoded.keys()


def test_excluded_keys_are_left_out_at_any_depth_and_stay_with_the_caller(tmp_path: Path) -> None:
    output = {"meta": [{"routed_experts": torch.ones(4), "kept": 1}], "hidden_states": [1]}
    with RequestRecorder(tmp_path) as recorder:
        for id, exclude in (("default", None), ("own", "kept, other"), ("all", "")):
            recorder.configure(exclude=exclude)
            recorder.record(id, {})
            recorder.finish(id, output)
    by_id = {record.id: record for record in records(tmp_path)}
    assert by_id["default"].output == {"meta": [{"kept": 1}]}
    assert by_id["default"].excluded == ["output.meta[0].routed_experts", "output.hidden_states"]
    assert by_id["own"].output["meta"] == [{"routed_experts": {"__grafter_tensor__": 0}}]
    assert by_id["all"].output["hidden_states"] == [1] and by_id["all"].excluded == []
    assert output.keys() == {"meta", "hidden_states"} and output["meta"][0].keys() == {"routed_experts", "kept"}


@given(
    st.sampled_from(["authorization", "cookie", "x-api-key", "set-cookie", "x-token", "secret", "proxy-authorization"]),
    st.lists(st.booleans(), min_size=20, max_size=20),
    st.sampled_from(["headers", "Headers", "request_headers", "extra_headers"]),
    st.booleans(),
)  # fmt: skip
def test_secrets_in_headers_are_never_written(name: str, upper: list[bool], key: str, as_pairs: bool) -> None:
    """In any spelling, as a mapping or as pairs, of text or of bytes, wherever headers stand."""
    spelt = "".join(c.upper() if up else c for c, up in zip(name, upper * 2, strict=False))
    headers: Any = {spelt: "hush", "x-ok": "told"}
    if as_pairs:
        headers = [(spelt.encode(), b"hush"), ("x-ok", "told")]
    text = encode_part({"deep": [{key: headers}]}, "meta", frozenset(), Buffers(1 << 20)).text
    assert "hush" not in text and b"hush".hex() not in text and "told" in text


def test_enough_finished_requests_are_a_batch(tmp_path: Path) -> None:
    """Whole files of `threshold` requests appear while the server runs; what is below it waits; indices have no gap."""
    with RequestRecorder(tmp_path, threshold=10) as recorder:
        for number in range(25):
            recorder.record(str(number), number)
            recorder.finish(str(number))
            wait_until(lambda done=number + 1: recorder.counts.get("written", 0) >= done // 10 * 10)
        assert len(lines_in(tmp_path)) == 20
        recorder.configure(threshold=5)
        wait_until(lambda: len(lines_in(tmp_path)) == 25)
    assert [record.index for record in records(tmp_path)] == list(range(25))
    assert not list(tmp_path.glob("*.tmp"))


def test_requests_from_many_threads_are_each_written_once(tmp_path: Path) -> None:
    with RequestRecorder(tmp_path, threshold=7) as recorder:

        def serve(thread: int) -> None:
            for number in range(50):
                recorder.record(f"{thread}.{number}", {"t": torch.full((10,), thread)})
                recorder.finish(f"{thread}.{number}", number)

        threads = [threading.Thread(target=serve, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = lines_in(tmp_path)
    assert len(lines) == 400 and len({line["id"] for line in lines}) == 400
    assert {line["index"] for line in lines} == set(range(400))
    recording = Recording(tmp_path)
    for place in recording.places[::40]:
        record = recording.read(place)
        assert set(recording.tensor(record, "request", 0).tolist()) == {int(record.id.split(".")[0])}
    assert recorder.counts == {"recorded": 400, "finished": 400, "written": 400, "open": 0}


def test_a_dump_holds_all_once_and_never_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Finished and unfinished requests; a second dump adds nothing; an unfinished one that is finished later counts as
    finished; and a directory that is gone is told, not raised."""
    recorder = RequestRecorder(tmp_path / "d")
    recorder.record("done", 1)
    recorder.finish("done", 2)
    recorder.record("open", {"t": torch.arange(30_000)})
    recorder.dump_now()
    recorder.dump_now()
    assert Counter(line["state"] for line in lines_in(tmp_path / "d")) == {"finished": 1, "unfinished": 1}
    recorder.record("other", {"t": torch.zeros(30_000)})
    recorder.finish("open", 3)
    recorder.dump_now()
    by_id = {record.id: record for record in records(tmp_path / "d")}
    assert {id: record.state for id, record in by_id.items()} == {
        "done": "finished", "open": "finished", "other": "unfinished",
    }  # fmt: skip
    # Its memory was still its own.
    assert torch.equal(Recording(tmp_path / "d").tensor(by_id["open"], "request", 0), torch.arange(30_000))
    for file in (tmp_path / "d").iterdir():
        file.unlink()
    (tmp_path / "d").rmdir()
    recorder.record("lost", 1)
    recorder.finish("lost", 1)
    with caplog.at_level(logging.WARNING):
        recorder.dump_now()
    assert "1 requests could not be written" in caplog.text and recorder.counts["lost"] == 1
    recorder.close()


def test_a_dump_in_the_middle_of_anything_comes_to_its_end(tmp_path: Path) -> None:
    """As a signal handler makes it: on a thread that holds the recorder's lock, and inside of another dump."""
    with RequestRecorder(tmp_path) as recorder:
        recorder.record("a", 1)
        with recorder._changed, recorder._changed:
            recorder.dump_now()
            assert [line["id"] for line in lines_in(tmp_path)] == ["a"]
            recorder.record("b", 1)
            recorder.dump_now()
    assert [line["id"] for line in lines_in(tmp_path)] == ["a", "b"]


def test_without_batches_the_last_five_minutes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """threshold=0: what finished longer ago is forgotten; only a dump writes; the oldest make room."""
    clock = [1000.0]
    monkeypatch.setattr(recorder_module.time, "time", lambda: clock[0])
    with RequestRecorder(tmp_path, threshold=0, limit_bytes=100_000) as recorder:
        for number in range(4):
            recorder.record(str(number), "x")
            recorder.finish(str(number))
            clock[0] += 200
        assert not list(tmp_path.iterdir())
        clock[0] -= 100
        recorder.dump_now()
        assert [record.id for record in records(tmp_path)] == ["2", "3"]
        for number in range(10):
            recorder.record(f"large{number}", "x" * 30_000)
            recorder.finish(f"large{number}")
        recorder.dump_now()
        assert [record.id for record in records(tmp_path)][2:] == ["large7", "large8", "large9"]
        assert recorder.counts["displaced"] == 7


def test_memory_is_bounded_and_what_does_not_fit_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that are never finished are written unfinished before memory is full; one too large alone is counted."""
    with caplog.at_level(logging.WARNING), RequestRecorder(tmp_path, limit_bytes=100_000) as recorder:
        recorder.record("huge", "x" * 200_000)
        assert recorder.counts["did not fit"] == 1 and "memory for requests is full" in caplog.text
        for number in range(50):
            recorder.record(f"never finished {number}", "x" * 10_000)
            wait_until(lambda: recorder._bytes <= 60_000)
        assert recorder.counts["given up"] >= 40
        recorder.finish("never finished 0", 1)
        assert recorder.counts["unknown"] == 1
        recorder.record("a", "x")
        recorder.finish("a", "y" * 200_000)
    found = records(tmp_path)
    assert len(found) == 51 and sum("memory was needed" in (record.reason or "") for record in found) >= 40
    assert recorder._bytes == sum(entry.nbytes for entry in recorder._open.values())
    (a,) = [record for record in found if record.id == "a"]
    assert (a.state, a.output) == ("finished", None) and "memory" in a.not_encoded["output"]


def test_an_id_that_comes_twice_is_two_requests(tmp_path: Path) -> None:
    with RequestRecorder(tmp_path) as recorder:
        recorder.record("a", 1)
        recorder.record("a", 2)
        recorder.finish("a", 3)
    first, second = records(tmp_path)
    assert (first.state, first.request) == ("unfinished", 1) and "its id" in (first.reason or "")
    assert (second.state, second.request, second.output) == ("finished", 2, 3)


def test_switched_off_it_records_nothing_new_and_finishes_what_is_open(tmp_path: Path) -> None:
    with RequestRecorder(tmp_path, enabled=False) as recorder:
        recorder.record("a", 1)
        recorder.finish("a", 1)
        recorder.configure(enabled=True)
        recorder.record("b", 1)
        recorder.configure(enabled=False)
        recorder.record("c", 1)
        recorder.finish("b", 2)
        assert recorder.settings == {
            "exclude": ["hidden_states", "routed_experts"], "threshold": 1000, "enabled": False,
        }  # fmt: skip
    assert [(record.id, record.state) for record in records(tmp_path)] == [("b", "finished")]


@pytest.mark.parametrize(
    "given", [{"threshold": -1}, {"threshold": True}, {"threshold": "9"}, {"exclude": 3}, {"exclude": [1]}]
)
def test_settings_that_mean_nothing_are_refused_as_a_whole(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        RequestRecorder(tmp_path, **given)
    with RequestRecorder(tmp_path) as recorder:
        before = recorder.settings
        with pytest.raises(UsageError):
            recorder.configure(**{"threshold": 5, "exclude": "x", **given})
        with pytest.raises(UsageError):
            recorder.configure(threshold=5, enabled="yes")  # type: ignore[arg-type]
        assert recorder.settings == before


def test_a_fault_of_the_recorder_never_reaches_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with RequestRecorder(tmp_path) as recorder:
        monkeypatch.setattr(recorder_module, "encode_part", lambda *_: 1 / 0)
        with caplog.at_level(logging.WARNING):
            recorder.record("a", 1)
        assert "ZeroDivisionError" in caplog.text and recorder.counts["failed"] == 1
        recorder.finish("b", state="odd")  # type: ignore[arg-type]
        assert recorder.counts["failed"] == 2


def test_files_are_of_their_owner_alone(tmp_path: Path) -> None:
    """What clients asked is nobody else's."""
    with RequestRecorder(tmp_path / "new") as recorder:
        recorder.record("a", 1)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "new").glob("*.jsonl"))


# Ends of a process.


def _server(directory: Path, how: str, pipe: Any) -> None:
    """One finished request, one unfinished, and then the end."""
    recorder = RequestRecorder(directory)
    if how == "handles SIGTERM":
        signal.signal(signal.SIGTERM, lambda *_: None)
    recorder.record("done", 1)
    recorder.finish("done", 2)
    recorder.record("open", 1)
    if how == "raises":
        import sys

        try:
            raise RuntimeError("on purpose")
        except RuntimeError:
            sys.excepthook(*sys.exc_info())  # As the interpreter does; multiprocessing catches before it.
        os._exit(3)
    if how == "thread raises":
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        os._exit(3)
    if how == "exits":
        import atexit

        atexit._run_exitfuncs()
        os._exit(3)
    if how == "forks":
        child = os.fork()
        if child == 0:
            recorder.record("of the child", 1)
            recorder.finish("of the child", 2)
            recorder.dump_now()
            os._exit(0)
        os.waitpid(child, 0)
        recorder.close()
        os._exit(3)
    pipe.send("ready")
    if how == "handles SIGTERM":
        pipe.poll(250)
        os._exit(4)
    time.sleep(30)


@pytest.mark.parametrize("how", ["raises", "thread raises", "exits", "SIGTERM", "handles SIGTERM", "forks"])
def test_the_end_of_a_process_writes_what_is_in_memory(how: str, tmp_path: Path) -> None:
    """Each request once, whatever ends it; also where a server handles SIGTERM by itself and ends without a word."""
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_server, args=(tmp_path, how, there))
    process.start()
    if "SIGTERM" in how:
        here.recv()
        os.kill(process.pid or 0, signal.SIGTERM)
    if how == "handles SIGTERM":
        wait_until(lambda: len(lines_in(tmp_path)) == 2)
        here.send("end")
    process.join(250)
    assert process.exitcode == {"SIGTERM": -signal.SIGTERM, "handles SIGTERM": 4}.get(how, 3)
    expected = {"done": "finished", "open": "unfinished"} | ({"of the child": "finished"} if how == "forks" else {})
    lines = lines_in(tmp_path)
    assert {line["id"]: line["state"] for line in lines} == expected and len(lines) == len(expected)


def test_a_batch_that_the_disk_refuses_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The batch is counted as lost and told; the next one is written."""
    from grafter.tools.requests import batch_file

    real, calls = os.replace, []

    def refuse_once(source: Any, destination: Any) -> None:
        calls.append(destination)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(source, destination)

    monkeypatch.setattr(batch_file.os, "replace", refuse_once)
    with caplog.at_level(logging.WARNING), RequestRecorder(tmp_path, threshold=1) as recorder:
        recorder.record("a", 1)
        recorder.finish("a", 1)
        wait_until(lambda: recorder.counts.get("lost") == 1)
        recorder.record("b", 1)
        recorder.finish("b", 1)
    assert "No space left" in caplog.text
    assert [line["id"] for line in lines_in(tmp_path)] == ["b"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_line_too_long_to_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its largest part is left out and named; the rest stays."""
    from grafter.tools.requests import batch_file

    monkeypatch.setattr(batch_file, "LONGEST_LINE", 1000)
    with RequestRecorder(tmp_path) as recorder:
        recorder.record("a", {"short": 1})
        recorder.finish("a", "x" * 2000)
    (record,) = records(tmp_path)
    assert (
        record.request == {"short": 1} and record.output is None and "2002 characters" in record.not_encoded["output"]
    )


def test_long_lists_of_token_ids_are_encoded_as_they_are(tmp_path: Path) -> None:
    """What the quick way takes, and what it must not: numbers too large for readers, and other things among them."""
    long = list(range(40))
    value = {"ids": long, "mixed": [*long, "x"], "huge": [*long, 1 << 2000], "floats": [0.5] * 40}
    part = encode_part(value, "request", frozenset(), Buffers(1 << 20))
    read = json.loads(part.text)
    assert read["ids"] == long and read["mixed"] == [*long, "x"] and read["floats"] == [0.5] * 40
    assert list(part.not_encoded) == ["request.huge[40]"]
