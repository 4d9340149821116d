"""Rows by token: prefill and decode of an engine against one packed batch, whatever the batches and their order.

Costs about 2 s of one core.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_parts import compared, random, sides
from dump_parts import RankDumps
from hypothesis import given, settings
from hypothesis import strategies as st

from grafter.analysis.compare.comparison import Choice, compare
from grafter.analysis.compare.record import PointRecord
from grafter.core.rows.tokens import Tokens
from grafter.store.dumps.reader import open_dumps


def runs(*entries: tuple[Any, int, int]) -> dict[str, Any]:
    return {"runs": [list(entry) for entry in entries]}


def packed(lengths: dict[Any, int]) -> dict[str, Any]:
    return runs(*((sequence, 0, length) for sequence, length in lengths.items()))


# Two sequences of 5 and 3 tokens, 6 values each.
BATCH = random(8, 6)
ROWS = {"a": BATCH[:5], "b": BATCH[5:]}


def trained(directory: Path) -> None:
    RankDumps(directory / "baseline").add("x", BATCH, "t h", tokens=packed({"a": 5, "b": 3}))


def serve(
    directory: Path, *calls: list[tuple[str, int, int]], change: dict[tuple[str, int], float] | None = None
) -> RankDumps:
    """An engine's forward passes, each of some stretches of sequences."""
    engine = RankDumps(directory / "target", role="target")
    for step, call in enumerate(calls):
        rows = torch.cat([ROWS[name][start : start + count] for name, start, count in call]).clone()
        at = 0
        for name, start, count in call:
            for position in range(start, start + count):
                rows[at] *= (change or {}).get((name, position), 1.0)
                at += 1
        engine.add("x", rows, "t h", step=step, tokens=runs(*call))
    return engine


PREFILL_AND_DECODE = ([("b", 0, 2), ("a", 0, 3)], [("a", 3, 1), ("b", 2, 1)], [("a", 4, 1)])


def one(directory: Path, *thresholds: str) -> PointRecord:
    (point,) = compared(directory, *thresholds).points
    return point


def test_prefill_and_decode_meet_one_packed_batch(tmp_path: Path) -> None:
    """Three forward passes in another order against one: all eight tokens are paired, and equal."""
    trained(tmp_path)
    serve(tmp_path, *PREFILL_AND_DECODE)
    point = one(tmp_path)
    assert point.verdict == "passed" and point.tokens is not None
    assert (point.tokens.paired, point.tokens.only_a, point.tokens.only_b, point.tokens.points_b) == (8, 0, 0, 3)
    assert point.label == "'x' (step=0), by token"


def test_the_worst_token_is_named(tmp_path: Path) -> None:
    """By its sequence and position, however it travelled."""
    trained(tmp_path)
    serve(tmp_path, *PREFILL_AND_DECODE, change={("b", 2): 1.5})
    point = one(tmp_path)
    assert point.verdict == "failed"
    measures = point.leaves[0].measures
    assert measures is not None and measures.rows is not None
    worst = measures.rows.worst[0]
    assert (worst.sequence, worst.position) == ("b", 2)
    assert worst.rel == pytest.approx(0.25 / 3.25)
    assert measures.rows.differing == 1


def test_tokens_of_one_side_are_counted_and_named(tmp_path: Path) -> None:
    """What only one side has is a finding, and no reason to fail; --forbid-skips makes it one."""
    trained(tmp_path)
    serve(tmp_path, [("a", 0, 2), ("b", 0, 3)])
    comparison = compared(tmp_path)
    (point,) = comparison.points
    assert point.tokens is not None
    assert (point.tokens.paired, point.tokens.only_a, point.tokens.only_a_tokens) == (5, 3, ["a:2..4"])
    assert [finding.what for finding in comparison.findings] == ["other_rows"]
    assert comparison.summary.exit_code == 0
    assert comparison.summary.sentence == (
        "B agrees with A: the one point that was compared is bitwise the same. In 1 point, tokens that only one side "
        "has were left out."
    )
    strict = compared(tmp_path, forbid_skips=True).summary
    assert strict.exit_code == 2 and strict.sentence.startswith("Not all could be compared: in 1 point, tokens")
    assert "forbids" in strict.sentence


