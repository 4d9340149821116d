"""Row views: which dims of a local tensor count its rows, and the rows that count as a tensor [rows, ...].

A tensor without names for its dims has one token for each combination of its first dims:

    tokens     shape           row dims        a row
    12         [1, 12, 32]     the first two   [32]
    1          [1, 1, 32]      the first       [1, 32]
                               or two          [32]

One tensor alone may leave the choice open, but only if it has dims of size 1. Its rows then hold the same values either
way, in another shape. Tensors that are compared with each other, such as those of a prefill and its decode steps, have
rows of one shape, which decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

from grafter.core.tokens.runs import each_of, total
from grafter.core.tokens.sequences import Int64Array


def leading_row_dims(shape: Sequence[int], rows: int) -> list[int]:
    """How many of the first dims may count the rows, fewest first; empty where no first dims have so many."""
    return [count for count in range(1, len(shape) + 1) if prod(shape[:count]) == rows]


def common_row_ndim(tensors: Iterable[tuple[int, Sequence[int]]]) -> int | None:
    """How many dims a row has in all of these tensors, each given as (ndim, how many of its dims may count the rows).

    The largest of several numbers that fit all; None where none does.
    """
    common: set[int] | None = None
    for ndim, row_dims in tensors:
        possible = {ndim - count for count in row_dims}
        common = possible if common is None else common & possible
    return max(common) if common else None


@dataclass(frozen=True, eq=False)
class RowView:
    """The rows of a local tensor that count.

    shape: that of the local tensor. row_dims: those of its dims that make up the rows, outer first: (t,), or (b, s).
    segments: int64 [n, 2], (first row, count). A single stretch of rows is a view of the tensor; others are gathered.
    """

    shape: tuple[int, ...]
    row_dims: tuple[int, ...]
    segments: Int64Array

    @cached_property
    def count(self) -> int:
        """How many rows count."""
        return total(self.segments[:, 1])

    @property
    def rows(self) -> int:
        """All rows of the tensor, including those that do not count."""
        return prod(self.shape[dim] for dim in self.row_dims)

    @cached_property
    def rest(self) -> tuple[int, ...]:
        """The dims that do not make up the rows."""
        return tuple(dim for dim in range(len(self.shape)) if dim not in self.row_dims)

    @cached_property
    def packed_shape(self) -> tuple[int, ...]:
        """The shape of the rows that count, [count, ...]."""
        if self.row_dims == (0,):
            return (self.count, *self.shape[1:])
        return (self.count, *(self.shape[dim] for dim in self.rest))

    @property
    def is_everything(self) -> bool:
        """Whether all rows count, in order: then the packed tensor is the tensor itself."""
        return self.row_dims == (0,) and self.count == self.shape[0] and len(self.segments) <= 1

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows that count, [count, ...]: a view if they are one stretch, else a copy."""
        by_rows = self._rows_first(tensor.detach())
        flat = self._flat(by_rows)
        if flat is not None:
            if len(self.segments) <= 1:
                return flat.narrow(0, *self._stretch)
            return flat.index_select(0, self._index.to(tensor.device))
        return by_rows[self._places(tensor.device)]

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Write [count, ...] into the rows that count, in the tensor's memory. All other rows stay unchanged."""
        by_rows = self._rows_first(tensor)
        flat = self._flat(by_rows)
        values = values.to(device=tensor.device, dtype=tensor.dtype)
        if flat is None:
            by_rows.index_put_(self._places(tensor.device), values)
        elif len(self.segments) <= 1:
            flat.narrow(0, *self._stretch).copy_(values)
        else:
            flat.index_copy_(0, self._index.to(tensor.device), values)

    def local_index(self, index: Sequence[int]) -> list[int]:
        """The index in the tensor of an index into [count, ...]."""
        place = [0] * len(self.shape)
        row = self.row_at(index[0])
        for dim in reversed(self.row_dims):
            row, place[dim] = divmod(row, self.shape[dim])
        for dim, at in zip(self.rest, index[1:], strict=True):
            place[dim] = at
        return place

    def row_at(self, place: int) -> int:
        """The row of the tensor that is row `place` of those that count."""
        ends = np.cumsum(self.segments[:, 1])
        number = int(np.searchsorted(ends, place, side="right"))
        first, count = self.segments[number].tolist()
        return int(first + place - (int(ends[number]) - count))

    @property
    def _stretch(self) -> tuple[int, int]:
        return (int(self.segments[0, 0]), int(self.segments[0, 1])) if len(self.segments) else (0, 0)

    def _rows_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.row_dims == (0,) else tensor.permute(*self.row_dims, *self.rest)

    def _flat(self, by_rows: torch.Tensor) -> torch.Tensor | None:
        """The rows as one dim; None where the strides do not allow it without a copy."""
        if len(self.row_dims) == 1:
            return by_rows
        (outer, inner), (step, stride) = by_rows.shape[:2], by_rows.stride()[:2]
        if outer > 1 and inner > 1 and step != inner * stride:
            return None
        one = stride if inner > 1 else step
        return by_rows.as_strided((outer * inner, *by_rows.shape[2:]), (one, *by_rows.stride()[2:]))

    @cached_property
    def _index(self) -> torch.Tensor:
        return torch.from_numpy(each_of(self.segments[:, 0], self.segments[:, 1]))

    def _places(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        index, inner = self._index, self.shape[self.row_dims[1]]
        return (index // inner).to(device), (index % inner).to(device)
