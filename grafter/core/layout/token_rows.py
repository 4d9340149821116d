"""Token rows: the tokens that both sides have, numbered through, and where each rank has them among its own rows.

    sender     rows   0  1  2  3  4        a:0 a:1 a:2 b:0 b:1
    receiver   rows   0  1  2  3           b:0 b:1  -  a:1          (- is padding, and a:0, a:2 are not here)
    numbers                                 0   1       2

So a tensor whose rows are tokens becomes a dim like any other, `t`, of which each rank holds some runs. Numbers go by
receiver, then by sender, then as the rows lie at the receiver: what goes from one to the other is one stretch, and a
receiver of the same rows in another order gets one that begins at 0.

Pure, and worked out on runs: the cost follows the runs of both sides, not the rows that they claim to have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from grafter.core.layout.runs import Runs
from grafter.core.rows.sequences import pair_sequences
from grafter.core.rows.tokens import FEW, SequenceId, Tokens, total

_Numbers = npt.NDArray[np.int64]
_LARGEST = 1 << 61
_MOST_EXAMPLES = 4


@dataclass(frozen=True, eq=False)
class WindowedTokens:
    """The tokens of one rank's rows. starts: for each of its sequences the position from which on rows count; empty:

    all count. The same tokens of several ranks are the same object.
    """

    tokens: Tokens
    starts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class RankRows:
    """One rank's rows that have a partner, in the order of the numbers.

    runs: (number, count, place among these rows). segments: int64 [n, 2], (first local row, count), parallel to places.
    kept: how many rows of this rank count at all; kept_out: of these, how many the other side keeps out.
    """

    runs: Runs
    segments: _Numbers
    kept: int
    kept_out: int

    @cached_property
    def count(self) -> int:
        return total(self.segments[:, 1])

    @property
    def only_here(self) -> int:
        """Rows that the other side has not got."""
        return self.kept - self.kept_out - self.count


@dataclass(frozen=True, eq=False)
class TokenRows:
    """How the rows of a point's senders and receivers pair. `ranks` of each side by role rank; side 0 sends.

    count: how many tokens both have. only_at: of each side, the tokens that the other has not got, ranks together.
    """

    count: int
    ranks: tuple[dict[int, RankRows], dict[int, RankRows]]
    only_at: tuple[int, int]
    _alone: tuple[_Numbers, _Numbers] = field(repr=False)
    _met: _Numbers = field(repr=False)
    _names: tuple[tuple[SequenceId | None, ...], tuple[SequenceId | None, ...]] = field(repr=False)

    def examples(self, side: int) -> list[str]:
        """The first tokens that only one side has, as `sequence:position..position`."""
        names = self._names[side]
        found = []
        for code, start, count in _joined(self._alone[side][: 64 * _MOST_EXAMPLES])[:_MOST_EXAMPLES].tolist():
            found.append(f"{names[code]}:{start}" + (f"..{start + count - 1}" if count > 1 else ""))
        return found

    def reached(self, side: int) -> dict[SequenceId, int]:
        """For each sequence of a side, how far it was paired: the position after its last token that has a partner."""
        ends: dict[SequenceId, int] = {}
        if len(self._met) <= FEW:
            for code, start, count in self._met.tolist():
                name = self._names[side][code]
                if name is not None:
                    ends[name] = max(start + count, ends.get(name, 0))
        else:
            codes, first = np.unique(self._met[:, 0], return_index=True)
            last = np.maximum.reduceat(self._met[:, 1] + self._met[:, 2], first)
            for code, end in zip(codes.tolist(), last.tolist(), strict=True):
                name = self._names[side][code]
                if name is not None:
                    ends[name] = end
        return ends


def number_rows(senders: Mapping[int, WindowedTokens], receivers: Mapping[int, WindowedTokens]) -> TokenRows:
    """Pair the rows of all ranks of both sides, as `grafter.core.rows.tokens.match` pairs those of two."""
    sides = _Side(senders), _Side(receivers)
    if len(sides[0].groups) == len(sides[1].groups) == 1 and _are_alike(sides[0].groups[0], sides[1].groups[0]):
        return _number_alike(*sides)
    codes, names, limits = _common_sequences(*sides)
    entries, cuts = _cut(sides, codes, limits)
    known = cuts[:, 1] < limits[cuts[:, 0]]
    kept, there = [], []
    # Entries come side by side, and of each side group by group.
    middle = int(np.searchsorted(entries[:, _SIDE], 1))
    of_sides = entries[:middle], entries[middle:]
    for own in of_sides:
        kept.append(_mark(len(cuts), own[own[:, _KEPT] > 0, _SEGMENT]))
        there.append(_mark(len(cuts), own[:, _SEGMENT]) & known)
    met = kept[0] & kept[1] & known
    numbers, count = _numbered(of_sides, cuts, met)
    ranks: list[dict[int, RankRows]] = []
    for side, own in enumerate(of_sides):
        begins = np.searchsorted(own[:, _GROUP], np.arange(1, len(sides[side].groups)))
        of_groups = [_rank_rows(part, cuts, numbers, there[1 - side]) for part in np.split(own, begins)]
        ranks.append({rank: of_groups[group] for rank, group in sides[side].group_of.items()})
    alone = [cuts[kept[side] & ~there[1 - side]] for side in (0, 1)]
    return TokenRows(
        count,
        (ranks[0], ranks[1]),
        (int(alone[0][:, 2].sum()), int(alone[1][:, 2].sum())),
        (alone[0], alone[1]),
        cuts[met],
        names,
    )


def _are_alike(a: WindowedTokens, b: WindowedTokens) -> bool:
    """Whether both have the same rows, and nothing contradicts that."""
    return a.tokens is b.tokens or (
        a.tokens.sequences == b.tokens.sequences
        and np.array_equal(a.tokens.runs, b.tokens.runs)
        and all(np.array_equal(a.tokens.hashes[n], b.tokens.hashes[n]) for n in a.tokens.hashes if n in b.tokens.hashes)
    )


def _number_alike(a: _Side, b: _Side) -> TokenRows:
    """Where both sides have the same batch, which is most often so: each row is its own partner."""
    tokens = a.groups[0].tokens
    if len(tokens.runs) <= FEW:
        return _number_few(a, b)
    runs = np.concatenate([tokens.runs, (np.cumsum(tokens.runs[:, 2]) - tokens.runs[:, 2])[:, None]], axis=1)
    runs = runs[runs[:, 0] >= 0]
    before = [_before(group.starts, runs) for group in (a.groups[0], b.groups[0])]
    out = np.maximum(*before)
    kept = [int((runs[:, 2] - own).sum()) for own in before]
    runs = np.stack([runs[:, 0], runs[:, 1] + out, runs[:, 2] - out, runs[:, 3] + out], axis=1)
    runs = runs[runs[:, 2] > 0]
    count = int(runs[:, 2].sum())
    segments = _joined(np.stack([np.zeros_like(runs[:, 3]), runs[:, 3], runs[:, 2]], axis=1))[:, 1:]
    numbered: Runs = ((0, count, 0),) if count else ()
    ranks = [
        dict.fromkeys(side.group_of, RankRows(numbered, segments, own, own - count))
        for side, own in zip((a, b), kept, strict=True)
    ]
    met = runs[np.argsort(runs[:, 0], kind="stable"), :3]
    none = met[:0]
    return TokenRows(count, (ranks[0], ranks[1]), (0, 0), (none, none), met, (tokens.sequences, tokens.sequences))


def _number_few(a: _Side, b: _Side) -> TokenRows:
    """The same of few runs, such as a turn of a conversation: in plain numbers, a tenth of what NumPy's calls cost."""
    tokens, starts = a.groups[0].tokens, (a.groups[0].starts, b.groups[0].starts)
    met: list[tuple[int, int, int]] = []
    segments: list[tuple[int, int]] = []
    kept, row = [0, 0], 0
    for number, first, count in tokens.runs.tolist():
        if number >= 0:
            before = [min(max(own[number] - first, 0), count) if own else 0 for own in starts]
            kept = [known + count - own for known, own in zip(kept, before, strict=True)]
            out = max(before)
            if out < count:
                met.append((number, first + out, count - out))
                begin = row + out
                if segments and sum(segments[-1]) == begin:
                    begin, _ = segments.pop()
                segments.append((begin, row + count - begin))
        row += count
    both = sum(count for _, _, count in met)
    numbered: Runs = ((0, both, 0),) if both else ()
    rows = np.array(segments, dtype=np.int64).reshape(-1, 2)
    ranks = [
        dict.fromkeys(side.group_of, RankRows(numbered, rows, own, own - both))
        for side, own in zip((a, b), kept, strict=True)
    ]
    there, names = np.array(sorted(met), dtype=np.int64).reshape(-1, 3), tokens.sequences
    return TokenRows(both, (ranks[0], ranks[1]), (0, 0), (there[:0], there[:0]), there, (names, names))


