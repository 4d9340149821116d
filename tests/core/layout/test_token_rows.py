"""Rows by token between any two batches: what each receiver gets, against dictionaries. Pure; about 6 s."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from layout_parts import StandIn
from point_parts import header, pair, roster, spec
from token_batches import UNTOUCHED, WIDTH, Batch, HeldRows, Row, Token, any_rows, batches, code, tokens_of
from torch.distributed.tensor import Replicate, Shard

from grafter.core.layout import token_rows
from grafter.core.layout.declared import DeclaredLayout
from grafter.core.layout.dtensor import read_dtensor
from grafter.core.messages.announced_tokens import AnnouncedTokens, announce
from grafter.core.messages.manifest import Header, Manifest, Pair, manifest_text, with_tokens_told_once
from grafter.core.plan.assembly import assembled_leaves
from grafter.core.plan.decision import Decision, decide
from grafter.core.plan.transfer_plan import make_plan
from grafter.core.rows.tokens import Tokens
from grafter.core.writing.write_back import WriteMode
from grafter.wire.exchange.incoming import IncomingLeaf


def kept_tokens(held: HeldRows) -> set[Token]:
    starts = dict(zip(held.told.sequences, held.starts, strict=False))
    return {row for row in held.rows if row is not None and row[1] >= starts.get(row[0], 0)}


def all_kept(batch: Batch) -> set[Token]:
    return set().union(*map(kept_tokens, batch.ranks))


def all_there(batch: Batch) -> set[Token]:
    return {row for held in batch.ranks for row in held.rows if row is not None}


def as_it_travels(headers: list[Header]) -> Manifest:
    text = manifest_text(headers[0].role, [header.text for header in with_tokens_told_once(headers)], None)
    return Manifest.model_validate_json(text)


def moved(both: Pair, decision: Decision, sender: Batch, receiver: Batch, mode: WriteMode) -> list[torch.Tensor]:
    """What each receiver goes on with, by the plan, in one process."""
    plan = make_plan("ab" * 12, "b2t", both, decision, roster(len(sender.ranks), len(receiver.ranks)))
    staged = {value: torch.full(value.spec.shape, UNTOUCHED, dtype=torch.int64) for value in plan.values}
    for piece in plan.pieces:
        header = both.baseline.headers[piece.sender]
        rows = decision.rows_of(header)
        assert rows is not None
        source = piece.taken_from(rows[0].of(sender.ranks[piece.sender].tensor))
        place = piece.landing(staged[piece.value])
        assert source.shape == place.shape == piece.spec.shape
        assert bool((place == UNTOUCHED).all()), "a place is written twice"
        place.copy_(source)
    found = []
    for number, (header, held) in enumerate(zip(both.target.headers, receiver.ranks, strict=True)):
        mine = {value: tensor for value, tensor in staged.items() if value.receiver == len(sender.ranks) + number}
        (one,) = assembled_leaves(decision, mine, header)
        rows = decision.rows_of(header)
        assert rows is not None
        view = None if rows[0].is_everything else rows[0]
        whole = rows[0].of(held.tensor)
        leaf = IncomingLeaf(one.tensor, whole, whole, one.room, None, view)
        leaf.check(held.tensor, mode)
        found.append(leaf.write(held.tensor, mode).value)
    return found


@settings(max_examples=300, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from(["in_place", "return"]), st.sampled_from([0, token_rows.FEW]))
def test_each_row_gets_the_value_of_its_token_and_all_others_stay(
    data: st.DataObject, windows: bool, write: str, few: int
) -> None:
    """Packed or padded, in any order, cut over ranks or held by all, with and without windows; one by one, or not."""
    rows = data.draw(st.none() | any_rows(), label="the rows of both")
    sender, receiver = (data.draw(batches(windows=windows, rows=rows)) for _ in range(2))
    note(sender.text)
    note(receiver.text)
    for held in sender.ranks:
        for row, token in enumerate(held.rows):
            for column, number in enumerate(held.columns):
                held.by_rows[row, column] = code(token, number) if token else -1
    both = Pair(as_it_travels(sender.headers("baseline")), as_it_travels(receiver.headers("target")))
    with patch.object(token_rows, "FEW", few):
        decision = decide("b2t", both)
    met = all_kept(sender) & all_kept(receiver)
    if not met:
        assert decision.outcome == "skipped" and "no token is in both" in (decision.reason or "")
        assert "Give equal sequence ids, or token_ids= on both sides." in (decision.reason or "")
        return
    assert decision.outcome is None, decision.reason
    before = [held.tensor.clone() for held in receiver.ranks]
    results = moved(both, decision, sender, receiver, WriteMode(write))  # type: ignore[arg-type]
    for number, held in enumerate(receiver.ranks):
        if write == "return":
            assert torch.equal(held.tensor, before[number])
            held.tensor.copy_(results[number])
        for row, token in enumerate(held.rows):
            for column, own in enumerate(held.columns):
                expected = code(token, own) if token in met else UNTOUCHED
                assert int(held.by_rows[row, column]) == expected
        assert decision.rows is not None
        counts = decision.rows.counts(both.target.headers[number])
        kept, there = kept_tokens(held), all_there(sender)
        assert counts.matched == len(kept & met)
        assert counts.only_here == len(kept - there)
        assert counts.kept_out == len((kept & there) - met)
        assert counts.only_there == len(all_kept(sender) - all_there(receiver))
        assert bool(counts.only_there) == bool(counts.only_there_tokens)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_a_dtensor_says_how_its_rows_are_cut_and_its_tokens_which_they_are(placement: Any, named: bool) -> None:
    """Sharded over rows, each rank tells its own; over columns, or replicated, both tell the same."""
    rows: list[Row] = [("a", position) for position in range(6)]
    whole = torch.tensor([[code(row, column) for column in range(WIDTH)] for row in rows])
    ranks, headers = [], []
    for rank in range(2):
        local = whole
        if isinstance(placement, Shard):
            local = placement._split_tensor(whole, 2, with_padding=False, contiguous=True)[0][rank]
        told = tokens_of(rows[3 * rank : 3 * rank + 3] if placement == Shard(0) else rows)
        found = read_dtensor(StandIn(whole.shape, local, (2,), (rank,), [placement]))
        layout = DeclaredLayout(
            dims="t h" if named else None, global_shape=found.global_shape, runs=found.runs, place=found.place,
            mesh=found.mesh, summand=found.summand,
        )  # fmt: skip
        ranks.append(HeldRows([], [], local, local, told, (), None, ()))
        leaf = spec(*local.shape, dtype=torch.int64)
        headers.append(header("baseline", rank, 2, leaves=(leaf,), layouts=(layout,), tokens=announce(told)))
    order = [rows[n] for n in (4, 0, 5, 2)]
    target = torch.full((4, WIDTH), UNTOUCHED)
    receiver = Batch([HeldRows(order, list(range(WIDTH)), target, target, tokens_of(order), (), "t h", ())], "")
    both = pair(headers, receiver.headers("target"))
    decision = decide("b2t", both)
    assert decision.outcome is None, decision.reason
    moved(both, decision, Batch(ranks, ""), receiver, WriteMode())
    assert torch.equal(target, whole[[4, 0, 5, 2]])


def test_ranks_that_hold_the_same_rows_in_another_order_are_copies() -> None:
    """And parts that overlap without being copies are refused."""
    shape = [spec(3, 2, dtype=torch.int64)]

    def sending(*orders: list[int]) -> list[Header]:
        return [
            header(
                "baseline", rank, len(orders), leaves=tuple(shape), axes=(("dp", rank, len(orders)),),
                layouts=(DeclaredLayout(dims="t h # dp:replicated"),),
                tokens=announce(tokens_of([("a", n) for n in order])),
            )
            for rank, order in enumerate(orders)
        ]  # fmt: skip

    receiving = [header("target", 0, leaves=tuple(shape), tokens=announce(tokens_of([("a", n) for n in (2, 1, 0)])))]
    decision = decide("b2t", pair(sending([0, 1, 2], [1, 2, 0]), receiving))
    assert decision.outcome is None and decision.reshardings is not None
    reason = decide("b2t", pair(sending([0, 1, 2], [2, 1, 4]), receiving)).reason
    assert reason is not None and "overlap without being copies" in reason


def test_working_out_which_rows_meet_goes_by_runs_and_not_by_rows() -> None:
    """Of a million million rows in another order on 64 ranks, each rank's part is one piece: they are told once."""
    lengths = [(1 << 34) + number for number in range(64)]
    packed, other = Tokens.from_lengths(range_of(64), lengths), Tokens.from_lengths(range_of(64)[::-1], lengths[::-1])
    sides = []
    for role, tokens in (("baseline", packed), ("target", other)):
        headers = [
            header(
                role, rank, 64, leaves=(spec(sum(lengths), 2, dtype=torch.uint8),), axes=(("tp", rank, 64),),
                layouts=(DeclaredLayout(dims="t h[tp]"),), tokens=announce(tokens),
            )
            for rank in range(64)
        ]  # fmt: skip
        sides.append(as_it_travels(headers))
        assert sum(own.tokens is not None and own.tokens.same_as is None for own in sides[-1].headers) == 1
    both = Pair(*sides)
    decision = decide("b2t", both)
    assert decision.rows is not None and decision.rows.tokens.count == sum(lengths)
    for rank in (0, 63, 64, 127):
        plan = make_plan("ab" * 12, "b2t", both, decision, roster(64, 64), rank)
        assert [piece.spec.shape for piece in plan.pieces] == [(sum(lengths), 2)]
    rows = decision.rows.tokens.ranks
    assert len(rows[1][0].segments) == 1 and len(rows[0][0].segments) == 64, "the receiver's order is kept"


