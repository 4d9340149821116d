"""Shares: which part of the global tensor each rank holds, from the sizes that all ranks announce."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_parts import on_axis, role_headers
from pydantic import ValidationError

from grafter.core.layout.declared import DeclaredLayout, Layout, by_path
from grafter.core.layout.runs import cut, from_parts, split_in_order
from grafter.core.layout.shares import RoleShares, boxes_of
from grafter.core.messages.manifest import Header
from grafter.core.plan.token_shares import find_shares, layouts_of
from grafter.errors import LayoutError


def shares(headers: list[Header]) -> RoleShares:
    found = find_shares(headers, 0)
    assert found is not None
    return found


def held(found: RoleShares, rank: int, dim: int) -> list[int]:
    """The places of the global dim, in the order of the local one."""
    places: list[int] = []
    for start, length, local in found.shares[rank].runs[dim]:
        assert local == len(places)
        places += range(start, start + length)
    return places


def refusal(headers: list[Header]) -> str:
    with pytest.raises(LayoutError) as error:
        find_shares(headers, 0)
    return str(error.value)


# --- plain splits


@pytest.mark.parametrize("sizes", [(3, 3, 1), (3, 2, 2), (0, 7, 0), (7, 0, 0), (0, 0, 0), (1,)])
def test_offsets_are_prefix_sums_of_what_the_ranks_announce(sizes: tuple[int, ...]) -> None:
    """`chunk` gives 3, 3, 1 where `tensor_split` gives 3, 2, 2: no rule is assumed."""
    found = shares(role_headers("baseline", "b h[tp]", [(2, n) for n in sizes], on_axis("tp", len(sizes))))
    assert found.global_shape == (2, sum(sizes))
    for rank, size in enumerate(sizes):
        start = sum(sizes[:rank])
        assert held(found, rank, 1) == list(range(start, start + size))


def test_the_coordinate_counts_and_not_the_rank() -> None:
    places = [{"tp": (1, 2)}, {"tp": (0, 2)}]
    found = shares(role_headers("baseline", "h[tp]", [(2,), (3,)], places))
    assert (held(found, 0, 0), held(found, 1, 0)) == ([3, 4], [0, 1, 2])


def test_axes_of_one_dim_cut_from_outer_to_inner() -> None:
    places = [{"cp": (cp, 2), "tp": (tp, 2)} for cp in range(2) for tp in range(2)]
    sizes = [3, 1, 2, 2]
    found = shares(role_headers("baseline", "s[cp,tp]", [(n,) for n in sizes], places))
    assert [held(found, rank, 0) for rank in range(4)] == [[0, 1, 2], [3], [4, 5], [6, 7]]
    found = shares(role_headers("baseline", "s[tp,cp]", [(n,) for n in sizes], places))
    assert [held(found, rank, 0) for rank in range(4)] == [[0, 1, 2], [5], [3, 4], [6, 7]]


def test_ranks_at_one_place_of_a_dim_hold_as_much() -> None:
    text = refusal(role_headers("baseline", "b h[tp]", [(2, 4), (3, 4)], on_axis("tp", 2)))
    assert text == (
        "the dim b has size 2 at baseline rank 0 and 3 at baseline rank 1; one part has one size. If b is split over "
        "an axis, 'b h[tp]' must say so: `b[tp]`."
    )
    places = [{"dp": (r // 2, 2), "tp": (r % 2, 2)} for r in range(4)]
    text = refusal(role_headers("baseline", "h[tp] # dp:replicated", [(4,), (4,), (4,), (5,)], places))
    assert text.startswith("the dim h at tp=1 has size 4 at baseline rank 1 and 5 at baseline rank 3")


def test_all_ranks_of_a_role_say_the_same() -> None:
    layouts = [DeclaredLayout(dims="b h"), DeclaredLayout(dims="b h[tp]")]
    places = on_axis("tp", 2)
    text = refusal(role_headers("baseline", None, [(2, 2)] * 2, places, layouts=layouts))
    assert text == (
        "baseline rank 0 declares 'b h', and baseline rank 1 declares 'b h[tp]'. Ranks that share a point declare it "
        "alike; if they hold two tensors, give ranks= of those that share one."
    )
    text = refusal(role_headers("baseline", None, [(2, 2)] * 2, places, layouts=[layouts[1], None]))
    assert text.startswith("baseline rank 0 declares 'b h[tp]', and baseline rank 1 declares no layout. ")
    text = refusal(role_headers("baseline", None, [(2, 2)] * 2, places, layouts=[None, layouts[1]]))
    assert text.startswith("baseline rank 0 declares no layout, and baseline rank 1 declares 'b h[tp]'. ")
    assert find_shares(role_headers("baseline", None, [(2, 2)] * 2, places), 0) is None


def test_summands_are_numbered_in_the_order_of_the_text() -> None:
    places = [{"tp": (r % 2, 2), "cp": (r // 2, 3)} for r in range(6)]
    found = shares(role_headers("baseline", "h[cp:partial,tp:partial]", [(4,)] * 6, places))
    assert found.summands == 6
    assert [found.shares[r].summand for r in range(6)] == [0, 1, 2, 3, 4, 5]
    found = shares(role_headers("baseline", "h[tp:partial] d[cp:partial]", [(4, 1)] * 6, places))
    assert [found.shares[r].summand for r in range(6)] == [0, 3, 1, 4, 2, 5]


# --- zigzag


@pytest.mark.parametrize("cp", [2, 3])
def test_zigzag_gives_the_kth_and_the_kth_last_of_twice_as_many_chunks(cp: int) -> None:
    found = shares(role_headers("baseline", "b s[cp:zigzag]", [(1, 4)] * cp, on_axis("cp", cp)))
    chunks = np.arange(4 * cp).reshape(2 * cp, 2)
    for rank in range(cp):
        assert held(found, rank, 1) == [*chunks[rank], *chunks[2 * cp - 1 - rank]]


def test_zigzag_goes_only_where_it_divides() -> None:
    text = refusal(role_headers("baseline", "b s[cp:zigzag]", [(1, 3)] * 2, on_axis("cp", 2)))
    assert text == (
        "'b s[cp:zigzag]': s[cp:zigzag] cuts 6 into 2 x 2 equal chunks, which does not go. Pad each sequence to a "
        "multiple of 4."
    )
    text = refusal(role_headers("baseline", "b s[cp:zigzag]", [(1, 3), (1, 5)], on_axis("cp", 2)))
    assert text.endswith("s[cp:zigzag] gives every rank as much, and the ranks of cp hold [3, 5].")
    assert shares(role_headers("baseline", "b s[cp:zigzag]", [(1, 3)])).global_shape == (1, 3)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(2, 3), st.integers(1, 2))
def test_packed_sequences_are_cut_each_by_itself(quarters: list[int], cp: int, sp: int) -> None:
    """As written out: of each sequence the k-th and the k-th last chunk, one sequence after the other; then sp."""
    lengths = [2 * cp * sp * n for n in quarters]
    size = sum(lengths) // cp // sp
    places = [{"cp": (r // sp, cp), "sp": (r % sp, sp)} for r in range(cp * sp)]
    found = shares(role_headers("baseline", "t[cp:zigzag,sp] 1", [(size, 1)] * (cp * sp), places, seq_lens=lengths))
    assert found.global_shape == (sum(lengths), 1)
    for rank in range(cp * sp):
        own, start = [], 0
        for length in lengths:
            chunk = length // (2 * cp)
            for number in (rank // sp, 2 * cp - 1 - rank // sp):
                own += list(range(start + number * chunk, start + (number + 1) * chunk))
            start += length
        assert held(found, rank, 0) == own[rank % sp * size : (rank % sp + 1) * size]


def test_packed_sequences_need_their_lengths() -> None:
    places = on_axis("cp", 2)
    assert "give seq_lens=, the global length of each sequence" in refusal(
        role_headers("baseline", "t[cp:zigzag] h", [(4, 1)] * 2, places)
    )
    assert "seq_lens= makes 12, and the ranks hold 8 together" in refusal(
        role_headers("baseline", "t[cp:zigzag] h", [(4, 1)] * 2, places, seq_lens=[4, 8])
    )
    assert "cuts 6 into 2 x 2 equal chunks" in refusal(
        role_headers("baseline", "t[cp:zigzag] h", [(4, 1)] * 2, places, seq_lens=[6, 2])
    )
    both = [{"cp": (r % 2, 2), "sp": (r // 2, 2)} for r in range(4)]
    assert "on packed sequences zigzag is the outermost split" in refusal(
        role_headers("baseline", "t[sp,cp:zigzag] h", [(4, 1)] * 4, both, seq_lens=[16])
    )
    # One rank on cp cuts nothing.
    assert shares(role_headers("baseline", "t[cp:zigzag] h", [(5, 1)])).global_shape == (5, 1)


def test_all_ranks_have_the_same_lengths_of_sequences() -> None:
    layouts = [DeclaredLayout(dims="t[cp:zigzag]", seq_lens=lengths) for lengths in ((4, 4), (8,))]
    text = refusal(role_headers("baseline", None, [(4,)] * 2, on_axis("cp", 2), layouts=layouts))
    assert text.startswith(
        "baseline rank 0 declares 't[cp:zigzag]' with seq_lens of 2 sequences, and baseline rank 1 declares "
        "'t[cp:zigzag]' with seq_lens of 1 sequences. "
    )


# --- runs


@given(st.data())
def test_a_stretch_of_a_local_dim_is_cut_as_a_list_would_be(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=6))
    runs = from_parts(parts)
    plain = [place for start, length in parts for place in range(start, start + length)]
    begin, end = sorted(data.draw(st.tuples(st.integers(0, len(plain) + 1), st.integers(0, len(plain) + 1))))
    found = [place for start, length in cut(runs, begin, end) for place in range(start, start + length)]
    assert found == plain[begin:end]
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=4))
    at = 0
    for stretch, size in zip(split_in_order(runs, sizes), sizes, strict=True):
        assert [p for start, length, _ in stretch for p in range(start, start + length)] == plain[at : at + size]
        at += size


# --- boxes that a user gives


@pytest.mark.parametrize(
    ("shape", "boxes", "why"),
    [
        ((4, 4), [((0, 0), (5, 4))], r"the box at \[0, 0\] of size \[5, 4\] leaves \[4, 4\]"),
        ((4, 4), [((0,), (4,))], "one number for each of 2 dims"),
        ((4, 4), [((0, -1), (4, 4))], "must be whole numbers of at least 0"),
        ((4, 4), [((0, 0.5), (4, 4))], "must be whole numbers of at least 0"),
        ((4, "x"), [], "global_shape: .* must be whole numbers"),
        (4, [], "global_shape: 4 must be whole numbers"),
        ((4, 4), [(0, 0)], "a box: 0 must be whole numbers"),
        ((4, 4), ["box"], "'box' is no box; write"),
        ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 4))], "each says where it begins in the local tensor"),
        ((4, 4), [((0, 0), (2, 4), (0, 0)), ((2, 0), (2, 4), (1, 0))], "two boxes lie over each other"),
    ],
)
def test_boxes_that_are_none_are_refused_at_once(shape: Any, boxes: list[Any], why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        Layout(shape, boxes)


@pytest.mark.parametrize(
    ("dims", "why"),
    [
        ("b", "names 1 dims, and the tensor has 2"),
        ("b h[tp]", "the dims 'b h\\[tp\\]' of a Layout are names"),
        ("b h[tp:partial]", "the dims 'b h\\[tp:partial\\]' of a Layout are names"),
        ("b h=3", "say 3, and global_shape \\[4, 4\\] says 4. A Layout has no padding"),
        ("b 1", "have a dim of size 1"),
    ],
)
def test_the_dims_of_a_layout_are_names_and_nothing_more(dims: str, why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        Layout((4, 4), [((0, 0), (4, 4))], dims)
    assert Layout((4, 4), [], "b=4 (n=2*d)").dims


def test_many_boxes_are_checked_in_one_pass() -> None:
    """A thousand sequences are two thousand boxes."""
    boxes = [((2 * n, 0), (1, 4), (n, 0)) for n in range(2000)]
    assert len(Layout((4000, 4), boxes).boxes) == 2000
    with pytest.raises(LayoutError, match=r"two boxes lie over each other in the local tensor: at \[7, 0\] and at"):
        Layout((4000, 4), [*boxes, ((1, 0), (1, 2), (7, 2))])


def test_layouts_of_a_role_are_told_as_boxes() -> None:
    headers = role_headers("baseline", "b s[cp:zigzag]", [(2, 4)] * 2, on_axis("cp", 2))
    told = layouts_of(headers, 0)
    assert told is not None
    assert [(b.offset, b.size, b.local_offset) for b in told[0].boxes] == [
        ((0, 0), (2, 2), (0, 0)), ((0, 6), (2, 2), (0, 2)),
    ]  # fmt: skip
    assert layouts_of(role_headers("baseline", "b h[tp]", [(2, 2)] * 2), 0) is None
    assert layouts_of(role_headers("baseline", None, [(2, 2)]), 0) is None
    assert boxes_of(shares(role_headers("baseline", "#", [()])).shares[0])[0].size == ()


def test_options_of_a_pytree_are_found_by_path_or_last_key() -> None:
    paths = ["['q']", "['kv'][0]", "['kv'][1]", ".x"]
    assert by_path("b h", paths, "dims") == ["b h"] * 4
    assert by_path({"q": 1, "['kv'][1]": 2, "x": 3}, paths, "dims") == [1, None, 2, 3]
    with pytest.raises(LayoutError, match=r"dims= has 'k', and the point has the leaves \['q'\]"):
        by_path({"k": 1}, paths, "dims")


# --- what a peer may send

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**62, 2**63, 10**30]) | st.integers(-2, 8)
ABSURD: list[dict[str, Any]] = [
    {},
    {"dims": None},
    {"dims": "b h", "boxes": [], "runs": []},
    {"dims": "b h", "global_shape": [2, 2]},
    {"boxes": []},
    {"runs": [[], []], "global_shape": [2, 2]},
    {"runs": [[], []], "global_shape": [2, 2], "place": [0], "mesh": "m", "summand": ["sum", 2, 2]},
    {"runs": [[], []], "global_shape": [2, 2], "place": [0], "mesh": "m", "summand": ["mask", 0, 2]},
    {"boxes": [[[0], [1]]], "global_shape": [2, 2]},
    {"dims": "b h", "seq_lens": [-1, 5]},
    {"dims": "b h", "seq_lens": ["4"]},
    {"boxes": [[[0, 0], [2, 10**30], [0, 0]]], "global_shape": [2, 2]},
]


@pytest.mark.parametrize("layout", ABSURD, ids=str)
def test_a_layout_that_is_none_does_not_parse(layout: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DeclaredLayout.model_validate(layout)


@st.composite
def hostile_headers(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Headers as they travel, of one or two ranks, with numbers of any size where numbers may be."""
    kind = draw(st.sampled_from(["dims", "dims", "boxes", "runs"]))
    ndim = draw(st.integers(0, 3))
    numbers = st.lists(NUMBERS, min_size=ndim, max_size=ndim) | st.lists(NUMBERS, max_size=3)
    text = st.sampled_from(["b h[tp]", "t[tp:zigzag] h", "(b*h)[tp]", "b h[tp:partial]", "h", "b=2 h=9[tp]", "b h"])
    layout: dict[str, Any] = {"dims": draw(text | st.none())}
    if kind == "dims":
        layout = {"dims": draw(text), "seq_lens": draw(st.none() | numbers)}
    elif kind == "boxes":
        box = st.tuples(numbers, numbers, numbers)
        layout |= {"boxes": draw(st.lists(box, max_size=3)), "global_shape": draw(numbers)}
    else:
        run = st.tuples(NUMBERS, NUMBERS, NUMBERS)
        layout |= {"global_shape": draw(numbers), "mesh": "m", "place": [0]}
        layout["runs"] = draw(st.lists(st.lists(run, max_size=2), min_size=ndim, max_size=ndim))
        layout["summand"] = draw(st.none() | st.tuples(st.sampled_from(["sum", "max"]), NUMBERS, NUMBERS))
    shape = draw(numbers)
    tp = st.lists(st.tuples(st.just("tp"), NUMBERS, NUMBERS), max_size=1)
    headers = []
    for rank in range(draw(st.integers(1, 2))):
        own = {**layout, "place": [rank]} if kind == "runs" else layout
        headers.append(
            {
                "role": "baseline", "role_rank": rank, "participants": [0, 1], "direction": "b2t", "call_site": "x",
                "structure": "tensor",
                "leaves": [{"path": "", "shape": shape, "dtype": "int64", "device": "cpu"}],
                "layouts": draw(st.just([own]) | st.just([own, own]) | st.just([None])),
                "axes": draw(st.just([["tp", rank, 2]]) | tp),
            }
        )  # fmt: skip
    return headers


