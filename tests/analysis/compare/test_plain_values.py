"""Values and leaves that are no tensors: equal ones pass, unequal ones fail with both values, live and between dumps.

Costs about 5 s of one core.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare_parts import compared, dump_by_program, one_point
from jobs import Rank, succeed, two_jobs
from point_parts import header, pair

import grafter
from grafter.analysis.run.run_summary import read_run_summary
from grafter.core.leaves import NothingToOffer, take_apart
from grafter.core.plan.decision import Decision, decide

NAN = float("nan")
EQUAL: dict[str, Any] = {
    "float": 0.125,
    "nan": NAN,
    "inf": float("inf"),
    "negative zero": -0.0,
    "int": 3,
    "long int": 2**200,
    "text": "mean",
    "empty text": "",
    "long text": "x" * 5000,
    "none": None,
    "bool": True,
    "tree": {"a": [1, 2.5, {"b": None}], "c": ("x", False)},
}
UNEQUAL: dict[str, tuple[Any, Any, str]] = {
    "float": (0.125, 0.25, "0.125 * 0.25"),
    "last bit": (0.1, 0.1 + 2**-56, "0.1 * 0.10000000000000002"),
    "nan": (NAN, 1.0, "[nN]a[nN] * 1.0"),
    "sign of zero": (0.0, -0.0, "0.0 * -0.0"),
    "int": (2**60, 2**60 + 3, "1152921504606846976 * 1152921504606846979"),
    "int and float": (1, 1.0, "1 * 1.0"),
    "int and bool": (1, True, "1 * [tT]rue"),
    "text": ("mean", "sum", "mean * sum"),
    "none": (None, 0, "(None|null) * 0"),
    "long text": (
        "x" * 5000,
        "x" * 4999 + "y",
        r"xxx\.\.\. \(5000 characters, SHA-256|from character 5000 on: 'x\"' and 'y\"'",
    ),
    "tree": ({"a": [1, 2]}, {"a": [1, 3]}, "2 * 3"),
}


def both_values(reason: str | None, pattern: str) -> bool:
    return re.search(pattern.replace(" * ", r"\b.*"), str(reason)) is not None


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("rules", [(), ("*: rel <= 1e-9",)], ids=["no rule", "a rule"])
def test_dumps_of_equal_values_pass(name: str, rules: tuple[str, ...], tmp_path: Path) -> None:
    """Also where it is the only point: exit code 0."""
    for role in ("baseline", "target"):
        dump_by_program(tmp_path, role, {"k": EQUAL[name]})
    comparison = compared(tmp_path, *rules)
    assert [point.verdict for point in comparison.points] == ["passed"], comparison.points[0].reason
    assert (comparison.summary.exit_code, comparison.summary.skips) == (0, 0)
    assert comparison.summary.sentence.startswith("B agrees with A: the one point that was compared is")


@pytest.mark.parametrize("name", UNEQUAL)
def test_dumps_of_other_values_fail_with_both(name: str, tmp_path: Path) -> None:
    """Whatever the rule: it is about tensors."""
    a, b, pattern = UNEQUAL[name]
    dump_by_program(tmp_path, "baseline", {"k": a})
    dump_by_program(tmp_path, "target", {"k": b})
    comparison = compared(tmp_path, "*: rel <= 1e9")
    (point,) = comparison.points
    assert (point.verdict, comparison.summary.exit_code) == ("failed", 1)
    assert both_values(point.reason, pattern), point.reason


class Opaque:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Opaque("<alike>"), "only its repr was saved, which is equal"),
        (Opaque("x" * 600), "only the first 500 characters of its repr were saved"),
        ({}, "neither side has a leaf here"),
    ],
    ids=["repr", "long repr", "no leaf"],
)
def test_what_nobody_can_compare_is_skipped_with_the_reason(value: Any, why: str, tmp_path: Path) -> None:
    """Equal reprs may stand for two things."""
    for role in ("baseline", "target"):
        dump_by_program(tmp_path, role, {"k": value})
    point = one_point(tmp_path)
    assert point.verdict == "skipped" and why in str(point.reason)
    assert compared(tmp_path).summary.exit_code == 2


def test_a_long_repr_beside_a_tensor_is_not_taken_for_equal(tmp_path: Path) -> None:
    """What differs may stand after the part that was saved."""
    for role in ("baseline", "target"):
        dump_by_program(tmp_path, role, {"k": {"x": torch.ones(2), "note": Opaque("y" * 600 + role)}})
    point = one_point(tmp_path)
    assert point.verdict == "skipped" and "['note']: only the first 500 characters" in str(point.reason)


def test_a_tensor_on_one_side_and_a_number_on_the_other_is_an_error(tmp_path: Path) -> None:
    """Neither is the other's partner."""
    dump_by_program(tmp_path, "baseline", {"k": torch.tensor(0.125)})
    dump_by_program(tmp_path, "target", {"k": 0.125})
    assert one_point(tmp_path).verdict == "error"