def test_no_token_in_common_is_an_error(tmp_path: Path) -> None:
    """And no agreement of nothing."""
    trained(tmp_path)
    RankDumps(tmp_path / "target", role="target").add("x", BATCH, "t h", tokens=packed({"c": 8}))
    point = one(tmp_path)
    assert (point.verdict, point.reason) == ("error", "no token is on both sides")


def test_the_same_rows_in_both_are_compared_as_they_lie(tmp_path: Path) -> None:
    """Where keys and tokens agree, points are paired one by one."""
    for side in sides(tmp_path):
        for step in range(2):
            side.add("x", BATCH + step, "t h", step=step, tokens=packed({"a": 5, "b": 3}))
    points = compared(tmp_path).points
    assert [(point.verdict, point.step, point.tokens) for point in points] == [("passed", 0, None), ("passed", 1, None)]


def test_tokens_that_come_again_in_another_step_are_paired_step_by_step(tmp_path: Path) -> None:
    """A trainer numbers the sequences of each batch from 0 on; rows of a step meet those of the same step."""
    a, b = sides(tmp_path)
    for step in range(2):
        a.add("x", BATCH + step, "t h", step=step, tokens=packed({0: 5, 1: 3}))
        order = torch.cat([BATCH[5:], BATCH[:5]]) + step
        b.add("x", order, "t h", step=step, tokens=packed({1: 3, 0: 5}))
    points = compared(tmp_path).points
    assert [(point.verdict, point.tokens and point.tokens.paired) for point in points] == [("passed", 8)] * 2


# "a" loses its blocks after three rows, and is computed anew once "b" has ended.
PREEMPTED = ([("b", 0, 2), ("a", 0, 3)], [("b", 2, 1)], [("a", 1, 4)])


def test_rows_that_a_server_computes_anew_are_compared_each_time(tmp_path: Path) -> None:
    """All passes meet the packed batch, and the rows that come again are told; on whichever side they do."""
    trained(tmp_path)
    serve(tmp_path, *PREEMPTED)
    packed_batch, server = (open_dumps(tmp_path, role=role) for role in ("baseline", "target"))
    for a, b, points in ((packed_batch, server, (1, 3)), (server, packed_batch, (3, 1))):
        (point,) = compare(a, b, Choice(thresholds=[])).points
        assert point.verdict == "passed" and point.tokens is not None
        assert (point.tokens.paired, point.tokens.again, point.tokens.only_a, point.tokens.only_b) == (10, 2, 0, 0)
        assert (point.tokens.points_a, point.tokens.points_b) == points


def test_a_row_that_is_wrong_only_when_it_comes_again_is_named(tmp_path: Path) -> None:
    """The first time it was right: one row of eight differs. Tokens that no pass has are of A alone."""
    trained(tmp_path)
    engine = serve(tmp_path, *PREEMPTED[:2])
    rows = ROWS["a"][1:3].clone()
    rows[1] *= 1.5
    engine.add("x", rows, "t h", step=2, tokens=runs(("a", 1, 2)))
    comparison = compared(tmp_path)
    (point,) = comparison.points
    assert point.verdict == "failed" and point.tokens is not None
    assert (point.tokens.paired, point.tokens.again, point.tokens.only_a_tokens) == (8, 2, ["a:3..4"])
    measures = point.leaves[0].measures
    assert measures is not None and measures.rows is not None
    assert measures.rows.differing == 1
    assert (measures.rows.worst[0].sequence, measures.rows.worst[0].position) == ("a", 2)
    (finding,) = comparison.findings
    assert "6 tokens are on both sides (2 rows are there once more), 2 only in A and 0 only in B" in finding.text


def test_a_further_step_of_the_same_tokens_never_agrees_unseen(tmp_path: Path) -> None:
    """Sequences are numbered from 0 in each step; a step that only one side has meets no other step's rows. It might
    be rows of a server computed anew, too, which nobody compared: an error, unless a filter leaves that step out."""
    a, b = sides(tmp_path)
    order = torch.cat([BATCH[5:], BATCH[:5]])
    a.add("x", BATCH, "t h", tokens=packed({0: 5, 1: 3}))
    for step in range(2):
        b.add("x", order + step, "t h", step=step, tokens=packed({1: 3, 0: 5}))
    comparison = compared(tmp_path)
    (point,) = comparison.points
    assert (point.verdict, point.tokens and (point.tokens.paired, point.tokens.again)) == ("passed", (8, 0))
    (finding,) = comparison.findings
    assert (finding.what, finding.is_error) == ("only_in_b", True) and "computed anew" in finding.text
    assert comparison.summary.exit_code == 2
    assert "1 point has tokens once more" in comparison.summary.sentence
    assert "--filter 'step != 1'" in finding.text
    assert compared(tmp_path, filter="step != 1").summary.exit_code == 0