@given(hostile_headers())
def test_headers_that_lie_are_refused_and_nothing_else_is_raised(lies: list[dict[str, Any]]) -> None:
    try:
        headers = [Header.model_validate_json(json.dumps(lie)) for lie in lies]
        found = find_shares(headers, 0)
    except (ValidationError, LayoutError):
        return
    for share in found.shares.values() if found is not None else ():
        assert len(boxes_of(share)) < 100


def test_a_peer_that_says_no_true_shape_or_fewer_layouts_than_tensors_is_refused() -> None:
    (header,) = role_headers("baseline", "b h", [(2, 2)])
    for shape in ((-1, 2), (2, 2**63)):
        leaf = header.leaves[0].model_copy(update={"shape": shape})
        assert "says that its tensor is" in refusal([header.model_copy(update={"leaves": (leaf,)})])
    two = header.model_copy(update={"leaves": header.leaves * 2})
    assert "has 2 tensors and 1 layouts" in refusal([two])
    assert "names 2 dims, and baseline rank 0 has [2]" in refusal(role_headers("baseline", "b h", [(2,)]))
    huge = role_headers("baseline", "h[tp]", [(2**62,)] * 2, on_axis("tp", 2))
    assert "makes a tensor of" in refusal(huge)


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([((0, 0), (2, 1), (0, 0))], "do not fill its local tensor"),
        ([((0, 0), (2, 1), (0, 0)), ((0, 1), (2, 1), (0, 0))], "do not fill its local tensor"),
        ([((0, 3), (2, 2), (0, 0))], "leaves the tensor"),
        ([((0, 0), (2, 2), (1, 0))], "leaves the tensor"),
    ],
)
def test_boxes_of_a_peer_fill_its_tensor(boxes: Sequence[Any], why: str) -> None:
    """Else a place of a receiver would stay unwritten, and what memory held before would come out of it."""
    layouts = [DeclaredLayout(global_shape=(2, 4), boxes=tuple(boxes))]
    assert why in refusal(role_headers("baseline", None, [(2, 2)], layouts=layouts))


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ((((0, 2, 0),),), "another number of dims"),
        ((((0, 2, 0),), ((0, 1, 0),)), "has 1 values in dim 1, and its local tensor 2"),
        ((((0, 2, 0),), ((3, 2, 0),)), "impossible parts in dim 1"),
        ((((0, 2, 0),), ((0, 1, 0), (1, 1, 0))), "impossible parts in dim 1"),
        ((((0, 2, 0),), ((0, 0, 0), (0, 2, 0))), "impossible parts in dim 1"),
    ],
)
def test_parts_of_a_peers_dtensor_fill_its_tensor(runs: Any, why: str) -> None:
    layouts = [DeclaredLayout(global_shape=(2, 4), runs=runs, place=(0,), mesh="m")]
    assert why in refusal(role_headers("baseline", None, [(2, 2)], layouts=layouts))
