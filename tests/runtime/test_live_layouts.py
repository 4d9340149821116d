"""Layouts between real jobs: each receiver gets its own part, wherever the parts lie on the other side.

One run has all cases, each a point with participants of its own: what a receiver must get is sliced from the whole
tensor by torch, not by grafter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Rank, succeed, two_jobs

import grafter

BACKENDS = ["auto", "gloo"]
Cut = Callable[[torch.Tensor, int], torch.Tensor]
UNTOUCHED = 77.0


@dataclass(frozen=True)
class Side:
    """`cut(whole, rank)` is what a rank holds; `axes` are the sizes of the mesh, outermost first."""

    dims: str | None
    axes: dict[str, int]
    cut: Cut

    @property
    def size(self) -> int:
        size = 1
        for length in self.axes.values():
            size *= length
        return size

    def places(self, role_rank: int) -> dict[str, tuple[int, int]]:
        places, inner = {}, self.size
        for axis, length in self.axes.items():
            inner //= length
            places[axis] = (role_rank // inner % length, length)
        return places


def tp(count: int, dims: str | None, cut: Cut) -> Side:
    return Side(dims, {"tp": count}, cut)


def chunk(dim: int, count: int) -> Cut:
    return lambda whole, rank: whole.chunk(count, dim)[rank]


def as_it_is(whole: torch.Tensor, rank: int) -> torch.Tensor:
    return whole


def zigzag(dim: int, count: int) -> Cut:
    def cut(whole: torch.Tensor, rank: int) -> torch.Tensor:
        parts = whole.chunk(2 * count, dim)
        return torch.cat([parts[rank], parts[2 * count - 1 - rank]], dim)

    return cut


def two_axes(whole: torch.Tensor, rank: int) -> torch.Tensor:
    return whole.chunk(2, 1)[rank // 2].chunk(2, 2)[rank % 2]


def sequence_then_tensor(whole: torch.Tensor, rank: int) -> torch.Tensor:
    """A dim split over two axes: cp zigzag outside, sp inside."""
    return zigzag(0, 2)(whole, rank // 2).chunk(2, 0)[rank % 2]


def part_or_nothing(whole: torch.Tensor, rank: int) -> torch.Tensor:
    """What a chunk of 8 over 4 gives that needs only 3: 3, 3, 2 and nothing."""
    return (*whole.split(3, 1), whole[:, 8:])[rank]


def uneven(sizes: tuple[int, ...], dim: int) -> Cut:
    return lambda whole, rank: whole.split(list(sizes), dim)[rank]


@dataclass(frozen=True)
class Case:
    sender: Side
    receiver: Side
    shape: tuple[int, ...] = (2, 8, 24)
    sent_as: torch.dtype = torch.float32
    received_as: torch.dtype = torch.float32

    @property
    def whole(self) -> torch.Tensor:
        count = torch.Size(self.shape).numel()
        return (torch.arange(count, dtype=torch.float32) % 251).view(self.shape).to(self.sent_as)


ONE = tp(1, "b s h", as_it_is)
CASES = {
    "1 to 4": Case(ONE, tp(4, "b s h[tp]", chunk(2, 4))),
    "4 to 1": Case(tp(4, "b s h[tp]", chunk(2, 4)), ONE),
    "an undeclared single rank": Case(tp(1, None, as_it_is), tp(4, "b s h[tp]", chunk(2, 4))),
    "to an undeclared single rank": Case(tp(4, "b s h[tp]", chunk(2, 4)), tp(1, None, as_it_is)),
    "2 to 4": Case(tp(2, "b s h[tp]", chunk(2, 2)), tp(4, "b s h[tp]", chunk(2, 4))),
    "4 to 3": Case(tp(4, "b s h[tp]", chunk(2, 4)), tp(3, "b s h[tp]", chunk(2, 3))),
    "heads to sequence": Case(tp(2, "b s h[tp]", chunk(2, 2)), tp(2, "b s[tp] h", chunk(1, 2))),
    "another order of dims": Case(
        tp(2, "b s h[tp]", chunk(2, 2)), tp(4, "s[tp] b h", lambda w, r: w.permute(1, 0, 2).chunk(4, 0)[r])
    ),
    "a dim of size 1 more": Case(
        tp(1, "t h", as_it_is), tp(2, "t[tp] 1 h", lambda w, r: w.chunk(2, 0)[r].unsqueeze(1)), shape=(6, 5)
    ),
    "sizes that do not divide": Case(
        tp(2, "b s h[tp]", uneven((15, 9), 2)), tp(4, "b s h[tp]", uneven((7, 7, 7, 3), 2))
    ),
    "ranks that hold nothing": Case(tp(4, "b s[tp] h", part_or_nothing), tp(4, "b s h[tp]", uneven((0, 20, 0, 4), 2))),
    "a fused dim": Case(
        tp(2, "t (n*d)[tp]", chunk(1, 2)),
        tp(4, "t n[tp] d", lambda w, r: w.view(6, 8, 4).chunk(4, 1)[r]),
        shape=(6, 32),
    ),
    "a cut inside of a head": Case(
        tp(3, "t (n*d)[tp]", uneven((5, 13, 14), 1)),
        tp(2, "t d n[tp]", lambda w, r: w.view(6, 8, 4).transpose(1, 2).chunk(2, 2)[r]),
        shape=(6, 32),
    ),
    "another fusion": Case(
        tp(2, "(b*s)[tp] h", lambda w, r: w.view(16, 24).chunk(2, 0)[r]), tp(3, "b s h[tp]", chunk(2, 3))
    ),
    "zigzag": Case(tp(4, "b s[tp:zigzag] h", zigzag(1, 4)), tp(2, "b s[tp] h", chunk(1, 2))),
    "two axes on two dims": Case(
        Side("b s[cp] h[tp]", {"cp": 2, "tp": 2}, two_axes),
        Side("b s[cp:zigzag] h[tp]", {"tp": 2, "cp": 2}, lambda w, r: zigzag(1, 2)(w.chunk(2, 2)[r // 2], r % 2)),
    ),
    "two axes on one dim": Case(
        Side("s[cp:zigzag,sp] h", {"cp": 2, "sp": 2}, sequence_then_tensor),
        tp(3, "s h[tp]", chunk(1, 3)),
        shape=(16, 6),
    ),
    "bfloat16 into float32": Case(
        tp(2, "b s h[tp]", chunk(2, 2)), tp(4, "b s[tp] h", chunk(1, 4)), sent_as=torch.bfloat16
    ),
    "float64 into float16": Case(
        ONE, tp(4, "b s[tp] h", chunk(1, 4)), sent_as=torch.float64, received_as=torch.float16
    ),
    "integers": Case(
        tp(2, "b s h[tp]", chunk(2, 2)), tp(3, "b s h[tp]", chunk(2, 3)), sent_as=torch.int64, received_as=torch.int64
    ),
    "conjugated and complex": Case(
        tp(2, "b s h[tp]", lambda w, r: (w * (1 - 2j)).conj().chunk(2, 2)[r]),
        tp(3, "s h[tp] b", lambda w, r: (w * (1 + 2j)).permute(1, 2, 0).chunk(3, 1)[r]),
        sent_as=torch.complex64,
        received_as=torch.complex64,
    ),
}


def room_for(shape: torch.Size, dtype: torch.dtype, spread: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory, the target in it): every third value of the memory, or all of it."""
    memory = torch.full((*shape, 3) if spread else tuple(shape), UNTOUCHED).to(dtype)
    return memory, memory[..., 1] if spread else memory


