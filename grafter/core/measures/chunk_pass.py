"""One pass over the chunks of one tensor or of two: a list of sums per chunk, in the order of the flattened index."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from grafter.core.measures.chunk_sums import (
    UNKNOWN_INDEX,
    PairSums,
    TensorSums,
    Workspace,
    exact_rows,
    fast_pair,
    fast_tensors,
    is_exact,
    tensor_rows,
)
from grafter.core.measures.flat_chunks import CHUNK, LONG, FlatReader, rounded_off, unequal

# Chunks in one step on a device: 2 million values, 16 MiB for each of some ten float64 temporaries.
DEVICE_ROWS = 70

WIDE = (torch.float64, torch.complex128)

# From here on, float64 cannot represent every whole number.
EXACT = 2.0**53


class _OwnWorkspace(threading.local):
    """A thread's buffers, kept for the next tensor: touching new memory costs as much as measuring a small tensor."""

    largest: Workspace | None = None

    def of(self, size: int) -> Workspace:
        """The workspace for chunks of this size."""
        if self.largest is None:
            self.largest = Workspace(CHUNK)
        return self.largest if size == CHUNK else Workspace(size, self.largest)


_workspace = _OwnWorkspace()


@dataclass(frozen=True)
class Sums:
    """The sums of all chunks. x and y are empty if no statistics of the single tensors are wanted."""

    pair: list[PairSums] = field(default_factory=list)
    x: list[TensorSums] = field(default_factory=list)
    y: list[TensorSums] = field(default_factory=list)


def pass_over_pair(x: torch.Tensor, y: torch.Tensor, level: Literal["full", "light"], statistics: bool) -> Sums:
    """The sums of two tensors of one shape. If either is on a device other than the CPU, they are computed there, with
    one synchronisation."""
    as_complex = x.is_complex() or y.is_complex()
    pair = FlatReader(x, as_complex), FlatReader(y, as_complex)
    device = x.device if x.device.type != "cpu" else y.device
    if device.type != "cpu":
        sums = pass_in_rows(*pair, device, statistics)
        _look_up_whole_numbers(*pair, sums)
        return sums
    sums = Sums()
    # The fast way recognises input that it must decline by overflow and NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop, space in _chunks(pair[0].parts):
            _pair_chunk(*pair, start, stop, space, level, statistics, sums)
        _look_up_maximum(*pair, sums)
        _look_up_whole_numbers(*pair, sums)
    return sums


def pass_over_tensor(tensor: torch.Tensor) -> list[TensorSums]:
    """The sums of one tensor alone."""
    reader = FlatReader(tensor)
    if tensor.device.type != "cpu":
        return tensor_in_rows(reader)
    sums: list[TensorSums] = []
    wide = tensor.dtype in WIDE
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop, space in _chunks(reader.parts):
            space.x.tensor.copy_(reader.read(start, stop))
            squares = space.x.squares()
            is_fast = is_exact(space.x, squares, wide)
            sums += fast_tensors(space, [squares]) if is_fast else _tensor_sums(tensor_rows(space.x.tensor[None], wide))
    return sums


def _chunks(parts: int) -> Iterator[tuple[int, int, Workspace]]:
    """(start, stop, workspace) of each chunk."""
    space = _workspace.of(min(CHUNK, parts))
    for start in range(0, parts, CHUNK):
        stop = min(start + CHUNK, parts)
        if stop - start != space.size:
            space = _workspace.of(stop - start)
        yield start, stop, space


def _pair_chunk(
    x: FlatReader,
    y: FlatReader,
    start: int,
    stop: int,
    space: Workspace,
    level: str,
    statistics: bool,
    sums: Sums,
) -> None:
    """Append the sums of one chunk."""
    wide = x.dtype in WIDE or y.dtype in WIDE
    # Bits are compared first: this reads memory twice as fast as the conversion, which then finds its input in cache.
    mismatched = _compare_bits(x, y, start, stop, space)
    same_bits = mismatched == 0
    space.x.tensor.copy_(x.read(start, stop))
    if not same_bits:
        space.y.tensor.copy_(y.read(start, stop))
    if mismatched is None:
        mask = unequal(x.read(start, stop), y.read(start, stop), space.x.tensor, space.y.tensor)
        np.copyto(space.unequal, mask.numpy())
        mismatched = int(np.count_nonzero(space.unequal))
    lost = None if same_bits else _lost(x, y, start, stop, space)
    pair = fast_pair(space, mismatched, same_bits, wide, level, None if lost is None else lost.numpy())
    if pair is None:
        y_tensor = space.x.tensor if same_bits else space.y.tensor
        mask, rows = torch.from_numpy(space.unequal), None if lost is None else lost[None]
        _append(sums, exact_rows(space.x.tensor[None], y_tensor[None], mask[None], wide, statistics, rows))
        return
    sums.pair.append(pair)
    if statistics:
        tensors = fast_tensors(space, [pair.x_squares] if same_bits else [pair.x_squares, pair.y_squares])
        sums.x.append(tensors[0])
        sums.y.append(tensors[-1])


def _compare_bits(x: FlatReader, y: FlatReader, start: int, stop: int, space: Workspace) -> int | None:
    """How many parts differ in their bits; space.unequal says which. None: the dtypes differ, so convert first."""
    if x.dtype != y.dtype:
        return None
    if x.flat_bits is not None and y.flat_bits is not None:
        np.not_equal(x.flat_bits[start:stop], y.flat_bits[start:stop], out=space.unequal)
    else:
        same = space.x.tensor
        np.copyto(space.unequal, unequal(x.read(start, stop), y.read(start, stop), same, same).numpy())
    return int(np.count_nonzero(space.unequal))


