"""Padding between real jobs: what lies beyond the size that dims declare is neither sent, nor compared, nor written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Rank, succeed, two_jobs

import grafter
from grafter.core.plan.assembly import with_padding
from grafter.wire.exchange.incoming import IncomingLeaf

ROWS, PADDED = 30, 32
# NaN with payloads: a padding that is read and written back as numbers would lose them.
PAYLOADS = torch.tensor([0x7FC00001, 0x7FC0BEEF, 0x7FA00003, -0x3FFF01], dtype=torch.int32)


def vocabulary() -> torch.Tensor:
    return torch.arange(ROWS * 2.0).view(ROWS, 2)


def padded_half(tp_rank: int) -> torch.Tensor:
    """One of two halves of [32, 2]; the second ends in two rows of padding."""
    whole = torch.full((PADDED, 2), 9.0)
    whole[ROWS:].view(torch.int32).copy_(PAYLOADS.view(2, 2))
    return whole.chunk(2, 0)[tp_rank].clone()


def tail(tensor: torch.Tensor) -> list[int]:
    return tensor.detach()[-2:].contiguous().view(torch.int32).flatten().tolist()


def dump_into_padded(rank: Rank) -> Any:
    names = ("in place", "returned", "parameter", "narrower", "transposed", "transformed")
    if rank.is_baseline:
        for name in names:
            value = vocabulary() * (1e4 if name == "narrower" else 1)
            grafter.dump(name, value.t() if name == "transposed" else value)
        return None
    axes, found = {"tp": (rank.role_rank, 2)}, {}
    for name in names:
        mine = padded_half(rank.role_rank)
        if name == "parameter":
            mine = torch.nn.Parameter(mine)
        if name == "narrower":
            mine = mine.half()
        options: dict[str, Any] = {"dims": f"v={ROWS}[tp] h", "axes": axes}
        if name == "transposed":
            memory = mine.t().contiguous()
            options["dims"] = f"h v={ROWS}[tp]"
            grafter.dump(name, memory, **options)
            found[name] = memory.t().contiguous()
            continue
        if name == "transformed":
            options["transform"] = double
        got = grafter.dump(name, mine, write="return" if name == "returned" else None, **options)
        found[name] = got.detach()
        if name == "returned":
            assert tail(mine) == tail(padded_half(rank.role_rank))
            assert bool((mine[:14] == 9.0).all())
    rows = {name: value[:14].tolist() for name, value in found.items()}
    return rows, {name: tail(value) if value.dtype is torch.float32 else None for name, value in found.items()}


@grafter.transform(receives="resharded")
def double(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    (received,) = graft_input.received_list
    assert received.shape == graft_input.target.shape == (16 - 2 * graft_input.role_rank, 2)
    return received * 2


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_the_tail_of_a_padded_target_stays_bit_for_bit(tmp_path: Path, backend: str) -> None:
    """NaN payloads in it too, in every way to write; and it is in no statistic and in no byte."""
    settings = {"b2t_filter": "True", "backend": backend}
    with two_jobs(tmp_path, dump_into_padded, dump_into_padded, ranks=(1, 2), **settings) as jobs:
        _, first, second = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    records = {record.name: record for record in ledgers["target", 1]}
    assert {name: record.reason for name, record in records.items() if record.outcome != "grafted"} == {}
    for name in ("in place", "returned", "parameter", "transposed"):
        assert first[0][name] == vocabulary()[:14].tolist(), name
        assert second[0][name] == vocabulary()[16:30].tolist(), name
    assert second[0]["transformed"] == (2 * vocabulary()[16:30]).tolist()
    assert all(bits == PAYLOADS.tolist() for name, bits in second[1].items() if name != "narrower")
    for record in records.values():
        assert record.bytes_received == 14 * 2 * 4
        assert record.incoming is not None and record.incoming.numel == 28
        assert record.before is not None and record.before.nan == 0
        assert record.difference is not None and record.difference.nan == 0
    assert [record.bytes_sent for record in ledgers["baseline", 0]] == [ROWS * 2 * 4] * 6
    saturated = [value for value in (vocabulary() * 1e4)[16:30].flatten().tolist() if value > 65520]
    assert records["narrower"].leaves[0].saturated == len(saturated) > 0
    assert records["in place"].leaves[0].saturated is None


def dump_from_padded(rank: Rank) -> Any:
    """The padded side sends; its tail is garbage."""
    if rank.is_baseline:
        mine = padded_half(rank.role_rank)
        start = 16 * rank.role_rank
        mine[: ROWS - start] = vocabulary()[start : start + 16]
        grafter.dump("logits", mine, dims=f"v={ROWS}[tp] h", axes={"tp": (rank.role_rank, 2)})
        return None
    mine = vocabulary()
    mine[29, 1] += 1
    got = grafter.dump("logits", mine)
    return got.tolist()


@pytest.mark.parametrize("direction", ["b2t", "compare"])
def test_padding_of_the_sender_stays_where_it_is(tmp_path: Path, direction: str) -> None:
    settings = {f"{direction}_filter": "True"}
    with two_jobs(tmp_path, dump_from_padded, dump_from_padded, ranks=(2, 1), **settings) as jobs:
        *_, got = succeed(jobs.wait())
        (record,) = jobs.ledgers()["target", 0]
        sent = [jobs.ledgers()["baseline", role_rank][0].bytes_sent for role_rank in range(2)]
    assert sent == [16 * 8, 14 * 8]
    assert record.difference is not None
    assert (record.difference.max_abs, record.difference.max_abs_index) == (1.0, [29, 1])
    assert (record.difference.nan, record.difference.inf) == (0, 0)
    assert got[29][1] == (59.0 if direction == "b2t" else 60.0)


def dump_both_padded(rank: Rank) -> Any:
    """32 over 2 ranks, and 33 over 3, of 30."""
    size = 16 if rank.is_baseline else 11
    start = size * rank.role_rank
    mine = torch.full((size, 2), 9.0)
    own = vocabulary()[start : start + size]
    if rank.is_baseline:
        mine[: len(own)] = own
    grafter.dump("h", mine, dims=f"v={ROWS}[tp] h", axes={"tp": (rank.role_rank, rank.world_size)})
    return torch.equal(mine[: len(own)], own) and bool((mine[len(own) :] == 9.0).all())


def test_each_side_may_have_its_own_padding(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_both_padded, dump_both_padded, ranks=(2, 3), b2t_filter="True") as jobs:
        assert succeed(jobs.wait()) == [True] * 5


def dump_undeclared_padding(rank: Rank) -> Any:
    if rank.is_baseline:
        return grafter.dump("h", vocabulary()) is None
    mine = padded_half(rank.role_rank)
    grafter.dump("h", mine, dims="v[tp] h", axes={"tp": (rank.role_rank, 2)})
    return bool((mine[:14] == 9.0).all())


def test_sizes_that_disagree_name_the_size_to_declare(tmp_path: Path) -> None:
    settings = {"b2t_filter": "True"}
    with two_jobs(tmp_path, dump_undeclared_padding, dump_undeclared_padding, ranks=(1, 2), **settings) as jobs:
        assert succeed(jobs.wait())[1:] == [True, True]
        reasons = {record.reason for own in jobs.ledgers().values() for record in own}
    (reason,) = reasons
    assert reason is not None and "`v=30`" in reason and "32" in reason and "target" in reason


# Memory.


def test_what_lies_in_staging_gets_its_padding_there() -> None:
    """No second tensor of the target's size: the padding goes around the value, in the memory that it came into."""
    target = torch.full((4, 3, 2), 9.0)
    room = torch.full((4, 3, 2), float("nan"))
    value = room[:2, :2]
    value.copy_(torch.arange(8.0).view(2, 2, 2))
    leaf = IncomingLeaf(value, target[:2, :2], padded=target, room=room)
    leaf.prepare()
    assert leaf.to_write is room
    expected = target.clone()
    expected[:2, :2] = torch.arange(8.0).view(2, 2, 2)
    assert torch.equal(leaf.to_write, expected)
    assert torch.equal(with_padding(target, value.clone()), expected)


def test_another_dtype_is_converted_into_a_tensor_of_its_own() -> None:
    target = torch.full((4,), 9.0, dtype=torch.float16)
    room = torch.tensor([1.0, 1e6, -1.0, -1.0])
    leaf = IncomingLeaf(room[:2], target[:2], padded=target, room=room)
    leaf.prepare()
    assert leaf.saturated == 1
    assert leaf.to_write.tolist() == [1.0, float("inf"), 9.0, 9.0]
