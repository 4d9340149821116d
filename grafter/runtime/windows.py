"""Windows: which rows of a point count, by absolute position, so that what was sent once is not sent again.

turn 1    positions 0 ... 511                    all of them
turn 2    positions 0 ... 1023, start=512        the last 512
turn 3    positions 0 ... 1535, new_rows_only    those after the last that met the other side's, per sequence
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from grafter.config.options import PointOptions
from grafter.core.messages.announced_tokens import AnnouncedTokens, announce
from grafter.core.points import PointKey
from grafter.core.tokens.runs import FEW
from grafter.core.tokens.sequences import SequenceId
from grafter.core.tokens.tokens import Tokens
from grafter.errors import UsageError

# Of points and sequences together. The one that was longest unused is forgotten first, and then sent from its start.
MOST_REMEMBERED = 1 << 16

# What stays of a point from step to step, and the sequence.
_Mark = tuple[str, str, str, SequenceId]


class Windows:
    """One rank's: how far each sequence of each point got."""

    def __init__(self) -> None:
        self._reached: OrderedDict[_Mark, int] = OrderedDict()

    def announce(self, options: PointOptions, key: PointKey | None) -> AnnouncedTokens | None:
        """The tokens of this call and from where on they count. Raises UsageError where they make no sense.

        key: needed where only new rows count.
        """
        tokens = options.tokens
        if tokens is None:
            if options.start is not None or options.new_rows_only:
                given = "start=" if options.start is not None else "new_rows_only=True"
                raise UsageError(
                    f"{given} counts rows by their position in a sequence, and nothing says it: give tokens=, too "
                    "(grafter.Tokens.from_positions, from_lengths)."
                )
            return None
        if not isinstance(tokens, Tokens):
            raise UsageError(f"tokens= is a grafter.Tokens, not {tokens!r}.")
        if not options.has_window:
            return announce(tokens)
        if options.start is None:
            starts = [min(length, options.run_start) for length in _lengths(tokens)]
        else:
            starts = _starts(tokens, options.start)
        if options.new_rows_only and key is not None:
            starts = list(map(max, starts, self._marks(tokens, key)))
        return announce(tokens, tuple(starts) if any(starts) else ())

    def _marks(self, tokens: Tokens, key: PointKey) -> list[int]:
        marks = [0] * len(tokens.sequences)
        point = key.name, repr(key.identifying), key.phase
        for number, (name, length) in enumerate(zip(tokens.sequences, _lengths(tokens), strict=True)):
            mark = (*point, name)
            reached = self._reached.get(mark, 0)
            if reached > length:
                # It ends before where it was: another sequence of the same id, or one that was taken back.
                del self._reached[mark]
            elif reached:
                self._reached.move_to_end(mark)
                marks[number] = reached
        return marks

    def advance(self, key: PointKey, reached: Mapping[SequenceId, int]) -> None:
        """The point met the other side. reached: for each sequence the position after its last row that did."""
        point = key.name, repr(key.identifying), key.phase
        for name, end in reached.items():
            mark = (*point, name)
            self._reached[mark] = max(end, self._reached.get(mark, 0))
            self._reached.move_to_end(mark)
        while len(self._reached) > MOST_REMEMBERED:
            self._reached.popitem(last=False)


def _lengths(tokens: Tokens) -> list[int]:
    """For each sequence, the position after its last row."""
    if len(tokens.runs) > FEW:
        ends = np.zeros(len(tokens.sequences), dtype=np.int64)
        there = tokens.runs[tokens.runs[:, 0] >= 0]
        np.maximum.at(ends, there[:, 0], there[:, 1] + there[:, 2])
        found: list[int] = ends.tolist()
        return found
    lengths = [0] * len(tokens.sequences)
    for number, start, count in tokens.runs.tolist():
        if number >= 0:
            lengths[number] = max(lengths[number], start + count)
    return lengths


def ends_of(tokens: Tokens) -> dict[SequenceId, int]:
    """For each sequence, the position after its last row."""
    return dict(zip(tokens.sequences, _lengths(tokens), strict=True))


def _starts(tokens: Tokens, start: Any) -> list[int]:
    """One start per sequence. Raises UsageError for one that does not lie in its sequence."""
    names, lengths = tokens.sequences, _lengths(tokens)
    if isinstance(start, Mapping):
        strange = [name for name in start if name not in names]
        if strange:
            raise UsageError(
                f"start= names the sequence {strange[0]!r}, and tokens= has "
                f"{', '.join(map(repr, names[:5])) or 'none'}{', ...' if len(names) > 5 else ''}."
            )
        given = [start.get(name, 0) for name in names]
    elif hasattr(start, "tolist"):
        given = start.tolist()
    else:
        given = list(start) if isinstance(start, (list, tuple)) else start
    if not isinstance(given, list):
        given = [given] * len(names)
    if len(given) != len(names):
        raise UsageError(
            f"start= has {len(given)} positions, and tokens= {len(names)} sequences: give one for each, in the order "
            "of their first rows, or a dict from sequence to position."
        )
    for name, own, length in zip(names, given, lengths, strict=True):
        if type(own) is not int or not 0 <= own <= length:
            raise UsageError(
                f"start= is {own!r} for the sequence {name!r}, whose rows end at {length}: a start is a whole number "
                f"from 0 to {length}. Nothing was sent."
            )
    return given
