"""Dumps are read back: points merged over ranks, in order, their tensors mapped, and assembled by layout. About 5 s."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dump_parts import RankDumps
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_parts import HeldSide, two_sides

import grafter
from grafter.core.layout.declared import Layout, declare
from grafter.core.layout.shares import boxes_of
from grafter.core.plan.token_shares import find_shares
from grafter.errors import DumpError, FilterError, LayoutError, UsageError
from grafter.store.dumps.lazy_tensor import LazyTensor
from grafter.store.dumps.pieces import LocalPart, find_pieces
from grafter.store.dumps.reader import Dumps, in_execution_order

WEIGHT = torch.arange(4 * 8 * 6, dtype=torch.float32).view(4, 8, 6)


def in_rows(tmp_path: Path, **fields: Any) -> Dumps:
    """WEIGHT, cut in two over its dim h, on two ranks."""
    directory = tmp_path / "run" / "baseline"
    for rank in range(2):
        dumps = RankDumps(directory, rank, 2)
        dumps.add("attn", WEIGHT[:, rank * 4 : rank * 4 + 4], "b h[tp] d", axes=[["tp", rank, 2]], **fields)
    return grafter.open_dumps(directory)


# --- which directory


def test_a_runs_directory_with_one_role_and_the_roles_own_are_the_same(tmp_path: Path) -> None:
    """Either may be given, as text or path."""
    in_rows(tmp_path)
    for directory in (tmp_path / "run", str(tmp_path / "run" / "baseline")):
        dumps = grafter.open_dumps(directory)
        assert (dumps.role, dumps.ranks, dumps.world_size, len(dumps)) == ("baseline", (0, 1), 2, 1)
        assert dumps.directory == tmp_path / "run" / "baseline"


def test_a_run_of_both_roles_is_a_choice(tmp_path: Path) -> None:
    """The error names both directories, and `role=` chooses."""
    for role in ("baseline", "target"):
        RankDumps(tmp_path / role, role=role).add("x", torch.ones(2))
    with pytest.raises(DumpError, match=r"both roles.*baseline or .*target\.$"):
        grafter.open_dumps(tmp_path)
    assert grafter.open_dumps(tmp_path, role="target").role == "target"


def test_a_directory_without_dumps_says_what_to_give_instead(tmp_path: Path) -> None:
    """No directory; nothing in it; runs in it; the other role; no role at all."""
    with pytest.raises(DumpError, match="no such directory"):
        grafter.open_dumps(tmp_path / "absent")
    with pytest.raises(DumpError, match="GRAFTER_DUMP_FILTER"):
        grafter.open_dumps(tmp_path)
    in_rows(tmp_path)
    with pytest.raises(DumpError, match=r"the runs run in it do"):
        grafter.open_dumps(tmp_path)
    with pytest.raises(DumpError, match=r"no dumps of the target, but of the baseline.*BASELINE TARGET"):
        grafter.open_dumps(tmp_path / "run", role="target")
    with pytest.raises(DumpError, match="baseline or target"):
        grafter.open_dumps(tmp_path / "run", role="trainer")


def test_run_facts_are_there_and_say_which_tags_identify(tmp_path: Path) -> None:
    """GRAFTER_KEY, as run.json has it, decides which points of two ranks are one."""
    directory = tmp_path / "baseline"
    for rank in range(2):
        RankDumps(directory, rank, 2).add("x", torch.ones(2), tags={"layer_id": 1, "seed": rank})
    assert len(grafter.open_dumps(directory)) == 2
    (directory / "run.json").write_text(json.dumps({"configuration": {"key": "layer_id, mb"}, "command": ["train.py"]}))
    dumps = grafter.open_dumps(directory)
    assert len(dumps) == 1 and dumps.run is not None and dumps.run["command"] == ["train.py"]


# --- points


def test_points_of_all_ranks_are_merged_by_key_and_rank_tags_are_no_part_of_it(tmp_path: Path) -> None:
    """One point with both ranks' records; other steps, phases, occurrences and tags are other points."""
    for rank in range(2):
        dumps = RankDumps(tmp_path, rank, 2)
        for fields in (
            {},
            {"step": 1},
            {"phase": "backward"},
            {"occurrence": 1},
            {"tags": {"layer_id": 1, "rank": rank}},
        ):
            dumps.add("x", torch.ones(2), **fields)
    dumps = grafter.open_dumps(tmp_path)
    assert [point.ranks for point in dumps] == [(0, 1)] * 5
    assert dumps.points[4].tags["layer_id"] == 1
    for point in dumps:
        assert dumps.get(point.key) is point


