"""What `grafter doctor` concludes from what a pair's runs left behind: pure, over notes that are written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grafter.tools.doctor.finding import Finding
from grafter.tools.doctor.notes import JobNotes, ProcessNotes, first_change, judge_likeness, read_notes
from grafter.tools.doctor.repeats import hint, judge_observer

EQUAL_STATES = {"torch": "t", "python": "p"}


def tensor(
    digest: str, shape: list[int] | None = None, dtype: str = "float32", abs_mean: float = 1.0
) -> dict[str, Any]:
    return {"shape": shape or [2], "dtype": dtype, "digest": digest, "abs_mean": abs_mean}


def job(*, outputs: str = "o", end: str = "e", end_states: dict[str, str] | None = None, **first: Any) -> JobNotes:
    """A job of one process that called its model once."""
    known = {
        "rank": 0,
        "time": 0.0,
        "inputs": {"input_ids": tensor("i", dtype="int64")},
        "weights": {"w": tensor("w")},
        "random_states": EQUAL_STATES,
        "dropout": [],
        "training": False,
        "modes": {"autocast": False, "threads": 1},
        "devices": ["cpu"],
    }
    last = {"calls": 1, "weights": {"w": tensor(end)}, "random_states": end_states or EQUAL_STATES}
    return JobNotes(1, True, [ProcessNotes({**known, **first}, {0: {"out": tensor(outputs)}}, last)])


def likeness(baseline: JobNotes, target: JobNotes) -> dict[str, Finding]:
    return {finding.check: finding for finding in judge_likeness(baseline, target)}


def test_jobs_that_start_alike_are_told_so() -> None:
    """Each of the five is looked at, and well."""
    found = likeness(job(), job())
    assert [(check, finding.level) for check, finding in found.items()] == [
        ("inputs", "ok"),
        ("weights", "ok"),
        ("dropout", "ok"),
        ("random states", "ok"),
        ("modes", "ok"),
    ]


@pytest.mark.parametrize(
    ("check", "changes", "level", "word"),
    [
        ("inputs", {"inputs": {"input_ids": tensor("j", dtype="int64")}}, "fault", "different values: input_ids"),
        ("inputs", {"inputs": {"input_ids": tensor("j", [4], "int64")}}, "warning", "int64[2] / int64[4]"),
        ("inputs", {"inputs": {"tokens": tensor("i")}}, "warning", "none has the same name"),
        ("inputs", {"inputs": {"input_ids": tensor("i"), "mask": tensor("m")}}, "ok", "only one side has mask"),
        ("weights", {"weights": {"w": tensor("v")}}, "fault", "1 of 1 differ, first w"),
        ("weights", {"weights": {"u": tensor("w")}}, "warning", "no name in common: w / u"),
        ("weights", {"weights": {"w": tensor("v", dtype="bfloat16", abs_mean=1.001)}}, "ok", "of another dtype"),
        ("weights", {"weights": {"w": tensor("v", dtype="bfloat16", abs_mean=2.0)}}, "fault", "another dtype"),
        ("weights", {"weights": {"w": tensor("v", [1])}}, "warning", "without their layouts"),
        ("dropout", {"dropout": ["drop"], "training": True}, "fault", "only one side: target: drop"),
        ("dropout", {"training": True}, "warning", "the target's model is in training mode"),
        ("random states", {"random_states": {"torch": "u", "python": "p"}}, "ok", "only sampling would show it"),
        ("random states", {"random_states": {"torch": "t", "python": "q"}}, "ok", "unless they are seeded"),
        (
            "random states",
            {"random_states": {"torch": "u"}, "dropout": ["drop"]},
            "warning",
            "differ at the first call",
        ),
        ("modes", {"modes": {"autocast": True, "threads": 1}}, "warning", "autocast: False / True"),
        ("modes", {"modes": {"autocast": False, "threads": 8}}, "ok", "the same"),
    ],
)
def test_what_is_not_alike_is_told(check: str, changes: dict[str, Any], level: str, word: str) -> None:
    """Each way in which a target starts otherwise has its own level and words."""
    found = likeness(job(), job(**changes))[check]
    assert found.level == level
    assert word in found.text


def test_dropout_on_both_sides_is_a_warning() -> None:
    """It is random, but the same on both."""
    found = likeness(job(dropout=["a"]), job(dropout=["b"]))["dropout"]
    assert (found.level, found.text) == ("warning", "active on both sides: baseline: a; target: b")


def test_a_job_that_no_witness_saw_is_no_evidence() -> None:
    """Nothing is said to be alike then."""
    (found,) = judge_likeness(job(), JobNotes())
    assert found.level == "warning"
    assert "in the target" in found.text


@pytest.mark.parametrize(
    ("other", "change"),
    [
        (job(), None),
        (job(weights={"w": tensor("v")}), "weight w of the first call differs"),
        (job(inputs={}), "input input_ids of the first call differs"),
        (job(outputs="x"), "output out of call 1 differs"),
        (job(end="x"), "weight w at the end differs"),
        (job(end_states={"torch": "x", "python": "p"}), "the random state of torch at the end differs"),
        (JobNotes(1, True, []), "1 processes called a model in one run, 0 in the other"),
    ],
)
def test_the_earliest_change_is_named(other: JobNotes, change: str | None) -> None:
    """Two runs of one command are compared in the order of what they do."""
    assert first_change(job(), other) == change


def test_a_random_state_that_nobody_seeded_says_nothing() -> None:
    """It differs from the start, so that it differs at the end is no change."""
    states = {"torch": "t", "python": "x"}
    assert first_change(job(), job(random_states=states, end_states=states)) is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"weights": {"w": tensor("v")}}, "The weights differ at the first call"),
        ({"inputs": {"input_ids": tensor("j")}}, "The inputs of the first call differ"),
        ({"dropout": ["drop"], "random_states": {"torch": "u"}}, "Dropout is active in drop"),
        ({"random_states": {"torch": "u", "python": "p"}}, "differ at the first call (torch)"),
        ({"devices": ["cuda:0"]}, "use_deterministic_algorithms"),
        ({}, "look for time"),
    ],
)
def test_the_hint_follows_what_was_seen(changes: dict[str, Any], word: str) -> None:
    """The cause that explains the others comes first."""
    both = {key: value for key, value in changes.items() if key in ("dropout", "devices")}
    assert word in hint(job(**changes), job(**both))
    assert "Usual causes" in hint(job(), JobNotes())


def test_an_observer_effect_is_only_claimed_of_a_program_that_repeats() -> None:
    """Changed, and repeatable both ways: a fault. Changed and not repeatable: no judgement."""
    seen = judge_observer("baseline", job(), job(), 12, None, True)
    assert seen.level == "ok"
    assert "points were reached 12 times" in seen.text
    assert judge_observer("baseline", job(), job(outputs="x"), 12, None, True).level == "fault"
    assert judge_observer("baseline", job(), job(outputs="x"), 12, None, False).level == "warning"
    again = judge_observer("baseline", job(), job(outputs="x"), 12, "output out of call 1 differs", True)
    assert again.level == "warning"
    assert judge_observer("baseline", JobNotes(), job(), 12, None, True).level == "warning"


def test_notes_of_a_killed_process_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    """A line that is not whole, and an end that never came."""
    first = {"kind": "first call", **job().processes[0].first}
    lines = [json.dumps(first), json.dumps({"kind": "call", "number": 0, "outputs": {}}), '{"kind": "en']
    (tmp_path / "target-7.jsonl").write_text("\n".join(lines))
    (tmp_path / "none-8.jsonl").write_text('{"kind": "start"}\n')
    jobs = read_notes(tmp_path)
    assert (jobs["baseline"].pythons, jobs["target"].pythons) == (0, 1)
    (process,) = jobs["target"].processes
    assert (list(process.outputs), process.end) == ([0], None)
