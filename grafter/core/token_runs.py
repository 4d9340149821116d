"""Runs of tokens: which token each row of a dumped tensor is."""

from __future__ import annotations

from grafter.core.records import Record


class TokenRuns(Record):
    """Which token each row is: (sequence, start, count) for `count` rows at the positions from `start` on, in order.

    Rows are those of the dim `t`, or of `b s` flattened. Rows that are no token (padding) are runs of sequence None.
    hashes: (sequence, base64) where its token ids were given from position 0 on: 8 bytes per beginning of it
    (grafter/core/rows/hashes.py).
    """

    runs: tuple[tuple[str | int | None, int, int], ...]
    hashes: tuple[tuple[str | int, str], ...] = ()
