"""Announced tokens: which token each row of a rank's tensor holds, as sent in the header.

A peer's announcement is checked before anything is computed from it. Its cost depends on the length of its text, not on
the number of rows that it claims.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from grafter.core.layout.token_rows import WindowedTokens
from grafter.core.processes import is_from_signal_handler
from grafter.core.rows.sequences import as_text, from_text
from grafter.core.rows.tokens import SequenceId, Tokens
from grafter.errors import LayoutError, UsageError

_Numbers = npt.NDArray[np.int64]
_LARGEST = 1 << 61
# Of one rank. A packed batch has a run per sequence, a decode step one per row.
MOST_RUNS = 1 << 20
MOST_HASHES = 1 << 20
_LONGEST_ID = 512
_MOST_KNOWN = 64
_WIDTHS = {"2": "<i2", "4": "<i4", "8": "<i8"}

_Id = (
    Annotated[int, Field(strict=True, ge=-_LARGEST, le=_LARGEST)]
    | Annotated[str, Field(strict=True, max_length=_LONGEST_ID)]
)


class AnnouncedTokens(BaseModel):
    """The announced tokens of one rank.

    runs: (number of the sequence or -1, first position, count) of each run, base64. starts: for each sequence, the
    position from which on rows count, or nothing. hashes: (number, base64) as in dumps. If several ranks of a role have
    the same tokens, one of them sends them, and the others refer to its role rank: `same_as`.
    """

    model_config = ConfigDict(frozen=True)

    sequences: tuple[_Id, ...] = ()
    runs: str = ""
    starts: tuple[Annotated[int, Field(strict=True, ge=0, le=_LARGEST)], ...] = ()
    hashes: tuple[tuple[int, str], ...] = ()
    same_as: int | None = None

    def read(self) -> WindowedTokens:
        """The same announcement gives the same object. Raises LayoutError for one that makes no sense."""
        return _read(self.sequences, self.runs, self.starts, self.hashes)


def announce(tokens: Tokens, starts: tuple[int, ...] = ()) -> AnnouncedTokens:
    """Raises UsageError for more than travels in a header."""
    known: AnnouncedTokens | None = tokens.announced.get(starts)
    if known is None:
        if len(tokens.announced) >= _MOST_KNOWN:
            tokens.announced.clear()
        known = tokens.announced[starts] = _announce(tokens, starts)
    return known


def _announce(tokens: Tokens, starts: tuple[int, ...]) -> AnnouncedTokens:
    if len(tokens.runs) > MOST_RUNS:
        raise UsageError(f"tokens= has {len(tokens.runs)} runs of rows, and at most {MOST_RUNS} are announced.")
    if sum(map(len, tokens.hashes.values())) > MOST_HASHES:
        raise UsageError(
            f"tokens= has token_ids for more than {MOST_HASHES} tokens, whose hashes would all travel at every point. "
            "Give sequences the same ids in both jobs and leave token_ids away."
        )
    long = next((own for own in tokens.sequences if isinstance(own, str) and len(own) > _LONGEST_ID), None)
    if long is not None:
        raise UsageError(
            f"tokens= has a sequence id of {len(long)} characters ({long[:40]!r}...), and {_LONGEST_ID} travel."
        )
    announced = AnnouncedTokens(
        sequences=tokens.sequences,
        runs=_as_text(tokens.runs),
        starts=starts,
        hashes=tuple((number, as_text(values)) for number, values in tokens.hashes.items()),
    )
    _remember((announced.sequences, announced.runs, announced.hashes), tokens)
    return announced


@lru_cache(maxsize=_MOST_KNOWN)
def _read(
    sequences: tuple[SequenceId, ...], runs: str, starts: tuple[int, ...], hashes: tuple[tuple[int, str], ...]
) -> WindowedTokens:
    if starts and len(starts) != len(sequences):
        raise LayoutError("tokens that were announced contradict themselves.")
    tokens = _known.get((sequences, runs, hashes))
    if tokens is None:
        tokens = _read_tokens(sequences, runs, hashes)
        _remember((sequences, runs, hashes), tokens)
    return WindowedTokens(tokens, starts)


# What travels, and the tokens that it is: those that this rank announces are most often those of the others, too.
_Announced = tuple[tuple[SequenceId, ...], str, tuple[tuple[int, str], ...]]
_known: dict[_Announced, Tokens] = {}


def _remember(announced: _Announced, tokens: Tokens) -> None:
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[announced] = tokens


def _read_tokens(sequences: tuple[SequenceId, ...], runs: str, hashes: tuple[tuple[int, str], ...]) -> Tokens:
    found = _from_text(runs)
    known = {}
    for number, text in hashes:
        try:
            known[number] = from_text(text)
        except ValueError as error:
            if is_from_signal_handler(error):
                raise
            raise LayoutError(f"tokens that were announced: {error}") from None
    try:
        return Tokens(sequences, found, known)
    except UsageError as error:
        raise LayoutError(f"of tokens that were announced: {error}") from None


def _as_text(runs: _Numbers) -> str:
    """The narrowest width that has room for all numbers, and their bytes, column by column."""
    highest = int(runs.max()) if len(runs) else 0
    width = "2" if highest < 1 << 15 else "4" if highest < 1 << 31 else "8"
    return width + base64.b64encode(runs.T.astype(_WIDTHS[width]).tobytes()).decode()


def _from_text(text: str) -> _Numbers:
    try:
        content = base64.b64decode(text[1:], validate=True)
        numbers = np.frombuffer(content, dtype=_WIDTHS[text[:1]])
        columns = numbers.reshape(3, -1) if len(numbers) else np.zeros((3, 0))
    except (binascii.Error, KeyError, ValueError) as error:
        if is_from_signal_handler(error):
            raise
        raise LayoutError("tokens that were announced cannot be read.") from None
    if columns.shape[1] > MOST_RUNS:
        raise LayoutError(f"tokens with {columns.shape[1]} runs were announced; {MOST_RUNS} are read at most.")
    found: _Numbers = columns.T.astype(np.int64)
    return found


def resolved(announced: Sequence[tuple[int, AnnouncedTokens]]) -> dict[int, WindowedTokens]:
    """Of one role: (role rank, what it announces). Raises LayoutError for what makes no sense."""
    found = {rank: own.read() for rank, own in announced if own.same_as is None}
    for rank, own in announced:
        if own.same_as is not None:
            if own.same_as not in found:
                raise LayoutError(f"rank {rank} announces the tokens of rank {own.same_as}, which announces none.")
            found[rank] = found[own.same_as]
    return {rank: found[rank] for rank, _ in announced}


def told_once(announced: Sequence[tuple[int, AnnouncedTokens | None]]) -> dict[int, AnnouncedTokens]:
    """The ranks whose tokens another rank before them has, too, and what they announce instead."""
    first: dict[AnnouncedTokens, int] = {}
    instead = {}
    for rank, own in announced:
        if own is not None and (other := first.setdefault(own, rank)) != rank:
            instead[rank] = AnnouncedTokens(same_as=other)
    return instead
