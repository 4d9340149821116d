"""Runs: where the values along one dim of a local tensor lie in the global dim.

    global dim      0  1  2  3  4  5  6  7
    local dim             0  1        2  3        runs: (2, 2, 0), (6, 2, 2)

A run is (start in the global dim, length, start in the local dim). Every kind of layout is turned into runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter

# Sizes, starts or dims, one number each.
Numbers = tuple[int, ...]
Run = tuple[int, int, int]
Runs = tuple[Run, ...]


def whole(size: int) -> Runs:
    """A dim that lies whole in one tensor."""
    return ((0, size, 0),) if size else ()


def from_parts(parts: Iterable[tuple[int, int]]) -> Runs:
    """Runs of (start, length) parts that follow each other in the local dim. Neighbours are joined."""
    runs: list[Run] = []
    local = 0
    for start, length in parts:
        if not length:
            continue
        if runs and runs[-1][0] + runs[-1][1] == start and runs[-1][2] + runs[-1][1] == local:
            runs[-1] = (runs[-1][0], runs[-1][1] + length, runs[-1][2])
        else:
            runs.append((start, length, local))
        local += length
    return tuple(runs)


def total(runs: Runs) -> int:
    """The size of the local dim."""
    return sum(length for _, length, _ in runs)


def cut(runs: Runs, start: int, stop: int) -> list[tuple[int, int]]:
    """The (start, length) parts of the global dim that lie in [start, stop) of the local one."""
    parts = []
    # The last run that begins at or before `start`, and those after it.
    for begin, length, local in runs[max(bisect_right(runs, start, key=itemgetter(2)) - 1, 0) :]:
        if local >= stop:
            break
        low, high = max(start, local), min(stop, local + length)
        if low < high:
            parts.append((begin + low - local, high - low))
    return parts


def split_in_order(runs: Runs, sizes: Sequence[int]) -> list[Runs]:
    """Consecutive stretches of the given sizes, one for each coordinate of an axis."""
    stretches, start = [], 0
    for size in sizes:
        stretches.append(from_parts(cut(runs, start, start + size)))
        start += size
    return stretches


def split_zigzag(runs: Runs, count: int, sequence_lengths: Sequence[int] | None = None) -> list[Runs]:
    """Of 2 * count equal chunks, coordinate k gets the k-th and the k-th last: causal attention costs each the same.

    sequence_lengths: for a packed dim, of which each sequence is cut by itself. Lengths are divisible by 2 * count.
    """
    parts: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    start = 0
    for length in sequence_lengths if sequence_lengths is not None else (total(runs),):
        chunk = length // (2 * count)
        for coordinate in range(count):
            for number in (coordinate, 2 * count - 1 - coordinate):
                parts[coordinate] += cut(runs, start + number * chunk, start + (number + 1) * chunk)
        start += length
    return [from_parts(own) for own in parts]


def clip(runs: Runs, size: int) -> Runs:
    """The runs without what lies at or beyond `size`, which is padding."""
    return tuple(
        (start, min(length, size - start), local) for start, length, local in runs if start < size and length > 0
    )
