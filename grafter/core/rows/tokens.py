"""Tokens: which token each row of a tensor is, so that rows of two programs can be paired whatever their batches.

    a trainer's packed batch    rows 0 ... 9    sequence 0 from 0, sequence 1 from 0
    an engine's decode step     rows 0, 1       "req-7" at position 5, "req-9" at position 3

Pure and exact. Everything is worked out on runs (a sequence's stretch of positions), never on what a record claims that
a run holds, so that a record from elsewhere costs what its own length costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from grafter.core.processes import is_from_signal_handler
from grafter.core.records import Record
from grafter.core.rows.matching import TokenMatch, match, placed_runs
from grafter.core.rows.sequences import as_text, from_text, prefix_hashes
from grafter.errors import UsageError

SequenceId = str | int
_Numbers = npt.NDArray[np.int64]

_PADDING = -1
# Sums of two of them stay within int64.
_LARGEST = 1 << 61
# Up to so many, NumPy's calls cost more than the numbers one by one.
FEW = 16


class Tokens:
    """Which token each row of a tensor is: a sequence and a position in it. Rows are those of the dim `t`, or of `b s`

    flattened.

    `from_positions` takes what a model has at hand, `from_lengths` a packed batch. sequences: the ids, in the order of
    their first row. runs: int64 [n, 3], (number of the sequence or -1 for padding, first position, count), in the order
    of the rows. hashes: for each sequence number whose token ids were given from position 0 on, uint64 [length]: the
    hash of its first 1, 2, ... ids.
    """

    __slots__ = ("announced", "hashes", "rows", "runs", "sequences")

    def __init__(
        self,
        sequences: tuple[SequenceId, ...],
        runs: _Numbers,
        hashes: Mapping[int, npt.NDArray[np.uint64]] | None = None,
    ) -> None:
        _check_runs(sequences, runs, hashes)
        self.sequences, self.runs = sequences, _joined_runs(runs)
        # How many rows there are, padding included.
        self.rows = total(self.runs[:, 2])
        self.hashes = dict(hashes or {})
        # As it travels, once it has, by from where on rows count: the same tokens are given at every layer.
        self.announced: dict[tuple[int, ...], Any] = {}
        _check_each_once(self)

    @classmethod
    def from_positions(cls, sequence_ids: Any, positions: Any, *, token_ids: Any = None) -> Tokens:
        """From the sequence and the position of each row.

        sequence_ids: integers or texts, 1-D [t] or 2-D [b, s] as tensor, array or (nested) list; for 2-D positions
            also one per row of the batch, [b]. None stands for padding.
        positions: integers of the same shape, from 0 on; a negative one stands for padding.
        token_ids: the ids of the tokens, of the same shape. Where given, sequences are hashed, so that they are known
            again in a job that gives them other ids.

        The same sequence has the same id in both programs, or token ids on both sides. Reading a tensor from a GPU
        waits for it. Raises UsageError for shapes that differ, and where one position of a sequence is there twice.
        """
        places = _integers(positions, "positions")
        shape = places.shape
        if len(shape) not in (1, 2):
            raise UsageError(f"positions has {len(shape)} dims; it is one number per row, [t] or [b, s].")
        codes, names = _codes(sequence_ids, shape)
        places = places.reshape(-1)
        padding = (codes < 0) | (places < 0)
        codes, places = np.where(padding, _PADDING, codes), np.where(padding, 0, places)
        if len(places) and int(places.max()) >= _LARGEST:
            raise UsageError(f"the position {int(places.max())} is too large for one.")
        ids = None
        if token_ids is not None:
            ids = _integers(token_ids, "token_ids")
            if ids.shape != shape:
                raise UsageError(f"token_ids is {list(ids.shape)}, and positions {list(shape)}: there is one per row.")
            ids = ids.reshape(-1)
        runs = _runs(codes, places)
        numbers, names = _in_order_of_rows(runs[:, 0], names)
        runs[:, 0] = numbers[runs[:, 0]]
        tokens = cls(names, runs)
        if ids is not None:
            tokens.hashes = prefix_hashes(numbers[codes], places, ids)
        return tokens

    @classmethod
    def from_lengths(cls, sequence_ids: Any, lengths: Any, starts: Any = None, *, token_ids: Any = None) -> Tokens:
        """From a packed batch: `lengths[i]` rows of the sequence `sequence_ids[i]`, one after the other.

        sequence_ids: integers or texts, [n], None for padding. lengths: integers, [n]. starts: the first position of
        each, [n]; by default 0. token_ids: as `from_positions` has it, one per row, [sum of lengths].

        Raises UsageError for lengths that differ or are negative, and for a position of a sequence that is there twice.
        """
        if token_ids is None and (few := _few_runs(sequence_ids, lengths, starts)) is not None:
            return cls(*few)
        counts = _integers(lengths, "lengths")
        if counts.ndim != 1:
            raise UsageError(f"lengths has {counts.ndim} dims; it is one number per sequence.")
        codes, names = _codes(sequence_ids, counts.shape)
        first = _integers(starts, "starts") if starts is not None else np.zeros_like(counts)
        if first.shape != counts.shape:
            raise UsageError(
                f"starts has {list(first.shape)}, and lengths {list(counts.shape)}: there is one for each."
            )
        if len(counts) and (int(counts.min()) < 0 or int(first.min()) < 0):
            raise UsageError("lengths and starts count from 0; one is negative. Padding is a sequence of id None.")
        if sum(counts.tolist()) > _LARGEST or (len(first) and int((first + counts).max()) > _LARGEST):
            raise UsageError("lengths or starts are too large for rows.")
        first = np.where(codes < 0, 0, first)
        codes, first, counts = (column[counts > 0] for column in (codes, first, counts))
        numbers, names = _in_order_of_rows(codes, names)
        tokens = cls(names, np.stack([numbers[codes], first, counts], axis=1).reshape(-1, 3))
        if token_ids is not None:
            ids = _integers(token_ids, "token_ids").reshape(-1)
            if len(ids) != tokens.rows:
                raise UsageError(f"token_ids has {len(ids)} numbers, and lengths make {tokens.rows} rows.")
            expanded = tokens._expanded()
            tokens.hashes = prefix_hashes(*expanded, ids)
        return tokens

    @classmethod
    def from_record(cls, record: TokenRuns) -> Tokens:
        """As it was dumped. Raises ValueError (UsageError is one of its kinds) for a record that is none."""
        numbers: dict[SequenceId, int] = {}
        rows = 0
        runs = []
        for sequence, start, count in record.runs:
            rows += count
            if start < 0 or count < 1 or start + count > _LARGEST or rows > _LARGEST:
                raise InvalidTokens(f"a run of {count} rows from position {start} is none.")
            if sequence is None:
                runs.append((_PADDING, 0, count))
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
        """As it is dumped."""
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
        """Sequence and position of one row; of padding, None and a number that means nothing."""
        ends = np.cumsum(self.runs[:, 2])
        number = int(np.searchsorted(ends, row, side="right"))
        sequence, start, count = self.runs[number].tolist()
        return (self.sequences[sequence] if sequence >= 0 else None), start + row - (int(ends[number]) - count)

    def at_rows(self, rows: _Numbers) -> Tokens:
        """Of some of the rows, in the order of `rows`, int64 [n]."""
        numbers, places = self._expanded()
        found = Tokens(self.sequences, _runs(numbers[rows], places[rows]))
        found.hashes = self.hashes
        return found

    def _expanded(self) -> tuple[_Numbers, _Numbers]:
        """Sequence number and position of each row."""
        numbers, starts, counts = self.runs.T
        within = np.arange(self.rows) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(numbers, counts), np.repeat(starts, counts) + within


class InvalidTokens(UsageError, ValueError):
    """A record of tokens that contradicts itself."""


# --- making runs


def total(counts: _Numbers) -> int:
    """Their sum, which of the one count that there most often is costs a tenth of NumPy's."""
    return int(counts[0]) if len(counts) == 1 else int(counts.sum())


