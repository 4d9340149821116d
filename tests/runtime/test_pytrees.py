"""A pytree is one point: all of its tensors are written, or none is; its other leaves must be equal in both jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jobs import Rank, succeed, two_jobs

import grafter


class Routed(NamedTuple):
    ids: Any
    weights: Any


def filled(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, value)


def values_of(value: float) -> dict[str, Any]:
    """One value per kind of container, all tensors filled alike; ids are integers."""
    return {
        "dict": {"a": filled(value, 2), "b": filled(value, 3)},
        "list": [filled(value, 2), filled(value, 1)],
        "tuple": (filled(value, 2), filled(value, 1)),
        "nested": {"kv": [filled(value, 2), (filled(value, 1), None)], "flag": True, "scale": 0.5, "kind": "mlp"},
        "namedtuple": Routed(torch.full((2,), int(value)), filled(value, 2)),
    }


def tensors_in(value: Any) -> list[list[float]]:
    from torch.utils._pytree import tree_leaves

    return [leaf.tolist() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def dump_containers(rank: Rank) -> Any:
    found = {}
    for name, value in values_of(1.0 if rank.is_baseline else 9.0).items():
        in_place = grafter.dump(name, value)
        assert in_place is value, "in place: the very object"
        found[name] = tensors_in(value)
    for name, value in values_of(1.0 if rank.is_baseline else 9.0).items():
        returned = grafter.dump(name, value, write="return")
        assert type(returned) is type(value)
        assert rank.is_baseline or tensors_in(value) != tensors_in(returned)
        found[f"{name} returned"] = tensors_in(returned)
    return found


def test_containers_of_every_kind_are_grafted_and_returned_whole(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_containers, dump_containers, b2t_filter="True") as jobs:
        baseline, target = succeed(jobs.wait())
        ledger = jobs.ledgers()["target", 0]
    assert target == baseline
    assert set(target) == {f"{name}{kind}" for name in values_of(0) for kind in ("", " returned")}
    assert [leaf.path for leaf in ledger[0].leaves] == ["['a']", "['b']"]
    assert ledger[0].bytes_received == 20


def dump_reordered(rank: Rank) -> Any:
    if rank.is_baseline:
        value = {"a": filled(1, 2), "b": filled(2, 2), "n": 1}
    else:
        value = {"n": 1, "b": filled(9, 2), "a": filled(9, 2)}
    grafter.dump("h", value)
    return list(value), value["a"].tolist(), value["b"].tolist()


def test_another_order_of_insertion_is_the_same_point(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_reordered, dump_reordered, b2t_filter="True") as jobs:
        assert succeed(jobs.wait())[1] == (["n", "b", "a"], [1.0, 1.0], [2.0, 2.0])


def dump_misfits(rank: Rank) -> Any:
    base = rank.is_baseline
    value = 1.0 if base else 9.0
    points = {
        "other shape": {"a": filled(value, 2), "b": filled(value, 3 if base else 4)},
        "other dtype": {"a": filled(value, 2), "b": filled(value, 2) if base else torch.full((2,), 9)},
        "other leaf": {"a": filled(value, 2), "k": 1 if base else 2},
        "other type of leaf": {"a": filled(value, 2), "k": 1 if base else True},
        "missing leaf": {"a": filled(value, 2), **({"b": filled(value, 2)} if base else {})},
        "none and tensor": {"a": filled(value, 2), "b": None if base else filled(value, 2)},
        "tensor and dict": filled(value, 2) if base else {"a": filled(value, 2)},
    }
    for name, point in points.items():
        grafter.dump(name, point)
    good = {"a": filled(value, 2)}
    grafter.dump("good", good)
    return {name: tensors_in(point) for name, point in {**points, "good": good}.items()}


def test_a_leaf_that_does_not_fit_keeps_the_whole_point_from_being_written(tmp_path: Path) -> None:
    """Every misfit fails its point on both sides, with a reason that names leaf and sides; then the run goes on."""
    with two_jobs(tmp_path, dump_misfits, dump_misfits, b2t_filter="True") as jobs:
        found = succeed(jobs.wait())[1]
        ledgers = jobs.ledgers()
    assert found.pop("good") == [[1.0, 1.0]]
    assert {value for tensors in found.values() for tensor in tensors for value in tensor} == {9.0}
    reasons = {record.name: record.reason for record in ledgers["target", 0]}
    assert {r.name: r.outcome for r in ledgers["target", 0]} == {**dict.fromkeys(found, "failed"), "good": "grafted"}
    assert "['b'] differ: float32[3] at baseline rank 0" in reasons["other shape"]
    assert "torch.float32 cannot be written into torch.int64" in reasons["other dtype"]
    assert "the leaf ['k'] is 1 at baseline rank 0 and 2 at target rank 0" in reasons["other leaf"]
    assert "the leaf ['k'] is 1 at baseline rank 0 and True at target rank 0" in reasons["other type of leaf"]
    assert "leaves ['a'], ['b'] at baseline rank 0, leaves ['a'] at target rank 0" in reasons["missing leaf"]
    assert "['b']" in reasons["none and tensor"]
    assert "a tensor at baseline rank 0, leaves ['a'] at target rank 0" in reasons["tensor and dict"]


def dump_no_tensor(rank: Rank) -> Any:
    base = rank.is_baseline
    first = grafter.dump("text", "no tensor" if base else filled(9, 2))
    second = grafter.dump("object", filled(1, 2) if base else {"x": filled(9, 2), "f": object})
    third = grafter.dump("good", filled(1, 2) if base else filled(9, 2))
    return first if base else first.tolist(), second.tolist() if base else second["x"].tolist(), third.tolist()


def test_a_value_that_is_no_tensor_is_skipped_on_both_sides_and_the_run_goes_on(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_no_tensor, dump_no_tensor, b2t_filter="True") as jobs:
        assert succeed(jobs.wait()) == [("no tensor", [1.0, 1.0], [1.0, 1.0]), ([9.0, 9.0], [9.0, 9.0], [1.0, 1.0])]
        ledgers = jobs.ledgers()
    for role in ("baseline", "target"):
        text, other, good = ledgers[role, 0]
        assert text.outcome == other.outcome == "skipped"
        assert text.reason == "baseline rank 0: the value is a str, not a tensor"
        assert other.reason == "target rank 0: the leaf ['f'] is a type, neither a tensor nor plain data"
        assert good.outcome in ("sent", "grafted")


# Functions as values.

CALLS: list[str] = []


def dump_functions(rank: Rank) -> Any:
    def make() -> torch.Tensor:
        CALLS.append("make")
        return filled(1 if rank.is_baseline else 9, 2)

    unmatched = grafter.dump("unmatched", make)
    assert unmatched is make and not CALLS
    matched = grafter.dump("h", make)
    assert CALLS == ["make"], "called once"
    tree = grafter.dump("tree", lambda: {"a": make()})
    return matched.tolist(), tree["a"].tolist()


def test_a_function_is_called_once_and_only_if_its_point_matches(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_functions, dump_functions, b2t_filter="name != 'unmatched'") as jobs:
        assert succeed(jobs.wait())[1] == ([1.0, 1.0], [1.0, 1.0])


def dump_function_of_no_tensor(rank: Rank) -> Any:
    def make() -> str:
        CALLS.append("make")
        return f"text {len(CALLS)}"

    returned = grafter.dump("h", make if rank.is_baseline else filled(9, 2))
    return returned if rank.is_baseline else None, len(CALLS)


def test_a_function_that_gives_no_tensor_is_called_once_and_its_value_returned(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_function_of_no_tensor, dump_function_of_no_tensor, b2t_filter="True") as jobs:
        baseline, _ = succeed(jobs.wait())
    assert baseline == ("text 1", 1)


def dump_more_than_can_be_described(rank: Rank) -> Any:
    from grafter.runtime import point_preparation

    point_preparation.MOST_DESCRIBED_BYTES = 20_000
    value = {f"leaf{number}": filled(1 if rank.is_baseline else 9, 1) for number in range(300)}
    grafter.dump("many", value)
    grafter.dump("fewer", dict(list(value.items())[:30]))
    return sorted({leaf.item() for leaf in value.values()}), sum(leaf.item() for leaf in value.values())


def test_more_leaves_than_can_be_described_fail_the_point_with_the_limit(tmp_path: Path) -> None:
    """The store would drop the connection of a rank whose side's text is too long; here none is written, and the next
    point is."""
    with two_jobs(
        tmp_path, dump_more_than_can_be_described, dump_more_than_can_be_described, ranks=(1, 2), b2t_filter="True",
        transform_path="transforms/take_last.py:transform",
    ) as jobs:  # fmt: skip
        _, *targets = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert targets == [([1.0, 9.0], 30 * 1.0 + 270 * 9.0)] * 2
    for lines in ledgers.values():
        many, fewer = lines
        assert many.outcome == "failed" and fewer.outcome in ("sent", "grafted")
        assert "PointTooLarge: 300 leaves take" in many.reason and "graft them as several points" in many.reason
    assert "20000 are allowed for each of 1 ranks" in ledgers["target", 0][0].reason


class OwnError(ValueError):
    pass


def dump_function_that_raises(rank: Rank) -> Any:
    def make() -> torch.Tensor:
        raise OwnError("the user's own fault")

    try:
        grafter.dump("h", make if rank.is_baseline else filled(9, 2))
        caught = None
    except Exception as error:
        caught = type(error).__name__, str(error)
    return caught, float(grafter.dump("good", filled(1 if rank.is_baseline else 9, 1)))


def test_a_function_that_raises_raises_its_own_error_and_fails_the_point_on_the_other_side(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_function_that_raises, dump_function_that_raises, b2t_filter="True") as jobs:
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert baseline == (("OwnError", "the user's own fault"), 1.0)
    assert target == (None, 1.0)
    for role in ("baseline", "target"):
        failed, good = ledgers[role, 0]
        assert failed.outcome == "failed" and good.outcome in ("sent", "grafted")
        assert failed.reason == "baseline rank 0 failed before the exchange: OwnError: the user's own fault"
