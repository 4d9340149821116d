"""Pairs of dumped points: layouts aligned, copies checked, errors kept to their point. Costs about 3 s of one core."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_parts import compared, one_point, random, sides, told
from dump_parts import RankDumps
from hypothesis import given, settings
from hypothesis import strategies as st

from grafter.analysis.compare.alignment import Alignment
from grafter.analysis.compare.measuring import measure_pair
from grafter.analysis.compare.record import LeafRecord, Measures, PointRecord
from grafter.core.layout.dims import parse_dims
from grafter.core.layout.runs import whole
from grafter.core.layout.shares import RoleShares, Share
from grafter.core.measures.stats import compare as compare_tensors
from grafter.store.dumps.reader import open_dumps


class InMemory:
    """A whole tensor that is no recording."""

    replicas = 1

    def __init__(self, tensor: torch.Tensor, dims: str | None = None) -> None:
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype
        parsed = parse_dims(dims).dims if dims is not None else None
        self.dim_names = None if parsed is None else tuple(map(str, parsed))
        share = Share(tuple(whole(size) for size in self.shape))
        self.whole = RoleShares("x", dims or "no names", parsed, self.shape, {0: share})
        self.read_values = 0

    def read(self, offset: Any = None, size: Any = None) -> torch.Tensor:
        self.read_values += torch.Size(size).numel()
        box = self.tensor
        for dim, (at, extent) in enumerate(zip(offset, size, strict=True)):
            box = box.narrow(dim, at, extent)
        return box

    def copies(self, offset: Any = None, size: Any = None) -> Any:
        yield (0,), self.read(offset, size)

    def will_read(self, offset: Any = None, size: Any = None) -> None:
        """All of it is in memory."""


def measures_of(a: InMemory, b: InMemory, block_bytes: int = 1 << 20, **kwargs: Any) -> Measures:
    return measure_pair(a, b, block_bytes=block_bytes, **kwargs).measures


# --- alignment


# How B has it, from A's `b s h d`; B's dims.
ORDERS = {
    "b s h d": lambda x: x,
    "s b h d": lambda x: x.transpose(0, 1),
    "d h s b": lambda x: x.permute(3, 2, 1, 0),
    "b s (h*d)": lambda x: x.flatten(2),
    "s (h*d) b": lambda x: x.flatten(2).permute(1, 2, 0),
    "(b*s) h d": lambda x: x.flatten(0, 1),
    "b s (d*h)": lambda x: x.transpose(2, 3).flatten(2),
    "(h*s) b d": lambda x: x.permute(2, 1, 0, 3).flatten(0, 1),
    "b 1 s h d": lambda x: x.unsqueeze(1),
}


@pytest.mark.parametrize("dims", ORDERS)
@pytest.mark.parametrize("block_bytes", [4, 100, 1 << 20])
def test_another_order_or_fusion_of_dims_changes_no_number(dims: str, block_bytes: int) -> None:
    """What is compared are the same values, whatever the block; places are given in each side's own dims."""
    a = random(3, 5, 4, 6)
    b = a + 0.01 * random(3, 5, 4, 6, seed=1)
    b[2, 3, 1, 4] += 3.0
    other = ORDERS[dims](b).contiguous()
    found = measures_of(InMemory(a, "b s h d"), InMemory(other, dims), block_bytes)
    plain = compare_tensors(b, a, "full")[2]
    assert found.difference == plain and found.difference.max_abs_index == [2, 3, 1, 4]
    assert found.max_abs_index_b is not None and found.difference.max_abs_values is not None
    assert other[tuple(found.max_abs_index_b)].item() == found.difference.max_abs_values[0]
    assert found.rows is not None
    assert sorted(zip(found.rows.dims, found.rows.worst[0].index, strict=True)) == [("b", 2), ("s", 3)]


@settings(max_examples=80)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=4), st.integers(1, 60))
def test_blocks_are_the_tensor_in_order_and_small(shape: list[int], most: int) -> None:
    """Each value comes once, in the order of the flattened index, and no block is larger than told."""
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    held = InMemory(tensor)
    alignment = Alignment(held, held)
    parts = [alignment.a.read(block) for block in alignment.blocks(most)]
    assert all(part.numel() <= most for part in parts)
    assert torch.equal(
        torch.cat([part.reshape(-1) for part in parts]) if parts else tensor.reshape(-1), tensor.reshape(-1)
    )
    assert held.read_values == tensor.numel()