def _before(starts: tuple[int, ...], runs: _Numbers) -> _Numbers:
    """How many rows of each run lie before its sequence's start."""
    if not starts:
        return np.zeros(len(runs), dtype=np.int64)
    before: _Numbers = np.clip(np.array(starts, dtype=np.int64)[runs[:, 0]] - runs[:, 1], 0, runs[:, 2])
    return before


class _Side:
    """One role: its distinct tokens, which rank has which, and all of its sequences."""

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
    def hashes(self) -> dict[int, npt.NDArray[np.uint64]]:
        """Of each sequence the longest that a rank knows."""
        found: dict[int, npt.NDArray[np.uint64]] = {}
        for group in self.groups:
            for number, values in group.tokens.hashes.items():
                own = self.sequences[group.tokens.sequences[number]]
                if own not in found or len(values) > len(found[own]):
                    found[own] = values
        return found


def _common_sequences(
    a: _Side, b: _Side
) -> tuple[tuple[_Numbers, _Numbers], tuple[tuple[SequenceId | None, ...], tuple[SequenceId | None, ...]], _Numbers]:
    """One code per sequence of either side; two names of the same sequence get the same code.

    Returns (codes of a's sequences, codes of b's), the names on each side, and the length up to which the two are known
    to be equal.
    """
    names_a, names_b = list(a.sequences), list(b.sequences)
    codes_b = np.arange(len(names_a), len(names_a) + len(names_b), dtype=np.int64)
    count = len(names_a) + len(names_b)
    limits = np.full(count, _LARGEST, dtype=np.int64)
    called_a: list[SequenceId | None] = [*names_a, *([None] * len(names_b))]
    called_b: list[SequenceId | None] = [*([None] * len(names_a)), *names_b]
    for of_a, of_b, length in pair_sequences(names_a, a.hashes, names_b, b.hashes):
        codes_b[of_b] = of_a
        called_b[of_a] = names_b[of_b]
        limits[of_a] = length if length is not None else _LARGEST
    return (np.arange(len(names_a), dtype=np.int64), codes_b), (tuple(called_a), tuple(called_b)), limits


