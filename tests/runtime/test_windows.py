"""Windows and what is announced of tokens: starts, memory of how far a sequence got, hostile texts. Pure; under 2 s."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from point_parts import header

from grafter.config.options import PointOptions
from grafter.core.layout.row_view import RowView
from grafter.core.messages.announced_tokens import AnnouncedTokens, announce, resolved, told_once
from grafter.core.points import PointKey
from grafter.core.rows.tokens import Tokens
from grafter.core.writing.write_back import WriteMode, apply_row_write
from grafter.errors import LayoutError, UsageError
from grafter.runtime import windows
from grafter.runtime.windows import Windows
from grafter.store.dumps.taken import rows_to_save


def options_of(tokens: Any, **fields: Any) -> PointOptions:
    return PointOptions(None, "in_place", "straight_through", "skip", tokens=tokens, **fields)


def key_of(name: str = "h", **tags: Any) -> PointKey:
    return PointKey(name, tuple(sorted(tags.items())), 0, "forward", 0)


LONG = Tokens.from_lengths(["a", "b"], [4, 2], [0, 10])


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (None, ()),
        (0, ()),
        (2, (2, 2)),
        (4, (4, 4)),
        ([1, 12], (1, 12)),
        (torch.tensor([0, 11]), (0, 11)),
        ({"b": 12}, (0, 12)),
        ({}, ()),
    ],
)
def test_a_start_is_one_number_or_one_per_sequence(start: Any, expected: tuple[int, ...]) -> None:
    announced = Windows().announce(options_of(LONG, start=start), None)
    assert announced is not None and announced.starts == expected


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (5, "start= is 5 for the sequence 'a', whose rows end at 4"),
        (-1, "from 0 to 4"),
        ([0, 13], "start= is 13 for the sequence 'b', whose rows end at 12"),
        ([0], "has 1 positions, and tokens= 2 sequences"),
        ({"c": 0}, "names the sequence 'c'"),
        (True, "a whole number"),
        (1.0, "a whole number"),
        ("1", "a whole number"),
    ],
)
def test_a_start_outside_of_its_sequence_is_refused(start: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Windows().announce(options_of(LONG, start=start), None)


def starts_of(own: Windows, key: PointKey, lengths: dict[str, int], start: Any = None) -> tuple[int, ...]:
    tokens = Tokens.from_lengths(list(lengths), list(lengths.values()))
    announced = own.announce(options_of(tokens, new_rows_only=True, start=start), key)
    assert announced is not None
    return announced.starts


def test_new_rows_are_those_after_the_last_that_met_per_point_and_sequence() -> None:
    own, key = Windows(), key_of(layer_id=1)
    assert starts_of(own, key, {"a": 4, "b": 3}) == ()
    own.advance(key, {"a": 4, "b": 1})
    assert starts_of(own, key, {"b": 5, "a": 8}) == (1, 4)
    assert starts_of(own, key, {"a": 8}, start=6) == (6,), "the later of both counts"
    assert starts_of(own, key_of(layer_id=2), {"a": 8}) == (), "another point begins for itself"
    assert starts_of(own, key_of(layer_id=True), {"a": 8}) == (), "1 and True are two tags"
    later = PointKey("h", (("layer_id", 1),), 9, "forward", 3)
    assert starts_of(own, later, {"a": 4}) == (4,), "of any step"
    assert starts_of(own, key, {"a": 2}) == (), "a sequence that ends before where it was begins again"
    assert starts_of(own, key, {"a": 9}) == ()


def test_memory_of_sequences_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forgotten is sent from its start again."""
    monkeypatch.setattr(windows, "MOST_REMEMBERED", 3)
    own, key = Windows(), key_of()
    for name in "abc":
        own.advance(key, {name: 2})
    assert starts_of(own, key, {"a": 5}) == (2,), "used, so not the oldest any more"
    own.advance(key, {"d": 2})
    assert starts_of(own, key, {"a": 5, "b": 5, "c": 5, "d": 5}) == (2, 0, 2, 2)