def _few_runs(sequence_ids: Any, lengths: Any, starts: Any) -> tuple[tuple[SequenceId, ...], _Numbers] | None:
    """(sequences, runs) of short lists of plain numbers; None for all else, and for what makes no sense."""
    starts = [0] * len(lengths) if starts is None and type(lengths) in (list, tuple) else starts
    if not all(type(given) in (list, tuple) for given in (sequence_ids, lengths, starts)):
        return None
    if not len(sequence_ids) == len(lengths) == len(starts) <= FEW:
        return None
    numbers: dict[SequenceId, int] = {}
    runs = []
    for own, start, count in zip(sequence_ids, starts, lengths, strict=True):
        if not (type(start) is type(count) is int and 0 <= start < _LARGEST // FEW > count >= 0):
            return None
        if type(own) not in (int, str, type(None)):
            return None
        if count and own is None:
            runs.append((_PADDING, 0, count))
        elif count:
            runs.append((numbers.setdefault(own, len(numbers)), start, count))
    return tuple(numbers), np.array(runs, dtype=np.int64).reshape(-1, 3)


def _integers(value: Any, what: str) -> _Numbers:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        if is_from_signal_handler(error):
            raise
        raise UsageError(f"{what}: its rows have other lengths: {error}. Flatten it, or pad it.") from None
    if array.size == 0:
        return np.zeros(array.shape, dtype=np.int64)
    if array.dtype.kind not in "iu" or (array.dtype == np.uint64 and int(array.max()) >= _LARGEST):
        raise UsageError(f"{what} must be whole numbers, not {array.dtype}.")
    return array.astype(np.int64)


def _codes(sequence_ids: Any, shape: tuple[int, ...]) -> tuple[_Numbers, tuple[SequenceId, ...]]:
    """The number of each row's sequence among the ids (-1: None), flattened; and the ids."""
    if hasattr(sequence_ids, "detach"):
        sequence_ids = sequence_ids.detach().cpu().numpy()
    if not isinstance(sequence_ids, np.ndarray):
        sequence_ids = _array_of_ids(sequence_ids)
    if len(shape) == 2 and sequence_ids.shape == shape[:1]:
        sequence_ids = np.broadcast_to(sequence_ids[:, None], shape)
    if sequence_ids.shape != shape:
        raise UsageError(
            f"sequence_ids has the shape {list(sequence_ids.shape)}, and there are {list(shape)}: each row has one id "
            "(or, of a batch [b, s], each of b)."
        )
    flat = sequence_ids.reshape(-1)
    if flat.dtype.kind in "iu" and len(flat):
        # Only where another sequence begins: sorting all rows would cost more than all the rest.
        first = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
        names, codes = np.unique(flat[first], return_inverse=True)
        codes = codes.astype(np.int64).reshape(-1)
        return np.repeat(codes, np.diff(np.append(first, len(flat)))), tuple(names.tolist())
    return _codes_one_by_one(flat.tolist())


def _array_of_ids(ids: Any) -> npt.NDArray[Any]:
    """A list of numbers is read at once; texts and None as objects, since NumPy would make texts of them all."""
    if not isinstance(ids, (list, tuple)):
        raise UsageError(f"sequence_ids is a tensor, an array or a list, not {type(ids).__name__}.")
    nested = bool(ids) and isinstance(ids[0], (list, tuple))
    flat = [item for row in ids for item in row] if nested else list(ids)
    if nested and len({len(row) for row in ids}) > 1:
        raise UsageError("sequence_ids: its rows have other lengths. Flatten it, or pad it with None.")
    if all(type(item) is int and -_LARGEST < item < _LARGEST for item in flat):
        array: npt.NDArray[Any] = np.array(flat, dtype=np.int64)
    else:
        array = np.empty(len(flat), dtype=object)
        array[:] = flat
    return array.reshape(len(ids), -1) if nested else array


def _codes_one_by_one(ids: list[Any]) -> tuple[_Numbers, tuple[SequenceId, ...]]:
    numbers: dict[SequenceId, int] = {}
    codes = np.empty(len(ids), dtype=np.int64)
    for row, own in enumerate(ids):
        if own is None:
            codes[row] = _PADDING
        elif type(own) in (int, str):
            codes[row] = numbers.setdefault(own, len(numbers))
        else:
            raise UsageError(f"a sequence id is a whole number or a text (or None for padding), not {own!r}.")
    return codes, tuple(numbers)


def _in_order_of_rows(codes: _Numbers, names: tuple[SequenceId, ...]) -> tuple[_Numbers, tuple[SequenceId, ...]]:
    """Sequences numbered by their first row, and only those that have one: (new number of each, names).

    codes: of rows, or of what begins with each of them, in order. Padding, -1, keeps its number.
    """
    there, first = np.unique(codes, return_index=True)
    there, first = there[there >= 0], first[there >= 0]
    kept = there[np.argsort(first, kind="stable")]
    renumbered = np.full(len(names) + 1, _PADDING, dtype=np.int64)
    renumbered[kept] = np.arange(len(kept))
    return renumbered, tuple(names[number] for number in kept.tolist())


def _runs(codes: _Numbers, places: _Numbers) -> _Numbers:
    if not len(codes):
        return np.zeros((0, 3), dtype=np.int64)
    padding = codes[1:] < 0
    goes_on = (codes[1:] == codes[:-1]) & (padding | (places[1:] == places[:-1] + 1))
    first = np.concatenate([[0], np.flatnonzero(~goes_on) + 1])
    counts = np.diff(np.append(first, len(codes)))
    return np.stack([codes[first], places[first], counts], axis=1)


def _joined_runs(runs: _Numbers) -> _Numbers:
    """Neighbours that go on are one run, so that the same tokens have the same runs."""
    if len(runs) < 2:
        return runs
    padding = runs[1:, 0] < 0
    goes_on = (runs[1:, 0] == runs[:-1, 0]) & (padding | (runs[1:, 1] == runs[:-1, 1] + runs[:-1, 2]))
    if not goes_on.any():
        return runs
    first = np.concatenate([[0], np.flatnonzero(~goes_on) + 1])
    return np.concatenate([runs[first, :2], np.add.reduceat(runs[:, 2], first)[:, None]], axis=1)


def _check_runs(sequences: tuple[SequenceId, ...], runs: _Numbers, hashes: Mapping[int, Any] | None) -> None:
    """What other ranks refuse to read must not exist here either: both sides decide alike."""
    if len(runs) <= FEW:
        rows = runs.tolist()
        possible = all(-1 <= number < len(sequences) and first >= 0 and count > 0 for number, first, count in rows)
        most = max(sum(count for _, _, count in rows), *(first + count for _, first, count in rows), 0)
    else:
        numbers, first, counts = runs.T
        possible = bool(
            numbers.min() >= -1 and numbers.max() < len(sequences) and first.min() >= 0 and counts.min() > 0
        )
        # In Python's numbers, which do not overflow.
        most = max(int(first.max()) + int(counts.max()), sum(counts.tolist()))
    if not possible:
        raise InvalidTokens("tokens have impossible runs of rows; each is (sequence or -1, first position, count > 0).")
    if most > _LARGEST:
        raise InvalidTokens("tokens have more rows than there can be.")
    if len(set(sequences)) != len(sequences):
        raise InvalidTokens("tokens have one sequence twice; each is listed once, whatever number of runs it has.")
    if any(not 0 <= number < len(sequences) for number in hashes or ()):
        raise InvalidTokens("tokens have hashes of no sequence.")


def _check_each_once(tokens: Tokens) -> None:
    if len(tokens.runs) < 2:
        return
    placed = placed_runs(tokens.runs)
    placed = placed[placed[:, 0] >= 0]
    placed = placed[np.lexsort((placed[:, 1], placed[:, 0]))]
    one, other = placed[:-1], placed[1:]
    twice = np.flatnonzero((one[:, 0] == other[:, 0]) & (other[:, 1] < one[:, 1] + one[:, 2]))
    if len(twice):
        first, second = one[twice[0]].tolist(), other[twice[0]].tolist()
        raise InvalidTokens(
            f"the position {second[1]} of the sequence {tokens.sequences[second[0]]!r} is there twice, in the rows "
            f"{first[3] + second[1] - first[1]} and {second[3]}. Each token is one row; padding has a negative "
            "position or the id None, and sequences of one batch have ids of their own."
        )


__all__: Sequence[str] = ("InvalidTokens", "TokenMatch", "Tokens", "match")


# Runs of tokens: which token each row of a dumped tensor is.


class TokenRuns(Record):
    """Which token each row is: (sequence, start, count) for `count` rows at the positions from `start` on, in order.

    Rows are those of the dim `t`, or of `b s` flattened. Rows that are no token (padding) are runs of sequence None.
    hashes: (sequence, base64) where its token ids were given from position 0 on: 8 bytes per beginning of it
    (grafter/core/rows/sequences.py).
    """

    runs: tuple[tuple[str | int | None, int, int], ...]
    hashes: tuple[tuple[str | int, str], ...] = ()
