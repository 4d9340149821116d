"""Row views: the rows of a local tensor that count, as a tensor [rows, ...]; and how values come back into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from grafter.core.tokens.tokens import total

_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowView:
    """shape: of the local tensor. row_dims: those of its dims that make up the rows, outer first: (t,), or (b, s).

    segments: int64 [n, 2], (first row, count). One stretch of rows is a view of the tensor; any others are gathered.
    """

    shape: tuple[int, ...]
    row_dims: tuple[int, ...]
    segments: _Numbers

    @cached_property
    def count(self) -> int:
        return total(self.segments[:, 1])

    @property
    def rows(self) -> int:
        """All rows of the tensor, those that do not count, too."""
        rows = 1
        for dim in self.row_dims:
            rows *= self.shape[dim]
        return rows

    @cached_property
    def rest(self) -> tuple[int, ...]:
        return tuple(dim for dim in range(len(self.shape)) if dim not in self.row_dims)

    @cached_property
    def packed_shape(self) -> tuple[int, ...]:
        if self.row_dims == (0,):
            return (self.count, *self.shape[1:])
        return (self.count, *(self.shape[dim] for dim in self.rest))

    @property
    def is_everything(self) -> bool:
        """Whether all rows count, in their order, as they lie: then the packed tensor is the tensor itself."""
        return self.row_dims == (0,) and self.count == self.shape[0] and len(self.segments) <= 1

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows that count, [count, ...]: memory of their own unless they are one stretch."""
        by_rows = self._rows_first(tensor.detach())
        flat = self._flat(by_rows)
        if flat is not None:
            if len(self.segments) <= 1:
                return flat.narrow(0, *self._stretch)
            return flat.index_select(0, self._index.to(tensor.device))
        return by_rows[self._places(tensor.device)]

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Write [count, ...] into the rows that count, into the tensor's memory; all others stay."""
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
        """Where a place of [count, ...] lies in the tensor."""
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
        """Rows as one dim, where strides allow it without a copy."""
        if len(self.row_dims) == 1:
            return by_rows
        (outer, inner), (step, stride) = by_rows.shape[:2], by_rows.stride()[:2]
        if outer > 1 and inner > 1 and step != inner * stride:
            return None
        one = stride if inner > 1 else step
        return by_rows.as_strided((outer * inner, *by_rows.shape[2:]), (one, *by_rows.stride()[2:]))

    @cached_property
    def _index(self) -> torch.Tensor:
        first, counts = self.segments[:, 0], self.segments[:, 1]
        within = np.arange(self.count) - np.repeat(np.cumsum(counts) - counts, counts)
        return torch.from_numpy(np.repeat(first, counts) + within)

    def _places(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        index, inner = self._index, self.shape[self.row_dims[1]]
        return (index // inner).to(device), (index % inner).to(device)
