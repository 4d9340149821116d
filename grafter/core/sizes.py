"""Sizes and ranges of steps as users write them: `512MiB`, `0-3,10,20-`. Imports no torch."""

from __future__ import annotations

import re

_UNITS = {"": 0, "b": 0, "kib": 10, "mib": 20, "gib": 30, "tib": 40}

_SIZE = re.compile(r"(\d{1,18})\s*([a-z]*)", re.IGNORECASE)

_STEPS = re.compile(r"(\d{1,18})(?:\s*(-)\s*(\d{1,18})?)?")


def read_size(text: str) -> int:
    """The number of bytes in `4096`, `512 MiB` or `1GiB`. Raises ValueError for other texts."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError("it must be a number of bytes, such as 4096, 512MiB or 10GiB")
    return int(found[1]) << _UNITS[found[2].lower()]


def read_steps(text: str) -> tuple[tuple[int, int | None], ...]:
    """The ranges of steps in `0-3,10,20-`, both ends included. Raises ValueError for other texts."""
    ranges = []
    for part in text.split(","):
        found = _STEPS.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{part.strip()!r} is neither a step nor a range; write 0-3,10 or 20- (from 20 on)")
        first = int(found[1])
        last = first if not found[2] else int(found[3]) if found[3] else None
        if last is not None and last < first:
            raise ValueError(f"{part.strip()!r} ends before it begins")
        ranges.append((first, last))
    return tuple(ranges)