def test_rows_are_tokens_where_the_dims_say_so() -> None:
    """`t`, or `b` and `s`, wherever they stand; else all but the last dim; one row of a vector."""
    cube = torch.zeros(2, 3, 4)
    for dims, rows in (("t h d", ["t"]), ("s b h", ["s", "b"]), ("h t d", ["t"]), ("x y z", ["x", "y"])):
        assert Alignment(InMemory(cube, dims), InMemory(cube, dims)).row_dims == rows
    assert len(Alignment(InMemory(cube), InMemory(cube)).row_dims) == 2
    assert Alignment(InMemory(torch.zeros(5)), InMemory(torch.zeros(5))).row_dims == []


# --- KL


def test_the_kl_is_over_the_dim_that_the_rule_names() -> None:
    """`kl` is over A's last dim, `kl_v` over v, wherever it stands on either side; another dim's is another number."""
    a, b = random(4, 6, 50), random(4, 6, 50, seed=1)
    log_p, log_q = a.double().log_softmax(2), b.double().log_softmax(2)
    rows = (log_p.exp() * (log_p - log_q)).sum(2)
    for dims, other in (("b s v", b), ("v s b", b.permute(2, 1, 0))):
        for kl_dims in ({None}, {"v"}, {None, "v"}, {"v", "s"}):
            held = InMemory(a, "b s v"), InMemory(other, dims)
            values = measure_pair(*held, kl_dims=frozenset(kl_dims), block_bytes=1000).values
            assert values["kl_v"] == values["kl"] == pytest.approx(rows.mean().item(), rel=1e-9)
            assert values["max_kl_v"] == pytest.approx(rows.max().item(), rel=1e-9)
            assert ("kl_s" in values) == ("s" in kl_dims)
    place = measures_of(InMemory(a, "b s v"), InMemory(b, "b s v"), kl_dims=frozenset({"v"})).kl[0].worst
    assert place == [int(n) for n in torch.unravel_index(rows.argmax(), rows.shape)]


def test_padding_of_the_vocabulary_has_no_part_in_the_kl(tmp_path: Path) -> None:
    """A declared size takes away what one side has beyond it."""
    a, b = sides(tmp_path)
    logits = random(7, 50)
    padded = torch.cat([logits, torch.full((7, 14), 9.0)], dim=1)
    a.add("logits", logits, "t v")
    b.add("logits", padded, "t v=50")
    assert one_point(tmp_path, "*: kl == 0 and rel == 0").verdict == "passed"


def test_a_kl_that_cannot_be_is_an_error_of_that_point(tmp_path: Path) -> None:
    """A dim that is not there, a number without dims."""
    a, b = sides(tmp_path)
    for side in (a, b):
        side.add("logits", random(3, 4), "t v")
        side.add("loss", torch.tensor(1.0))
    points = compared(tmp_path, "logits: kl_h < 1", "loss: kl < 1").points
    assert [point.verdict for point in points] == ["error", "error"]
    assert "the dim 'h', and the dims are 't v' at A" in str(points[0].reason)
    assert "a single number without dims" in str(points[1].reason)


# --- layouts on ranks


def test_shards_are_put_together(tmp_path: Path) -> None:
    """One rank's `b s h d` against two of `s b (h*d)[tp]`, and against a sum of summands in bfloat16."""
    x = random(2, 5, 4, 6)
    RankDumps(tmp_path / "baseline").add("x", x, "b s h d")
    for rank in range(2):
        part = x.transpose(0, 1)[:, :, 2 * rank : 2 * rank + 2].flatten(2)
        dumps = RankDumps(tmp_path / "target", rank, 2, "target")
        dumps.add("x", part, "s b (h*d)[tp]", axes=[["tp", rank, 2]])
    point = one_point(tmp_path)
    assert point.verdict == "passed"
    (leaf,) = point.leaves
    assert leaf.a is not None and leaf.b is not None
    assert (leaf.b.ranks, leaf.b.shape, leaf.b.dims) == ([0, 1], [5, 2, 24], ["s", "b", "(h*d)"])
    assert leaf.a.statistics is not None and leaf.a.statistics.numel == 240


def test_summands_are_summed_in_float32_or_better(tmp_path: Path) -> None:
    """Two bfloat16 summands whose sum bfloat16 does not hold agree with the float32 sum, to the last bit."""
    parts = [torch.full((3, 4), 1.0).bfloat16(), torch.full((3, 4), 2.0**-9).bfloat16()]
    RankDumps(tmp_path / "baseline").add("x", torch.full((3, 4), 1 + 2.0**-9), "t h")
    for rank, part in enumerate(parts):
        RankDumps(tmp_path / "target", rank, 2, "target").add("x", part, "t h[tp:partial]", axes=[["tp", rank, 2]])
    point = one_point(tmp_path)
    assert (point.verdict, point.leaves[0].b and point.leaves[0].b.summands) == ("passed", 2)


