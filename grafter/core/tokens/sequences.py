"""Sequences: which sequences of two programs are the same, by id, or where ids mean nothing, by their token ids.

Token ids travel as hashes, one for each prefix of a sequence, so that a prompt is found again in a longer text:

    m(i, id) = mix(mix(id) + (i + 1) * 0x9E3779B97F4A7C15)    of the token `id` at position i, modulo 2**64
    h(n) = m(0, id_0) + ... + m(n - 1, id_(n-1))              of the first n tokens, modulo 2**64

`mix` is the last step of splitmix64 (Steele, Lea, Flood 2014). If one sequence is a prefix of another, both have the
same h at the length of the shorter. The hash guards against accidents, not against attackers, who would gain nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from grafter.core.processes import is_from_signal_handler

SequenceId = str | int
Hashes = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
# (number in a, number in b, how many tokens are known to be the same; None: all, because the ids are equal).
SequencePair = tuple[int, int, int | None]

# Beyond every position.
_NO_LIMIT = 1 << 61


def common_codes(
    ids_a: Sequence[SequenceId],
    hashes_a: Mapping[int, Hashes],
    ids_b: Sequence[SequenceId],
    hashes_b: Mapping[int, Hashes],
) -> tuple[list[SequencePair], Int64Array, Int64Array]:
    """One code for each sequence of either side: those of a are their numbers, and b's paired sequences share them.

    Returns the pairs, the codes of b's sequences (int64 [n]), and for each code the position up to which both sides'
    tokens are known to be the same (int64; 2**61 if they all are).
    """
    pairs = pair_sequences(ids_a, hashes_a, ids_b, hashes_b)
    count = len(ids_a) + len(ids_b)
    codes_b, limits = np.arange(len(ids_a), count, dtype=np.int64), np.full(count, _NO_LIMIT, dtype=np.int64)
    for of_a, of_b, length in pairs:
        codes_b[of_b] = of_a
        limits[of_a] = _NO_LIMIT if length is None else length
    return pairs, codes_b, limits


def pair_sequences(
    ids_a: Sequence[SequenceId],
    hashes_a: Mapping[int, Hashes],
    ids_b: Sequence[SequenceId],
    hashes_b: Mapping[int, Hashes],
) -> list[SequencePair]:
    """The sequences that are the same, each in at most one pair. Equal ids pair, unless the token ids contradict."""
    numbers_b = {own: number for number, own in enumerate(ids_b)}
    pairs: list[SequencePair] = []
    for number, own in enumerate(ids_a):
        other = numbers_b.get(own)
        if other is not None and not _contradict(hashes_a.get(number), hashes_b.get(other)):
            pairs.append((number, other, None))
    taken_a, taken_b = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
    left_a = {number: hashes for number, hashes in hashes_a.items() if number not in taken_a}
    left_b = {number: hashes for number, hashes in hashes_b.items() if number not in taken_b}
    return pairs + _by_content(left_a, left_b)


def _contradict(one: Hashes | None, other: Hashes | None) -> bool:
    if one is None or other is None:
        return False
    length = min(len(one), len(other))
    return bool(one[length - 1] != other[length - 1])


def _by_content(left_a: Mapping[int, Hashes], left_b: Mapping[int, Hashes]) -> list[SequencePair]:
    """Pairs of which one sequence is a prefix of the other: those that agree furthest, then the first; each once."""
    candidates = _prefixes(left_a, left_b) + [
        (length, a, b) for length, b, a in _prefixes(left_b, left_a) if len(left_a[a]) != len(left_b[b])
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


def _prefixes(shorter: Mapping[int, Hashes], longer: Mapping[int, Hashes]) -> list[tuple[int, int, int]]:
    """(length, number, number) of each sequence of `shorter` that is a prefix of one of `longer`."""
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


def prefix_hashes(codes: Int64Array, places: Int64Array, ids: Int64Array) -> dict[int, Hashes]:
    """For each sequence with a row of position 0: the hashes of its first 1, 2, ... tokens, uint64 [length].

    codes: the number of each row's sequence; negative for padding. places: its position. ids: its token id. All are
    int64 [rows]. A sequence is hashed up to the first gap in its positions.
    """
    kept = codes >= 0
    codes, places, ids = codes[kept], places[kept], ids[kept]
    order = np.lexsort((places, codes))
    codes, places, ids = codes[order], places[order], ids[order]
    found: dict[int, Hashes] = {}
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


def _marks(places: Int64Array, ids: Int64Array) -> Hashes:
    # Arrays of unsigned integers wrap around, as the formula requires.
    steps = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(_mix(ids.astype(np.uint64)) + steps)


def _mix(x: Hashes) -> Hashes:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = x ^ (x >> np.uint64(31))
    return mixed


def as_text(hashes: Hashes) -> str:
    """Base64 of the hashes, 8 bytes each, little-endian."""
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode()


def from_text(text: str) -> Hashes:
    """The hashes of a text of `as_text`. Raises ValueError for any other text."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        if is_from_signal_handler(error):
            raise
        content = b""
    if not content or len(content) % 8:
        raise ValueError(f"{text[:40]!r} are not hashes of token ids.")
    return np.frombuffer(content, dtype="<u8").astype(np.uint64)