def range_of(count: int) -> list[int]:
    return list(range(count))


def test_a_peer_that_announces_rows_that_it_has_not_got_is_refused() -> None:
    """Also where it says that another rank's are its own."""
    receiving = header("target", 0, leaves=(spec(3, 2),), tokens=announce(tokens_of([("a", n) for n in range(3)])))
    many = 1 << 40
    layout = DeclaredLayout(dims="t[sp] h")
    claims = [
        header(
            "baseline", rank, 2, leaves=(spec(many, 2),), layouts=(layout,), axes=(("sp", rank, 2),),
            tokens=announce(Tokens.from_lengths(["a"], [2 * many])),
        )
        for rank in range(2)
    ]  # fmt: skip
    assert "at most" in (decide("b2t", pair(claims, [receiving])).reason or "")
    for tokens, reason in [
        (announce(Tokens.from_lengths(["a"], [1 << 60])), f"announces {1 << 60} rows"),
        (AnnouncedTokens(same_as=0), "which announces none"),
        (AnnouncedTokens(same_as=7), "which announces none"),
        (AnnouncedTokens(runs="?"), "cannot be read"),
    ]:
        layout = DeclaredLayout(dims="t h")
        sending = header("baseline", 0, leaves=(spec(3, 2),), layouts=(layout,), tokens=tokens)
        decision = decide("b2t", pair([sending], [receiving]))
        assert decision.outcome == "failed" and reason in (decision.reason or "")


@settings(max_examples=100, deadline=None)
@given(batches(windows=False), batches(windows=False), st.sampled_from([0, token_rows.FEW]))
def test_how_far_a_sequence_got_is_told_alike_on_both_sides(sender: Batch, receiver: Batch, few: int) -> None:
    both = pair(sender.headers("baseline"), receiver.headers("target"))
    decision = decide("b2t", both)
    met = all_kept(sender) & all_kept(receiver)
    reached = {name: max(p for n, p in met if n == name) + 1 for name in {name for name, _ in met}}
    assert decision.rows is not None
    with patch.object(token_rows, "FEW", few):
        told = [decision.rows.reached(side.headers[0]) for side in (both.baseline, both.target)]
    assert told == [reached, reached]