def replicated(directory: Path, *copies: torch.Tensor) -> None:
    RankDumps(directory / "baseline").add("x", copies[0], "t h")
    for rank, copy in enumerate(copies):
        dumps = RankDumps(directory / "target", rank, len(copies), "target")
        dumps.add("x", copy, "t h # dp:replicated", axes=[["dp", rank, len(copies)]])


def test_copies_are_judged_by_the_rule_of_their_point(tmp_path: Path) -> None:
    """A copy that is off fails the point though the first one agrees, unless the rule allows as much."""
    x = random(4, 5)
    off = x.clone()
    off[2, 3] *= 1.5
    replicated(tmp_path, x, x, off)
    strict, loose = one_point(tmp_path), one_point(tmp_path, "*: rel <= 0.1")
    assert (strict.verdict, loose.verdict) == ("failed", "passed")
    assert "copies at B differ: ranks [2] from ranks [0]" in str(strict.reason)
    (replica,) = strict.leaves[0].replicas
    assert (replica.side, replica.ranks, replica.difference.max_abs_index) == ("b", [2], [2, 3])
    assert loose.leaves[0].replicas[0].passed


# --- leaves, dtypes, levels


def test_dtypes_that_differ_are_measured_twice(tmp_path: Path) -> None:
    """After promotion, and once more in the narrower one, which a rule may read."""
    a, b = sides(tmp_path)
    x = random(6, 40)
    a.add("x", x)
    b.add("x", x.bfloat16())
    point = one_point(tmp_path, "*: narrow_mismatched_fraction == 0 and rel < 1e-4")
    assert point.verdict == "passed" and point.values["narrow_rel"] == 0 and point.values["max_ulp"] == 0
    measures = point.leaves[0].measures
    assert measures is not None and measures.narrow_dtype == "bfloat16" and measures.difference.rel != 0
    assert one_point(tmp_path, "*: rel < 1e-9").verdict == "failed"


def test_a_point_is_as_bad_as_its_worst_tensor(tmp_path: Path) -> None:
    """Leaves are compared by path; the worst decides, and is named; one that a side lacks is an error."""
    a, b = sides(tmp_path)
    x = random(3, 4)
    a.add("moe", {"['ids']": x, "['weights']": x})
    b.add("moe", {"['ids']": x, "['weights']": x + 1})
    a.add("pair", {"[0]": x, "[1]": x})
    b.add("pair", {"[0]": x})
    moe, pair = compared(tmp_path).points
    assert (moe.verdict, moe.worst_leaf) == ("failed", "['weights']")
    assert str(moe.reason).startswith("['weights']: mismatched_fraction 1")
    assert (pair.verdict, pair.reason) == ("error", "[1]: only A has this tensor of the point")


def test_shapes_that_do_not_fit_are_an_error_of_that_point(tmp_path: Path) -> None:
    """The others are compared all the same."""
    a, b = sides(tmp_path)
    a.add("x", random(3, 4))
    b.add("x", random(4, 4))
    for side in (a, b):
        side.add("y", random(3))
    comparison = compared(tmp_path)
    assert [point.verdict for point in comparison.points] == ["error", "passed"]
    assert "3 (the shards at A) and 4 (the shards at B)" in str(comparison.points[0].reason)
    assert comparison.summary.exit_code == 2


def test_values_as_a_graft_left_them(tmp_path: Path) -> None:
    """`grafted` is what the program went on with, where a graft changed it, and the value elsewhere."""
    a, b = sides(tmp_path)
    x, y = random(3), random(3, seed=1)
    a.add("x", x)
    b.add("x", y, stored={"grafted": x})
    b.add("z", y)
    a.add("z", y)
    assert [p.verdict for p in compared(tmp_path).points] == ["failed", "passed"]
    points = compared(tmp_path, which="grafted").points
    assert [p.verdict for p in points] == ["passed", "passed"]
    assert [leaf_which(p.leaves[0]) for p in points] == [("value", "grafted"), ("value", "value")]


def leaf_which(leaf: LeafRecord) -> tuple[str, str]:
    assert leaf.a is not None and leaf.b is not None
    return leaf.a.which, leaf.b.which