# --- what travels


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_announced_is_read_as_it_was(data: st.DataObject) -> None:
    """Through JSON, with positions of any size; and equal announcements are one object, also under another name."""
    lengths = data.draw(st.lists(st.integers(0, 5), max_size=6))
    first = [data.draw(st.sampled_from([0, 3, 40_000, 1 << 40])) for _ in lengths]
    names = data.draw(st.permutations([0, -5, 1 << 60, "0", "x", "\u20ac"]))[: len(lengths)]
    tokens = Tokens.from_lengths(list(names), lengths, first)
    starts = tuple(data.draw(st.integers(0, 9)) for _ in tokens.sequences)
    text = announce(tokens, starts).model_dump_json()
    one, other = (AnnouncedTokens.model_validate_json(text).read() for _ in range(2))
    assert one is other and one.tokens == tokens and one.starts == starts
    both = [(0, announce(tokens, starts)), (3, AnnouncedTokens.model_validate_json(text))]
    assert told_once([(0, both[0][1]), (2, None), (3, both[1][1])]) == {3: AnnouncedTokens(same_as=0)}
    found = resolved([both[0], (3, AnnouncedTokens(same_as=0))])
    assert found[3] is found[0] is one


def packed(*runs: tuple[int, int, int]) -> str:
    import base64

    columns = np.array(runs, dtype="<i8").reshape(-1, 3).T
    return "8" + base64.b64encode(columns.tobytes()).decode()


@pytest.mark.parametrize(
    "fields",
    [
        {"runs": "8!!"},
        {"runs": "9AAAA"},
        {"runs": "8AAAA"},
        {"runs": ""},
        {"runs": packed((1, 0, 2))},
        {"runs": packed((-2, 0, 2))},
        {"runs": packed((0, -1, 2))},
        {"runs": packed((0, 0, 0))},
        {"runs": packed((0, 0, -5))},
        {"runs": packed((0, 1 << 62, 1 << 62))},
        {"runs": packed((-1, 0, 1 << 61), (-1, 0, 1 << 61))},
        {"runs": packed((0, 0, 3), (0, 2, 3))},
        {"runs": packed((0, 0, 2)), "sequences": ("a", "a")},
        {"runs": packed((0, 0, 2)), "starts": (1, 2, 3)},
        {"runs": packed((0, 0, 2)), "hashes": ((7, "AAAAAAAAAAA="),)},
        {"runs": packed((0, 0, 2)), "hashes": ((0, "?"),)},
    ],
)
def test_tokens_that_make_no_sense_are_refused_and_cost_nothing(fields: dict[str, Any]) -> None:
    announced = AnnouncedTokens.model_validate({"sequences": ("a",), **fields})
    with pytest.raises(LayoutError):
        announced.read()


def test_a_rank_that_names_another_names_one_that_tells() -> None:
    for other in (5, 1):
        with pytest.raises(LayoutError, match="announces none"):
            resolved([(0, announce(LONG)), (1, AnnouncedTokens(same_as=other))])


def test_a_header_without_tokens_says_nothing_of_them() -> None:
    """Most points have none, and their headers do not grow."""
    assert '"tokens"' not in header("baseline", 0).text
    assert '"tokens"' in header("baseline", 0, tokens=announce(LONG)).text


def test_more_than_travels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from grafter.core.messages import announced_tokens

    monkeypatch.setattr(announced_tokens, "MOST_RUNS", 1)
    monkeypatch.setattr(announced_tokens, "MOST_HASHES", 1)
    with pytest.raises(UsageError, match="2 runs of rows"):
        announce(Tokens.from_lengths([0, 1], [2, 2]))
    with pytest.raises(UsageError, match="leave token_ids away"):
        announce(Tokens.from_lengths([0], [2], token_ids=[1, 2]))
    with pytest.raises(UsageError, match="600 characters"):
        announce(Tokens.from_lengths(["x" * 600], [2]))


# --- rows of a tensor