def hashed(name: str, start: int, ids: list[int]) -> Any:
    return Tokens.from_lengths([name], [len(ids)], [start], token_ids=ids).record().model_dump()


def test_rows_that_come_again_are_known_by_the_token_ids_of_the_first_time(tmp_path: Path) -> None:
    """They mostly begin in the middle, without hashes of their own, and are paired by content, or contradicted, too."""
    for name, first in (("r9", [7, 8, 9, 6, 5]), ("a", [1, 2, 3, 4, 5])):
        a, b = sides(tmp_path / name)
        a.add("x", ROWS["a"], "t h", tokens=hashed("a", 0, [7, 8, 9, 6, 5]))
        b.add("x", ROWS["a"], "t h", tokens=hashed(name, 0, first))
        b.add("x", ROWS["a"][2:], "t h", step=1, tokens=hashed(name, 2, first[2:]))
        # Not all of A is in one step of B, so all meet all.
        a.add("x", ROWS["b"], "t h", step=1, tokens=packed({"b": 3}))
        b.add("x", ROWS["b"], "t h", step=2, tokens=packed({"b": 3}))
    point = one(tmp_path / "r9")
    assert point.verdict == "passed" and point.tokens is not None
    assert (point.tokens.paired, point.tokens.again, point.tokens.only_a, point.tokens.only_b) == (11, 3, 0, 0)
    point = one(tmp_path / "a")
    assert point.tokens is not None
    assert (point.tokens.paired, point.tokens.only_a, point.tokens.only_b) == (3, 5, 8)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_passes_in_which_tokens_come_again_agree(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Each row of a server is compared, however often its token came before."""
    directory = tmp_path_factory.mktemp("again")
    trained(directory)
    stretches = st.builds(lambda first, count: (first, min(count, 5 - first)), st.integers(0, 4), st.integers(1, 5))
    # The first pass has one row, so that no step alone holds all that the others have.
    calls = [[("b", 2, 1)]] + [[("a", *call)] for call in data.draw(st.lists(stretches, min_size=1, max_size=6))]
    serve(directory, *calls)
    rows = [(name, first + n) for call in calls for name, first, count in call for n in range(count)]
    point = one(directory)
    assert point.verdict == "passed" and point.tokens is not None
    assert (point.tokens.paired, point.tokens.again) == (len(rows), len(rows) - len(set(rows)))
    assert (point.tokens.only_a, point.tokens.only_b) == (8 - len(set(rows)), 0)


def test_padding_and_batches_of_two_dims(tmp_path: Path) -> None:
    """`b s h` with padding against `t`, also with s before b in memory."""
    padded = torch.zeros(2, 5, 6)
    padded[0], padded[1, :3] = ROWS["a"], ROWS["b"]
    tokens = runs(("a", 0, 5), ("b", 0, 3), (None, 0, 2))
    for name, dims, value in (("x", "b s h", padded), ("y", "s b h", padded.transpose(0, 1)), ("z", None, padded)):
        directory = tmp_path / name
        a, b = sides(directory)
        a.add("x", BATCH, "t h" if dims else None, tokens=packed({"a": 5, "b": 3}))
        b.add("x", value, dims, tokens=tokens)
        point = one(directory)
        assert (point.verdict, point.tokens and point.tokens.paired) == ("passed", 8)


def test_rows_that_lie_on_several_ranks(tmp_path: Path) -> None:
    """Each rank of a context-parallel job says which tokens its own rows are."""
    trained(tmp_path)
    for rank, tokens in enumerate((runs(("a", 0, 4)), runs(("a", 4, 1), ("b", 0, 3)))):
        dumps = RankDumps(tmp_path / "target", rank, 2, "target")
        part = BATCH[4 * rank : 4 * rank + 4]
        dumps.add("x", part, "t[cp] h", axes=[["cp", rank, 2]], tokens=tokens)
    point = one(tmp_path)
    assert (point.verdict, point.tokens and point.tokens.paired) == ("passed", 8)


def test_sequences_with_other_ids_are_known_by_their_tokens(tmp_path: Path) -> None:
    """Request ids on one side, numbers on the other, token ids on both."""
    ids = torch.tensor([7, 8, 9, 7, 7, 1, 2, 3])
    a, b = sides(tmp_path)
    tokens = Tokens.from_lengths([0, 1], [5, 3], token_ids=ids)
    a.add("x", BATCH, "t h", tokens=tokens.record().model_dump())
    other = Tokens.from_lengths(["r9", "r3"], [3, 5], token_ids=torch.cat([ids[5:], ids[:5]]))
    b.add("x", torch.cat([BATCH[5:], BATCH[:5]]), "t h", tokens=other.record().model_dump())
    point = one(tmp_path)
    assert point.verdict == "passed" and point.tokens is not None
    assert sorted(map(str, point.tokens.by_content)) == ["[0, 'r3']", "[1, 'r9']"]


def test_tokens_that_do_not_fit_the_tensor_are_an_error(tmp_path: Path) -> None:
    """Fewer or more rows than the tensor has."""
    trained(tmp_path)
    RankDumps(tmp_path / "target", role="target").add("x", BATCH, "t h", tokens=packed({"a": 5, "b": 2}))
    point = one(tmp_path)
    assert point.verdict == "error" and "rank 0 gives tokens for 7 rows, and has 8" in str(point.reason)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_split_of_the_same_tokens_agrees(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Tokens in any order, in any number of calls: each is compared with itself."""
    directory = tmp_path_factory.mktemp("split")
    trained(directory)
    order = data.draw(st.permutations([("a", n) for n in range(5)] + [("b", n) for n in range(3)]))
    cuts = sorted(data.draw(st.sets(st.integers(1, 7), max_size=4)))
    calls = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, 8], strict=True)]
    serve(directory, *([(name, position, 1) for name, position in call] for call in calls))
    point = one(directory)
    assert (point.verdict, point.tokens and point.tokens.paired) == ("passed", 8)