def test_tags_that_compare_equal_in_python_stay_apart_and_nan_is_itself(tmp_path: Path) -> None:
    """1, 1.0 and True are three points, and a NaN tag of two ranks is one."""
    for rank in range(2):
        dumps = RankDumps(tmp_path, rank, 2)
        for value in (1, 1.0, True, math.nan):
            dumps.add("x", torch.ones(2), tags={"scale": value})
    dumps = grafter.open_dumps(tmp_path)
    assert len(dumps) == 4 and not dumps.problems
    assert torch.equal(dumps.points[3].whole(), torch.ones(2))


def test_points_are_found_by_name_step_tags_and_by_filters(tmp_path: Path) -> None:
    """`point` gives exactly one, and says what there is instead; `select` takes the language of the filters."""
    dumps = RankDumps(tmp_path)
    for step in range(2):
        for layer in range(3):
            dumps.add("mlp", torch.full((2,), float(layer)), tags={"layer_id": layer}, step=step)
    read = grafter.open_dumps(tmp_path)
    assert read.point("mlp", step=1, layer_id=2).tags == {
        "layer_id": 2, "name": "mlp", "step": 1, "phase": "forward", "occurrence": 0,
    }  # fmt: skip
    assert [(p.step, p.tags["layer_id"]) for p in read.select("layer_id >= 1 and step == 1")] == [(1, 1), (1, 2)]
    assert read.select("name.startswith('mlp')") == list(read) and read.names == ("mlp",) and read[0] is read.points[0]
    with pytest.raises(DumpError, match="3 points are 'mlp'"):
        read.point("mlp")
    with pytest.raises(DumpError, match=r"no point is 'mlp'.*step=7.*Of that name there are"):
        read.point("mlp", step=7)
    with pytest.raises(DumpError, match="The names: mlp"):
        read.point("attn")
    with pytest.raises(FilterError):
        read.select("layer_id = 3")


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    """A rank that shares the point and has no record of it."""
    RankDumps(tmp_path, 0, 3).add("x", torch.ones(2), participants=[0, 2])
    assert grafter.open_dumps(tmp_path).points[0].missing_ranks == (2,)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_execution_order_is_that_of_every_rank_where_they_agree(data: st.DataObject) -> None:
    """Whatever part of one order each rank saw, and whatever its clock says, no rank's order is turned round."""
    points = [f"p{number}" for number in range(data.draw(st.integers(0, 8)))]
    sequences = [[point for point in points if data.draw(st.booleans())] for _ in range(data.draw(st.integers(1, 4)))]
    times = {point: data.draw(st.floats()) for point in points}
    ordered = in_execution_order(sequences, times)
    assert sorted(ordered) == sorted({point for sequence in sequences for point in sequence})
    for sequence in sequences:
        assert [point for point in ordered if point in sequence] == sequence


def test_execution_order_without_agreement_is_by_time() -> None:
    """Two ranks that saw two points in another order, and two ranks that share none."""
    assert in_execution_order([["a", "b"], ["b", "a"]], {"a": 2.0, "b": 1.0}) == ["b", "a"]
    assert in_execution_order([["a", "b"], ["c"]], {"a": 1.0, "b": 3.0, "c": 2.0}) == ["a", "c", "b"]