def without_tensors(directory: Path, *checksums: str | None) -> PointRecord:
    for role, checksum in zip(("baseline", "target"), checksums, strict=True):
        dumps = RankDumps(directory / role, role=role)
        record = dumps.record("x", {"": torch.zeros(3)}, level="checksum", file=None)
        record["leaves"][0]["checksum"] = checksum
        dumps.write_line(json.dumps(record))
    return one_point(directory)


def test_what_was_saved_without_values_is_skipped_unless_its_checksums_agree(tmp_path: Path) -> None:
    """Equal checksums pass; unequal ones say only that, and are no measure."""
    assert without_tensors(tmp_path / "same", "ab", "ab").verdict == "passed"
    other = without_tensors(tmp_path / "other", "ab", "cd")
    assert other.verdict == "skipped" and "Their checksums differ" in str(other.reason)
    assert without_tensors(tmp_path / "none", None, None).verdict == "skipped"


def test_equal_checksums_of_tensors_that_are_laid_out_differently_say_nothing(tmp_path: Path) -> None:
    """The same bytes under `a b` and `b a` are two different tensors."""
    for name, dims in (("same", ("a b", "a b")), ("turned", ("a b", "b a")), ("unsaid", ("a b", None))):
        for role, said in zip(("baseline", "target"), dims, strict=True):
            dumps = RankDumps(tmp_path / name / role, role=role)
            record = dumps.record("x", {"": torch.zeros(4, 4)}, level="checksum", file=None)
            record["leaves"][0] |= {"checksum": "ab", "layout": {"dims": said} if said else None}
            dumps.write_line(json.dumps(record))
        point = one_point(tmp_path / name)
        assert point.verdict == ("passed" if name == "same" else "skipped"), name
        assert ("laid out differently" in str(point.reason)) == (name != "same")


def test_a_point_that_passes_without_a_ranks_dump_is_skipped(tmp_path: Path) -> None:
    """A rank that ended before it wrote its dump never makes a comparison better."""
    for role in ("baseline", "target"):
        dumps = RankDumps(tmp_path / role, role=role, world_size=2)
        dumps.add("x", torch.ones(3), participants=[0, 1])
    point = one_point(tmp_path)
    assert point.verdict == "skipped"
    assert str(point.reason) == "there is no dump of it of A's ranks [1] and B's ranks [1], which take part in it"


def test_checksums_of_what_a_graft_left(tmp_path: Path) -> None:
    """`grafted` is judged by the checksum, or the value, that a graft left; the value's is another."""
    a, b = sides(tmp_path)
    x, y = random(3), random(3, seed=1)
    sums = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in (x, y)]
    for name, grafted in (("sums", sums[1]), ("right", sums[0])):
        for side in (a, b):
            told = side.record(name, {"": x}, level="checksum", file=None)
            told["leaves"][0] |= {"checksum": sums[0], "grafted_checksum": grafted if side is b else None}
            side.write_line(json.dumps(told))
            side.order += 1
    a.add("file", x, stored={"grafted": y})
    b.write_line(json.dumps(told | {"name": "file", "order": b.order}))
    assert [point.verdict for point in compared(tmp_path).points] == ["passed"] * 3
    points = compared(tmp_path, which="grafted").points
    assert [point.verdict for point in points] == ["skipped", "passed", "skipped"]
    assert all("Their checksums differ" in str(point.reason) for point in points if point.verdict == "skipped")


def test_values_meet_a_checksum(tmp_path: Path) -> None:
    """Where one side saved the values, and the other only their checksum; a damaged file is no difference."""
    x = random(3)
    for name, value, of in (("same", x, x), ("other", x, x + 1), ("damaged", x, x), ("scalar", x[0], x[0])):
        a = RankDumps(tmp_path / name / "baseline")
        path = a.add("x", value)
        if name == "damaged":
            path.write_bytes(path.read_bytes()[:-4])
        b = RankDumps(tmp_path / name / "target", role="target")
        record = b.record("x", {"": of}, level="checksum", file=None)
        record["leaves"][0]["checksum"] = hashlib.sha256(of.numpy().tobytes()).hexdigest()
        b.write_line(json.dumps(record))
    points = {name: one_point(tmp_path / name) for name in ("same", "other", "damaged", "scalar")}
    assert {name: point.verdict for name, point in points.items()} == {
        "same": "passed",
        "other": "skipped",
        "damaged": "error",
        "scalar": "passed",
    }
    assert "Their checksums differ" in str(points["other"].reason)


