"""Row dims of a tensor whose dims have no names: which of its first dims count the rows. There is one token a row.

    tokens  shape          row dims        a row
    12      [1, 12, 32]    the first two   [32]
     1      [1, 1, 32]     the first, or   [1, 32], or
                           the first two   [32]

One tensor alone may leave it open, and only where it has dims of size 1: its rows are then the same values either way,
and their shape is another. Tensors that are compared with each other, as those of a prefill and its decode steps, have
rows of one shape, and that decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod


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