def plain(shape: tuple[int, ...], dims: tuple[int, ...], rows: list[int], tensor: torch.Tensor) -> torch.Tensor:
    rest = [dim for dim in range(len(shape)) if dim not in dims]
    return tensor.permute(*dims, *rest).reshape(-1, *(shape[dim] for dim in rest))[rows]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rows_are_taken_and_put_back_wherever_they_lie(data: st.DataObject) -> None:
    """In dims of any order, from memory of any strides; all other values stay."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    dims = tuple(data.draw(st.permutations(range(len(shape))))[: data.draw(st.integers(1, 2))])
    count = int(np.prod([shape[dim] for dim in dims]))
    rows = data.draw(st.permutations(range(count)))[: data.draw(st.integers(0, count))]
    if data.draw(st.booleans()):
        rows = sorted(rows)
    segments = np.array([(row, 1) for row in rows], dtype=np.int64).reshape(-1, 2)
    if rows and rows == list(range(rows[0], rows[0] + len(rows))):
        segments = np.array([(rows[0], len(rows))])
    view = RowView(shape, dims, segments)
    order = data.draw(st.permutations(range(len(shape))))
    memory = torch.arange(int(np.prod(shape))).reshape([shape[dim] for dim in order])
    tensor = memory.permute(*[order.index(dim) for dim in range(len(shape))])
    taken = view.of(tensor)
    assert taken.shape == view.packed_shape and torch.equal(taken, plain(shape, dims, list(rows), tensor))
    expected = tensor.clone()
    for place, row in enumerate(rows):
        index = view.local_index([place] + [0] * len(view.rest))
        assert view.row_at(place) == row
        spot = tuple(index[dim] if dim in dims else slice(None) for dim in range(len(shape)))
        expected[spot] = -1 - place
    filled = -1 - torch.arange(len(rows)).view(-1, *[1] * len(view.rest)).expand(view.packed_shape)
    view.put(tensor, filled)
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("write", ["in_place", "return"])
@pytest.mark.parametrize("gradient", ["straight_through", "cut", "strict"])
def test_a_write_of_some_rows_has_the_gradients_of_a_whole_one(write: Any, gradient: Any) -> None:
    """In place, exp differentiates with what was written, as with a whole write; a cut cuts the whole point off."""
    leaf = torch.zeros(4, 2, requires_grad=True)
    made = leaf.exp()
    view = RowView((4, 2), (0,), np.array([(1, 1), (3, 1)]))
    written = apply_row_write(made, torch.full((2, 2), 5.0), view, WriteMode(write, gradient)).value
    assert written.tolist() == [[1, 1], [5, 5], [1, 1], [5, 5]]
    assert (written is made) == (write == "in_place")
    if gradient == "strict" and write == "in_place":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            written.sum().backward()
        return
    if gradient == "cut":
        assert not written.requires_grad
        return
    written.sum().backward()
    saved = 5.0 if write == "in_place" else 1.0
    assert leaf.grad is not None and leaf.grad.tolist() == [[1, 1], [saved] * 2, [1, 1], [saved] * 2]


# --- on disk


def test_rows_before_a_start_are_not_saved() -> None:
    """Padding is; and of a batch in two dims all are, those before the start without a token."""
    tokens = Tokens.from_positions(["a", "a", "a", None, "b", "b"], [0, 1, 2, 0, 0, 1])
    value = {"x": torch.arange(12).view(6, 2), "y": torch.arange(6).view(1, 6)}
    given = options_of(tokens, dims={"x": "t h", "y": "1 t"})
    options, rows = rows_to_save(value, given, (2, 1))
    assert rows is not None
    assert rows.of(value)["x"].tolist() == [[4, 5], [6, 7], [10, 11]] and rows.of(value)["y"].tolist() == [[2, 3, 5]]
    assert options.tokens.record().runs == (("a", 2, 1), (None, 0, 1), ("b", 1, 1))
    batch = torch.arange(12).view(2, 3, 2)
    options, rows = rows_to_save(batch, options_of(tokens, dims="b s h"), (2, 1))
    assert rows is None and options.tokens.record().runs == ((None, 0, 2), ("a", 2, 1), (None, 0, 2), ("b", 1, 1))