# --- one rank's tensors

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also without values, and without dims."""
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (3, 5 * dtype.itemsize), dtype=torch.uint8)
    value = raw.view(dtype)
    dumps = RankDumps(tmp_path)
    dumps.add("x", {"['a']": value, "['none']": value[:0], "['one']": value[0, 0]})
    point = grafter.open_dumps(tmp_path).points[0]
    assert point.paths == ("['a']", "['none']", "['one']")
    for path, expected in zip(point.paths, (value, value[:0], value[0, 0]), strict=True):
        for got in (point.local(0, path), point.whole(path)):
            assert got.dtype == dtype and got.shape == expected.shape
            assert got.contiguous().view(-1).view(torch.uint8).tolist() == (
                expected.contiguous().view(-1).view(torch.uint8).tolist()
            )


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.complex128, torch.float64), (torch.complex32, torch.float16), (torch.float8_e4m3fnuz, torch.uint8)],
    ids=str,
)
def test_a_dtype_that_is_stored_as_another_comes_back(dtype: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    """The bytes are the same, whatever they are called in the file."""
    raw = torch.randint(0, 256, (3, 4 * dtype.itemsize), dtype=torch.uint8)
    leaf = {"path": "", "shape": [3, 4], "dtype": str(dtype)[6:], "device": "cuda:0", "stored_as": str(stored)[6:]}
    kept = raw.view(stored).view(3, 4, -1) if dtype.is_complex else raw.view(stored)
    RankDumps(tmp_path).add("x", raw, stored={"value": kept}, leaves=[leaf])
    got = grafter.open_dumps(tmp_path).points[0].local(0)
    assert got.dtype == dtype and torch.equal(got.view(torch.uint8), raw)


def test_a_local_tensor_is_mapped_and_writing_to_it_leaves_the_file(tmp_path: Path) -> None:
    """A file of 256 GiB, which no memory holds, is mapped and read in blocks; and no writing reaches a file."""
    dumps = RankDumps(tmp_path)
    path = dumps.add("x", torch.ones(1000))
    point = grafter.open_dumps(tmp_path).points[0]
    point.local(0).fill_(7)
    assert torch.equal(point.local(0), torch.ones(1000)) and b"\0\0\xe0\x40" not in path.read_bytes()
    program = f"""