def is_sender(rank: Rank) -> bool:
    return rank.is_baseline == ("GRAFTER_T2B_FILTER" not in os.environ)


def dump_all(rank: Rank) -> list[str]:
    """The cases whose values are not what torch would slice, or which wrote beside the target."""
    wrong = []
    for name, case in CASES.items():
        side = case.sender if is_sender(rank) else case.receiver
        if rank.role_rank >= side.size:
            continue
        mine = side.cut(case.whole, rank.role_rank)
        options = {"dims": side.dims, "axes": side.places(rank.role_rank), "ranks": range(side.size)}
        if is_sender(rank):
            grafter.dump(name, mine, **options)
            continue
        memory, target = room_for(mine.shape, case.received_as, spread=rank.role_rank % 2 == 1)
        returned = grafter.dump(name, target, **options)
        beside = memory if memory is target else memory[..., ::2]
        if returned is not target or not torch.equal(target, mine.to(case.received_as)):
            wrong.append(name)
        elif memory is not target and not bool((beside == UNTOUCHED).all()):
            wrong.append(f"{name}: beside the target")
    return wrong


@pytest.mark.parametrize(("backend", "direction"), [("auto", "b2t"), ("gloo", "b2t"), ("auto", "t2b")])
def test_every_receiver_gets_exactly_its_own_part(tmp_path: Path, backend: str, direction: str) -> None:
    """In place, into any strides, and each byte crosses once: what is sent and received is what the receivers hold."""
    settings = {f"{direction}_filter": "True", "backend": backend, "stats": "off"}
    with two_jobs(tmp_path, dump_all, dump_all, ranks=(4, 4), **settings) as jobs:
        wrong = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    records = [record for own in ledgers.values() for record in own]
    assert [(r.name, r.role, r.role_rank, r.reason) for r in records if r.outcome == "failed"] == []
    assert wrong == [[]] * 8
    for name, case in CASES.items():
        own = [record for record in records if record.name == name]
        nbytes = case.whole.numel() * case.whole.element_size()
        assert sum(record.bytes_received for record in own) == nbytes, name
        assert sum(record.bytes_sent for record in own) == nbytes, name
        for record in own:
            if record.outcome == "grafted":
                (leaf,) = record.leaves
                assert record.bytes_received == torch.Size(leaf.shape).numel() * case.whole.element_size(), name


