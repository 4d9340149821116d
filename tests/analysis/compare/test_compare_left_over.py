"""What is left over of a point: unsaved tensors, leaves that are no tensors, our own faults. Costs 2 s of one core."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare_parts import compared, one_point, random, sides, told
from dump_parts import RankDumps

from grafter.analysis.compare import comparison as comparison_module
from grafter.analysis.compare import point_comparison
from grafter.analysis.compare.record import LeafRecord
from grafter.config.settings.config import GrafterConfig
from grafter.rank.grafter import Grafter


def dumped_by_the_program(directory: Path, values: dict[str, Any], role: str) -> None:
    config = {"enable": True, "role": role, "dump_filter": "True", "dir": str(directory), "run_name": "run"}
    grafter = Grafter(GrafterConfig(**config))
    for name, value in values.items():
        grafter.dump(name, value)
    grafter.close()


def test_what_was_not_saved_agrees_with_nothing(tmp_path: Path) -> None:
    """A sparse tensor beside a dense one, and one whose copy failed: the point is skipped, and --forbid-skips sees it;

    a dense one that differs fails all the same.
    """
    x = torch.eye(3)
    for role, scale in (("baseline", 1.0), ("target", 2.0)):
        values = {"mixed": (x, (x * scale).to_sparse()), "off": (x * scale, x.to_sparse()), "plain": x}
        dumped_by_the_program(tmp_path, values, role)
    comparison = compared(tmp_path / "run")
    assert [point.verdict for point in comparison.points] == ["skipped", "failed", "passed"]
    assert "[1]: A (rank 0) did not save it: it is of layout torch.sparse_coo" in str(comparison.points[0].reason)
    strict = compared(tmp_path / "run", forbid_skips=True, allow=["off"]).summary
    assert strict.exit_code == 2 and "1 point was skipped" in strict.sentence


def test_a_reason_of_an_older_grafter_may_be_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    """A rank whose file could not be written, or a record that does not say which tensors it lacks."""
    x = random(3)
    for name in ("reason", "no file"):
        RankDumps(tmp_path / name / "baseline").add("x", x)
        first, second = (RankDumps(tmp_path / name / "target", rank, 2, "target") for rank in range(2))
        first.add("x", x)
        if name == "reason":
            second.add("x", x, reason="[1]: RuntimeError")
        else:
            second.write_line(json.dumps(second.record("x", {"": x}, file=None, reason="the disk is full")))
    assert [one_point(tmp_path / name).verdict for name in ("reason", "no file")] == ["skipped", "skipped"]


class Opaque:
    def __init__(self, number: float) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<Opaque at {self.number}>"


def test_what_is_no_tensor_is_compared_too(tmp_path: Path) -> None:
    """Numbers, texts and arrays exactly, by path; what only its repr stands for is skipped where that differs."""
    x = random(3)
    for role, own in (("baseline", 1.0), ("target", 2.0)):
        values = {
            "same": (x, 3, math.nan, "text", np.ones(2), torch.float32),
            "number": (x, own),
            "array": {"x": x, "array": np.full(2, own)},
            "object": (x, Opaque(own)),
            "only": (x, 1) if role == "baseline" else (x,),
            "scale": own,
        }
        dumped_by_the_program(tmp_path, values, role)
    points = {point.name: point for point in compared(tmp_path / "run").points}
    assert {name: point.verdict for name, point in points.items()} == {
        "same": "passed",
        "number": "failed",
        "array": "failed",
        "object": "skipped",
        "only": "error",
        "scale": "failed",
    }
    assert points["number"].reason == "[1]: it is no tensor, and differs: A has 1.0 and B has 2.0"
    assert points["array"].worst_leaf == "['array']"
    assert "only A has" in str(points["only"].reason)


def test_values_that_are_no_tensors_meet_rank_by_rank(tmp_path: Path) -> None:
    """Where both jobs have the same ranks; else each value of one side is one of the other's."""
    x = random(3)
    for name, ranks in (("swapped", (2, 2)), ("fewer", (1, 2))):
        for role, count in zip(("baseline", "target"), ranks, strict=True):
            for rank in range(count):
                value = 1 - rank if name == "swapped" and role == "target" else rank
                dumps = RankDumps(tmp_path / name / role, rank, count, role)
                dumps.add("x", x, others={"[1]": value})
    for name in ("swapped", "fewer"):
        assert "[1]: it is no tensor, and differs" in str(one_point(tmp_path / name).reason)


def test_a_fault_of_our_own_is_an_error_of_its_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are compared, in threads too; Ctrl-C ends the comparison."""
    for side in sides(tmp_path):
        for name in "xyz":
            side.add(name, random(3))

    def failing(pair: Any) -> list[LeafRecord]:
        if pair.a[0].name == "y":
            raise fault
        return []

    monkeypatch.setattr(point_comparison, "compare_others", failing)
    fault: BaseException = ZeroDivisionError("of a helper")
    comparison = compared(tmp_path, threads=2)
    assert [point.verdict for point in comparison.points] == ["passed", "error", "passed"]
    assert "ZeroDivisionError: of a helper" in str(comparison.points[1].reason)
    assert comparison.summary.exit_code == 2
    fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path, threads=2)


def test_a_fault_outside_of_any_point_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is 2, and not Python's 1, which says that a point differs."""
    for side in sides(tmp_path):
        side.add("x", random(3))

    def failing(*points: Any) -> None:
        raise ZeroDivisionError("in pairing")

    monkeypatch.setattr(comparison_module, "find_pairs", failing)
    code, _, errors = told(tmp_path)
    assert code == 2 and "ZeroDivisionError: in pairing" in errors