import resource, grafter, torch
point = grafter.open_dumps({str(tmp_path)!r}).points[0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
big = point.local(0)
assert big.shape == (1 << 36,) and big[-1] == 0 and point.reader().read((1 << 35,), (4,)).tolist() == [0] * 4
big[7] = 1.0
assert point.local(0)[7] == 0 and big[7] == 1
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
"""
    # A file with a hole: zeros that take no disk.
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    record = json.loads(header["__metadata__"]["grafter"])
    record["leaves"][0]["shape"] = header["value"]["shape"] = [1 << 36]
    header["value"]["data_offsets"] = [0, 1 << 38]
    header["__metadata__"]["grafter"] = json.dumps(record)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + (1 << 38))
    dumps.lines.write_text(json.dumps(record) + "\n")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_thousands_of_tensors_can_be_held_at_once(tmp_path: Path) -> None:
    """More than a process may have files open: none stays open for a tensor that is alive."""
    RankDumps(tmp_path).add("x", torch.ones(4))
    point = grafter.open_dumps(tmp_path).points[0]
    before = len(os.listdir("/proc/self/fd"))
    held = [point.local(0) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before and len(held) == 50


def test_a_point_keeps_no_file_mapped_that_nobody_reads(tmp_path: Path) -> None:
    """A reader is one object while it is in use; then its files are unmapped, so that any number can be read."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("-attn.safetensors")

    point = in_rows(tmp_path).points[0]
    reader = point.reader()
    assert reader is point.reader() and torch.equal(reader.read(), WEIGHT) and mapped() == 2
    point.let_go()
    assert mapped() == 0 and torch.equal(reader.read(), WEIGHT) and mapped() == 2
    del reader
    assert mapped() == 0
    point.whole()
    assert mapped() == 0


def test_what_was_grafted_is_read_beside_what_was_there_before(tmp_path: Path) -> None:
    """`which` chooses; where no graft wrote, that is said."""
    dumps = RankDumps(tmp_path)
    dumps.add("x", torch.ones(2), stored={"grafted": torch.zeros(2)}, direction="b2t", outcome="grafted")
    dumps.add("y", torch.ones(2))
    x, y = grafter.open_dumps(tmp_path)
    assert x.local(0, which="grafted").tolist() == x.whole(which="grafted").tolist() == [0, 0]
    assert (
        x.whole().tolist() == [1, 1] and x.ranks_with(which="grafted") == (0,) and y.ranks_with(which="grafted") == ()
    )
    for read in (lambda: y.local(0, which="grafted"), lambda: y.whole(which="grafted")):
        with pytest.raises(DumpError, match="no graft changed it there"):
            read()


def test_what_was_not_saved_says_why(tmp_path: Path) -> None:
    """A level without tensors; a reason of the record; a rank or a leaf that is not there."""
    dumps = RankDumps(tmp_path)
    dumps.add("figures", torch.ones(2), level="statistics", file=None)
    dumps.add("lost", torch.ones(2), file=None, reason="the disk is full")
    dumps.add("partly", {".a": torch.ones(2)}, reason=".b: out of memory", leaves=[
        {"path": path, "shape": [2], "dtype": "float32", "device": "cpu"} for path in (".a", ".b")
    ])  # fmt: skip
    for number in range(2):
        next((tmp_path / "rank0").glob(f"00000{number}*")).unlink()
    figures, lost, partly = grafter.open_dumps(tmp_path)
    with pytest.raises(DumpError, match="saved at the level 'statistics'"):
        figures.whole()
    with pytest.raises(DumpError, match="the disk is full"):
        lost.local(0)
    assert partly.whole(".a").tolist() == [1, 1]
    for read in (partly.local, lambda rank, path: partly.whole(path)):
        with pytest.raises(DumpError, match="out of memory"):
            read(0, ".b")
    with pytest.raises(DumpError, match="rank 3 has no dump of it; ranks \\[0\\] do"):
        figures.local(3)
    with pytest.raises(DumpError, match=r"no leaf 'x'.*'\.a', '\.b'"):
        partly.local(0, "x")


def test_extras_come_back_with_their_tensors(tmp_path: Path) -> None:
    """As data, and tensors where they stood."""
    extras = {"scale": 0.5, "ids": {"__grafter_tensor__": 0}, "more": [{"__grafter_tensor__": 1}, None]}
    stored = {"extras0": torch.tensor([3, 4]), "extras1": torch.ones(1)}
    dumps = RankDumps(tmp_path)
    dumps.add("x", torch.ones(2), stored=stored, extras=extras)
    dumps.add("y", torch.ones(2))
    x, y = grafter.open_dumps(tmp_path)
    got = x.extras(0)
    assert got is not None and got["scale"] == 0.5 and got["ids"].tolist() == [3, 4] and got["more"][0].tolist() == [1]
    assert y.extras(0) is None and y.tokens(0) is None


def test_tokens_come_back(tmp_path: Path) -> None:
    """As `grafter.Tokens`."""
    tokens = grafter.Tokens.from_lengths(["a", None], [3, 2], token_ids=[5, 6, 7, 0, 0])
    RankDumps(tmp_path).add("x", torch.ones(5), tokens=json.loads(tokens.record().model_dump_json()))
    assert grafter.open_dumps(tmp_path).points[0].tokens(0) == tokens


# --- the whole tensor


def test_shards_are_put_together_and_boxes_of_them_read(tmp_path: Path) -> None:
    """A box in one rank's part is a view of its file, one across both is assembled."""
    point = in_rows(tmp_path).points[0]
    reader = point.reader()
    assert (reader.shape, reader.dtype, reader.dim_names) == ((4, 8, 6), torch.float32, ("b", "h", "d"))
    assert reader.layouts == {0: "'b h[tp] d'", 1: "'b h[tp] d'"} and reader.replicas == reader.summands == 1
    assert torch.equal(point.whole(), WEIGHT)
    assert torch.equal(reader.read((1, 2, 0), (2, 4, 6)), WEIGHT[1:3, 2:6])
    within = reader.read((0, 4, 1), (4, 2, 3))
    assert torch.equal(within, WEIGHT[:, 4:6, 1:4])
    assert within.untyped_storage().nbytes() > 4 * 4 * 6 * 4, "the memory is the whole file's"


def test_a_box_that_leaves_the_tensor_is_refused(tmp_path: Path) -> None:
    """Nothing is read for it."""
    reader = in_rows(tmp_path).points[0].reader()
    for offset, size in [((0, 0, 0), (5, 1, 1)), ((-1, 0, 0), (1, 1, 1)), ((0, 0), (1, 1)), ((4, 8, 6), (1, 0, 0))]:
        with pytest.raises(UsageError, match=r"\[4, 8, 6\]"):
            reader.read(offset, size)


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_blocks_are_the_tensor_in_order_each_contiguous_and_none_too_large(shape: list[int], most: int) -> None:
    """Every place is in one block, and in row-major order."""
    parts = (LocalPart(0, tuple(shape), "int64", "cpu", None, ()),)
    values = torch.arange(math.prod(shape)).view(shape)
    reader = LazyTensor("x", parts, find_pieces("baseline", parts), torch.int64, lambda rank: values)
    blocks = [reader.read(*block) for block in reader.blocks(most)]
    assert all(block.numel() <= most and block.is_contiguous() for block in blocks)
    assert torch.equal(
        torch.cat([block.reshape(-1) for block in blocks]) if blocks else values.view(-1), values.view(-1)
    )


def reader_of(side: HeldSide, dtype: torch.dtype = torch.int64) -> tuple[LazyTensor, dict[int, torch.Tensor]]:
    """A reader of a side's ranks without files; the first summand has the values, the others zeros."""
    local = {
        rank: torch.from_numpy(np.ascontiguousarray(held.index)).to(dtype) * (held.summand == 0)
        for rank, held in enumerate(side.ranks)
    }
    parts = tuple(
        LocalPart(rank, tuple(held.index.shape), str(dtype)[6:], "cpu", held.layout, held.axes)
        for rank, held in enumerate(side.ranks)
    )
    return LazyTensor("x", parts, find_pieces("baseline", parts), dtype, local.__getitem__), local


@given(two_sides(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_layout_makes_the_whole_tensor_of_which_any_box_can_be_read(
    sides: tuple[HeldSide, HeldSide], data: st.DataObject
) -> None:
    """Dims, DTensors and boxes, with padding, zigzag, replicas and summands: each value is where its rank's share says,

    once; and a box is that part of the whole, in every copy.
    """
    side = sides[0]
    reader, local = reader_of(side)
    whole = reader.read()
    assert tuple(whole.shape) == reader.shape
    assert sorted(whole.reshape(-1).tolist()) == list(range(whole.numel()))
    shares = find_shares(side.headers("baseline"), 0)
    assert shares is not None
    for rank, share in shares.shares.items():
        for box in boxes_of(share) if share.summand == 0 else ():
            size = [max(0, min(n, full - at)) for at, n, full in zip(box.offset, box.size, whole.shape, strict=True)]
            there = whole[tuple(slice(at, at + n) for at, n in zip(box.offset, size, strict=True))]
            here = local[rank][tuple(slice(at, at + n) for at, n in zip(box.local_offset, size, strict=True))]
            assert torch.equal(there, here)
    offset = tuple(data.draw(st.integers(0, size)) for size in whole.shape)
    size = tuple(data.draw(st.integers(0, full - at)) for full, at in zip(whole.shape, offset, strict=True))
    box = whole[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))]
    assert torch.equal(reader.read(offset, size), box)
    for _, copy in reader.copies(offset, size):
        assert torch.equal(copy, box)
    assert reader.differing_replicas() == []


@pytest.mark.parametrize("changed", range(8))
def test_one_copy_of_one_summand_of_one_shard_that_differs_is_found(changed: int) -> None:
    """Eight ranks: two shards, each as two summands, each twice. The other copy is named beside the changed one."""
    places = [(cp, tp, dp) for cp in range(2) for tp in range(2) for dp in range(2)]
    local = {rank: torch.arange(6.0) for rank in range(8)}
    axes = [tuple((axis, at, 2) for axis, at in zip(("cp", "tp", "dp"), place, strict=True)) for place in places]
    layout = declare(local[0], (6,), "a[cp,tp:partial] # dp:replicated", None, None)
    parts = tuple(LocalPart(rank, (6,), "float32", "cpu", layout, axes[rank]) for rank in range(8))
    local[changed] = local[changed].index_fill(0, torch.tensor([4]), 9.0)
    reader = LazyTensor("x", parts, find_pieces("baseline", parts), torch.float32, local.__getitem__)
    assert (reader.shape, reader.replicas, reader.summands) == ((12,), 2, 2)
    for most in (1, 5, 100):
        (found,) = reader.differing_replicas(most)
        assert {*found.ranks, *found.other_ranks} == {changed, changed ^ 1}
        assert found.index == (6 * places[changed][0] + 4,) and found.count == 1


@pytest.mark.parametrize(
    ("dtype", "summed"),
    [
        (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
        (torch.float64, torch.float64), (torch.int32, torch.int32), (torch.complex64, torch.complex64),
        (torch.float8_e4m3fn, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_summands_are_summed_in_float32_or_better(dtype: torch.dtype, summed: torch.dtype, tmp_path: Path) -> None:
    """The sum of three is that of their values in the wider dtype, and no file is changed by it."""
    values = [(torch.randn(4, 3) * 4).to(dtype) for _ in range(3)]
    for rank, value in enumerate(values):
        RankDumps(tmp_path, rank, 3).add("x", value, "a b[tp:partial]", axes=[["tp", rank, 3]])
    point = grafter.open_dumps(tmp_path).points[0]
    expected = values[0].to(summed) + values[1].to(summed) + values[2].to(summed)
    for _ in range(2):
        assert point.whole().dtype == point.reader().dtype == summed
        assert torch.equal(point.whole(), expected)
        assert torch.equal(point.reader().read((1, 0), (2, 3)), expected[1:3])


def test_summands_of_a_dtype_without_a_sum_are_refused(tmp_path: Path) -> None:
    """Two bools are no value."""
    for rank in range(2):
        RankDumps(tmp_path, rank, 2).add("x", torch.ones(2, dtype=torch.bool), "a[tp:partial]", axes=[["tp", rank, 2]])
    with pytest.raises(DumpError, match="have no sum"):
        grafter.open_dumps(tmp_path).points[0].whole()


def test_replicas_that_differ_are_found_with_ranks_count_and_place(tmp_path: Path) -> None:
    """Bit for bit: -0.0 is not 0.0, and a NaN equals itself. Reading takes the first copy."""
    values = [torch.zeros(5, 4), torch.zeros(5, 4)]
    values[0][0, 0] = values[1][0, 0] = math.nan
    values[1][2, 3], values[1][4, 1] = -0.0, 1.0
    for rank, value in enumerate(values):
        RankDumps(tmp_path, rank, 2).add("x", value, "a b # tp:replicated", axes=[["tp", rank, 2]])
    reader = grafter.open_dumps(tmp_path).points[0].reader()
    assert reader.replicas == 2 and reader.read()[4, 1] == 0
    for most in (1, 6, 1000):
        (found,) = reader.differing_replicas(most)
        assert (found.ranks, found.other_ranks, found.index, found.count) == ((0,), (1,), (2, 3), 2)
    assert [ranks for ranks, _ in reader.copies()] == [(0,), (1,)]


def test_undeclared_tensors_of_several_ranks_are_one_if_they_are_copies(tmp_path: Path) -> None:
    """Else the error says in how much they differ, and to declare dims; each rank's own can still be read."""
    for rank in range(2):
        dumps = RankDumps(tmp_path, rank, 2)
        dumps.add("same", torch.tensor([1.0, math.nan]))
        dumps.add("other", torch.tensor([1.0, float(rank)]))
        dumps.add("shape", torch.ones(2 + rank))
        dumps.add("half", torch.ones(2), "a[tp]" if rank else None, axes=[["tp", rank, 2]])
    same, other, shape, half = grafter.open_dumps(tmp_path)
    assert same.whole()[0] == 1 and same.reader().layouts[1] == "nothing declared"
    with pytest.raises(
        DumpError, match=r"ranks \[0\] and \[1\] differ in 1 of 2 values, first at \[1\].*Declare dims="
    ):
        other.whole()
    assert other.local(1).tolist() == [1, 1]
    with pytest.raises(DumpError, match=r"float32\[2\] at baseline rank 0, float32\[3\].*Declare dims="):
        shape.whole()
    with pytest.raises(DumpError, match="baseline rank 0 declares no layout"):
        half.whole()


def test_parts_that_make_no_whole_are_refused_with_point_and_ranks(tmp_path: Path) -> None:
    """A rank that did not dump; parts of two dtypes; a layout that was refused at the dump."""
    dumps = RankDumps(tmp_path, 0, 2)
    dumps.add("hole", torch.ones(2), "a[tp]", axes=[["tp", 0, 2]])
    dumps.add("types", torch.ones(2), "a[tp]", axes=[["tp", 0, 2]])
    dumps.add("bad", torch.ones(2), not_encoded={"layout": "dims, character 3"})
    other = RankDumps(tmp_path, 1, 2)
    other.add("types", torch.ones(2).half(), "a[tp]", axes=[["tp", 1, 2]])
    other.add("bad", torch.ones(3))
    hole, types, bad = grafter.open_dumps(tmp_path)
    with pytest.raises(DumpError, match=r"'hole'.*at tp=1.*no dump of ranks \[1\]"):
        hole.whole()
    with pytest.raises(DumpError, match="two dtypes: float32 at baseline rank 0, float16 at baseline rank 1"):
        types.whole()
    with pytest.raises(DumpError, match="A layout was declared that does not fit: dims, character 3"):
        bad.whole()


def test_boxes_of_a_layout_are_read(tmp_path: Path) -> None:
    """Two boxes in one rank's tensor, in another order than in the whole one."""
    whole = torch.arange(12.0).view(6, 2)
    first = Layout((6, 2), [((4, 0), (2, 2), (0, 0)), ((0, 0), (1, 2), (2, 0))])
    second = Layout((6, 2), [((1, 0), (3, 2))])
    RankDumps(tmp_path, 0, 2).add("x", whole[[4, 5, 0]], {"layout": first})
    RankDumps(tmp_path, 1, 2).add("x", whole[1:4], {"layout": second})
    reader = grafter.open_dumps(tmp_path).points[0].reader()
    assert torch.equal(reader.read(), whole) and torch.equal(reader.read((0, 1), (5, 1)), whole[:5, 1:])
    assert reader.dim_names is None


def test_a_hole_between_parts_is_an_error_and_no_value() -> None:
    """In the words of a graft."""
    declared = Layout((6,), [((0,), (2,))])
    parts = (LocalPart(0, (2,), "float32", "cpu", declare(torch.ones(2), (2,), None, declared, None), ()),)
    with pytest.raises(LayoutError, match="leave a hole"):
        find_pieces("baseline", parts)


# --- the table


def test_the_table_is_what_pandas_takes(tmp_path: Path) -> None:
    """One row per tensor and rank, the same columns in each, one type per column; no tensor is opened."""
    statistics = {"numel": 2, "mean": 1.0, "nan": 0, "inf": 0}
    leaf = {"path": "", "shape": [2], "dtype": "float32", "device": "cpu", "statistics": statistics}
    dumps = RankDumps(tmp_path)
    dumps.add("x", torch.ones(2), tags={"layer_id": 3, "order": "first", "mode": 1, "large": 1}, leaves=[leaf])
    dumps.add("x", {".a": torch.ones(2, 3), ".b": torch.ones(1)}, tags={"scale": 1, "mode": "fast", "large": 10**30})
    dumps.add("y", torch.ones(1), leaves=[], tags={"scale": 0.5})
    table = grafter.open_dumps(tmp_path).table()
    assert len(table) == 4 and len({tuple(row) for row in table}) == 1
    assert [row["layer_id"] for row in table] == [3, None, None, None]
    assert [row["tag_order"] for row in table][:2] == ["first", None] and table[0]["order"] == 0
    assert [row["mode"] for row in table][:2] == ["1", "fast"] and [row["scale"] for row in table][1:] == [
        1.0,
        1.0,
        0.5,
    ]
    assert table[1]["large"] == str(10**30) and table[0]["mean"] == 1.0 and table[3]["path"] is None
    assert table[2]["shape"] == [1] and table[1]["file"] == "rank0/000001-x.safetensors"
    for column in table[0]:
        assert len({type(row[column]) for row in table} - {type(None)}) <= 1, column
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table)
    assert frame[frame.path == ".a"]["dtype"].item() == "float32"
