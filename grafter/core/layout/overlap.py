"""Overlap: whether any of some boxes share a place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Matrix = npt.NDArray[np.int64]

# Up to this many boxes, plain Python is faster than arrays.
_FEW = 8
# Pairs of boxes that are compared at once, which bounds the memory.
_BLOCK = 1 << 20


def find_overlap(starts: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """The numbers of two boxes that share a place, or None. An empty box shares none."""
    if len(starts) <= _FEW:
        return next(
            (
                (one, other)
                for other in range(len(starts))
                for one in range(other)
                if share_a_place(starts[one], sizes[one], starts[other], sizes[other])
            ),
            None,
        )
    low, size = np.array(starts, dtype=np.int64), np.array(sizes, dtype=np.int64)
    kept = np.flatnonzero((size > 0).all(axis=1))
    low, high = low[kept], low[kept] + size[kept]
    if low.shape[1] == 0:
        return (int(kept[0]), int(kept[1])) if len(kept) > 1 else None
    found = _search(low, high)
    return None if found is None else (int(kept[found[0]]), int(kept[found[1]]))


def share_a_place(
    starts: Sequence[int], sizes: Sequence[int], other_starts: Sequence[int], other_sizes: Sequence[int]
) -> bool:
    """Whether two boxes overlap. An empty box overlaps nothing."""
    return all(
        max(a, b) < min(a + n, b + m) for a, n, b, m in zip(starts, sizes, other_starts, other_sizes, strict=True)
    )


def _search(low: _Matrix, high: _Matrix) -> tuple[int, int] | None:
    """Pairs that overlap along one dim, that with the fewest such pairs, are compared along the others."""
    counted = [_followers(low[:, dim], high[:, dim]) for dim in range(low.shape[1])]
    order, followers = min(counted, key=lambda item: int(item[1].sum()))
    low, high = low[order], high[order]
    begin = 0
    while begin < len(low):
        # At least one box, and as many as give a block of pairs.
        sums = np.cumsum(followers[begin:])
        end = begin + max(1, int(np.searchsorted(sums, _BLOCK)))
        one = np.repeat(np.arange(begin, end), followers[begin:end])
        within = np.arange(len(one)) - np.repeat(sums[: end - begin] - followers[begin:end], followers[begin:end])
        other = one + 1 + within
        shared = np.flatnonzero(((low[one] < high[other]) & (low[other] < high[one])).all(axis=1))
        if len(shared):
            return int(order[one[shared[0]]]), int(order[other[shared[0]]])
        begin = end
    return None


def _followers(low: _Matrix, high: _Matrix) -> tuple[_Matrix, _Matrix]:
    """The boxes ordered by their start along one dim, and for each, how many of the next ones begin before it ends."""
    order = np.argsort(low, kind="stable")
    ends = np.searchsorted(low[order], high[order], side="left")
    return order, ends - np.arange(len(order)) - 1
