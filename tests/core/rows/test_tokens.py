"""Which token each row is: made, recorded and matched, against dictionaries. Pure; about 4 s."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grafter
from grafter.core.rows.sequences import as_text, from_text
from grafter.core.rows.tokens import TokenRuns, Tokens, match
from grafter.errors import UsageError

Row = tuple[Any, int] | None


@st.composite
def rows_of_tokens(draw: st.DrawFn, ids: list[Any]) -> list[Row]:
    """Rows in stretches, as batches have them, and out of order; None is padding."""
    rows: list[Row] = []
    seen: set[Any] = set()
    for _ in range(draw(st.integers(0, 6))):
        sequence = draw(st.sampled_from([None, *ids]))
        start = draw(st.integers(0, 6))
        for position in range(start, start + draw(st.integers(0, 5))):
            row = None if sequence is None else (sequence, position)
            if row is None or (type(sequence), row) not in seen:
                rows.append(row)
                seen.add((type(sequence), row))
    return list(draw(st.permutations(rows))) if draw(st.integers(0, 3)) == 0 else rows


IDS: list[Any] = [0, 1, 7, "0", "request-7", -3]


def tokens_of(rows: list[Row], token_ids: Any = None) -> Tokens:
    ids = [row[0] if row else None for row in rows]
    return Tokens.from_positions(ids, [row[1] if row else 0 for row in rows], token_ids=token_ids)


def expanded(tokens: Tokens) -> list[Row]:
    return [
        None if sequence is None else (sequence, start + number)
        for sequence, start, count in tokens.record().runs
        for number in range(count)
    ]


def flat(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def typed(rows: list[Row]) -> list[Any]:
    return [row and (type(row[0]), *row) for row in rows]


@given(rows_of_tokens(IDS))
@settings(max_examples=150, deadline=None)
def test_runs_say_of_each_row_what_was_given_and_survive_a_record(rows: list[Row]) -> None:
    """Also as JSON; and there are no more runs than stretches."""
    tokens = tokens_of(rows)
    assert typed(expanded(tokens)) == typed(rows) and tokens.rows == len(rows)
    again = Tokens.from_record(TokenRuns.model_validate_json(tokens.record().model_dump_json()))
    assert again == tokens and hash(again) == hash(tokens)
    stretches = sum(
        one is None or other is None or typed([other])[0] != typed([(one[0], one[1] + 1)])[0]
        for one, other in pairwise(rows)
        if one is not None or other is not None
    )
    assert len(tokens.runs) <= stretches + 1


@given(rows_of_tokens(IDS), rows_of_tokens(IDS))
@settings(max_examples=250, deadline=None)
def test_rows_that_are_the_same_token_are_matched_and_no_others(a: list[Row], b: list[Row]) -> None:
    """As a dictionary would match them; padding is nobody's."""
    found = match(tokens_of(a), tokens_of(b))
    in_b = {row: number for number, row in enumerate(typed(b)) if row is not None}
    expected = [(number, in_b[row]) for number, row in enumerate(typed(a)) if row is not None and row in in_b]
    rows_a, rows_b = found.rows
    assert list(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == expected and found.count == len(expected)
    assert [n for start, count in found.only_a.tolist() for n in range(start, start + count)] == [
        number for number, row in enumerate(typed(a)) if row is not None and row not in in_b
    ]
    in_a = set(typed(a))
    assert [n for start, count in found.only_b.tolist() for n in range(start, start + count)] == [
        number for number, row in enumerate(typed(b)) if row is not None and row not in in_a
    ]
    assert not found.by_content


@given(rows_of_tokens(IDS), rows_of_tokens(IDS))
@settings(max_examples=50, deadline=None)
def test_matching_the_other_way_round_gives_the_same_pairs(a: list[Row], b: list[Row]) -> None:
    """Neither side is special."""
    forth, back = match(tokens_of(a), tokens_of(b)), match(tokens_of(b), tokens_of(a))
    pairs = {*zip(*(rows.tolist() for rows in forth.rows), strict=True)}
    assert pairs == {(one, other) for other, one in zip(*(rows.tolist() for rows in back.rows), strict=True)}


# --- what may be given


def test_tensors_arrays_and_lists_say_the_same() -> None:
    """1-D and 2-D, one id per row or per sequence of the batch, any integer dtype."""
    ids, positions = [[4, 4, 4], [9, 9, 9]], [[0, 1, 2], [0, 1, -1]]
    expected = ((4, 0, 3), (9, 0, 2), (None, 0, 1))
    for made in (
        Tokens.from_positions(ids, positions),
        Tokens.from_positions(torch.tensor(ids, dtype=torch.int32), torch.tensor(positions)),
        Tokens.from_positions(np.array(ids, dtype=np.uint8), positions),
        Tokens.from_positions([4, 9], torch.tensor(positions)),
        Tokens.from_positions(torch.tensor([4, 9]), positions),
        Tokens.from_positions(flat(ids), flat(positions)),
        Tokens.from_positions([[4, 4, 4], [9, 9, None]], [[0, 1, 2], [0, 1, 0]]),
        Tokens.from_lengths([4, 9, None], [3, 2, 1]),
        Tokens.from_lengths(torch.tensor([4, 4, 9, 9]), torch.tensor([1, 2, 2, 0]), [0, 1, 0, 7]).record() and None,
    ):
        if made is not None:
            assert made.record().runs == expected and made.rows == 6
    packed = Tokens.from_lengths(torch.tensor([4, 4, 9, 5]), torch.tensor([1, 2, 2, 0]), [0, 1, 3, 7])
    assert packed.record().runs == ((4, 0, 3), (9, 3, 2)) and packed.sequences == (4, 9)


def test_no_rows_are_tokens_too() -> None:
    """An empty batch matches nothing, and is no error."""
    nothing = Tokens.from_positions([], [])
    assert nothing.rows == 0 and nothing.record().runs == () and Tokens.from_lengths([], []) == nothing
    some = Tokens.from_lengths(["a"], [2])
    assert match(nothing, some).only_b.tolist() == [[0, 2]] and match(nothing, nothing).count == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tokens.from_positions([1, 2, 3], [0, 1]), r"sequence_ids has the shape \[3\], and there are \[2\]"),
        (lambda: Tokens.from_positions([[1], [2]], [0, 1]), r"\[2, 1\]"),
        (lambda: Tokens.from_positions([1, 1], [0, 0.5]), "positions must be whole numbers, not float64"),
        (lambda: Tokens.from_positions([1, 1], torch.tensor([True, False])), "not bool"),
        (lambda: Tokens.from_positions([1.5, 1], [0, 1]), "a whole number or a text .*not 1.5"),
        (lambda: Tokens.from_positions([True, 1], [0, 1]), "not True"),
        (lambda: Tokens.from_positions("ab", [0, 1]), "not str"),
        (lambda: Tokens.from_positions(7, [0]), "not int"),
        (lambda: Tokens.from_positions([[[1]]], [[[1]]]), "positions has 3 dims"),
        (lambda: Tokens.from_positions(1, 2), "positions has 0 dims"),
        (lambda: Tokens.from_positions([[1, 1], [1]], [[0, 1], [2, 3]]), "other lengths"),
        (lambda: Tokens.from_positions([[1, 1]], [[0, 1], [2]]), "positions: its rows have other lengths"),
        (lambda: Tokens.from_positions([1], [1 << 62]), "too large"),
        (lambda: Tokens.from_positions([1, 1], [0, 1], token_ids=[5]), r"token_ids is \[1\], and positions \[2\]"),
        (
            lambda: Tokens.from_positions(["a", "b", "a", "a"], [0, 0, 1, 0]),
            "position 0 of the sequence 'a' is there twice, in the rows 0 and 3",
        ),
        (lambda: Tokens.from_lengths([5, 5], [4, 4], [0, 2]), "position 2 of the sequence 5 .* rows 2 and 4"),
        (lambda: Tokens.from_lengths([5, 6], [4]), r"shape \[2\], and there are \[1\]"),
        (lambda: Tokens.from_lengths([5], [-4]), "negative"),
        (lambda: Tokens.from_lengths([5], [4], [-1]), "negative"),
        (lambda: Tokens.from_lengths([5], [4], [1, 2]), "starts has"),
        (lambda: Tokens.from_lengths([5], [[4]]), "lengths has 2 dims"),
        (lambda: Tokens.from_lengths([5], [1 << 62]), "too large"),
        (lambda: Tokens.from_lengths([5, 6], [2, 1], token_ids=[1, 2]), "token_ids has 2 numbers, and lengths make 3"),
    ],
)
def test_what_is_no_tokens_is_refused_with_the_reason(make: Any, words: str) -> None:
    """The argument, and what is wrong with it."""
    with pytest.raises(UsageError, match=words):
        make()


