"""Runs of rows as arrays: read from what users give, joined, checked, and cut.

A run is (number of its sequence, or -1 for padding; first position; count of rows). Runs are in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from grafter.core.processes import is_from_signal_handler
from grafter.core.tokens.sequences import Int64Array, SequenceId
from grafter.errors import UsageError

PADDING = -1
# Beyond every position. Sums of two of them stay within int64.
LARGEST = 1 << 61
# For up to this many runs, plain Python is faster than NumPy's calls.
FEW = 16


class InvalidTokens(UsageError, ValueError):
    """Tokens that contradict themselves: impossible runs, or a token that is there twice."""


def total(counts: Int64Array) -> int:
    """The sum. Most often there is one count, and then this costs a tenth of NumPy's sum."""
    return int(counts[0]) if len(counts) == 1 else int(counts.sum())


def begins_of(counts: Int64Array) -> Int64Array:
    """Where each of some consecutive stretches begins."""
    begins: Int64Array = np.cumsum(counts) - counts
    return begins


def each_of(first: Int64Array, counts: Int64Array) -> Int64Array:
    """The numbers of all stretches, one by one: int64 [sum of counts]. first, counts: int64 [n]."""
    return np.repeat(first - begins_of(counts), counts) + np.arange(total(counts))


def placed_runs(runs: Int64Array) -> Int64Array:
    """(sequence, first position, count, first row) of each run that is not padding."""
    placed = np.concatenate([runs, begins_of(runs[:, 2])[:, None]], axis=1)
    return placed[placed[:, 0] >= 0]


def joined_runs(runs: Int64Array) -> Int64Array:
    """(sequence, first position, count), neighbours that continue each other joined: the same tokens, the same runs."""
    if len(runs) < 2:
        return runs
    continues = runs[1:, 1] == runs[:-1, 1] + runs[:-1, 2]
    return _merged(runs, (runs[1:, 0] == runs[:-1, 0]) & (continues | (runs[1:, 0] < 0)))


def joined_rows(stretches: Int64Array) -> Int64Array:
    """Stretches of rows, neighbours that continue each other joined. The last column is the count; each other one is a
    first row, and all of them must continue."""
    if len(stretches) < 2:
        return stretches
    return _merged(stretches, (stretches[1:, :-1] == stretches[:-1, :-1] + stretches[:-1, -1:]).all(axis=1))


def _merged(stretches: Int64Array, continues: npt.NDArray[np.bool_]) -> Int64Array:
    if not continues.any():
        return stretches
    first = np.concatenate([[0], np.flatnonzero(~continues) + 1])
    return np.concatenate([stretches[first, :-1], np.add.reduceat(stretches[:, -1], first)[:, None]], axis=1)


