"""Tokens: which token each row of a tensor is, so that rows of two programs can be paired whatever their batches.

    a trainer's packed batch    rows 0 ... 9    sequence 0 from 0, sequence 1 from 0
    an engine's decode step     rows 0, 1       "req-7" at position 5, "req-9" at position 3

Everything is computed on runs (stretches of positions of a sequence), never on single rows, so the cost of a record
from elsewhere follows its length, not the number of rows that it claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from grafter.core.processes import is_from_signal_handler
from grafter.core.records import Record
from grafter.core.tokens.runs import (
    LARGEST,
    PADDING,
    InvalidTokens,
    check_each_once,
    check_runs,
    each_of,
    few_runs,
    in_order_of_rows,
    joined_runs,
    read_integers,
    read_sequence_ids,
    runs_of_rows,
    total,
)
from grafter.core.tokens.sequences import Int64Array, SequenceId, as_text, from_text, prefix_hashes
from grafter.errors import UsageError


class TokenRuns(Record):
    """Which token each row of a dumped tensor is.

    runs: (sequence, start, count) for `count` rows at the positions from `start` on, in the order of the rows. Rows are
    those of the dim `t`, or of `b s` flattened. Padding is a run of the sequence None. hashes: (sequence, base64) of
    each sequence whose token ids were given from position 0 on: 8 bytes for each of its prefixes
    (grafter/core/tokens/sequences.py).
    """

    runs: tuple[tuple[str | int | None, int, int], ...]
    hashes: tuple[tuple[str | int, str], ...] = ()


class Tokens:
    """Which token each row of a tensor is: a sequence, and a position in it.

    Rows are those of the dim `t`, or of `b s` flattened. `from_positions` takes what a model has at hand,
    `from_lengths` a packed batch.

    sequences: the ids, in the order of their first rows. runs: int64 [n, 3], (number of the sequence or -1 for padding,
    first position, count), in the order of the rows. rows: how many there are, padding included. hashes: for each
    sequence number whose token ids were given from position 0 on, uint64 [length]: the hashes of its first 1, 2, ...
    ids.
    """

    __slots__ = ("announced", "hashes", "rows", "runs", "sequences")

    def __init__(
        self,
        sequences: tuple[SequenceId, ...],
        runs: Int64Array,
        hashes: Mapping[int, npt.NDArray[np.uint64]] | None = None,
    ) -> None:
        check_runs(sequences, runs, hashes)
        self.sequences, self.runs = sequences, joined_runs(runs)
        self.rows = total(self.runs[:, 2])
        self.hashes = dict(hashes or {})
        # Filled when announced, by the positions from which on rows count: every layer is given the same tokens.
        self.announced: dict[tuple[int, ...], Any] = {}
        check_each_once(self.sequences, self.runs)

    @classmethod
    def from_positions(cls, sequence_ids: Any, positions: Any, *, token_ids: Any = None) -> Tokens:
        """From the sequence and the position of each row.

        sequence_ids: integers or texts, 1-D [t] or 2-D [b, s] as tensor, array or (nested) list; for 2-D positions
            also one per row of the batch, [b]. None stands for padding.
        positions: integers of the same shape, from 0 on; a negative one stands for padding.
        token_ids: the ids of the tokens, of the same shape. With them, a sequence is recognised in a job that gives it
            another id.

        A sequence must have the same id in both programs, or token ids in both. Reading a tensor from a GPU waits for
        it. Raises UsageError for shapes that differ, and for a position of a sequence that is there twice.
        """
        places = read_integers(positions, "positions")
        shape = places.shape
        if len(shape) not in (1, 2):
            raise UsageError(f"positions has {len(shape)} dims; it is one number per row, [t] or [b, s].")
        codes, names = read_sequence_ids(sequence_ids, shape)
        places = places.reshape(-1)
        padding = (codes < 0) | (places < 0)
        codes, places = np.where(padding, PADDING, codes), np.where(padding, 0, places)
        if len(places) and int(places.max()) >= LARGEST:
            raise UsageError(f"the position {int(places.max())} is too large; the largest is {LARGEST - 1}.")
        ids = None
        if token_ids is not None:
            ids = read_integers(token_ids, "token_ids")
            if ids.shape != shape:
                raise UsageError(f"token_ids is {list(ids.shape)}, and positions {list(shape)}: there is one per row.")
            ids = ids.reshape(-1)
        runs = runs_of_rows(codes, places)
        numbers, names = in_order_of_rows(runs[:, 0], names)
        runs[:, 0] = numbers[runs[:, 0]]
        tokens = cls(names, runs)
        if ids is not None:
            tokens.hashes = prefix_hashes(numbers[codes], places, ids)
        return tokens

    @classmethod
    def from_lengths(cls, sequence_ids: Any, lengths: Any, starts: Any = None, *, token_ids: Any = None) -> Tokens:
        """From a packed batch: `lengths[i]` rows of the sequence `sequence_ids[i]`, one after the other.

        sequence_ids: integers or texts, [n], None for padding. lengths: integers, [n]. starts: the first position of
        each, [n]; by default 0. token_ids: as for `from_positions`, one per row, [sum of lengths].

        Raises UsageError for lengths that differ or are negative, and for a position of a sequence that is there twice.
        """
        if token_ids is None and (few := few_runs(sequence_ids, lengths, starts)) is not None:
            return cls(*few)
        counts = read_integers(lengths, "lengths")
        if counts.ndim != 1:
            raise UsageError(f"lengths has {counts.ndim} dims; it is one number per sequence.")
        codes, names = read_sequence_ids(sequence_ids, counts.shape)
        first = read_integers(starts, "starts") if starts is not None else np.zeros_like(counts)
        if first.shape != counts.shape:
            raise UsageError(
                f"starts has {list(first.shape)}, and lengths {list(counts.shape)}: there is one for each."
            )
        if len(counts) and (int(counts.min()) < 0 or int(first.min()) < 0):
            raise UsageError("lengths and starts count from 0; one is negative. Padding is a sequence of id None.")
        if sum(counts.tolist()) > LARGEST or (len(first) and int((first + counts).max()) > LARGEST):
            raise UsageError("lengths or starts are too large for rows.")
        first = np.where(codes < 0, 0, first)
        codes, first, counts = (column[counts > 0] for column in (codes, first, counts))
        numbers, names = in_order_of_rows(codes, names)
        tokens = cls(names, np.stack([numbers[codes], first, counts], axis=1).reshape(-1, 3))
        if token_ids is not None:
            ids = read_integers(token_ids, "token_ids").reshape(-1)
            if len(ids) != tokens.rows:
                raise UsageError(f"token_ids has {len(ids)} numbers, and lengths make {tokens.rows} rows.")
            tokens.hashes = prefix_hashes(*tokens._expanded(), ids)
        return tokens

    @classmethod
    def from_record(cls, record: TokenRuns) -> Tokens:
        """The tokens of a dumped record. Raises InvalidTokens (a ValueError) for a record that contradicts itself."""
        numbers: dict[SequenceId, int] = {}
        rows = 0
        runs = []
        for sequence, start, count in record.runs:
            rows += count
            if start < 0 or count < 1 or start + count > LARGEST or rows > LARGEST:
                raise InvalidTokens(f"a run of {count} rows from position {start} is impossible.")
            if sequence is None:
                runs.append((PADDING, 0, count))
            else:
                runs.append((numbers.setdefault(sequence, len(numbers)), start, count))
        hashes = {}
        for sequence, text in record.hashes:
            if sequence not in numbers:
                raise InvalidTokens(f"the sequence {sequence!r} has hashes and no rows.")
            try:
                hashes[numbers[sequence]] = from_text(text)
            except ValueError as error:
                if is_from_signal_handler(error):
                    raise
                raise InvalidTokens(f"the sequence {sequence!r}: {error}") from None
        return cls(tuple(numbers), np.array(runs, dtype=np.int64).reshape(-1, 3), hashes)

    def record(self) -> TokenRuns:
        """The record that is dumped."""
        return TokenRuns(
            runs=tuple(
                (self.sequences[number] if number >= 0 else None, start, count)
                for number, start, count in self.runs.tolist()
            ),
            hashes=tuple((self.sequences[number], as_text(values)) for number, values in self.hashes.items()),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and self.record() == other.record()

    def __hash__(self) -> int:
        return hash((self.sequences, self.runs.tobytes()))

    def __repr__(self) -> str:
        return f"<Tokens {self.rows} rows of {len(self.sequences)} sequences>"

    def token_at(self, row: int) -> tuple[SequenceId | None, int]:
        """The sequence and position of one row; for padding, None and a number without a meaning."""
        ends = np.cumsum(self.runs[:, 2])
        number = int(np.searchsorted(ends, row, side="right"))
        sequence, start, count = self.runs[number].tolist()
        return (self.sequences[sequence] if sequence >= 0 else None), start + row - (int(ends[number]) - count)

    def at_rows(self, rows: Int64Array) -> Tokens:
        """The tokens of some of the rows, in the order of `rows`, int64 [n]."""
        numbers, places = self._expanded()
        found = Tokens(self.sequences, runs_of_rows(numbers[rows], places[rows]))
        found.hashes = self.hashes
        return found

    def _expanded(self) -> tuple[Int64Array, Int64Array]:
        """The sequence number and the position of each row."""
        numbers, starts, counts = self.runs.T
        return np.repeat(numbers, counts), each_of(starts, counts)