# The columns of what is worked on: a stretch of one rank group's rows that is one segment.
_SEGMENT, _ROW, _KEPT, _SIDE, _GROUP = range(5)


def _cut(sides: Sequence[_Side], codes: Sequence[_Numbers], limits: _Numbers) -> tuple[_Numbers, _Numbers]:
    """All runs of both sides, cut where any of them begins, ends, or begins to count.

    Entries (segment, local row, whether it counts, side, group), and segments (sequence, position, count).
    """
    runs = [
        _runs_of(group, own_codes, side, number, own)
        for side, (own, own_codes) in enumerate(zip(sides, codes, strict=True))
        for number, group in enumerate(own.groups)
    ]
    every = np.concatenate([*runs, np.zeros((0, 6), dtype=np.int64)])
    starts, ends = every[:, 1], every[:, 1] + every[:, 2]
    limited = np.flatnonzero(limits < _LARGEST)
    sequences = np.concatenate([every[:, 0], every[:, 0], limited])
    positions = np.concatenate([starts, ends, limits[limited]])
    order = np.lexsort((positions, sequences))
    sequences, positions = sequences[order], positions[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (sequences[1:] != sequences[:-1]) | (positions[1:] != positions[:-1])
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    sequences, positions = sequences[new], positions[new]
    # A segment that ends with its sequence holds nothing; no run covers it.
    counts = np.zeros_like(positions)
    counts[:-1] = np.where(sequences[1:] == sequences[:-1], np.diff(positions), 0)
    begins, stops = number[: len(every)], number[len(every) : 2 * len(every)]
    owner = np.repeat(np.arange(len(every)), stops - begins)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(stops - begins) - (stops - begins), stops - begins)
    segment = begins[owner] + within
    row = every[owner, 3] + positions[segment] - every[owner, 1]
    entries = np.stack([segment, row, every[owner, 4], every[owner, 5] >> 32, every[owner, 5] & 0xFFFFFFFF], axis=1)
    return entries, np.stack([sequences, positions, counts], axis=1)