def test_a_damaged_file_is_an_error_of_its_point(tmp_path: Path) -> None:
    """Whatever is in the file, the comparison goes on, and says which point it could not judge."""
    a, b = sides(tmp_path)
    for side in (a, b):
        side.add("x", random(3))
    path = b.add("y", random(3))
    a.add("y", random(3))
    path.write_bytes(path.read_bytes()[:-4])
    comparison = compared(tmp_path)
    assert [point.verdict for point in comparison.points] == ["passed", "error"]
    assert "truncated" in str(comparison.points[1].reason)
    assert comparison.summary.exit_code == 2


def test_a_shape_that_a_record_only_claims_costs_nothing(tmp_path: Path) -> None:
    """Of 2**40 rows of 2**22 values, on a side whose file has 24: the file says so when it is first read."""
    for side in sides(tmp_path):
        told = side.record("x", {"": random(6, 4)})
        told["leaves"][0]["shape"] = [2**40, 2**22]
        side.add("x", random(6, 4), line=False)
        side.write_line(json.dumps(told))
    point = one_point(tmp_path)
    assert point.verdict == "error" and "the record says" in str(point.reason)


def test_a_scalar_an_empty_tensor_and_integers(tmp_path: Path) -> None:
    """They are compared like all others."""
    a, b = sides(tmp_path)
    for value in (torch.tensor(2.0), torch.zeros(0, 3), torch.arange(5), torch.tensor([True]), torch.ones(2) * 1j):
        a.add(f"{a.order}", value)
        b.add(f"{b.order}", value)
    points = compared(tmp_path).points
    assert [point.verdict for point in points] == ["passed"] * 5
    assert open_dumps(tmp_path, role="baseline").problems == []


# --- what rel does not show


def test_other_bits_at_rel_0_are_marked_in_the_table(tmp_path: Path) -> None:
    """-0.0 against 0.0: passed by a rule on rel, failed by none, and marked in both tables."""
    a, b = sides(tmp_path)
    a.add("x", torch.tensor([0.0, 1.0]))
    b.add("x", torch.tensor([-0.0, 1.0]))
    for rules, code, verdict in (((), 1, "failed"), (("--threshold", "*: rel <= 1e-9"), 0, "passed")):
        found, out, _ = told(tmp_path, *rules)
        assert found == code and re.search(rf"'x' \(step=0\) +0 != +0 != .*{verdict}", out), out
        assert "!= some values differ in their bits though rel is 0 or unknown" in out


@pytest.mark.parametrize("rules", [(), ("--threshold", "*: rel <= 0.5")], ids=["no rule", "a loose rule"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_copies_that_differ_are_told_on_either_side_whatever_the_rule(
    side: str, rules: tuple[str, ...], tmp_path: Path
) -> None:
    """A rule for two programs says nothing of the ranks of one: the ranks are named, and so in the sentence."""
    x = random(4, 5)
    off = x.clone()
    off[2, 3] *= 1.5
    replicated(tmp_path, x, off)
    baseline, target = tmp_path / "baseline", tmp_path / "target"
    code, out, _ = told(*((target, baseline) if side == "A" else (baseline, target)), *rules)
    assert code == (0 if rules else 1)
    assert f"copies differ: 'x' (step=0): the copies at {side} differ: ranks [1] from ranks [0], by rel" in out
    assert "In 1 point, copies that one side's ranks hold differ among themselves." in out


def test_copies_are_compared_where_rows_are_paired_by_token(tmp_path: Path) -> None:
    """Two ranks that hold the same rows, in another order than the other side, and one row is off."""
    x = random(4, 5)
    RankDumps(tmp_path / "baseline").add("x", x, "t h", tokens={"runs": [["a", 0, 4]]})
    for rank in range(2):
        own = x.flip(0).clone()
        own[1, 3] += rank
        dumps = RankDumps(tmp_path / "target", rank, 2, "target")
        runs = {"runs": [["a", position, 1] for position in (3, 2, 1, 0)]}
        dumps.add("x", own, "t h # dp:replicated", axes=[["dp", rank, 2]], tokens=runs)
    point = one_point(tmp_path)
    assert point.verdict == "failed" and "copies at B differ: ranks [1] from ranks [0]" in str(point.reason)
    (replica,) = point.leaves[0].replicas
    assert replica.difference.max_abs_index == [2, 3] and replica.difference.mismatched_fraction == 1 / 20
