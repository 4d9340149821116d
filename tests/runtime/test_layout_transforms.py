"""Transforms and layouts between real jobs: one that asks for `resharded` works on its own part and knows no ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter import GraftTransformInput
from grafter.core.layout.declared import Box
from grafter.store.ledger import read_ledger

HERE = __name__
SEEN: list[dict[str, Any]] = []


@grafter.transform(receives="resharded")
def scale(graft_input: GraftTransformInput) -> torch.Tensor:
    """The assembled part, times what the lowest sender says."""
    (received,), (extras,) = graft_input.received_list, graft_input.received_extras_list
    assert received.shape == graft_input.target.shape
    SEEN.append(
        {
            "sender_ranks": graft_input.sender_ranks,
            "sender_layouts": graft_input.sender_layouts,
            "target_layout": graft_input.target_layout,
            "path": graft_input.path,
            "received": received.clone(),
        }
    )
    return received * (extras["scale"] if extras is not None else 2)


@grafter.transform(receives="all")
def concatenate_by_layouts(graft_input: GraftTransformInput) -> torch.Tensor:
    """What `resharded` does, by hand: `sender_layouts` say where each tensor lies, though the target says nothing."""
    assert graft_input.sender_layouts is not None and graft_input.target_layout is None
    layouts = graft_input.sender_layouts
    whole = torch.empty(layouts[0].global_shape)
    for tensor, layout in zip(graft_input.received_list, layouts, strict=True):
        for box in layout.boxes:
            there = tuple(slice(start, start + size) for start, size in zip(box.offset, box.size, strict=True))
            here = tuple(slice(start, start + size) for start, size in zip(box.local_offset, box.size, strict=True))
            whole[there] = tensor[here]
    return whole.chunk(2, 1)[graft_input.role_rank]


def full_tensor() -> torch.Tensor:
    return torch.arange(24.0).view(4, 6)


def dump_scaled(rank: Rank, **options: Any) -> Any:
    """Rows of two senders into columns of two receivers."""
    axes = {"tp": (rank.role_rank, 2)}
    if rank.is_baseline:
        extras = {"scale": torch.tensor(10.0 + rank.role_rank), "ranks": [0, 1]}
        part = full_tensor().chunk(2, 0)[rank.role_rank]
        grafter.dump("h", part, dims="t[tp] h", axes=axes, extras=extras)
        return None
    mine = torch.zeros(4, 3)
    grafter.dump("h", mine, dims="t h[tp]", axes=axes, **options)
    (seen,) = SEEN
    received = seen.pop("received").tolist()
    return mine.tolist(), received, seen


def dump_scaled_by_function(rank: Rank) -> Any:
    return dump_scaled(rank, transform=scale)


def dump_scaled_by_path(rank: Rank) -> Any:
    return dump_scaled(rank, transform=f"{HERE}:scale")


@pytest.mark.parametrize("by", ["function", "path", "environment", "plan file"])
@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_it_receives_its_own_part_alone_whoever_names_it(tmp_path: Path, by: str, backend: str) -> None:
    """With the extras of the lowest sender, tensors among them, and the layouts of all senders."""
    settings: dict[str, Any] = {"b2t_filter": "True", "backend": backend}
    function = {"function": dump_scaled_by_function, "path": dump_scaled_by_path}.get(by, dump_scaled)
    if by == "environment":
        settings["transform_path"] = f"{HERE}:scale"
    if by == "plan file":
        settings["plan"] = tmp_path / "plan.yaml"
        settings["plan"].write_text(f"rules:\n  - match: h\n    transform: {HERE}:scale\n")
    with two_jobs(tmp_path, function, function, ranks=(2, 2), **settings) as jobs:
        _, _, *got = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    for role_rank, (written, received, seen) in enumerate(got):
        assert received == full_tensor().chunk(2, 1)[role_rank].tolist()
        assert written == (10 * full_tensor().chunk(2, 1)[role_rank]).tolist()
        assert seen["sender_ranks"] == [0] and seen["path"] == ""
        assert [layout.boxes for layout in seen["sender_layouts"]] == [
            (Box((0, 0), (2, 6), (0, 0)),),
            (Box((2, 0), (2, 6), (0, 0)),),
        ]
        assert seen["target_layout"].boxes == (Box((0, 3 * role_rank), (4, 3), (0, 0)),)
        assert seen["target_layout"].global_shape == (4, 6)
    # The part, and beside it the one tensor of the lowest sender's extras.
    assert [ledgers["target", r][0].bytes_received for r in range(2)] == [4 * 3 * 4 + 4] * 2
    assert [ledgers["baseline", r][0].bytes_sent for r in range(2)] == [2 * 6 * 4 + 2 * 4, 2 * 6 * 4]


def dump_tree(rank: Rank) -> Any:
    axes = {"tp": (rank.role_rank, 2)}
    if rank.is_baseline:
        grafter.dump("tree", {"a": full_tensor(), "b": -full_tensor()})
        return None
    mine = {"a": torch.zeros(4, 3), "b": torch.zeros(2, 6)}
    grafter.dump("tree", mine, dims={"a": "t h[tp]", "b": "t[tp] h"}, axes=axes, transform=scale)
    return mine["a"].tolist(), mine["b"].tolist(), [seen["path"] for seen in SEEN]


def test_each_leaf_is_transformed_with_its_own_part(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_tree, dump_tree, ranks=(1, 2), b2t_filter="True") as jobs:
        _, *got = succeed(jobs.wait())
    for role_rank, found in enumerate(got):
        assert found == (
            (2 * full_tensor()).chunk(2, 1)[role_rank].tolist(),
            (-2 * full_tensor()).chunk(2, 0)[role_rank].tolist(),
            ["['a']", "['b']"],
        )


def dump_for_all(rank: Rank) -> Any:
    if rank.is_baseline:
        part = full_tensor().chunk(2, 0)[rank.role_rank]
        grafter.dump("h", part, dims="t[tp] h", axes={"tp": (rank.role_rank, 2)})
        return None
    mine = torch.zeros(4, 3)
    grafter.dump("h", mine, transform=concatenate_by_layouts)
    return mine.tolist()


def test_a_transform_that_receives_all_sees_where_the_senders_tensors_lie(tmp_path: Path) -> None:
    """The target declares nothing, and its transform decides."""
    with two_jobs(tmp_path, dump_for_all, dump_for_all, ranks=(2, 2), b2t_filter="True") as jobs:
        values = succeed(jobs.wait())
    assert values[2:] == [part.tolist() for part in full_tensor().chunk(2, 1)]


def of_another_shape(graft_input: GraftTransformInput) -> torch.Tensor:
    return torch.ones(7)


def dump_unfit(rank: Rank) -> Any:
    """Three points whose transform cannot have what it asks for, or gives what cannot be written."""
    axes = {"tp": (rank.role_rank, 2)}
    for name in ("target undeclared", "sender undeclared", "another shape"):
        declares = (rank.is_baseline and name != "sender undeclared") or (
            not rank.is_baseline and name != "target undeclared"
        )
        options: dict[str, Any] = {"dims": "t h=5[tp]" if name == "another shape" else "t h[tp]", "axes": axes}
        mine = torch.full((4, 3), 1.0 if rank.is_baseline else 9.0)
        transform = grafter.transform(receives="resharded")(of_another_shape) if name == "another shape" else scale
        grafter.dump(name, mine, transform=transform, **(options if declares else {}))
        if not rank.is_baseline:
            assert bool((mine == 9.0).all())
    if rank.is_baseline:
        wait_to_hear(rank)


def wait_to_hear(rank: Rank) -> None:
    """A sender hears of a failure within about a second; it must still be there to write it down."""
    ledger = Path(rank.arguments[0]) / "run" / "baseline" / f"rank{rank.role_rank}.ledger.jsonl"
    for _ in range(600):
        if read_ledger(ledger)[-1].outcome == "failed":
            return
        time.sleep(0.05)
    raise TimeoutError("the sender never heard of the failure")


def test_what_a_transform_asks_for_and_nobody_declares_fails_with_the_reason(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        jobs.start("baseline", 2, dump_unfit, tmp_path)
        jobs.start("target", 2, dump_unfit, tmp_path)
        succeed(jobs.wait())
        ledgers = jobs.ledgers()
    reasons: dict[str, set[Any]] = {}
    for own in ledgers.values():
        for record in own:
            assert record.outcome == "failed"
            reasons.setdefault(record.name, set()).add(record.reason)
    assert all(len(found) == 1 for found in reasons.values()), reasons
    (target,), (sender,), (shape,) = reasons.values()
    assert "resharded" in target and "the target, of 2 ranks, declares no layout" in target and "dims=" in target
    assert "the baseline, of 2 ranks, declares no layout" in sender
    assert "[7]" in shape and "target rank" in shape


@grafter.transform(receives="resharded")
def fail_on_the_last(graft_input: GraftTransformInput) -> torch.Tensor:
    if graft_input.role_rank == 1:
        raise ZeroDivisionError("no scale")
    return graft_input.received_list[0]


def dump_and_fail(rank: Rank) -> Any:
    """Copies at two senders, of which each serves one receiver; a third has nothing to send."""
    if rank.is_baseline:
        grafter.dump("h", full_tensor(), dims="t h # dp:replicated", axes={"dp": (rank.role_rank, 3)})
        wait_to_hear(rank)
        return None
    mine = torch.full((4, 3), 9.0)
    grafter.dump("h", mine, dims="t h[tp]", axes={"tp": (rank.role_rank, 2)}, transform=fail_on_the_last)
    return mine.unique().tolist()


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_every_sender_hears_that_a_receiver_failed_also_one_that_sent_nothing(tmp_path: Path, backend: str) -> None:
    """Each serves another receiver, and none of them need be the one that tells."""
    with Jobs(tmp_path, b2t_filter="True", backend=backend) as jobs:
        jobs.start("baseline", 3, dump_and_fail, tmp_path)
        jobs.start("target", 2, dump_and_fail, tmp_path)
        assert succeed(jobs.wait())[3:] == [[9.0], [9.0]]
        ledgers = jobs.ledgers()
    assert {record.outcome for own in ledgers.values() for record in own} == {"failed"}
    (reason,) = {record.reason for own in ledgers.values() for record in own}
    assert reason is not None and "target rank 1" in reason and "no scale" in reason
