"""Resharding: whatever the two layouts, a receiver gets its part of the global tensor, each value once."""

from __future__ import annotations

from collections import Counter
from math import ceil
from random import Random

import numpy as np
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from layout_parts import HeldSide, role_headers, two_sides

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.layout.shares import RoleShares
from grafter.core.plan.resharding import CopyItem, Near, Resharding
from grafter.core.plan.token_shares import find_shares

UNTOUCHED = -7


def shares(side: HeldSide, role: str) -> RoleShares:
    found = find_shares(side.headers(role), 0)
    assert found is not None
    return found


def reshard(sender: HeldSide, receiver: HeldSide, **options: bool) -> Resharding:
    note(f"sender: {sender.text}")
    note(f"receiver: {receiver.text}")
    return Resharding(shares(sender, "baseline"), shares(receiver, "target"), **options)


def value_of(index: np.ndarray, summand: int) -> np.ndarray:
    """What the sender has at a place of the global tensor: every place and summand has a value of its own."""
    return np.where(index < 0, -1, index + 1_000_000 * summand)


def laid_out(values: np.ndarray, transposed: bool) -> torch.Tensor:
    """A tensor with these values, in memory as usual or in the opposite order of dims."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.mT.contiguous().mT if transposed and tensor.ndim > 1 else tensor


@settings(max_examples=400)
@given(two_sides(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_receiver_gets_its_part_and_each_value_once(
    sides: tuple[HeldSide, HeldSide], check_replicas: bool, transposed: bool, seed: int
) -> None:
    sender, receiver = sides
    resharding = reshard(sender, receiver, check_replicas=check_replicas)
    near = on_hosts(sender, receiver, seed)
    sent = [laid_out(value_of(held.index, held.summand), transposed) for held in sender.ranks]
    assert resharding.layers == sender.summands * resharding.replicas
    incoming: list[CopyItem] = []
    for rank, held in enumerate(receiver.ranks):
        layers = [laid_out(np.full(held.index.shape, UNTOUCHED), not transposed) for _ in range(resharding.layers)]
        items = list(resharding.incoming(rank, near))
        moved = 0
        for item in items:
            assert item.receiver == rank
            place, source = item.place.of(layers[item.layer]), item.source.of(sent[item.sender])
            assert place.shape == source.shape
            assert bool((place == UNTOUCHED).all()), "a place is written twice"
            strides = [stride for stride, size in zip(place.stride(), place.shape, strict=True) if size > 1]
            assert transposed is False or strides == sorted(strides, reverse=True), "not in the order of memory"
            place.copy_(source)
            moved += source.numel()
        for number, layer in enumerate(layers):
            expected = value_of(held.index, number // resharding.replicas)
            expected = np.where(held.index < 0, UNTOUCHED, expected)
            assert np.array_equal(layer.numpy(), expected)
        assert moved == resharding.layers * int((held.index >= 0).sum())
        inner = np.zeros(held.index.shape, dtype=bool)
        inner[tuple(slice(0, size) for size in resharding.held_sizes(rank, held.index.shape))] = True
        assert np.array_equal(inner, held.index >= 0) or not (held.index >= 0).any()
        incoming += items
    outgoing = [item for rank in range(len(sender.ranks)) for item in resharding.outgoing(rank, near)]
    assert Counter(incoming) == Counter(outgoing)
    assert by_pair(incoming) == by_pair(outgoing)


def on_hosts(sender: HeldSide, receiver: HeldSide, seed: int) -> Near:
    """The ranks are spread over three hosts."""
    draw = Random(seed)
    there = [draw.randrange(3) for _ in sender.ranks]
    here = [draw.randrange(3) for _ in receiver.ranks]
    return lambda s, r: there[s] == here[r]


def by_pair(items: list[CopyItem]) -> dict[tuple[int, int], list[CopyItem]]:
    """The order of what one rank sends another is the same on both: their messages are matched by it."""
    pairs: dict[tuple[int, int], list[CopyItem]] = {}
    for item in items:
        pairs.setdefault((item.sender, item.receiver), []).append(item)
    return pairs


@settings(max_examples=150)
@given(two_sides(), st.integers(0, 99))
def test_a_replica_on_the_same_host_is_preferred(sides: tuple[HeldSide, HeldSide], seed: int) -> None:
    sender, receiver = sides
    resharding, near = reshard(sender, receiver), on_hosts(sender, receiver, seed)
    for rank in range(len(receiver.ranks)):
        for item in resharding.incoming(rank, near):
            held = sender.ranks[item.sender]
            # In boxes, a near rank may have all of it as two cells.
            if near(item.sender, rank) or held.layout is None or held.layout.boxes is not None:
                continue
            assert not any(
                near(number, rank) and other.summand == held.summand and np.array_equal(other.index, held.index)
                for number, other in enumerate(sender.ranks)
            )


@settings(max_examples=150)
@given(two_sides())
def test_replicas_share_the_work_where_all_are_near(sides: tuple[HeldSide, HeldSide]) -> None:
    """No replica serves more receivers than the fair share, rounded up."""
    sender, receiver = sides
    resharding = reshard(sender, receiver)
    if any(held.layout is not None and held.layout.boxes is not None for held in sender.ranks):
        return
    copies: dict[object, list[int]] = {}
    for rank, held in enumerate(sender.ranks):
        copies.setdefault((held.index.tobytes(), held.summand), []).append(rank)
    served = {
        rank: {i.receiver for i in resharding.outgoing(rank, lambda s, r: True)} for rank in range(len(sender.ranks))
    }
    for ranks in copies.values():
        counts = [len(served[rank]) for rank in ranks]
        assert max(counts) <= ceil(sum(counts) / len(counts))
        assert max(counts) - min(counts) <= 1


def test_two_ranks_that_hold_the_same_cells_in_another_order_send_them_in_one_order() -> None:
    """By which the receiver, who does not know that order, matches what comes."""
    cells = [((2 * n, 0), (2, 3)) for n in range(4)]
    sides = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        boxes = tuple((*cells[n], (2 * at, 0)) for at, n in enumerate(order))
        sides.append(DeclaredLayout(global_shape=(8, 3), boxes=boxes))
    sender = find_shares(role_headers("baseline", None, [(8, 3)] * 2, layouts=sides), 0)
    receiver = find_shares(role_headers("target", "s h", [(8, 3)]), 0)
    assert sender is not None and receiver is not None
    resharding = Resharding(sender, receiver)
    for host in range(2):
        incoming = list(resharding.incoming(0, lambda s, r, host=host: s == host))
        assert incoming == list(resharding.outgoing(host, lambda s, r, host=host: s == host))
        assert [item.place.starts for item in incoming] == [(0, 0), (2, 0), (4, 0), (6, 0)]