@pytest.mark.parametrize(
    ("sequences", "runs", "words"),
    [
        (("a", "b"), [[0, 0, 3], [1, 0, 0]], "impossible runs"),
        (("a",), [[1, 0, 3]], "impossible runs"),
        (("a",), [[0, -1, 3]], "impossible runs"),
        (("a",), [[0, 0, 1 << 62]], "more rows than there can be"),
        (("a", "a"), [[0, 0, 3], [1, 3, 3]], "one sequence twice"),
    ],
)
@pytest.mark.parametrize("padding", [0, 20])
def test_tokens_that_the_other_side_would_refuse_cannot_be_made(
    sequences: tuple[str, ...], runs: list[list[int]], words: str, padding: int
) -> None:
    """Else one side would go on where the other fails. With many runs they are checked in another way."""
    rows = np.array(runs + [[-1, 0, 1]] * padding, dtype=np.int64)
    with pytest.raises(UsageError, match=words):
        Tokens(sequences, rows)


def test_a_record_that_claims_more_rows_than_there_are_costs_nothing() -> None:
    """Matching is by runs: 2**60 rows are two numbers."""
    large = Tokens.from_record(TokenRuns(runs=(("a", 0, 1 << 60), ("b", 5, 1 << 59))))
    small = Tokens.from_lengths(["b", "a"], [9, 2])
    found = match(large, small)
    assert found.pairs.tolist() == [[0, 9, 2], [1 << 60, 5, 4]]
    assert found.only_a.tolist() == [[2, (1 << 60) - 2], [(1 << 60) + 4, (1 << 59) - 4]]


