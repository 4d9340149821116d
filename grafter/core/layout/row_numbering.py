"""Row numbering: the tokens that both sides have, numbered, and where each rank has them among its own rows.

    sender     rows   0  1  2  3  4        a:0 a:1 a:2 b:0 b:1
    receiver   rows   0  1  2  3           b:0 b:1  -  a:1          (- is padding; a:0 and a:2 are only at the sender)
    numbers                                 0   1       2

A tensor whose rows are tokens thus gets a dim like any other, `t`, of which each rank holds some runs. Numbers follow
the receiver, then the sender, then the order of rows at the receiver: what goes from one rank to another is one
stretch, and a receiver of the same rows in another order gets one that begins at 0.

The cost follows the number of runs on both sides, not the number of rows that they claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from grafter.core.layout.runs import Runs
from grafter.core.tokens.runs import FEW, begins_of, cut_runs, each_of, joined_rows, joined_runs, placed_runs, total
from grafter.core.tokens.sequences import Hashes, Int64Array, SequenceId, common_codes
from grafter.core.tokens.tokens import Tokens

_MOST_EXAMPLES = 4
# The names of the sequences by their codes, as one side has them; None: the side lacks the sequence.
_Names = tuple[SequenceId | None, ...]


@dataclass(frozen=True, eq=False)
class WindowedTokens:
    """The tokens of one rank's rows, and which of its rows count.

    starts: for each of its sequences, the position from which on rows count; empty if all rows count. Ranks with the
    same tokens share one object.
    """

    tokens: Tokens
    starts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class RankRows:
    """One rank's rows that have a partner, in the order of the numbers.

    runs: (number, count, place among these rows). segments: int64 [n, 2], (first local row, count), parallel to places.
    kept: how many rows of this rank count. kept_out: how many of these the other side excludes.
    """

    runs: Runs
    segments: Int64Array
    kept: int
    kept_out: int

    @cached_property
    def count(self) -> int:
        """How many rows have a partner."""
        return total(self.segments[:, 1])

    @property
    def only_here(self) -> int:
        """How many rows the other side lacks."""
        return self.kept - self.kept_out - self.count


@dataclass(frozen=True, eq=False)
class RowNumbering:
    """How the rows of a point's senders and receivers pair. Side 0 sends, side 1 receives.

    count: how many tokens both sides have. ranks: for each side, the rows of each role rank. only_at: for each side,
    how many tokens of all its ranks the other side lacks.
    """

    count: int
    ranks: tuple[dict[int, RankRows], dict[int, RankRows]]
    only_at: tuple[int, int]
    # Segments (code of the sequence, first position, count): those of one side alone, and those of both.
    _alone: tuple[Int64Array, Int64Array] = field(repr=False)
    _common: Int64Array = field(repr=False)
    _names: tuple[_Names, _Names] = field(repr=False)

    def examples(self, side: int) -> list[str]:
        """The first tokens that only one side has, as `sequence:position..position`."""
        names = self._names[side]
        return [
            f"{names[code]}:{start}" + (f"..{start + count - 1}" if count > 1 else "")
            for code, start, count in joined_runs(self._alone[side][: 64 * _MOST_EXAMPLES])[:_MOST_EXAMPLES].tolist()
        ]

    def reached(self, side: int) -> dict[SequenceId, int]:
        """For each sequence of a side, the position after its last token that has a partner."""
        if len(self._common) <= FEW:
            ends: dict[int, int] = {}
            for code, start, count in self._common.tolist():
                ends[code] = max(start + count, ends.get(code, 0))
        else:
            codes, first = np.unique(self._common[:, 0], return_index=True)
            last = np.maximum.reduceat(self._common[:, 1] + self._common[:, 2], first)
            ends = dict(zip(codes.tolist(), last.tolist(), strict=True))
        names = self._names[side]
        return {name: end for code, end in ends.items() if (name := names[code]) is not None}


def number_rows(senders: Mapping[int, WindowedTokens], receivers: Mapping[int, WindowedTokens]) -> RowNumbering:
    """Pair the rows of all ranks of both sides, given by role rank, as `grafter.core.tokens.matching.match` pairs those
    of two tensors."""
    sides = _Side(senders), _Side(receivers)
    if len(sides[0].groups) == len(sides[1].groups) == 1 and _are_alike(sides[0].groups[0], sides[1].groups[0]):
        return _number_alike(*sides)
    codes, names, limits = _common_sequences(*sides)
    entries, segments = _entries_of(sides, codes, limits)
    is_known = segments[:, 1] < limits[segments[:, 0]]
    # Entries are ordered by side, and within a side by group.
    middle = int(np.searchsorted(entries[:, _SIDE], 1))
    of_sides = entries[:middle], entries[middle:]
    kept = [_mark(len(segments), own[own[:, _KEPT] > 0, _SEGMENT]) for own in of_sides]
    there = [_mark(len(segments), own[:, _SEGMENT]) & is_known for own in of_sides]
    is_common = kept[0] & kept[1] & is_known
    numbers, count = _numbered(of_sides, segments, is_common)
    ranks: list[dict[int, RankRows]] = []
    for side, own in enumerate(of_sides):
        begins = np.searchsorted(own[:, _GROUP], np.arange(1, len(sides[side].groups)))
        of_groups = [_rank_rows(part, segments, numbers, there[1 - side]) for part in np.split(own, begins)]
        ranks.append({rank: of_groups[group] for rank, group in sides[side].group_of.items()})
    alone = [segments[kept[side] & ~there[1 - side]] for side in (0, 1)]
    only_at = (int(alone[0][:, 2].sum()), int(alone[1][:, 2].sum()))
    return RowNumbering(count, (ranks[0], ranks[1]), only_at, (alone[0], alone[1]), segments[is_common], names)


def _are_alike(a: WindowedTokens, b: WindowedTokens) -> bool:
    """Whether both have the same rows, and no hash contradicts that."""
    return a.tokens is b.tokens or (
        a.tokens.sequences == b.tokens.sequences
        and np.array_equal(a.tokens.runs, b.tokens.runs)
        and all(np.array_equal(a.tokens.hashes[n], b.tokens.hashes[n]) for n in a.tokens.hashes if n in b.tokens.hashes)
    )


def _number_alike(a: _Side, b: _Side) -> RowNumbering:
    """The numbering where both sides have the same batch, as is most often so: each row is its own partner."""
    tokens, starts = a.groups[0].tokens, (a.groups[0].starts, b.groups[0].starts)
    common, segments, kept = (_alike_few if len(tokens.runs) <= FEW else _alike_many)(tokens, starts)
    count = total(common[:, 2]) if len(common) else 0
    numbered: Runs = ((0, count, 0),) if count else ()
    ranks = [
        dict.fromkeys(side.group_of, RankRows(numbered, segments, own, own - count))
        for side, own in zip((a, b), kept, strict=True)
    ]
    none, names = common[:0], tokens.sequences
    return RowNumbering(count, (ranks[0], ranks[1]), (0, 0), (none, none), common, (names, names))


_Starts = tuple[tuple[int, ...], tuple[int, ...]]


def _alike_many(tokens: Tokens, starts: _Starts) -> tuple[Int64Array, Int64Array, list[int]]:
    """(segments that count on both sides, by sequence; their rows; how many rows count on each side)."""
    runs = placed_runs(tokens.runs)
    before = [_before(own, runs) for own in starts]
    out = np.maximum(*before)
    kept = [int((runs[:, 2] - own).sum()) for own in before]
    runs = np.stack([runs[:, 0], runs[:, 1] + out, runs[:, 2] - out, runs[:, 3] + out], axis=1)
    runs = runs[runs[:, 2] > 0]
    return runs[np.argsort(runs[:, 0], kind="stable"), :3], joined_rows(runs[:, [3, 2]]), kept


def _alike_few(tokens: Tokens, starts: _Starts) -> tuple[Int64Array, Int64Array, list[int]]:
    """As `_alike_many`, in plain Python: a tenth of the cost for a turn of a conversation, which has few runs."""
    common: list[tuple[int, int, int]] = []
    segments: list[tuple[int, int]] = []
    kept, row = [0, 0], 0
    for number, first, count in tokens.runs.tolist():
        if number >= 0:
            before = [min(max(own[number] - first, 0), count) if own else 0 for own in starts]
            kept = [known + count - own for known, own in zip(kept, before, strict=True)]
            out = max(before)
            if out < count:
                common.append((number, first + out, count - out))
                begin = row + out
                if segments and sum(segments[-1]) == begin:
                    begin, _ = segments.pop()
                segments.append((begin, row + count - begin))
        row += count
    as_array = np.array(sorted(common), dtype=np.int64).reshape(-1, 3)
    return as_array, np.array(segments, dtype=np.int64).reshape(-1, 2), kept


def _before(starts: tuple[int, ...], runs: Int64Array) -> Int64Array:
    """How many rows of each run lie before its sequence's start."""
    if not starts:
        return np.zeros(len(runs), dtype=np.int64)
    before: Int64Array = np.clip(np.array(starts, dtype=np.int64)[runs[:, 0]] - runs[:, 1], 0, runs[:, 2])
    return before


