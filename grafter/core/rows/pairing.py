"""Which sequences of two programs are the same: by id, and where ids mean nothing, by their token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

_Hashes = npt.NDArray[np.uint64]
# (number in a, number in b, how many tokens are known to be the same; None: all, since the id is).
SequencePair = tuple[int, int, int | None]


def pair_sequences(
    ids_a: Sequence[str | int],
    hashes_a: Mapping[int, _Hashes],
    ids_b: Sequence[str | int],
    hashes_b: Mapping[int, _Hashes],
) -> list[SequencePair]:
    """Each sequence is in one pair at most. Equal ids pair, unless both sides' token ids contradict."""
    numbers_b = {own: number for number, own in enumerate(ids_b)}
    pairs: list[SequencePair] = []
    for number, own in enumerate(ids_a):
        other = numbers_b.get(own)
        if other is not None and not _contradict(hashes_a.get(number), hashes_b.get(other)):
            pairs.append((number, other, None))
    left_a = {number: hashes for number, hashes in hashes_a.items() if number not in {pair[0] for pair in pairs}}
    taken_b = {pair[1] for pair in pairs}
    left_b = {number: hashes for number, hashes in hashes_b.items() if number not in taken_b}
    return pairs + _by_content(left_a, left_b)


def _contradict(one: _Hashes | None, other: _Hashes | None) -> bool:
    if one is None or other is None:
        return False
    length = min(len(one), len(other))
    return bool(one[length - 1] != other[length - 1])


def _by_content(left_a: Mapping[int, _Hashes], left_b: Mapping[int, _Hashes]) -> list[SequencePair]:
    """Of all pairs of which one begins the other, those that agree furthest, then the first; each sequence once."""
    candidates = _beginnings(left_a, left_b) + [
        (length, a, b) for length, b, a in _beginnings(left_b, left_a) if len(left_a[a]) != len(left_b[b])
    ]
    pairs: list[SequencePair] = []
    taken_a: set[int] = set()
    taken_b: set[int] = set()
    for length, a, b in sorted(candidates, key=lambda found: (-found[0], found[1], found[2])):
        if a not in taken_a and b not in taken_b:
            taken_a.add(a)
            taken_b.add(b)
            pairs.append((a, b, length))
    return sorted(pairs)


def _beginnings(shorter: Mapping[int, _Hashes], longer: Mapping[int, _Hashes]) -> list[tuple[int, int, int]]:
    """(length, number, number) of each sequence of `shorter` that is the whole beginning of one of `longer`."""
    whole: dict[tuple[int, int], list[int]] = {}
    for number, hashes in shorter.items():
        whole.setdefault((len(hashes), int(hashes[-1])), []).append(number)
    lengths = sorted({length for length, _ in whole})
    found = []
    for other, hashes in longer.items():
        for length in lengths:
            if length > len(hashes):
                break
            found += [(length, number, other) for number in whole.get((length, int(hashes[length - 1])), ())]
    return found