def _lost(x: FlatReader, y: FlatReader, start: int, stop: int, space: Workspace) -> torch.Tensor | None:
    """What float64 lost of the differences; None if it represents all numbers."""
    if x.dtype not in LONG and y.dtype not in LONG:
        return None
    if not any(reader.dtype in LONG and row.max_abs() >= EXACT for reader, row in ((x, space.x), (y, space.y))):
        return None
    return rounded_off(x.read(start, stop), space.x.tensor) - rounded_off(y.read(start, stop), space.y.tensor)


def first_maximum(pair: Sequence[PairSums]) -> int | None:
    """The number of the chunk with the first maximum of |d|; None if d is 0 everywhere. Cannot overflow."""

    def size(chunk: int) -> tuple[float, float]:
        mantissa, exponent = math.frexp(pair[chunk].d_max)
        return exponent + pair[chunk].d_exponent, mantissa

    nonzero = [chunk for chunk, entry in enumerate(pair) if entry.d_max]
    return max(nonzero, key=size) if nonzero else None


def _look_up_maximum(x: FlatReader, y: FlatReader, sums: Sums) -> None:
    """Fill in the index of the maximum in the one entry that has it, if the fast way left it out."""
    chunk = first_maximum(sums.pair)
    if chunk is None or sums.pair[chunk].d_index != UNKNOWN_INDEX:
        return
    start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, x.parts)
    space = _workspace.of(stop - start)
    space.x.tensor.copy_(x.read(start, stop))
    space.y.tensor.copy_(y.read(start, stop))
    np.subtract(space.x.values, space.y.values, out=space.d.values)
    lost = _lost(x, y, start, stop, space)
    if lost is not None:
        space.d.tensor.add_(lost)
    space.d.tensor.abs_()
    index = int(space.d.values.argmax())
    sums.pair[chunk] = sums.pair[chunk]._replace(
        d_index=float(index), x_at=float(space.x.values[index]), y_at=float(space.y.values[index])
    )


def _look_up_whole_numbers(x: FlatReader, y: FlatReader, sums: Sums) -> None:
    """Put the exact two numbers into the entry with the maximum, if float64 may not represent them."""
    if x.dtype not in LONG and y.dtype not in LONG:
        return
    chunk = first_maximum(sums.pair)
    if chunk is None:
        return
    place = chunk * CHUNK + int(sums.pair[chunk].d_index)
    values = [reader.read(place, place + 1).item() for reader in (x, y)]
    sums.pair[chunk] = sums.pair[chunk]._replace(x_at=values[0], y_at=values[1])


def pass_in_rows(x: FlatReader, y: FlatReader, device: torch.device, statistics: bool, rows: int = DEVICE_ROWS) -> Sums:
    """As `pass_over_pair`, by `exact_rows` on `device`, `rows` chunks a step, and one transfer to the host."""
    wide = x.dtype in WIDE or y.dtype in WIDE
    steps = []
    for start, stop in _row_ranges(x.parts, rows):
        x_raw, y_raw = x.read(start, stop).to(device), y.read(start, stop).to(device)
        x_double, y_double = x_raw.double(), y_raw.double()
        mask = unequal(x_raw, y_raw, x_double, y_double)
        shape = (-1, min(CHUNK, stop - start))
        lost = None
        if x.dtype in LONG or y.dtype in LONG:
            lost = (rounded_off(x_raw, x_double) - rounded_off(y_raw, y_double)).view(shape)
        steps.append(exact_rows(x_double.view(shape), y_double.view(shape), mask.view(shape), wide, statistics, lost))
    sums = Sums()
    if steps:
        # Side by side, so that the three tables cross to the host in one copy.
        table = torch.cat([torch.cat([part for part in step if part is not None], dim=1) for step in steps]).cpu()
        first, second = len(PairSums._fields), len(PairSums._fields) + len(TensorSums._fields)
        single = (table[:, first:second], table[:, second:]) if statistics else (None, None)
        _append(sums, (table[:, :first], *single))
    return sums


def tensor_in_rows(reader: FlatReader, rows: int = DEVICE_ROWS) -> list[TensorSums]:
    """As `pass_over_tensor`, by `tensor_rows` on the tensor's device."""
    steps = [
        tensor_rows(reader.read(start, stop).double().view(-1, min(CHUNK, stop - start)), reader.dtype in WIDE)
        for start, stop in _row_ranges(reader.parts, rows)
    ]
    return _tensor_sums(torch.cat(steps).cpu()) if steps else []


def _row_ranges(parts: int, rows: int) -> list[tuple[int, int]]:
    """Ranges of at most `rows` whole chunks, and one of the rest."""
    whole = parts // CHUNK * CHUNK
    ranges = [(start, min(start + rows * CHUNK, whole)) for start in range(0, whole, rows * CHUNK)]
    return ranges + [(whole, parts)] if whole < parts else ranges


def _append(sums: Sums, tables: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]) -> None:
    sums.pair.extend(PairSums._make(row) for row in tables[0].tolist())
    if tables[1] is not None and tables[2] is not None:
        sums.x.extend(_tensor_sums(tables[1]))
        sums.y.extend(_tensor_sums(tables[2]))


def _tensor_sums(table: torch.Tensor) -> list[TensorSums]:
    return [TensorSums._make(row) for row in table.tolist()]