class _Side:
    """The tokens of one role: the distinct ones (groups), which rank has which, and all sequences."""

    def __init__(self, ranks: Mapping[int, WindowedTokens]) -> None:
        numbers: dict[int, int] = {}
        self.groups: list[WindowedTokens] = []
        self.group_of: dict[int, int] = {}
        for rank, windowed in ranks.items():
            number = self.group_of[rank] = numbers.setdefault(id(windowed), len(self.groups))
            if number == len(self.groups):
                self.groups.append(windowed)

    @cached_property
    def sequences(self) -> dict[SequenceId, int]:
        found: dict[SequenceId, int] = {}
        for group in self.groups:
            for name in group.tokens.sequences:
                found.setdefault(name, len(found))
        return found

    @cached_property
    def hashes(self) -> dict[int, Hashes]:
        """For each sequence, the longest hashes that a rank has."""
        found: dict[int, Hashes] = {}
        for group in self.groups:
            for number, values in group.tokens.hashes.items():
                own = self.sequences[group.tokens.sequences[number]]
                if own not in found or len(values) > len(found[own]):
                    found[own] = values
        return found


def _common_sequences(a: _Side, b: _Side) -> tuple[tuple[Int64Array, Int64Array], tuple[_Names, _Names], Int64Array]:
    """(codes of a's sequences, codes of b's), the names by code on each side, and the limits: see `common_codes`."""
    names_a, names_b = list(a.sequences), list(b.sequences)
    pairs, codes_b, limits = common_codes(names_a, a.hashes, names_b, b.hashes)
    called_a: list[SequenceId | None] = [*names_a, *([None] * len(names_b))]
    called_b: list[SequenceId | None] = [*([None] * len(names_a)), *names_b]
    for of_a, of_b, _ in pairs:
        called_b[of_a] = names_b[of_b]
    return (np.arange(len(names_a), dtype=np.int64), codes_b), (tuple(called_a), tuple(called_b)), limits


