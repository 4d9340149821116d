"""Bytes and seconds as people write and read them."""

from __future__ import annotations

import re

KIB, MIB = 2**10, 2**20
_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": 1024 * MIB}


def parse_size(text: str) -> int:
    """Bytes of `4096`, `4KiB`, `1 MiB`: a positive multiple of 4, since tensors are float32. Else ValueError."""
    found = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size, such as 4096, 64KiB or 1MiB")
    nbytes = int(found[1]) * _UNITS[found[2].lower()]
    if nbytes == 0 or nbytes % 4:
        raise ValueError(f"{text!r} is not a positive multiple of 4 bytes (tensors are float32)")
    return nbytes


def size_text(nbytes: int) -> str:
    return f"{nbytes / MIB:g} MiB" if nbytes >= MIB else f"{nbytes / KIB:g} KiB"


def time_text(seconds: float) -> str:
    """Three digits and the unit that suits: 95.0 ns, 4.20 us, 1.52 ms, 2.31 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{three_digits(seconds * factor)} {unit}"
    return f"{three_digits(seconds * 1e9)} ns"


def three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
