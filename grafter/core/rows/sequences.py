"""Sequences: which sequences of two programs are the same: by id, and where ids mean nothing, by their token ids."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from grafter.core.processes import is_from_signal_handler

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


# Hashes of a sequence's token ids, one for each of its beginnings, so that a prompt is known again in a longer text.
#
# m(i, id) = mix(mix(id) + (i + 1) * 0x9E3779B97F4A7C15) of the token `id` at position i, modulo 2**64 h(n) = m(0,
# id_0) + ... + m(n - 1, id_(n-1)) of the first n tokens, modulo 2**64
#
# `mix` is the last step of splitmix64 (Steele, Lea, Flood 2014). Two sequences of which one begins the other have the
# same h at the length of the shorter. It is made against accidents, not against an attacker, who gains nothing by it.

_Numbers = npt.NDArray[np.int64]


def prefix_hashes(codes: _Numbers, places: _Numbers, ids: _Numbers) -> dict[int, _Hashes]:
    """For each sequence number that has a row of position 0: the hashes of its first 1, 2, ... tokens.

    Hashes are computed as far as its positions continue without a gap. All arguments [rows]; a negative code is
    padding.
    """
    kept = codes >= 0
    codes, places, ids = codes[kept], places[kept], ids[kept]
    order = np.lexsort((places, codes))
    codes, places, ids = codes[order], places[order], ids[order]
    found: dict[int, _Hashes] = {}
    if not len(codes):
        return found
    first = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    counts = np.diff(np.append(first, len(codes)))
    within = np.arange(len(codes)) - np.repeat(first, counts)
    marks = _marks(places, ids)
    for begin, count in zip(first.tolist(), counts.tolist(), strict=True):
        gap = np.flatnonzero(places[begin : begin + count] != within[begin : begin + count])
        length = int(gap[0]) if len(gap) else count
        if length:
            found[int(codes[begin])] = np.cumsum(marks[begin : begin + length], dtype=np.uint64)
    return found


def _marks(places: _Numbers, ids: _Numbers) -> _Hashes:
    # Arrays of unsigned numbers wrap around, as the formula wants it.
    steps = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(_mix(ids.astype(np.uint64)) + steps)


def _mix(x: _Hashes) -> _Hashes:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Hashes = x ^ (x >> np.uint64(31))
    return mixed


def as_text(hashes: _Hashes) -> str:
    """Base64 of the hashes, 8 bytes each, little-endian."""
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode()


def from_text(text: str) -> _Hashes:
    """Raises ValueError for what `as_text` does not make."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        if is_from_signal_handler(error):
            raise
        content = b""
    if not content or len(content) % 8:
        raise ValueError(f"{text[:40]!r} are no hashes of token ids.")
    return np.frombuffer(content, dtype="<u8").astype(np.uint64)