# The columns of an entry: a stretch of one group's rows that is one segment.
_SEGMENT, _ROW, _KEPT, _SIDE, _GROUP = range(5)


def _entries_of(
    sides: Sequence[_Side], codes: Sequence[Int64Array], limits: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """All runs of both sides as entries, cut where any run begins, ends, or begins to count; and the segments.

    Entries are (segment, local row, whether it counts, side, group), segments (sequence, first position, count).
    """
    runs = np.concatenate(
        [
            _runs_of(group, own_codes, side, number, own)
            for side, (own, own_codes) in enumerate(zip(sides, codes, strict=True))
            for number, group in enumerate(own.groups)
        ]
    )
    segments, begins, stops = cut_runs(runs, limits)
    owner = np.repeat(np.arange(len(runs)), stops - begins)
    segment = each_of(begins, stops - begins)
    row = runs[owner, 3] + segments[segment, 1] - runs[owner, 1]
    return np.concatenate([np.stack([segment, row], axis=1), runs[owner, 4:]], axis=1), segments


def _runs_of(group: WindowedTokens, codes: Int64Array, side: int, number: int, own: _Side) -> Int64Array:
    """(code of the sequence, position, count, first row, whether it counts, side, group) of each run, but padding."""
    runs = placed_runs(group.tokens.runs)
    code_of = np.array([codes[own.sequences[name]] for name in group.tokens.sequences], dtype=np.int64)
    found = np.empty((len(runs), 7), dtype=np.int64)
    found[:, :4], found[:, 4:] = runs, (1, side, number)
    found[:, 0] = code_of[runs[:, 0]]
    if not group.starts:
        return found
    before = _before(group.starts, runs)
    outside, inside = found.copy(), found
    outside[:, 2], outside[:, 4] = before, 0
    inside[:, 1] += before
    inside[:, 3] += before
    inside[:, 2] -= before
    both = np.concatenate([outside, inside])
    return both[both[:, 2] > 0]


def _mark(count: int, numbers: Int64Array) -> npt.NDArray[np.bool_]:
    marked = np.zeros(count, dtype=bool)
    marked[numbers] = True
    return marked


def _numbered(
    of_sides: tuple[Int64Array, Int64Array], segments: Int64Array, is_common: npt.NDArray[np.bool_]
) -> tuple[Int64Array, int]:
    """The number of the first row of each segment that both sides have, else -1; and how many rows both have."""
    first_group = [np.zeros(len(segments), dtype=np.int64), np.zeros(len(segments), dtype=np.int64)]
    row_there = np.zeros(len(segments), dtype=np.int64)
    for side, entries in enumerate(of_sides):
        # If several groups have a segment, the first one counts: it is assigned last.
        own = entries[entries[:, _KEPT] > 0][::-1]
        first_group[side][own[:, _SEGMENT]] = own[:, _GROUP]
        if side == 1:
            row_there[own[:, _SEGMENT]] = own[:, _ROW]
    found = np.flatnonzero(is_common)
    order = found[np.lexsort((row_there[found], first_group[0][found], first_group[1][found]))]
    counts = segments[order, 2]
    numbers = np.full(len(segments), -1, dtype=np.int64)
    numbers[order] = begins_of(counts)
    return numbers, int(counts.sum())


def _rank_rows(
    entries: Int64Array, segments: Int64Array, numbers: Int64Array, there: npt.NDArray[np.bool_]
) -> RankRows:
    """The rows of one group. there: the segments that the other side has, whether they count there or not."""
    entries = entries[entries[:, _KEPT] > 0]
    own = entries[:, _SEGMENT]
    counts = segments[own, 2]
    kept, kept_out = int(counts.sum()), int(counts[(numbers[own] < 0) & there[own]].sum())
    entries = entries[numbers[own] >= 0]
    entries = entries[np.argsort(numbers[entries[:, _SEGMENT]], kind="stable")]
    number, count = numbers[entries[:, _SEGMENT]], segments[entries[:, _SEGMENT], 2]
    runs = joined_rows(np.stack([number, count], axis=1))
    places = begins_of(runs[:, 1])
    rows = joined_rows(np.stack([entries[:, _ROW], count], axis=1))
    return RankRows(tuple(map(tuple, np.column_stack([runs, places]).tolist())), rows, kept, kept_out)
