"""Alignment: two whole tensors in one order of dims, read block by block.

    A  b s (h*d)          B  s b h d                 what is compared  b s | h d
       |  |   |             | | | |                                    rows | rest
       one factor per dim that both sides know, as in a graft between the two

A block is a range of one factor, all of the factors after it, and one index of each factor before it. Blocks follow one
another in the flattened index, so `PairStream` takes them in order. Each side reads only the box of the block. If a
block needs a part of a fused dim that is not contiguous, all inner factors of that dim are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np
import torch

from grafter.core.layout.shares import RoleShares
from grafter.core.layout.space import find_space
from grafter.core.measures.flat_chunks import copyable
from grafter.errors import LayoutError

Numbers = tuple[int, ...]

# The usual names of the dims that count tokens; a row is a token.
ROW_DIMS = frozenset({"t", "b", "s"})
_PART = re.compile(r"[^(*)]+")


class WholeTensor(Protocol):
    """The interface of `grafter.store.dumps.lazy_tensor.LazyTensor` that comparing needs; `GatheredRows` has it too."""

    @property
    def shape(self) -> Numbers: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def dim_names(self) -> tuple[str, ...] | None: ...

    @property
    def whole(self) -> RoleShares: ...

    @property
    def replicas(self) -> int: ...

    def read(self, offset: Numbers | None = None, size: Numbers | None = None) -> torch.Tensor: ...

    def copies(
        self, offset: Numbers | None = None, size: Numbers | None = None
    ) -> Iterator[tuple[Numbers, torch.Tensor]]: ...

    def will_read(self, offset: Numbers | None = None, size: Numbers | None = None) -> None: ...


@dataclass(frozen=True)
class Along:
    """One factor on one side: its dim, and the number of values of that dim that one step of the factor spans."""

    dim: int
    step: int


@dataclass(frozen=True)
class AlignedDim:
    """A factor that both sides have. size: without padding."""

    name: str
    size: int
    a: Along
    b: Along


@dataclass(frozen=True)
class AlignedBlock:
    """A box of the aligned dims: where it starts in each, and its size in each."""

    starts: Numbers
    sizes: Numbers


class Side:
    """One side's tensor, read in the order of the aligned dims. tensor: in its own order of dims."""

    def __init__(self, tensor: WholeTensor, along: Sequence[Along], sizes: Numbers) -> None:
        self.tensor, self._along, self._full = tensor, tuple(along), sizes
        self._ndim = len(tensor.shape)
        # The factors of each dim of the tensor, outer first.
        self._factors = [
            sorted((n for n, own in enumerate(along) if own.dim == dim), key=lambda n: -along[n].step)
            for dim in range(self._ndim)
        ]
        listed = [factor for own in self._factors for factor in own]
        self._order = [listed.index(factor) for factor in range(len(along))]

    def read(self, block: AlignedBlock) -> torch.Tensor:
        """The values of a block, with its sizes as shape; a view of the file's memory if possible."""
        return self._aligned(self.tensor.read(*self._box(block)), block)

    def will_read(self, block: AlignedBlock) -> None:
        """Hint that the block is read next."""
        self.tensor.will_read(*self._box(block))

    def copies(self, block: AlignedBlock) -> Iterator[tuple[Numbers, torch.Tensor]]:
        """Every copy of a block, with the ranks that hold it."""
        for ranks, copy in self.tensor.copies(*self._box(block)):
            yield ranks, self._aligned(copy, block)

    def index(self, aligned: Sequence[int]) -> list[int]:
        """The index in this side's tensor of an aligned index. A number for complex parts stays at the end."""
        found = [0] * self._ndim
        for own, place in zip(self._along, aligned, strict=False):
            found[own.dim] += own.step * place
        return found + list(aligned[len(self._along) :])

    def _box(self, block: AlignedBlock) -> tuple[Numbers, Numbers]:
        offset, size = [0] * self._ndim, [1] * self._ndim
        for dim, factors in enumerate(self._factors):
            cut = self._cut(factors, block)
            for factor in factors[: cut + 1]:
                offset[dim] += block.starts[factor] * self._along[factor].step
            if factors:
                size[dim] = block.sizes[factors[cut]] * self._along[factors[cut]].step
        return tuple(offset), tuple(size)

    @staticmethod
    def _cut(factors: Sequence[int], block: AlignedBlock) -> int:
        """The first factor of a dim of which a block needs more than one value; the factors after it are read whole."""
        return next((n for n, factor in enumerate(factors) if block.sizes[factor] > 1), len(factors) - 1)

    def _aligned(self, box: torch.Tensor, block: AlignedBlock) -> torch.Tensor:
        shape: list[int] = []
        narrowed: list[tuple[int, int, int]] = []
        for factors in self._factors:
            cut = self._cut(factors, block)
            for number, factor in enumerate(factors):
                if number > cut and block.sizes[factor] != self._full[factor]:
                    narrowed.append((len(shape), block.starts[factor], block.sizes[factor]))
                shape.append(self._full[factor] if number > cut else block.sizes[factor])
        values = copyable(box).reshape(shape)
        for place, start, size in narrowed:
            values = values.narrow(place, start, size)
        return values.permute(self._order).view(box.dtype)