def cut_runs(runs: Int64Array, limits: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Cut all sequences into segments where a run begins or ends, or where the limit of a sequence lies.

        runs      |-----------|           |-----|
                       |------------|
        segments  |    |      |     |     |     |     each lies within a run of either side, or outside of it

    runs: int64 [n, 3 or more], (sequence, first position, count, ...), without padding. limits: for each sequence a
    position at which it is cut, too; LARGEST: nowhere.

    Returns the segments (sequence, first position, count), and for each run the number of its first segment and of the
    first one behind it.
    """
    limited = np.flatnonzero(limits < LARGEST)
    sequences = np.concatenate([runs[:, 0], runs[:, 0], limited])
    positions = np.concatenate([runs[:, 1], runs[:, 1] + runs[:, 2], limits[limited]])
    order = np.lexsort((positions, sequences))
    sequences, positions = sequences[order], positions[order]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (sequences[1:] != sequences[:-1]) | (positions[1:] != positions[:-1])
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.cumsum(is_new) - 1
    sequences, positions = sequences[is_new], positions[is_new]
    # The last segment of a sequence is empty, and no run covers it.
    counts = np.zeros_like(positions)
    counts[:-1] = np.where(sequences[1:] == sequences[:-1], np.diff(positions), 0)
    segments = np.stack([sequences, positions, counts], axis=1)
    return segments, numbers[: len(runs)], numbers[len(runs) : 2 * len(runs)]


def few_runs(sequence_ids: Any, lengths: Any, starts: Any) -> tuple[tuple[SequenceId, ...], Int64Array] | None:
    """(sequences, runs) of short lists of plain numbers. None for anything else, and for values that make no sense."""
    starts = [0] * len(lengths) if starts is None and type(lengths) in (list, tuple) else starts
    if not all(type(given) in (list, tuple) for given in (sequence_ids, lengths, starts)):
        return None
    if not len(sequence_ids) == len(lengths) == len(starts) <= FEW:
        return None
    numbers: dict[SequenceId, int] = {}
    runs = []
    for own, start, count in zip(sequence_ids, starts, lengths, strict=True):
        if not (type(start) is type(count) is int and 0 <= start < LARGEST // FEW > count >= 0):
            return None
        if type(own) not in (int, str, type(None)):
            return None
        if count and own is None:
            runs.append((PADDING, 0, count))
        elif count:
            runs.append((numbers.setdefault(own, len(numbers)), start, count))
    return tuple(numbers), np.array(runs, dtype=np.int64).reshape(-1, 3)


def read_integers(value: Any, what: str) -> Int64Array:
    """A tensor, array or (nested) list of whole numbers, as int64. Raises UsageError, naming `what`, for others."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        if is_from_signal_handler(error):
            raise
        raise UsageError(f"{what}: its rows differ in length: {error}. Flatten it, or pad it.") from None
    if array.size == 0:
        return np.zeros(array.shape, dtype=np.int64)
    if array.dtype.kind not in "iu" or (array.dtype == np.uint64 and int(array.max()) >= LARGEST):
        raise UsageError(f"{what} must be whole numbers, not {array.dtype}.")
    return array.astype(np.int64)


def read_sequence_ids(sequence_ids: Any, shape: tuple[int, ...]) -> tuple[Int64Array, tuple[SequenceId, ...]]:
    """The number of each row's sequence among the ids (-1: None), flattened; and the ids. shape: that of the rows.

    Raises UsageError for ids of another shape, and for what is neither a whole number nor a text.
    """
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
        # Only the rows where another sequence begins are sorted: sorting all of them would dominate the cost.
        first = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
        names, codes = np.unique(flat[first], return_inverse=True)
        codes = codes.astype(np.int64).reshape(-1)
        return np.repeat(codes, np.diff(np.append(first, len(flat)))), tuple(names.tolist())
    return _numbered_one_by_one(flat.tolist())


def _array_of_ids(ids: Any) -> npt.NDArray[Any]:
    """A list as an array: of int64, or of objects if there are texts or None, since NumPy would turn all into texts."""
    if not isinstance(ids, (list, tuple)):
        raise UsageError(f"sequence_ids is a tensor, an array or a list, not {type(ids).__name__}.")
    nested = bool(ids) and isinstance(ids[0], (list, tuple))
    flat = [item for row in ids for item in row] if nested else list(ids)
    if nested and len({len(row) for row in ids}) > 1:
        raise UsageError("sequence_ids: its rows differ in length. Flatten it, or pad it with None.")
    if all(type(item) is int and -LARGEST < item < LARGEST for item in flat):
        array: npt.NDArray[Any] = np.array(flat, dtype=np.int64)
    else:
        array = np.empty(len(flat), dtype=object)
        array[:] = flat
    return array.reshape(len(ids), -1) if nested else array


def _numbered_one_by_one(ids: list[Any]) -> tuple[Int64Array, tuple[SequenceId, ...]]:
    """As `read_sequence_ids`, for ids of any type."""
    numbers: dict[SequenceId, int] = {}
    codes = np.empty(len(ids), dtype=np.int64)
    for row, own in enumerate(ids):
        if own is None:
            codes[row] = PADDING
        elif type(own) in (int, str):
            codes[row] = numbers.setdefault(own, len(numbers))
        else:
            raise UsageError(f"a sequence id is a whole number or a text (or None for padding), not {own!r}.")
    return codes, tuple(numbers)


def in_order_of_rows(codes: Int64Array, names: tuple[SequenceId, ...]) -> tuple[Int64Array, tuple[SequenceId, ...]]:
    """Sequences numbered in the order of their first rows; those without a row are left out: (new numbers, names).

    codes: the sequence of each row, or of each run, in order. Padding, -1, keeps its number.
    """
    there, first = np.unique(codes, return_index=True)
    there, first = there[there >= 0], first[there >= 0]
    kept = there[np.argsort(first, kind="stable")]
    renumbered = np.full(len(names) + 1, PADDING, dtype=np.int64)
    renumbered[kept] = np.arange(len(kept))
    return renumbered, tuple(names[number] for number in kept.tolist())


def runs_of_rows(codes: Int64Array, places: Int64Array) -> Int64Array:
    """The runs of rows whose sequences and positions are given one by one, int64 [rows] each."""
    if not len(codes):
        return np.zeros((0, 3), dtype=np.int64)
    continues = (codes[1:] == codes[:-1]) & ((codes[1:] < 0) | (places[1:] == places[:-1] + 1))
    first = np.concatenate([[0], np.flatnonzero(~continues) + 1])
    counts = np.diff(np.append(first, len(codes)))
    return np.stack([codes[first], places[first], counts], axis=1)


def check_runs(sequences: tuple[SequenceId, ...], runs: Int64Array, hashes: Mapping[int, Any] | None) -> None:
    """Raise InvalidTokens for runs that other ranks would refuse to read, so that both sides decide alike."""
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
    if most > LARGEST:
        raise InvalidTokens("tokens have more rows than there can be.")
    if len(set(sequences)) != len(sequences):
        raise InvalidTokens("tokens have one sequence twice; each is listed once, whatever number of runs it has.")
    if any(not 0 <= number < len(sequences) for number in hashes or ()):
        raise InvalidTokens("tokens have hashes of no sequence.")


def check_each_once(sequences: tuple[SequenceId, ...], runs: Int64Array) -> None:
    """Raise InvalidTokens for a token that several rows claim to be."""
    if len(runs) < 2:
        return
    placed = placed_runs(runs)
    placed = placed[np.lexsort((placed[:, 1], placed[:, 0]))]
    one, other = placed[:-1], placed[1:]
    twice = np.flatnonzero((one[:, 0] == other[:, 0]) & (other[:, 1] < one[:, 1] + one[:, 2]))
    if len(twice):
        first, second = one[twice[0]].tolist(), other[twice[0]].tolist()
        raise InvalidTokens(
            f"the position {second[1]} of the sequence {sequences[second[0]]!r} is there twice, in the rows "
            f"{first[3] + second[1] - first[1]} and {second[3]}. Each token is one row; padding has a negative "
            "position or the id None, and the sequences of a batch have different ids."
        )
