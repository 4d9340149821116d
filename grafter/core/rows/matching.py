"""Matching: which rows of two tensors are the same tokens, by runs of rows; in time linear in runs, and a sort."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from grafter.core.rows.sequences import pair_sequences

if TYPE_CHECKING:
    from grafter.core.rows.tokens import Tokens


_Numbers = npt.NDArray[np.int64]

_ALONE = -1
# Beyond every position.
_NO_LIMIT = 1 << 61


@dataclass(frozen=True)
class TokenMatch:
    """Which rows of two tensors are the same tokens, as runs of rows.

    pairs: int64 [n, 3], (first row of a, first row of b, count), in the order of a's rows.
    only_a, only_b: int64 [n, 2], (first row, count) of tokens that only one of the two has. Padding is in neither.
    by_content: the sequences (of a, of b) whose ids differ and whose token ids agree.
    """

    pairs: _Numbers
    only_a: _Numbers
    only_b: _Numbers
    by_content: tuple[tuple[str | int, str | int], ...] = ()

    @property
    def count(self) -> int:
        """How many rows are paired."""
        return int(self.pairs[:, 2].sum())

    @property
    def rows(self) -> tuple[_Numbers, _Numbers]:
        """The paired rows of a, and those of b, one by one: int64 [count] each."""
        return _each_row(self.pairs[:, 0], self.pairs[:, 2]), _each_row(self.pairs[:, 1], self.pairs[:, 2])


def match(a: Tokens, b: Tokens) -> TokenMatch:
    """Pair the rows of a and b that are the same token: the same position of the same sequence.

    Two sequences are the same if they have one id, unless both have token ids that contradict it; else if their token
    ids from position 0 on agree as far as both have them, and then only so far. Of several that agree, those that
    agree furthest are paired, then the first. Costs time linear in runs (and a sort), not in rows.
    """
    pairing = pair_sequences(a.sequences, a.hashes, b.sequences, b.hashes)
    numbers_b = np.full(len(b.sequences) + 1, _ALONE, dtype=np.int64)
    limits = np.full(len(a.sequences) + 1, _NO_LIMIT, dtype=np.int64)
    others = len(a.sequences)
    for number in range(len(b.sequences)):
        numbers_b[number] = others + number
    for of_a, of_b, length in pairing:
        numbers_b[of_b] = of_a
        limits[of_a] = length if length is not None else _NO_LIMIT
    runs_a, runs_b = placed_runs(a.runs), placed_runs(b.runs)
    runs_b[:, 0] = numbers_b[runs_b[:, 0]]
    runs_a, runs_b = runs_a[runs_a[:, 0] >= 0], runs_b[runs_b[:, 0] >= 0]
    pairs, only_a, only_b = _meet(runs_a, runs_b, limits)
    by_content = tuple((a.sequences[i], b.sequences[j]) for i, j, length in pairing if length is not None)
    return TokenMatch(pairs, only_a, only_b, by_content)


def placed_runs(runs: _Numbers) -> _Numbers:
    """(sequence, first position, count, first row) of each run."""
    return np.concatenate([runs, (np.cumsum(runs[:, 2]) - runs[:, 2])[:, None]], axis=1)


def _meet(a: _Numbers, b: _Numbers, limits: _Numbers) -> tuple[_Numbers, _Numbers, _Numbers]:
    """Cut all sequences where a run of either side begins or ends; each segment then is in one run of a side or none.

    a       |-----------|           |-----|
    b            |------------|
    cuts    .    .      .     .     .     .        and where a sequence's tokens are no longer known to be the same
    """
    both = np.concatenate([a, b])
    ends = both[:, 1] + both[:, 2]
    limited = np.flatnonzero(limits < _NO_LIMIT)
    sequences = np.concatenate([both[:, 0], both[:, 0], limited])
    positions = np.concatenate([both[:, 1], ends, limits[limited]])
    order = np.lexsort((positions, sequences))
    sequences, positions = sequences[order], positions[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (sequences[1:] != sequences[:-1]) | (positions[1:] != positions[:-1])
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.cumsum(new) - 1
    cut_sequences, cut_positions = sequences[new], positions[new]
    begins, stops = rank[: len(both)], rank[len(both) : 2 * len(both)]
    in_a = _owners(begins[: len(a)], stops[: len(a)], len(cut_positions))
    in_b = _owners(begins[len(a) :], stops[len(a) :], len(cut_positions))
    lengths = np.append(np.diff(cut_positions), 0)
    known = cut_positions < limits[np.minimum(cut_sequences, len(limits) - 1)]
    paired = np.flatnonzero((in_a >= 0) & (in_b >= 0) & known)
    row_a, row_b = (
        side[owner[paired], 3] + cut_positions[paired] - side[owner[paired], 1]
        for side, owner in ((a, in_a), (b, in_b))
    )
    pairs = np.stack([row_a, row_b, lengths[paired]], axis=1)
    alone = []
    for side, own, other in ((a, in_a, in_b), (b, in_b, in_a)):
        segments = np.flatnonzero((own >= 0) & ~((other >= 0) & known))
        rows = side[own[segments], 3] + cut_positions[segments] - side[own[segments], 1]
        alone.append(_joined(np.stack([rows, lengths[segments]], axis=1)))
    return _joined(pairs), alone[0], alone[1]


def _owners(begins: _Numbers, stops: _Numbers, count: int) -> _Numbers:
    """For each of `count` segments, the run that it lies in, or -1. Runs do not overlap."""
    owners = np.full(count, -1, dtype=np.int64)
    if not len(begins):
        return owners
    order = np.argsort(begins, kind="stable")
    last = np.searchsorted(begins[order], np.arange(count), side="right") - 1
    candidates = order[np.maximum(last, 0)]
    inside = (last >= 0) & (np.arange(count) < stops[candidates])
    return np.where(inside, candidates, owners)


def _joined(runs: _Numbers) -> _Numbers:
    """Runs of rows in order, neighbours joined. The last column is the count, the others rows that go on together."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    if not len(runs):
        return runs
    breaks = np.ones(len(runs), dtype=bool)
    breaks[1:] = (runs[1:, :-1] != runs[:-1, :-1] + runs[:-1, -1:]).any(axis=1)
    first = np.flatnonzero(breaks)
    return np.concatenate([runs[first, :-1], np.add.reduceat(runs[:, -1], first)[:, None]], axis=1)


def _each_row(first: _Numbers, counts: _Numbers) -> _Numbers:
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within


# Row dims of a tensor whose dims have no names: which of its first dims count the rows. There is one token a row.
#
# tokens shape row dims a row 12 [1, 12, 32] the first two [32] 1 [1, 1, 32] the first, or [1, 32], or the first two
# [32]
#
# One tensor alone may leave it open, and only where it has dims of size 1: its rows are then the same values either
# way, and their shape is another. Tensors that are compared with each other, as those of a prefill and its decode
# steps, have rows of one shape, and that decides.


def leading_row_dims(shape: Sequence[int], rows: int) -> list[int]:
    """How many of the first dims may count the rows, fewest first; empty where no first dims have so many."""
    return [count for count in range(1, len(shape) + 1) if prod(shape[:count]) == rows]


def common_row_ndim(tensors: Iterable[tuple[int, Sequence[int]]]) -> int | None:
    """How many dims a row has in all of these tensors, given as (ndim, how many of its dims may count the rows).

    The most, where several numbers will do for all. None where none will.
    """
    common: set[int] | None = None
    for ndim, row_dims in tensors:
        possible = {ndim - count for count in row_dims}
        common = possible if common is None else common & possible
    return max(common) if common else None
