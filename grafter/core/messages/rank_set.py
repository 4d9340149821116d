"""Sets of ranks as they travel: `[[0, 1024, 1]]` for a thousand ranks, so that a header stays short in a large job.

Every rank's header says who takes part. Number by number, both manifests of 1024 + 1024 ranks would be 9 MB.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from grafter.core.processes import is_from_signal_handler

# [first, end, step], as `range` takes them.
Stretch = tuple[int, int, int]
_MOST_RANKS = 1 << 20


@lru_cache(maxsize=256)
def as_stretches(ranks: tuple[int, ...]) -> tuple[Stretch, ...]:
    """Stretches that make these ranks, which are in ascending order."""
    stretches: list[Stretch] = []
    for rank in ranks:
        first, end, step = stretches[-1] if stretches else (0, 0, 0)
        if stretches and (rank == end or end == first + 1):
            # The second rank of a stretch says how far apart they are.
            step = rank - first if end == first + 1 else step
            stretches[-1] = (first, rank + step, step)
        else:
            stretches.append((rank, rank + 1, 1))
    return tuple(stretches)


@lru_cache(maxsize=256)
def from_stretches(stretches: tuple[Stretch, ...]) -> tuple[int, ...]:
    """The ranks of stretches; the same stretches give the same object. Raises ValueError for what makes none."""
    ranks: list[int] = []
    for first, end, step in stretches:
        if not 0 <= first < end <= 2 * _MOST_RANKS or step < 1 or (ranks and first <= ranks[-1]):
            raise ValueError(f"{(first, end, step)} is no stretch of ranks in ascending order")
        ranks += range(first, end, step)
        if len(ranks) > _MOST_RANKS:
            raise ValueError(f"more than {_MOST_RANKS} ranks")
    return tuple(ranks)


def _read(value: Any) -> tuple[int, ...]:
    """A tuple of ranks as this program has it, or stretches as they travel."""
    if isinstance(value, tuple) and all(type(rank) is int for rank in value):
        return value
    try:
        stretches = tuple((first, end, step) for first, end, step in value)
    except (TypeError, ValueError) as error:
        if is_from_signal_handler(error):
            raise
        raise ValueError(f"{value!r} is no set of ranks") from None
    if not all(type(number) is int for stretch in stretches for number in stretch):
        raise ValueError(f"{value!r} is no set of ranks")
    return from_stretches(stretches)


RankSet = Annotated[tuple[int, ...], PlainValidator(_read), PlainSerializer(as_stretches)]