@pytest.mark.parametrize("count", [2**40, 2**60])
def test_rows_that_a_record_only_claims_take_no_memory(tmp_path: Path, count: int) -> None:
    """Tokens of more rows than there could be are an error, told before anything is made of that size."""
    trained(tmp_path)
    for rank in range(2):
        dumps = RankDumps(tmp_path / "target", rank, 2, "target")
        tokens = runs(("a", 8 * rank, count))
        dumps.add("x", BATCH[4 * rank : 4 * rank + 4], "t[cp] h", axes=[["cp", rank, 2]], tokens=tokens)
    point = one(tmp_path)
    assert point.verdict == "error" and f"gives tokens for {count} rows, and has 4" in str(point.reason)


def test_rows_without_values_take_no_memory(tmp_path: Path) -> None:
    """2**40 rows of no values: the file of no bytes has them, as it says, and they are there once more."""
    a, b = sides(tmp_path)
    rows = torch.empty(2**40, 0)
    for side, steps in ((a, (0,)), (b, (1, 2))):
        for step in steps:
            side.add("x", rows, None, step=step, tokens=runs(("a", 0, len(rows))))
    (point,) = compared(tmp_path).points
    assert point.tokens is not None
    assert (point.verdict, point.tokens.paired, point.tokens.again) == ("passed", 2**41, 2**40)


def test_a_shape_that_a_record_only_claims_takes_no_memory(tmp_path: Path) -> None:
    """The file is opened, and contradicts it, before any row is made."""
    a, b = sides(tmp_path)
    a.add("x", BATCH, "t h", tokens=packed({"a": 8}))
    record = b.record("x", {"": BATCH}, "t h", tokens=packed({"a": 2**50}))
    record["leaves"][0]["shape"] = [2**50, 6]
    b.add("x", BATCH, "t h", line=False)
    b.write_line(json.dumps(record))
    point = one(tmp_path)
    assert point.verdict == "error" and "the record says" in str(point.reason)
