"""Mesh axes: where this rank stands, said by a user, read from a mesh or a setting, and what a layout makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from layout_parts import role_headers

import grafter
from grafter.core.layout.axes import axes_from_text, axes_of_job, read_axes, read_axis_sizes
from grafter.core.plan.token_shares import find_shares
from grafter.errors import LayoutError


@pytest.fixture(autouse=True)
def no_axes() -> Iterator[None]:
    """No test sees what another set."""
    before = dict(axes_of_job())
    axes_of_job().clear()
    yield
    axes_of_job().clear()
    axes_of_job().update(before)


def refusal(dims: str, shape: tuple[int, ...], places: list[dict[str, tuple[int, int]]], **fields: Any) -> str:
    with pytest.raises(LayoutError) as error:
        find_shares(role_headers("baseline", dims, [shape] * len(places), places, **fields), 0)
    return str(error.value)


# --- where they come from


def test_axes_are_added_replaced_and_taken_away() -> None:
    grafter.set_axes(tp=(1, 4), pp=(0, 2))
    grafter.set_axes(tp=(0, 2))
    assert axes_of_job() == {"tp": (0, 2), "pp": (0, 2)}
    grafter.set_axes(pp=None, cp=(0, 1))
    assert axes_of_job() == {"tp": (0, 2), "cp": (0, 1)}


@pytest.mark.parametrize("place", [(2, 2), (-1, 2), (0, 0), (0,), (0, 1, 2), "01", 3, (True, 2), (0, 2.0), None])
def test_a_place_outside_of_its_axis_is_refused_and_nothing_is_set(place: Any) -> None:
    with pytest.raises(LayoutError, match=r"tp=.*an axis is \(coordinate, size\) with 0 <= coordinate < size"):
        read_axes({"tp": place})
    if place is not None:
        with pytest.raises(LayoutError, match="tp="):
            grafter.set_axes(pp=(0, 2), tp=place)
    assert axes_of_job() == {}


def test_an_axis_is_a_word_and_axes_a_dict() -> None:
    with pytest.raises(LayoutError, match="'a b' is no name for a mesh axis"):
        read_axes({"a b": (0, 1)})
    with pytest.raises(LayoutError, match=r"it is a dict such as \{'tp': \(rank, size\)\}"):
        read_axes((0, 1))


def test_an_axis_is_read_from_its_process_group() -> None:
    group = SimpleNamespace(rank=lambda: 3, size=lambda: 8)
    assert read_axes({"tp": group}) == {"tp": (3, 8)}
    with pytest.raises(LayoutError, match="tp: this rank is not in the process group"):
        read_axes({"tp": SimpleNamespace(rank=lambda: -1, size=lambda: -1)})


def mesh(names: tuple[str, ...] | None, sizes: tuple[int, ...], at: list[int] | None) -> Any:
    return SimpleNamespace(mesh_dim_names=names, get_coordinate=lambda: at, size=lambda number: sizes[number])


def test_axes_are_read_from_meshes_one_after_the_other() -> None:
    grafter.set_mesh(mesh(("dp", "tp"), (2, 4), [1, 3]))
    grafter.set_mesh(mesh(("ep", "tp"), (8, 1), [5, 0]))
    assert axes_of_job() == {"dp": (1, 2), "tp": (0, 1), "ep": (5, 8)}


def test_a_rank_outside_of_a_mesh_has_no_place_on_its_axes() -> None:
    grafter.set_axes(tp=(0, 2), pp=(1, 2))
    grafter.set_mesh(mesh(("tp",), (2,), None))
    assert axes_of_job() == {"pp": (1, 2)}


def test_a_mesh_without_names_is_refused() -> None:
    with pytest.raises(LayoutError, match="set_mesh needs a DeviceMesh whose axes have names"):
        grafter.set_mesh(mesh(None, (2,), [0]))
    with pytest.raises(LayoutError, match="set_mesh needs a DeviceMesh whose axes have names, not None"):
        grafter.set_mesh(None)


def test_a_setting_names_axes_outermost_first() -> None:
    places = [axes_from_text("dp=2, tp=3", rank, 6) for rank in range(6)]
    assert places == [{"dp": (dp, 2), "tp": (tp, 3)} for dp in range(2) for tp in range(3)]
    assert axes_from_text("", 0, 1) == {}


def test_a_setting_makes_as_many_ranks_as_the_job_has() -> None:
    with pytest.raises(LayoutError, match="make 4 ranks, and this job has 8"):
        axes_from_text("dp=2 tp=2", 0, 8)


@pytest.mark.parametrize(
    "text", ["tp", "tp=", "tp=0", "tp=-1", "2=tp", "tp=x", "=2", "tp=1e3", "tp=²", "tp=" + "9" * 5000]
)
def test_what_is_no_axis_and_size_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="is not `axis=size`, such as tp=4"):
        read_axis_sizes(text)
    with pytest.raises(LayoutError, match="the axis 'tp' is there twice"):
        read_axis_sizes("tp=2 tp=4")


# --- what a layout makes of them


def test_an_axis_that_the_job_has_not_got_is_of_size_one() -> None:
    """One plan file serves TP=1 and TP=4."""
    one = find_shares(role_headers("baseline", "b h[tp]", [(2, 8)], [{}]), 0)
    assert one is not None and one.global_shape == (2, 8)
    four = role_headers("baseline", "b h[tp] # ep:replicated", [(2, 8)] * 4, [{"tp": (r, 4)} for r in range(4)])
    assert find_shares(four, 0).global_shape == (2, 32)  # type: ignore[union-attr]


def test_an_active_axis_that_is_not_mentioned_is_refused_with_the_sentence_that_fixes_it() -> None:
    """Both ranks are named: two batches are not one tensor."""
    text = refusal("b h[tp]", (2, 8), [{"dp": (r // 2, 2), "tp": (r % 2, 2)} for r in range(4)])
    assert text == (
        "baseline rank 0 and baseline rank 2 have the same place in 'b h[tp]'; they differ in the axis 'dp', which it "
        "does not mention. If their tensors are copies, write `# dp:replicated` at its end; if not (other batches, "
        "say), they are not one tensor: give ranks= of those that share it."
    )


def test_an_axis_that_no_rank_has_set_is_named() -> None:
    assert refusal("b h[tp]", (2, 8), [{}, {}]) == (
        "baseline rank 0 and baseline rank 1 have the same place in 'b h[tp]', since this job has no axis 'tp'. Say "
        "where each rank stands: grafter.set_axes(tp=(rank, size)), set_mesh(mesh), or GRAFTER_BASELINE_AXES."
    )
    assert "since this job has no axis 'moe_tp'" in refusal("b h[tp] # tp:=moe_tp", (2, 8), [{}, {}])


def test_ranks_that_nothing_sets_apart_are_refused() -> None:
    text = refusal("b h", (2, 8), [{"tp": (0, 1)}] * 2)
    assert text.startswith("baseline rank 0 and baseline rank 1 have the same place in 'b h', and no axis is known in")
    assert text.endswith("give ranks= of those that share the tensor.")
    assert "and no axis is known" in refusal("b h[tp]", (2, 8), [{"tp": (1, 2)}] * 2)


def test_replicas_are_at_one_place_once_they_are_declared() -> None:
    places = [{"dp": (r // 2, 2), "tp": (r % 2, 2)} for r in range(4)]
    found = find_shares(role_headers("baseline", "b h[tp] # dp:replicated", [(2, 8)] * 4, places), 0)
    assert found is not None and found.global_shape == (2, 16)
    assert [found.shares[r].runs[1] for r in range(4)] == [((0, 8, 0),), ((8, 8, 0),)] * 2


def test_replicas_are_equally_many() -> None:
    places = [{"dp": (0, 2), "tp": (0, 2)}, {"dp": (0, 2), "tp": (1, 2)}, {"dp": (1, 2), "tp": (0, 2)}]
    assert refusal("b h[tp] # dp:replicated", (2, 8), places) == (
        "'b h[tp] # dp:replicated': the part at tp=0 is held by 2 ranks, that at tp=1 by 1; replicas must be equally "
        "many."
    )


def test_a_renamed_axis_is_that_of_the_job() -> None:
    """`# dp:=moe_dp` says which group holds the data."""
    places = [{"dp": (0, 1), "moe_dp": (r, 2)} for r in range(2)]
    found = find_shares(role_headers("baseline", "b[dp] h # dp:=moe_dp", [(2, 8)] * 2, places), 0)
    assert found is not None and found.global_shape == (4, 8)
    found = find_shares(role_headers("baseline", "b h # dp:replicated dp:=moe_dp", [(2, 8)] * 2, places), 0)
    assert found is not None and found.global_shape == (2, 8)
    assert "they differ in the axis 'moe_dp'" in refusal("b h # dp:=moe_dp", (2, 8), places)


def test_a_place_that_nobody_has_is_named() -> None:
    places = [{"tp": (r, 4), "dp": (0, 2)} for r in (0, 1, 3)]
    assert refusal("b h[tp]", (2, 8), places) == (
        "'b h[tp]' needs 4 places, and no rank among baseline rank 0, baseline rank 1, baseline rank 2 is at tp=2. All "
        "ranks that hold a part take part in the point."
    )
    places = [{"tp": (r % 2, 2), "cp": (r // 2, 3)} for r in range(5)]
    assert "needs 6 places" in (text := refusal("s[cp] h[tp]", (2, 8), places))
    assert ", ... is at cp=2, tp=1. All ranks" in text


def test_a_subset_of_the_ranks_is_a_tensor_of_its_own() -> None:
    """A pipeline stage: its ranks differ only in tp."""
    headers = role_headers(
        "baseline", "b h[tp]", [(2, 8)] * 2, [{"pp": (1, 2), "tp": (r, 2)} for r in range(2)], ranks=[2, 3]
    )
    found = find_shares(headers, 0)
    assert found is not None and set(found.shares) == {2, 3}
    assert found.shares[3].runs[1] == ((8, 8, 0),)


def test_axis_sizes_that_disagree_are_refused() -> None:
    assert refusal("b h[tp]", (2, 8), [{"tp": (0, 2)}, {"tp": (1, 4)}]) == (
        "the axis 'tp' is of size 2 at baseline rank 0 and of size 4 at baseline rank 1. Set it on every rank of the "
        "job: grafter.set_axes(tp=(rank, size))."
    )
    assert "of size 2 at baseline rank 0 and unknown at baseline rank 1" in refusal(
        "b h[tp]", (2, 8), [{"tp": (0, 2)}, {}]
    )
    assert "unknown at baseline rank 0 and of size 2 at baseline rank 1" in refusal(
        "b h # tp:replicated", (2, 8), [{}, {"tp": (1, 2)}]
    )


def test_a_coordinate_beyond_its_axis_is_refused() -> None:
    """A rank checks its own; a peer's word is not taken for it."""
    text = refusal("b h[tp]", (2, 8), [{"tp": (-1, 2)}, {"tp": (0, 2)}])
    assert text == "the axis 'tp' has no place -1 of 2, as baseline rank 0 says."


def test_two_factorisations_of_the_same_ranks() -> None:
    """tp and ep over the same four ranks: each layout mentions its own, and needs no word of the other."""
    places = [{"tp": (r, 4), "ep": (r // 2, 2), "etp": (r % 2, 2)} for r in range(4)]
    dense = find_shares(role_headers("baseline", "t h[tp]", [(2, 8)] * 4, places), 0)
    experts = find_shares(role_headers("baseline", "e[ep] h[etp]", [(2, 8)] * 4, places), 0)
    assert dense is not None and dense.global_shape == (2, 32)
    assert experts is not None and experts.global_shape == (4, 16)
    both = refusal("e[ep] h[tp]", (2, 8), places)
    assert both.startswith("'e[ep] h[tp]' needs 8 places")