def test_a_hundred_thousand_rows_of_a_packed_batch_meet_decode_steps() -> None:
    """64 sequences of 1600 tokens, one after the other on one side, one token of each at a time on the other."""
    ids = torch.arange(64).repeat_interleave(1600)
    positions = torch.arange(1600).repeat(64)
    token_ids = torch.randint(0, 1 << 17, (102_400,))
    packed = Tokens.from_positions(ids, positions, token_ids=token_ids)
    by_step = Tokens.from_positions(positions.view(64, 1600).T * 0 + torch.arange(64), positions.view(64, 1600).T)
    found = match(packed, by_step)
    assert packed.rows == found.count == 102_400 and len(packed.runs) == 64 and len(by_step.runs) == 102_400
    rows_a, rows_b = found.rows
    assert (rows_b == rows_a % 1600 * 64 + rows_a // 1600).all()


# --- by content


def test_sequences_with_other_ids_are_known_by_their_token_ids() -> None:
    """A prompt in an engine begins a longer sequence in a trainer; a prompt that differs is not matched."""
    trainer = Tokens.from_lengths([0, 1, 2], [5, 4, 3], token_ids=[1, 7, 7, 8, 9, 1, 7, 7, 5, 2, 2, 2])
    engine = Tokens.from_lengths(["r-b", "r-a", "r-c"], [4, 3, 2], token_ids=[1, 7, 7, 5, 1, 7, 7, 2, 9])
    found = match(trainer, engine)
    assert found.by_content == ((0, "r-a"), (1, "r-b"))
    assert found.pairs.tolist() == [[0, 4, 3], [5, 0, 4]]
    assert found.only_a.tolist() == [[3, 2], [9, 3]] and found.only_b.tolist() == [[7, 2]]


def test_token_ids_that_contradict_an_id_weigh_more() -> None:
    """Both programs number from 0, in another order; an id whose tokens agree, or are not known, stays."""
    a = Tokens.from_lengths([0, 1, 2], [2, 2, 2], token_ids=[5, 6, 7, 8, 3, 3])
    b = Tokens.from_lengths([0, 1, 2], [2, 2, 2], token_ids=[7, 8, 5, 6, 3, 3])
    assert match(a, b).pairs.tolist() == [[0, 2, 2], [2, 0, 2], [4, 4, 2]]
    assert match(a, b).by_content == ((0, 1), (1, 0))
    unknown = Tokens.from_lengths([0, 1, 2], [2, 2, 2])
    assert match(a, unknown).pairs.tolist() == match(unknown, b).pairs.tolist() == [[0, 0, 6]]


def test_only_tokens_that_are_known_to_be_the_same_are_matched_by_content() -> None:
    """Beyond a gap nothing is known of what came before, so those rows stay alone."""
    a = Tokens.from_positions([0] * 4, [0, 1, 5, 6], token_ids=[4, 4, 1, 2])
    b = Tokens.from_positions(["x"] * 8, range_of(8), token_ids=[4, 4, 9, 9, 9, 1, 2, 3])
    assert match(a, b).pairs.tolist() == [[0, 0, 2]] and match(a, b).only_a.tolist() == [[2, 2]]
    tail = Tokens.from_positions([0, 0], [5, 6], token_ids=[1, 2])
    assert not tail.hashes and match(tail, b).count == 0


def range_of(count: int) -> list[int]:
    return list(range(count))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_content_is_matched_as_lists_of_ids_would_be(data: st.DataObject) -> None:
    """Each pair agrees over the shorter; none that could be paired is left; further agreement goes first."""
    texts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), max_size=5)
    a, b = data.draw(texts), data.draw(texts)
    in_a = Tokens.from_lengths(list(range(len(a))), list(map(len, a)), token_ids=flat(a))
    in_b = Tokens.from_lengths([f"r{n}" for n in range(len(b))], list(map(len, b)), token_ids=flat(b))
    found = match(in_a, in_b)
    pairs = [(one, int(other[1:])) for one, other in found.by_content]
    left_a, left_b = set(range(len(a))), set(range(len(b)))
    agreeing = sorted(
        (-min(len(one), len(other)), i, j)
        for i, one in enumerate(a)
        for j, other in enumerate(b)
        if one[: len(other)] == other[: len(one)]
    )
    expected = []
    for _, i, j in agreeing:
        if i in left_a and j in left_b:
            expected.append((i, j))
            left_a.discard(i)
            left_b.discard(j)
    assert sorted(pairs) == sorted(expected)
    assert found.count == sum(min(len(a[i]), len(b[j])) for i, j in expected)


def test_the_hash_is_the_one_that_is_described() -> None:
    """Computed here number by number, as docs/dump-format.md says, for readers in other languages."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    ids, total, expected = [17, 0, 128_000, -100], 0, []
    for position, own in enumerate(ids):
        total = (total + mix((mix(own % 2**64) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)) % 2**64
        expected.append(total)
    tokens = Tokens.from_lengths(["a"], [4], token_ids=ids)
    assert tokens.hashes[0].tolist() == expected
    (recorded,) = tokens.record().hashes
    assert (
        recorded[0] == "a" and from_text(recorded[1]).tolist() == expected and as_text(tokens.hashes[0]) == recorded[1]
    )


def test_token_ids_are_hashed_by_position_whatever_the_order_of_rows() -> None:
    """Rows of a sequence may be anywhere in the batch."""
    straight = Tokens.from_positions(["a"] * 3, [0, 1, 2], token_ids=[4, 5, 6])
    turned = Tokens.from_positions(["a", "b", "a", "a"], [2, 0, 0, 1], token_ids=[6, 1, 4, 5])
    assert turned.hashes[0].tolist() == straight.hashes[0].tolist()


def test_tokens_are_public() -> None:
    """`grafter.Tokens`."""
    assert grafter.Tokens is Tokens
