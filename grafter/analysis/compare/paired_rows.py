"""Paired rows: the rows of two sides that are the same tokens, each side's as one tensor.

On one side a token may occur several times, because a server computes the rows of a preempted request again. The points
of that side are then divided into rounds in which every token occurs once, and each round is paired with the other
side's rows.

    A, one packed batch      rows  0 1 2 3 4
    B, prefill, preempted          0 1 2               round 0
       once more                   0 1 2 3             round 1
       decode                              4           round 0
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from grafter.analysis.compare.gathered_rows import (
    GatheredRows,
    RowSource,
    described,
    joined,
    keep_longer,
    rows_of_sources,
    token_at,
)
from grafter.core.tokens.matching import TokenMatch, match
from grafter.core.tokens.sequences import SequenceId
from grafter.core.tokens.tokens import Tokens

_MOST_NAMED = 5


class PairedRows:
    """The pairing of the rows of several points of each side, given as rows and their tokens.

    a, b: the rows that both sides have, round by round, within a round in A's order. paired: the number of these rows.
    again: how many of them repeat a token. only_a, only_b: the number of rows without a partner, not counting padding,
    and the first of them in words. by_content: sequences (of A, of B) with different ids and the same token ids.

    Raises UsageError if tokens repeat on both sides, LayoutError if the points of a side differ in dtype or dims.
    """

    def __init__(self, a: Sequence[tuple[RowSource, Tokens]], b: Sequence[tuple[RowSource, Tokens]]) -> None:
        sides = a, b
        parted = [_rounds([tokens for _, tokens in side]) for side in sides]
        if all(len(rounds) > 1 for rounds in parted):
            parted = [[list(range(len(side)))] for side in sides]
        whole = [
            [_Round(side, points, _known_hashes(side)) for points in rounds]
            for side, rounds in zip(sides, parted, strict=True)
        ]
        runs: tuple[list[tuple[int, int, int]], ...] = [], []
        self._met: list[tuple[Tokens, TokenMatch]] = []
        for of_a, of_b in product(*whole):
            found = match(of_a.tokens, of_b.tokens)
            self._met.append((of_a.tokens, found))
            for own, rows, column, alone in zip((of_a, of_b), runs, (0, 1), (found.only_a, found.only_b), strict=True):
                rows += own.in_sources(found.pairs[:, [column, 2]])
                own.keep_alone(alone)
        self.a, self.b = (
            GatheredRows(who, [source for source, _ in side], rows)
            for who, side, rows in zip("AB", sides, runs, strict=True)
        )
        self.paired = sum(found.count for _, found in self._met)
        self.again = self.paired - min(sum(one.count_met for one in rounds) for rounds in whole)
        self.only_a, self.only_b = (
            (
                sum(int(one.alone[:, 1].sum()) for one in rounds),
                [text for one in rounds for text in described(one.tokens, one.alone)][:_MOST_NAMED],
            )
            for rounds in whole
        )
        self.by_content = list(dict.fromkeys(ids for _, found in self._met for ids in found.by_content))

    def token_at(self, row: int) -> tuple[SequenceId, int]:
        """Sequence and position of a paired row."""
        for tokens, found in self._met:
            for first, _, count in found.pairs.tolist():
                if row < count:
                    sequence, position = token_at(tokens, first + row)
                    # Padding is never paired.
                    return sequence if sequence is not None else "", position
                row -= count
        raise IndexError(row)


_Hashes = npt.NDArray[np.uint64]


def _known_hashes(side: Sequence[tuple[RowSource, Tokens]]) -> dict[SequenceId, _Hashes]:
    """The longest hashes of each sequence: repeated rows mostly lack the beginning of their sequence."""
    found: dict[SequenceId, _Hashes] = {}
    for _, tokens in side:
        for number, hashes in tokens.hashes.items():
            keep_longer(found, tokens.sequences[number], hashes)
    return found


class _Round:
    """Some points of one side among which no token occurs twice.

    known: the hashes of the side's sequences. alone: int64 [n, 2], runs (first row, count) of rows without a partner.
    """

    def __init__(
        self, side: Sequence[tuple[RowSource, Tokens]], points: Sequence[int], known: Mapping[SequenceId, _Hashes]
    ) -> None:
        self._points = points
        self._sources = [side[number][0] for number in points]
        self.tokens = joined([side[number][1] for number in points])
        for number, name in enumerate(self.tokens.sequences):
            own, longest = self.tokens.hashes.get(number), known.get(name)
            # An id that was reused for another sequence keeps its own hashes.
            if longest is not None and (own is None or own[-1] == longest[len(own) - 1]):
                self.tokens.hashes[number] = longest
        self._alone: npt.NDArray[np.int64] | None = None

    def in_sources(self, runs: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Runs (first row, count) of this round as (number of the point on its side, row in the point, count)."""
        pieces = rows_of_sources(runs.tolist(), self._sources)
        return [(self._points[source], row, count) for source, row, count in pieces]

    def keep_alone(self, runs: npt.NDArray[np.int64]) -> None:
        """Keep as alone only rows that are in `runs`, the sorted rows that one round of the other side lacks."""
        self._alone = runs if self._alone is None else _in_both(self._alone, runs)

    @property
    def alone(self) -> npt.NDArray[np.int64]:
        assert self._alone is not None
        return self._alone

    @property
    def count_met(self) -> int:
        """The number of rows with a partner."""
        padding = int(self.tokens.runs[self.tokens.runs[:, 0] < 0, 2].sum())
        return self.tokens.rows - padding - int(self.alone[:, 1].sum())


def _in_both(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows that two lists of runs have in common, as runs: a claimed number of rows must not take memory."""
    found = []
    theirs = other.tolist()
    place = 0
    for first, count in one.tolist():
        while place < len(theirs) and sum(theirs[place]) <= first:
            place += 1
        for begin, length in theirs[place:]:
            if begin >= first + count:
                break
            start = max(first, begin)
            found.append((start, min(first + count, begin + length) - start))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


_Spans = dict[SequenceId, list[tuple[int, int]]]


def _rounds(several: Sequence[Tokens]) -> list[list[int]]:
    """The numbers of the points, divided into rounds without repeated tokens; a point joins the first that it fits."""
    rounds: list[tuple[list[int], _Spans]] = []
    for number, tokens in enumerate(several):
        runs = [
            (tokens.sequences[sequence], start, start + count)
            for sequence, start, count in tokens.runs.tolist()
            if sequence >= 0
        ]
        fitting = next((one for one in rounds if not any(_is_taken(one[1], *run) for run in runs)), None)
        if fitting is None:
            fitting = ([], {})
            rounds.append(fitting)
        points, spans = fitting
        points.append(number)
        for name, start, end in runs:
            insort(spans.setdefault(name, []), (start, end))
    return [points for points, _ in rounds]


def _is_taken(spans: _Spans, name: SequenceId, start: int, end: int) -> bool:
    """Whether a token from `start` to `end` of a sequence is in its spans, which are sorted and do not overlap."""
    own = spans.get(name, [])
    place = bisect_left(own, (start, start))
    return (place > 0 and own[place - 1][1] > start) or (place < len(own) and own[place][0] < end)
