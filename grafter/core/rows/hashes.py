"""Hashes of a sequence's token ids, one for each of its beginnings, so that a prompt is known again in a longer text.

    m(i, id)  = mix(mix(id) + (i + 1) * 0x9E3779B97F4A7C15)        of the token `id` at position i, modulo 2**64
    h(n)      = m(0, id_0) + ... + m(n - 1, id_(n-1))              of the first n tokens, modulo 2**64

`mix` is the last step of splitmix64 (Steele, Lea, Flood 2014). Two sequences of which one begins the other have the
same h at the length of the shorter. It is made against accidents, not against an attacker, who gains nothing by it.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np
import numpy.typing as npt

from grafter.core.signal_handlers import is_from_signal_handler

_Hashes = npt.NDArray[np.uint64]
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