def compare_all(rank: Rank) -> None:
    """The last rank's last value is off by 2, in every case."""
    for name, case in CASES.items():
        side = case.sender if rank.is_baseline else case.receiver
        if rank.role_rank >= side.size:
            continue
        mine = side.cut(case.whole, rank.role_rank).contiguous()
        if not rank.is_baseline:
            mine = mine.to(case.received_as)
            if rank.role_rank == side.size - 1:
                mine.view(-1)[-1] += 2
        options = {"dims": side.dims, "axes": side.places(rank.role_rank), "ranks": range(side.size)}
        assert grafter.dump(name, mine, **options) is mine


def test_compare_finds_a_value_that_differs_on_the_rank_and_at_the_index_where_it_lies(tmp_path: Path) -> None:
    with two_jobs(tmp_path, compare_all, compare_all, ranks=(4, 4), compare_filter="True") as jobs:
        succeed(jobs.wait())
        ledgers = jobs.ledgers()
    for name, case in CASES.items():
        last = case.receiver.size - 1
        for role_rank in range(case.receiver.size):
            (record,) = [record for record in ledgers["target", role_rank] if record.name == name]
            (leaf,) = record.leaves
            assert record.outcome == "compared", record.reason
            assert record.difference is not None
            if role_rank == last:
                assert record.difference.max_abs == 2.0, name
                index = [size - 1 for size in leaf.shape]
                assert record.difference.max_abs_index is not None
                assert record.difference.max_abs_index[: len(index)] == index, name
            else:
                assert record.difference.max_abs in (0.0, None), name


# Several tensors, and the ways to write them.


