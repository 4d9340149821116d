"""The space of both sides: names and sizes agree or are refused; fused, cut and padded dims; holes and overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layout_parts import on_axis, role_headers, two_sides

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.layout.overlap import find_overlap, share_a_place
from grafter.core.layout.space import rectangles
from grafter.core.messages.manifest import Header
from grafter.core.plan.resharding import Resharding
from grafter.core.plan.token_shares import find_shares, whole_tensor
from grafter.errors import LayoutError


def side(role: str, dims: str | None, *shapes: Sequence[int], axis: str = "tp", **fields: Any) -> list[Header]:
    """Ranks along one axis."""
    return role_headers(role, dims, shapes, on_axis(axis, len(shapes)), **fields)


def boxes(role: str, global_shape: Sequence[int], *ranks: Sequence[Any], dims: str | None = None) -> list[Header]:
    """One rank for each list of (offset, size, local offset), with a local shape."""
    layouts = [DeclaredLayout(dims=dims, global_shape=tuple(global_shape), boxes=tuple(own)) for _, own in ranks]
    return role_headers(role, None, [shape for shape, _ in ranks], layouts=layouts)


def reshard(sender: list[Header], receiver: list[Header], **options: bool) -> Resharding:
    sides = [find_shares(own, 0) or whole_tensor(own[0], 0) for own in (sender, receiver)]
    return Resharding(sides[0], sides[1], **options)


def moved(resharding: Resharding, sent: Sequence[torch.Tensor], receiver: int, shape: Sequence[int]) -> torch.Tensor:
    """What a receiver's value becomes; -7 where nothing comes."""
    value = torch.full(tuple(shape), -7)
    for item in resharding.incoming(receiver, lambda s, r: True):
        item.place.of(value).copy_(item.source.of(sent[item.sender]))
    return value


def refusal(sender: list[Header], receiver: list[Header], **options: bool) -> str:
    with pytest.raises(LayoutError) as error:
        reshard(sender, receiver, **options)
    return str(error.value)


# --- names


def test_dims_have_the_same_names_on_both_sides() -> None:
    assert refusal(side("baseline", "b s h", (2, 3, 4)), side("target", "b t d", (2, 3, 4))) == (
        "the dims have other names: h, s only at baseline ('b s h'), d, t only at target ('b t d'). Name them alike on "
        "both sides; a dim of size 1 that one side has not got is written `1`."
    )
    assert "the dims have other names: b only at baseline ('b s h'), none only at target ('s h')" in refusal(
        side("baseline", "b s h", (1, 3, 4)), side("target", "s h", (3, 4))
    )


def test_a_dim_of_size_1_has_no_name_to_agree_on() -> None:
    full = torch.arange(12).view(3, 4)
    resharding = reshard(side("baseline", "1 s h 1", (1, 3, 4, 1)), side("target", "h[tp] 1 s", (2, 1, 3), (2, 1, 3)))
    assert torch.equal(moved(resharding, [full.view(1, 3, 4, 1)], 1, (2, 1, 3)), full.T[2:].unsqueeze(1))


def test_a_dim_that_is_said_to_be_1_is_1() -> None:
    # A peer checks it for itself; its word is not taken for it.
    assert "says that a dim is 1, and it is 2 at baseline" in refusal(
        side("baseline", "1 s", (2, 3)), side("target", "s", (3,))
    )


def test_dims_without_names_are_taken_by_position() -> None:
    full = torch.arange(12).view(3, 4)
    plain = boxes("baseline", (3, 4), ((3, 4), [((0, 0), (3, 4), (0, 0))]))
    resharding = reshard(plain, boxes("target", (3, 1, 4), ((3, 1, 2), [((0, 0, 2), (3, 1, 2), (0, 0, 0))])))
    assert torch.equal(moved(resharding, [full], 0, (3, 1, 2)), full[:, 2:].unsqueeze(1))
    text = refusal(plain, boxes("target", (4, 3), ((4, 3), [((0, 0), (4, 3), (0, 0))])))
    assert text == "the sizes of dim 0 disagree: 3 (the shards at baseline) and 4 (the shards at target)."
    assert "the global shapes are [3, 4] at baseline and [12] at target, and their dims have no names" in refusal(
        plain, boxes("target", (12,), ((12,), [((0,), (12,), (0,))]))
    )