def _runs_of(group: WindowedTokens, codes: _Numbers, side: int, number: int, own: _Side) -> _Numbers:
    """(sequence code, position, count, first row, whether it counts, side and group) of each run, without padding."""
    runs = group.tokens.runs
    rows = np.cumsum(runs[:, 2]) - runs[:, 2]
    there = runs[:, 0] >= 0
    runs, rows = runs[there], rows[there]
    code_of = np.array([codes[own.sequences[name]] for name in group.tokens.sequences], dtype=np.int64)
    found = np.zeros((len(runs), 6), dtype=np.int64)
    found[:, 0] = code_of[runs[:, 0]] if len(runs) else 0
    found[:, 1], found[:, 2], found[:, 3], found[:, 4] = runs[:, 1], runs[:, 2], rows, 1
    found[:, 5] = (side << 32) | number
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


def _mark(count: int, numbers: _Numbers) -> npt.NDArray[np.bool_]:
    marked = np.zeros(count, dtype=bool)
    marked[numbers] = True
    return marked


def _numbered(of_sides: tuple[_Numbers, _Numbers], cuts: _Numbers, met: npt.NDArray[np.bool_]) -> tuple[_Numbers, int]:
    """The number of the first row of each segment that both sides have (-1: they have not), and how many rows."""
    first_group = [np.zeros(len(cuts), dtype=np.int64), np.zeros(len(cuts), dtype=np.int64)]
    row_there = np.zeros(len(cuts), dtype=np.int64)
    for side, entries in enumerate(of_sides):
        # Of several groups that have a segment the first counts: it is assigned last.
        own = entries[entries[:, _KEPT] > 0][::-1]
        first_group[side][own[:, _SEGMENT]] = own[:, _GROUP]
        if side == 1:
            row_there[own[:, _SEGMENT]] = own[:, _ROW]
    segments = np.flatnonzero(met)
    order = segments[np.lexsort((row_there[segments], first_group[0][segments], first_group[1][segments]))]
    counts = cuts[order, 2]
    numbers = np.full(len(cuts), -1, dtype=np.int64)
    numbers[order] = np.cumsum(counts) - counts
    return numbers, int(counts.sum())


def _rank_rows(entries: _Numbers, cuts: _Numbers, numbers: _Numbers, there: npt.NDArray[np.bool_]) -> RankRows:
    """`there`: the segments that the other side has, whether they count with it or not."""
    entries = entries[entries[:, _KEPT] > 0]
    segments = entries[:, _SEGMENT]
    counts = cuts[segments, 2]
    kept, kept_out = int(counts.sum()), int(counts[(numbers[segments] < 0) & there[segments]].sum())
    entries = entries[numbers[segments] >= 0]
    entries = entries[np.argsort(numbers[entries[:, _SEGMENT]], kind="stable")]
    number, count = numbers[entries[:, _SEGMENT]], cuts[entries[:, _SEGMENT], 2]
    place = np.cumsum(count) - count
    runs = _joined(np.stack([np.zeros_like(number), number, count], axis=1))
    places = np.cumsum(runs[:, 2]) - runs[:, 2]
    rows = _joined(np.stack([np.zeros_like(place), entries[:, _ROW], count], axis=1))[:, 1:]
    return RankRows(
        tuple((start, length, at) for (_, start, length), at in zip(runs.tolist(), places.tolist(), strict=True)),
        rows,
        kept,
        kept_out,
    )


def _joined(runs: _Numbers) -> _Numbers:
    """(what, first, count), neighbours that go on as one."""
    if not len(runs):
        return runs
    breaks = np.ones(len(runs), dtype=bool)
    breaks[1:] = (runs[1:, 0] != runs[:-1, 0]) | (runs[1:, 1] != runs[:-1, 1] + runs[:-1, 2])
    first = np.flatnonzero(breaks)
    return np.concatenate([runs[first, :2], np.add.reduceat(runs[:, 2], first)[:, None]], axis=1)