def tree_of(rank: Rank) -> Any:
    full = torch.arange(2 * 6 * 8, dtype=torch.float32).view(2, 6, 8)
    ids = torch.arange(12).view(2, 6)
    if rank.is_baseline:
        value = {"h": full, "ids": ids, "inner": [full * 2], "kind": "moe"}
        grafter.dump("tree", value, dims={"h": "b s h", "ids": "b s", "['inner'][0]": "b s h"})
        return None
    axes = {"tp": (rank.role_rank, 2)}
    value = {
        "h": torch.zeros(6, 2, 4),
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        "inner": [torch.zeros(2, 6, 4)],
        "kind": "moe",
    }
    dims = {"h": "s b h[tp]", "ids": "b s[tp]", "['inner'][0]": "b s h[tp]"}
    got = grafter.dump("tree", value, dims=dims, axes=axes)
    assert got is value
    return torch.equal(got["h"], full.permute(1, 0, 2).chunk(2, 2)[rank.role_rank]), [
        torch.equal(got["ids"], ids.chunk(2, 1)[rank.role_rank]),
        torch.equal(got["inner"][0], (full * 2).chunk(2, 2)[rank.role_rank]),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_leaves_of_a_pytree_have_layouts_of_their_own(tmp_path: Path, backend: str) -> None:
    """By path or by last key; all leaves travel as one point, and the ledger names each one's layout."""
    with two_jobs(tmp_path, tree_of, tree_of, ranks=(1, 2), b2t_filter="True", backend=backend) as jobs:
        _, *got = succeed(jobs.wait())
        (record,) = jobs.ledgers()["target", 0]
    assert got == [(True, [True, True])] * 2
    assert [(leaf.path, leaf.layout) for leaf in record.leaves] == [
        ("['h']", "'s b h[tp]'"),
        ("['ids']", "'b s[tp]'"),
        ("['inner'][0]", "'b s h[tp]'"),
    ]


def dump_modes(rank: Rank) -> Any:
    full = torch.arange(8.0).view(2, 4)
    if rank.is_baseline:
        for name in ("returned", "graph", "parameter"):
            grafter.dump(name, full.clone(), dims="b h")
        return None
    axes = {"tp": (rank.role_rank, 2)}
    kept = torch.zeros(2, 2)
    returned = grafter.dump("returned", kept, dims="b h[tp]", axes=axes, write="return")
    x = torch.ones(2, 2, requires_grad=True)
    y = x * 3
    out = grafter.dump("graph", y, dims="b h[tp]", axes=axes)
    (out * out.detach()).sum().backward()
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    grafter.dump("parameter", parameter, dims="b h[tp]", axes=axes)
    assert x.grad is not None
    mine = full.chunk(2, 1)[rank.role_rank]
    return {
        "left alone": bool((kept == 0).all()),
        "returned": torch.equal(returned, mine),
        "written": out is y and torch.equal(y, mine),
        "gradient": torch.equal(x.grad, 3 * mine),
        "parameter": torch.equal(parameter, mine) and parameter.requires_grad and parameter.is_leaf,
    }


def test_what_layouts_bring_is_written_in_every_mode(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_modes, dump_modes, ranks=(1, 2), b2t_filter="True") as jobs:
        _, *got = succeed(jobs.wait())
    assert got == [dict.fromkeys(("left alone", "returned", "written", "gradient", "parameter"), True)] * 2


GROUPS, HEAD = 4, 2
# Per KV group, in a fused dim: two heads of q, one of k, one of v.
PARTS = {"q": (0, 2), "k": (2, 1), "v": (3, 1)}


def dump_fused(rank: Rank) -> Any:
    """Fused `[q q k v]` per group over two ranks, against a tensor for each, whose place boxes tell."""
    whole = torch.arange(6.0 * GROUPS * 4 * HEAD).view(6, -1)
    for name, (first, count) in PARTS.items():
        if rank.is_baseline:
            part = whole.chunk(2, 1)[rank.role_rank]
            grafter.dump(name, part, dims="s qkv[tp]", axes={"tp": (rank.role_rank, 2)})
            continue
        width = count * HEAD
        boxes = [((0, (4 * g + first) * HEAD), (6, width), (0, g * width)) for g in range(GROUPS)]
        target = torch.zeros(6, GROUPS * width)
        grafter.dump(name, target, layout=grafter.Layout(tuple(whole.shape), boxes))
        expected = whole.view(6, GROUPS, 4, HEAD)[:, :, first : first + count].reshape(6, -1)
        assert torch.equal(target, expected), name
    return True


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_take_q_k_and_v_out_of_what_is_fused_by_group(tmp_path: Path, backend: str) -> None:
    """Only what is asked for crosses."""
    with two_jobs(tmp_path, dump_fused, dump_fused, ranks=(2, 1), b2t_filter="True", backend=backend) as jobs:
        succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert [record.bytes_received for record in ledgers["target", 0]] == [4 * 6 * 16, 4 * 6 * 8, 4 * 6 * 8]
    assert [record.bytes_sent for record in ledgers["baseline", 1]] == [2 * 6 * 16, 2 * 6 * 8, 2 * 6 * 8]


def dump_steps(rank: Rank) -> list[list[float]]:
    """The same point in each step, and, in between, one that grows."""
    found = []
    for step in range(4):
        full = torch.arange(8.0 * (step + 1)).view(2, -1) + step
        if rank.is_baseline:
            grafter.dump("h", full, dims="b h[tp]" if step % 2 else "b h", axes={"tp": (0, 1)})
        else:
            mine = torch.zeros(2, 2 * (step + 1))
            grafter.dump("h", mine, dims="b h[tp]", axes={"tp": (rank.role_rank, 2)})
            found.append(torch.equal(mine, full.chunk(2, 1)[rank.role_rank]))
        grafter.step()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_layouts_may_change_from_step_to_step(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_steps, dump_steps, ranks=(1, 2), b2t_filter="True", backend=backend) as jobs:
        _, *got = succeed(jobs.wait())
    assert got == [[True] * 4] * 2