def test_names_are_borrowed_from_the_side_that_has_them() -> None:
    full = torch.arange(12).view(3, 4)
    whole = side("baseline", None, (3, 4))
    resharding = reshard(whole, side("target", "s 1 h[tp]", (3, 1, 1), (3, 1, 3)))
    assert torch.equal(moved(resharding, [full], 1, (3, 1, 3)), full[:, 1:].unsqueeze(1))
    assert "baseline (the whole tensor) has 2 dims without names: [3, 4]" in refusal(
        whole, side("target", "a b c", (3, 4, 1))
    )
    assert "target has the dims '1 h', and baseline has [3, 4]: size 3 where the other has 1" in refusal(
        whole, side("target", "1 h", (1, 4))
    )


def test_a_rank_that_holds_nothing_of_a_dim_of_size_1_is_no_replica() -> None:
    """A DTensor of [1, 4], sharded over its first dim: the second rank has nothing."""
    layouts = [
        DeclaredLayout(global_shape=(1, 4), runs=(runs, ((0, 4, 0),)), place=(n,), mesh="m")
        for n, runs in enumerate([((0, 1, 0),), ()])
    ]
    sender = role_headers("baseline", None, [(1, 4), (0, 4)], layouts=layouts)
    resharding = reshard(sender, side("target", None, (4,)), check_replicas=True)
    assert resharding.replicas == 1
    sent = [torch.arange(4).view(1, 4), torch.empty(0, 4, dtype=torch.int64)]
    assert moved(resharding, sent, 0, (4,)).tolist() == [0, 1, 2, 3]
    back = reshard(side("baseline", None, (4,)), role_headers("target", None, [(1, 4), (0, 4)], layouts=layouts))
    assert list(back.incoming(1, lambda s, r: True)) == []


def test_an_empty_box_in_a_dim_of_size_1_is_no_replica() -> None:
    for dims in ("1 h", "1 1"):
        size = 4 if dims == "1 h" else 1
        ranks = [((n, size), [((0, 0), (n, size), (0, 0))]) for n in (0, 1)]
        resharding = reshard(boxes("baseline", (1, size), *ranks, dims=dims), side("target", dims, (1, size)))
        assert [len(list(resharding.outgoing(rank, lambda s, r: True))) for rank in range(2)] == [0, 1]


# --- sizes


def test_sizes_that_disagree_name_both_sides() -> None:
    assert refusal(side("baseline", "b h[tp]", (2, 4), (2, 4)), side("target", "b h", (2, 6))) == (
        "the sizes of h disagree: 8 (the shards at baseline) and 6 (the shards at target). If h is split over the "
        "ranks there, mark it: `h[tp]`. If 8 is padded, declare the true size there: `h=6`."
    )
    assert "the sizes of n disagree: 4 ('(n=4*d)' at baseline) and 2 (the shards at target)" in refusal(
        side("baseline", "(n=4*d)", (8,)), side("target", "n d", (2, 4))
    )
    assert "(n*d) is 9 at baseline, which does not fit n=2 (the shards at target), d=4 (the shards at target)" in (
        refusal(side("baseline", "(n*d)", (9,)), side("target", "n d", (2, 4)))
    )
    assert "(n*d) is 9 at baseline, which does not fit n=4 ('(n=4*d)' at baseline)" in refusal(
        side("baseline", "(n=4*d)", (9,)), side("target", "(n*d)", (9,))
    )


def test_a_declared_size_that_nobody_holds_is_refused() -> None:
    assert refusal(side("baseline", "v=10[tp] h", (4, 1), (4, 1)), side("target", "v h", (10, 1))) == (
        "'v=10[tp] h' says that v is 10, and the ranks of baseline hold only 8 of it together."
    )


def test_a_size_inside_a_fused_dim_is_declared_or_found_on_the_other_side() -> None:
    assert refusal(side("baseline", "(n*d)", (8,)), side("target", "(d*n)", (8,))) == (
        "the size of d is not known: '(n*d)' at baseline, '(d*n)' at target. Declare one of (n*d), such as `(n*d=8)`."
    )
    full = torch.arange(8)
    for text in ("(n=2*d)", "(n*d=4)"):
        resharding = reshard(side("baseline", text, (8,)), side("target", "(d*n)", (8,)))
        assert torch.equal(moved(resharding, [full], 0, (8,)), full.view(2, 4).T.flatten())


