"""Matching: which rows of two tensors are the same tokens. Costs time linear in the runs of both, and a sort."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grafter.core.tokens.runs import cut_runs, each_of, joined_rows, placed_runs
from grafter.core.tokens.sequences import Int64Array, common_codes
from grafter.core.tokens.tokens import Tokens


@dataclass(frozen=True)
class TokenMatch:
    """The rows of two tensors that are the same tokens, as runs of rows.

    pairs: int64 [n, 3], (first row of a, first row of b, count), in the order of a's rows.
    only_a, only_b: int64 [n, 2], (first row, count) of tokens that only one of the two has. Padding is in neither.
    by_content: the sequences (of a, of b) whose ids differ and whose token ids agree.
    """

    pairs: Int64Array
    only_a: Int64Array
    only_b: Int64Array
    by_content: tuple[tuple[str | int, str | int], ...] = ()

    @property
    def count(self) -> int:
        """How many rows are paired."""
        return int(self.pairs[:, 2].sum())

    @property
    def rows(self) -> tuple[Int64Array, Int64Array]:
        """The paired rows of a, and those of b, one by one: int64 [count] each."""
        return each_of(self.pairs[:, 0], self.pairs[:, 2]), each_of(self.pairs[:, 1], self.pairs[:, 2])


def match(a: Tokens, b: Tokens) -> TokenMatch:
    """Pair the rows of a and b that are the same token: the same position of the same sequence.

    Two sequences are the same if they have one id, unless both have token ids that contradict it; else if their token
    ids agree from position 0 as far as both are known, and then only that far. If several agree, those that agree
    furthest are paired, then the first.
    """
    pairing, codes_b, limits = common_codes(a.sequences, a.hashes, b.sequences, b.hashes)
    runs_a, runs_b = placed_runs(a.runs), placed_runs(b.runs)
    runs_b[:, 0] = codes_b[runs_b[:, 0]]
    segments, begins, stops = cut_runs(np.concatenate([runs_a, runs_b]), limits)
    sequences, positions, counts = segments.T
    owners = (
        _owners(begins[: len(runs_a)], stops[: len(runs_a)], len(segments)),
        _owners(begins[len(runs_a) :], stops[len(runs_a) :], len(segments)),
    )
    is_known = positions < limits[sequences]
    is_paired = (owners[0] >= 0) & (owners[1] >= 0) & is_known

    def rows_of(side: int, numbers: Int64Array) -> Int64Array:
        """The first row of each of these segments."""
        own = (runs_a, runs_b)[side][owners[side][numbers]]
        rows: Int64Array = own[:, 3] + positions[numbers] - own[:, 1]
        return rows

    paired = np.flatnonzero(is_paired)
    alone = [np.flatnonzero((owners[side] >= 0) & ~is_paired) for side in (0, 1)]
    by_content = tuple((a.sequences[i], b.sequences[j]) for i, j, length in pairing if length is not None)
    return TokenMatch(
        _in_order(np.stack([rows_of(0, paired), rows_of(1, paired), counts[paired]], axis=1)),
        _in_order(np.stack([rows_of(0, alone[0]), counts[alone[0]]], axis=1)),
        _in_order(np.stack([rows_of(1, alone[1]), counts[alone[1]]], axis=1)),
        by_content,
    )


def _owners(begins: Int64Array, stops: Int64Array, count: int) -> Int64Array:
    """For each of `count` segments the run that it lies in, or -1. The runs of one side do not overlap."""
    owners = np.full(count, -1, dtype=np.int64)
    owners[each_of(begins, stops - begins)] = np.repeat(np.arange(len(begins)), stops - begins)
    return owners


def _in_order(stretches: Int64Array) -> Int64Array:
    """Stretches of rows by their first column, neighbours joined."""
    return joined_rows(stretches[np.argsort(stretches[:, 0], kind="stable")])