# --- live


def decided(direction: Any, *values: Any, of_baseline: int = 1) -> Decision:
    """What becomes of a point to which each rank brings a value."""
    headers = []
    for number, value in enumerate(values):
        role, rank = ("baseline", number) if number < of_baseline else ("target", number - of_baseline)
        try:
            leaves = take_apart(value)
            fields: dict[str, Any] = {"leaves": leaves.specs, "others": leaves.others, "structure": leaves.structure}
        except NothingToOffer as nothing:
            fields = {"leaves": (), "others": nothing.plain, "structure": "", "nothing": str(nothing)}
        fields["others"] = tuple(sorted(fields["others"].items()))
        size = of_baseline if role == "baseline" else len(values) - of_baseline
        headers.append(header(role, rank, size, **fields))
    return decide(direction, pair(headers[:of_baseline], headers[of_baseline:]))


@pytest.mark.parametrize("name", EQUAL)
def test_a_live_comparison_of_equal_values_is_equal(name: str) -> None:
    """On any number of ranks; a graft of them is skipped, since there is nothing to write into."""
    decision = decided("compare", *[EQUAL[name]] * 3)
    assert decision.outcome == "compared" and "equal on all ranks" in str(decision.reason)
    assert decided("b2t", *[EQUAL[name]] * 3).outcome == "skipped"


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("other", [1, 2], ids=["second rank", "third rank"])
def test_a_live_comparison_of_other_values_fails_with_both(name: str, other: int) -> None:
    """On whichever rank the other value is."""
    a, b, pattern = UNEQUAL[name]
    values = [a, a, a]
    values[other] = b
    decision = decided("compare", *values)
    assert decision.outcome == "failed" and both_values(decision.reason, pattern), decision.reason


def test_values_that_look_alike_are_told_with_their_types() -> None:
    """NumPy's 0.5 is not Python's."""
    decision = decided("compare", np.float64(0.5), 0.5)
    assert decision.outcome == "failed" and "0.5 (float64)" in str(decision.reason), decision.reason


def test_what_one_side_alone_has_is_no_comparison() -> None:
    """A leaf more fails; a value that is no data is skipped."""
    assert "absent" in str(decided("compare", {"a": 1}, {"a": 1, "b": 2}).reason)
    assert decided("compare", 1, object()).outcome == "skipped"
    assert decided("compare", 1, torch.ones(1)).outcome == "skipped"


def dump_values(rank: Rank) -> Any:
    first = rank.is_baseline
    for name, value in EQUAL.items():
        grafter.dump(f"equal {name}", value)
    for name, (a, b, _) in UNEQUAL.items():
        grafter.dump(f"other {name}", a if first else b)
    grafter.dump("tensor", {"x": torch.ones(2), "scale": 0.125})


def test_a_run_compares_values_that_are_no_tensors(tmp_path: Path) -> None:
    """Equal ones count as compared, with a difference of 0 in the ledger; others are failed points of the run."""
    with two_jobs(tmp_path, dump_values, dump_values, ranks=(1, 2), compare_filter="True") as jobs:
        succeed(jobs.wait())
        records = jobs.ledgers()["target", 1]
        summary = read_run_summary(tmp_path / "run")
    outcomes = {record.name: record.outcome for record in records}
    assert {outcomes[f"equal {name}"] for name in EQUAL} == {"compared"}
    assert {outcomes[f"other {name}"] for name in UNEQUAL} == {"failed"}
    equal = [record for record in records if record.outcome == "compared"]
    assert all(record.difference is not None and record.difference.mismatched_fraction == 0 for record in equal)
    assert summary.problems == [f"{len(UNEQUAL)} points failed; the first is other float at step 0."]