class Alignment:
    """Two tensors in one order of dims: the rows first, then the rest in A's order, then the dim named `last`.

    dims: the aligned dims. row_ndim: the number of them that count rows. row_dims, row_shape: the names and sizes of
    those. Raises LayoutError if names or sizes of the two sides do not fit together.
    """

    def __init__(self, a: WholeTensor, b: WholeTensor, *, last: str | None = None) -> None:
        space = find_space(replace(a.whole, who="A"), replace(b.whole, who="B"))
        dims = [
            AlignedDim(name, size, Along(*a_along), Along(*b_along))
            for c in space.components
            for name, size, a_along, b_along in zip(
                c.names,
                c.sizes,
                zip(c.sender.along, c.sender.steps, strict=True),
                zip(c.receiver.along, c.receiver.steps, strict=True),
                strict=True,
            )
        ]
        dims.sort(key=lambda dim: (dim.a.dim, -dim.a.step))
        self.last = None if last is None else _named(dims, last, a, b)
        rows = _rows(dims, self.last)
        rest = [dim for dim in dims if dim not in rows and dim is not self.last]
        self.dims: tuple[AlignedDim, ...] = (*rows, *rest, *([self.last] if self.last is not None else []))
        self.row_ndim = len(rows)
        self.row_dims = [dim.name for dim in rows]
        self.shape: Numbers = tuple(dim.size for dim in self.dims)
        self.row_shape: Numbers = self.shape[: self.row_ndim]
        self.a = Side(a, [dim.a for dim in self.dims], self.shape)
        self.b = Side(b, [dim.b for dim in self.dims], self.shape)

    @property
    def last_of_a(self) -> str | None:
        """The name of A's last dim, or of its inner factor if it is fused; None if the tensor has no dims."""
        last = max(self.dims, key=lambda dim: (dim.a.dim, -dim.a.step), default=None)
        return last.name if last is not None else None

    def blocks(self, most_numel: int, *, last_dim_whole: bool = False) -> Iterator[AlignedBlock]:
        """Blocks of at most `most_numel` values. With `last_dim_whole`, a block holds at least the whole last dim."""
        shape = self.shape
        if not all(shape):
            return
        if last_dim_whole and shape:
            most_numel = max(most_numel, shape[-1])
        cut = next((dim for dim in range(len(shape)) if prod(shape[dim + 1 :]) <= most_numel), 0)
        if not shape:
            yield AlignedBlock((), ())
            return
        step = max(1, most_numel // prod(shape[cut + 1 :]))
        inner = (0,) * (len(shape) - cut - 1)
        # Not itertools.product, which would first expand ranges of any length in memory.
        for number in range(prod(shape[:cut])):
            before = tuple(int(place) for place in np.unravel_index(number, shape[:cut])) if cut else ()
            for start in range(0, shape[cut], step):
                size = min(step, shape[cut] - start)
                yield AlignedBlock((*before, start, *inner), (*(1 for _ in before), size, *shape[cut + 1 :]))


def _named(dims: Sequence[AlignedDim], name: str, a: WholeTensor, b: WholeTensor) -> AlignedDim:
    found = [dim for dim in dims if dim.name == name]
    if not found:
        raise LayoutError(
            f"a rule asks for the KL over the dim {name!r}, and the dims are {_listed(a)} at A and {_listed(b)} at B. "
            "Name it there with dims=, or ask for `kl`, which is over the last dim."
        )
    return found[0]


def _listed(tensor: WholeTensor) -> str:
    names = tensor.dim_names
    return f"{' '.join(names)!r}" if names is not None else f"without names ({list(tensor.shape)})"


def _rows(dims: Sequence[AlignedDim], last: AlignedDim | None) -> list[AlignedDim]:
    """The dims that count rows: those named `t`, or `b` and `s`; without such names, all except the last one."""
    rest = [dim for dim in dims if dim is not last]
    named = [dim for dim in rest if set(_PART.findall(dim.name)) <= ROW_DIMS]
    if named:
        return named
    return rest if last is not None else list(dims[:-1])