def test_dims_that_are_fused_alike_need_no_sizes_inside() -> None:
    """Neither between two texts nor where one side gives boxes."""
    full = torch.arange(24).view(2, 12)
    receiver = side("target", "(n*d)[tp] s", (5, 2), (7, 2))
    sender = side("baseline", "s (n*d)", (2, 12))
    assert torch.equal(moved(reshard(sender, receiver), [full], 1, (7, 2)), full.T[5:])
    sender = boxes("baseline", (2, 12), ((2, 12), [((0, 0), (2, 12), (0, 0))]), dims="s (n*d)")
    assert torch.equal(moved(reshard(sender, receiver), [full], 1, (7, 2)), full.T[5:])


# --- cuts, padding


def test_a_cut_inside_of_a_head_is_several_boxes() -> None:
    full = torch.arange(24).view(2, 3, 4)
    sender = side("baseline", "s (n*d)[tp]", (2, 6), (2, 6))
    sent = [part.contiguous() for part in full.view(2, 12).chunk(2, 1)]
    resharding = reshard(sender, side("target", "d n s", (4, 3, 2)))
    assert torch.equal(moved(resharding, sent, 0, (4, 3, 2)), full.permute(2, 1, 0))
    assert len(list(resharding.incoming(0, lambda s, r: True))) == 4


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_rectangles_of_a_stretch_are_its_places_in_order(sizes: list[int], data: st.DataObject) -> None:
    index = np.arange(int(np.prod(sizes))).reshape(sizes)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, index.size), st.integers(0, index.size))))
    found = rectangles(start, stop, sizes)
    cut = [index[tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))] for starts, lengths in found]
    assert [place for part in cut for place in part.flatten()] == list(range(start, stop))
    assert len(found) <= 2 * len(sizes) - 1


@pytest.mark.parametrize("other", ["v h", "h v", "(v*h)"])
def test_padding_is_neither_sent_nor_written(other: str) -> None:
    """A vocabulary of 10 in 3 x 4 rows, against one of 10, in both directions."""
    full = torch.arange(20).view(10, 2)
    plain = {"v h": full, "h v": full.T, "(v*h)": full.flatten()}[other].contiguous()
    parts = list(torch.cat([full, torch.full((2, 2), -1)]).chunk(3))
    padded = side("baseline", "v=10[tp] h", *[(4, 2)] * 3)
    resharding = reshard(padded, side("target", other, plain.shape))
    assert torch.equal(moved(resharding, parts, 0, plain.shape), plain)
    back = reshard(side("baseline", other, plain.shape), side("target", "v=10[tp] h", *[(4, 2)] * 3))
    assert [back.held_sizes(rank, (4, 2)) for rank in range(3)] == [(4, 2), (4, 2), (2, 2)]
    got = [moved(back, [plain], rank, (4, 2)) for rank in range(3)]
    assert torch.equal(torch.cat(got)[:10], full)
    assert (got[2][2:] == -7).all()


def test_a_receiver_that_holds_only_padding_gets_nothing() -> None:
    resharding = reshard(side("baseline", "v h", (4, 2)), side("target", "v=4[tp] h", *[(2, 2)] * 3))
    assert resharding.held_sizes(2, (2, 2)) == (0, 2)
    assert list(resharding.incoming(2, lambda s, r: True)) == []


def test_padding_is_left_out_where_the_other_side_gives_boxes() -> None:
    full = torch.arange(20).view(10, 2)
    sender = boxes("baseline", (10, 2), ((10, 2), [((0, 0), (10, 2), (0, 0))]))
    resharding = reshard(sender, side("target", "v=10[tp] h", *[(4, 2)] * 3))
    assert resharding.held_sizes(2, (4, 2)) == (2, 2)
    assert moved(resharding, [full], 2, (4, 2)).tolist() == [[16, 17], [18, 19], [-7, -7], [-7, -7]]


def test_padding_in_the_middle_of_a_receivers_tensor_is_refused_before_anything_moves() -> None:
    """Zigzag gives the first rank the first and the last chunk, so that padding still ends its tensor."""
    receiver = role_headers("target", "s=6[cp:zigzag]", [(4,)] * 2, on_axis("cp", 2))
    assert reshard(side("baseline", "s", (6,)), receiver).held_sizes(0, (4,)) == (2,)
    order = [DeclaredLayout(dims="v=3", global_shape=(4,), runs=(((2, 2, 0), (0, 2, 2)),), place=(0,), mesh="m")]
    assert "lies in the middle of a local tensor" in refusal(
        side("baseline", "v", (3,)), role_headers("target", None, [(4,)], layouts=order)
    )


# --- interleaved qkv: per group of 2 q heads, then k, then v; 3 groups, heads of 5


GROUPS, QUERIES, HEAD = 4, 2, 5


def test_interleaved_qkv_against_a_split_head_dim_as_dims() -> None:
    """A view of q alone: `(g q d)` against `g[tp] q d`."""
    width = QUERIES + 2
    full = torch.arange(3 * GROUPS * width * HEAD).view(3, GROUPS, width, HEAD)
    fused = [part.contiguous()[:, :, :QUERIES] for part in full.chunk(2, 1)]
    resharding = reshard(
        side("baseline", "s g[tp] q d", *[tuple(part.shape) for part in fused]),
        side("target", "s (g*q*d)[tp]", *[(3, GROUPS * QUERIES * HEAD // 4)] * 4),
    )
    plain = full[:, :, :QUERIES].reshape(3, -1).chunk(4, 1)
    for rank in range(4):
        assert torch.equal(moved(resharding, fused, rank, plain[rank].shape), plain[rank])


def test_interleaved_qkv_against_separate_parts_as_boxes_with_key_heads_held_twice() -> None:
    """Senders hold `q q k v` of their group, receivers `q..., k, v` of the whole in one tensor; kv is on two ranks."""
    q, k, v = GROUPS * QUERIES, GROUPS, GROUPS
    full = torch.arange((q + k + v) * HEAD).view(q + k + v, HEAD)
    # Each sender has one q head of a group, and the group's k and v: those are on two ranks.
    sent, ranks = [], []
    for rank in range(2 * GROUPS):
        rows = [rank, q + rank // 2, q + k + rank // 2]
        rows = rows if rank % 2 else rows[::-1]
        ranks.append(((3, HEAD), [((row, 0), (1, HEAD), (at, 0)) for at, row in enumerate(rows)]))
        sent.append(full[rows])
    sender = boxes("baseline", full.shape, *ranks)
    resharding = reshard(sender, side("target", "n[tp] d", *[(8, HEAD)] * 2))
    items = [item for rank in range(2) for item in resharding.incoming(rank, lambda s, r: True)]
    assert sum(item.source.of(sent[item.sender]).numel() for item in items) == full.numel()
    for rank in range(2):
        assert torch.equal(moved(resharding, sent, rank, (8, HEAD)), full[rank * 8 : rank * 8 + 8])
    checked = reshard(sender, side("target", "n[tp] d", *[(8, HEAD)] * 2), check_replicas=True)
    assert checked.layers == checked.replicas == 2


# --- partial


def test_a_partial_receiver_is_refused_unless_the_first_gets_all() -> None:
    sender, receiver = side("baseline", "h", (4,)), side("target", "h[tp:partial]", (4,), (4,))
    assert refusal(sender, receiver) == (
        "'h[tp:partial]' at target is partial: its ranks hold summands, and a value has no one way to be shared out "
        "among them. Graft it after its reduction, or set GRAFTER_PARTIAL_TARGET=first: the first rank gets the value, "
        "the others zeros."
    )
    first = reshard(sender, receiver, first_summand_gets_all=True)
    assert [first.gets_zeros(rank) for rank in range(2)] == [False, True]
    assert [len(list(first.incoming(rank, lambda s, r: True))) for rank in range(2)] == [1, 0]
    assert len(list(first.outgoing(0, lambda s, r: True))) == 1


def test_a_receiver_whose_summands_are_no_sum_is_refused_in_any_case() -> None:
    layouts = [
        DeclaredLayout(global_shape=(4,), runs=(((0, 4, 0),),), place=(n,), mesh="m", summand=("max", n, 2))
        for n in range(2)
    ]
    receiver = role_headers("target", None, [(4,), (4,)], layouts=layouts)
    assert "is partial by max, and a value and zeros have it only as their sum" in refusal(
        side("baseline", None, (4,)), receiver, first_summand_gets_all=True
    )


# --- holes and overlaps


@given(two_sides(), st.data())
def test_a_rank_that_is_missing_or_moved_is_refused_and_never_a_wrong_copy(
    sides: tuple[Any, Any], data: st.DataObject
) -> None:
    """Unless what it held is on another rank, too; then every receiver still gets what is true."""
    sender, receiver = sides
    headers = sender.headers("baseline")
    victim = data.draw(st.sampled_from(range(len(headers))))
    held = sender.ranks[victim]
    others = [own for number, own in enumerate(sender.ranks) if number != victim and own.summand == held.summand]
    elsewhere = {place for own in others for place in own.index.flatten().tolist()}
    needed = set(held.index.flatten().tolist()) - {-1} - elsewhere
    del headers[victim]
    if not headers or not needed:
        return
    target = find_shares(receiver.headers("target"), 0)
    assert target is not None
    with pytest.raises(LayoutError) as error:
        found = find_shares(headers, 0)
        assert found is not None
        Resharding(found, target)
    assert "baseline" in str(error.value)


def test_a_hole_among_boxes_is_named_by_its_first_place() -> None:
    parts = [((2, 4), [((row, 0), (2, 4), (0, 0))]) for row in (0, 4)]
    text = refusal(boxes("baseline", (6, 4), *parts, dims="s h"), side("target", "s h", (6, 4)))
    assert text == (
        "the parts of Layout of [6, 4] at baseline leave a hole: they hold 16 of 24 places of s=6 x h=4, and nobody "
        "holds s at 2, h at 0. All ranks that hold a part take part in the point."
    )
    parts = [((2, 3), [((row, 0), (2, 3), (0, 0))]) for row in (0, 2)]
    text = refusal(boxes("baseline", (4, 4), *parts, dims="s h"), side("target", "s h", (4, 4)))
    assert "nobody holds s at 0, h at 3" in text


def test_boxes_that_overlap_without_being_copies_are_refused_naming_both_ranks() -> None:
    parts = [((3, 4), [((row, 0), (3, 4), (0, 0))]) for row in (0, 2)]
    text = refusal(boxes("baseline", (5, 4), *parts, dims="s h"), side("target", "s h", (5, 4)))
    assert text == (
        "parts of Layout of [5, 4] at baseline overlap without being copies: s 0:3, h 0:4 at baseline rank 0 and s "
        "2:5, h 0:4 at baseline rank 1. Each value needs one owner, or equal copies."
    )


def test_a_part_of_a_mesh_that_nobody_brought_is_named() -> None:
    """A DTensor over 2 x 2: each row and each column is held by someone, one corner by nobody."""
    halves = (((0, 2, 0),), ((2, 2, 0),))
    layouts = [
        DeclaredLayout(global_shape=(4, 4), runs=(halves[row], halves[column]), place=(row, column), mesh="m")
        for row, column in ((0, 0), (0, 1), (1, 0))
    ]
    sender = role_headers("baseline", None, [(2, 2)] * 3, layouts=layouts)
    text = refusal(sender, side("target", "s h", (4, 4)))
    assert "it is cut into 4 parts, the ranks of the point hold 3 of them, and nobody holds s 2:4, h 2:4" in text


def test_a_summand_that_nobody_brought_is_named() -> None:
    layouts = [
        DeclaredLayout(global_shape=(4,), runs=(((0, 4, 0),),), place=(n,), mesh="m", summand=("sum", n, 3))
        for n in (0, 2)
    ]
    sender = role_headers("baseline", None, [(4,)] * 2, layouts=layouts)
    assert "and nobody holds s 0:4, summand 1" in refusal(sender, side("target", "s", (4,)))


# --- overlap


@given(st.integers(1, 3), st.lists(st.lists(st.integers(0, 6), min_size=6, max_size=6), max_size=14))
def test_an_overlap_is_found_as_comparing_all_pairs_would(ndim: int, numbers: list[list[int]]) -> None:
    starts = [own[:ndim] for own in numbers]
    sizes = [[n // 2 for n in own[3 : 3 + ndim]] for own in numbers]
    pairs = {
        (a, b) for b in range(len(starts)) for a in range(b) if share_a_place(starts[a], sizes[a], starts[b], sizes[b])
    }
    found = find_overlap(starts, sizes)
    assert (found is None) == (not pairs)
    assert found is None or (min(found), max(found)) in pairs


def test_ten_thousand_boxes_are_searched_without_looking_at_all_pairs() -> None:
    starts = [(0, row, column) for row in range(100) for column in range(100)]
    assert find_overlap(starts, [(9, 1, 1)] * len(starts)) is None
    assert find_overlap([*starts, (3, 7, 99)], [(9, 1, 1)] * 10001) == (799, 10000)
