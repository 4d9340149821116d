"""A whole tensor of a recording, read box by box: from each rank's mapped file only what the box needs.

whole tensor        rank 0      rank 1         a box that needs both ranks is put together in memory of its own;
. . . . . .         . . .       . . .          one that lies in a single rank's tensor is a view of its file
. [# # #] .         . # #       # . .
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch

from grafter.core.layout.shares import RoleShares
from grafter.core.plan.assembly import reduce_summands, reduced_dtype
from grafter.core.plan.resharding import Resharding
from grafter.errors import DumpError, GrafterError, UsageError
from grafter.store.dumps.pieces import LocalPart, Pieces, named_dims
from grafter.store.dumps.tensor_file import will_read

Numbers = tuple[int, ...]
Box = tuple[Numbers, Numbers]

# Values of a block where none is asked for: 32 MiB of float64.
BLOCK_NUMEL = 1 << 22


@dataclass(frozen=True)
class ReplicaDifference:
    """Two copies of a part that are not equal bit for bit.

    `index`: of the first value that differs, in the whole tensor. `count`: how many values differ.
    """

    ranks: Numbers
    other_ranks: Numbers
    index: Numbers
    count: int


class LazyTensor:
    """The whole tensor of one leaf of a point, from the files of all its ranks. Nothing is read before it is asked for.

    shape: of the whole tensor, without padding. dtype: of what `read` gives: the parts' own, or, where parts are
    summands, float32 or better. dim_names: such as ("b", "s", "(h*d)"), or None where no names were declared.
    layouts: what each rank declared, as messages show it.

    The tensors that reading gives are on the CPU. One that lies in one rank's file is its mapped memory: writing to it
    never changes the file, but what is read there afterwards by this object, so clone what you want to change.
    """

    def __init__(
        self,
        who: str,
        parts: tuple[LocalPart, ...],
        pieces: Pieces,
        dtype: torch.dtype,
        local: Callable[[int], torch.Tensor],
    ) -> None:
        self.who, self._pieces, self._local = who, pieces, local
        self._opened: dict[int, torch.Tensor] = {}
        self.shape: Numbers = pieces.shape
        self.stored_dtype = dtype
        self.dtype = reduced_dtype(dtype) if pieces.summands > 1 else dtype
        self.dim_names = named_dims(pieces)
        self.layouts: dict[int, str] = {part.role_rank: str(part.layout or "nothing declared") for part in parts}
        self.ranks: Numbers = tuple(part.role_rank for part in parts)
        self._local_shapes = {part.role_rank: part.shape for part in parts}

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def whole(self) -> RoleShares:
        """A role of one rank that holds this tensor, with the names of its dims, as the layout functions take it."""
        return self._pieces.whole

    @property
    def replicas(self) -> int:
        """How many copies of each part there are; where parts have unequally many, the most."""
        return self._pieces.replicas

    @property
    def is_undeclared(self) -> bool:
        """Whether no rank declared a layout, so that each holds the whole tensor."""
        return self._pieces.resharding is None

    @property
    def summands(self) -> int:
        """How many summands make the value; 1 where it is no partial one."""
        return self._pieces.summands

    def __repr__(self) -> str:
        return f"<LazyTensor {self.who} {self.dtype}{list(self.shape)}>"

    def read(self, offset: Numbers | None = None, size: Numbers | None = None) -> torch.Tensor:
        """The values of a box of the whole tensor; without arguments, all of it.

        offset, size: one number per dim, inside of `shape`. Returns a tensor of shape `size` and of `dtype`.
        Raises UsageError for a box that leaves the tensor, DumpError for a file that is damaged.
        """
        box = self._box(offset, size)
        return self._reduced(box, 0)

    def copies(
        self, offset: Numbers | None = None, size: Numbers | None = None
    ) -> Iterator[tuple[Numbers, torch.Tensor]]:
        """Every copy of a box, with the ranks that it is made from; the first is what `read` gives.

        Where parts have unequally many copies, a part with fewer is there more than once.
        """
        box = self._box(offset, size)
        for copy in range(self._pieces.replicas):
            yield self._ranks_of(box, copy), self._reduced(box, copy)

    def will_read(self, offset: Numbers | None = None, size: Numbers | None = None) -> None:
        """Have the system read a box from the disk meanwhile: a hint for what `read` or `copies` is asked for next.

        Raises what `read` raises.
        """
        box = self._box(offset, size)
        for row in self._pieces.within(*box).tolist():
            will_read(self._view(row, *box)[1])

    def blocks(self, most_numel: int = BLOCK_NUMEL) -> Iterator[Box]:
        """Boxes (offset, size) that together are the tensor, in row-major order, none of more values than told.

        A block is as much of the last dims as fits, so that it is contiguous in the whole tensor.
        """
        if most_numel < 1:
            raise UsageError(f"most_numel={most_numel}: a block has at least one value.")
        if not all(self.shape):
            return
        sizes = list(self.shape)
        for dim in range(len(sizes)):
            inside = prod(sizes[dim + 1 :])
            sizes[dim] = max(1, min(sizes[dim], most_numel // inside))
            if sizes[dim] * inside <= most_numel and inside <= most_numel:
                break
        steps = [range(0, full, step) for full, step in zip(self.shape, sizes, strict=True)]
        for offset in product(*steps):
            yield offset, tuple(min(n, full - at) for at, n, full in zip(offset, sizes, self.shape, strict=True))

    def differing_replicas(self, most_numel: int = BLOCK_NUMEL) -> list[ReplicaDifference]:
        """Copies of one part that should be the same and are not, bit for bit; empty where all are.

        Reads every rank's file once, a block at a time.
        """
        if self._pieces.replicas == 1:
            return []
        found: dict[tuple[Numbers, Numbers], ReplicaDifference] = {}
        for offset, size in self.blocks(most_numel):
            for ranks, other_ranks, index, count in self._differing_in(offset, size):
                before = found.get((ranks, other_ranks))
                found[ranks, other_ranks] = ReplicaDifference(
                    ranks, other_ranks, before.index if before else index, count + (before.count if before else 0)
                )
        return list(found.values())

    def boxes_of(self, rank: int) -> Iterator[tuple[Numbers, Numbers, Numbers, Numbers]]:
        """A rank's boxes: (offset in the whole tensor, size, where it begins in the local tensor, that one's shape)."""
        pieces = self._pieces
        for row in range(len(pieces.ranks)):
            if int(pieces.ranks[row]) == rank:
                offset, size, local = (tuple(own[row].tolist()) for own in (pieces.starts, pieces.sizes, pieces.local))
                yield offset, size, local, self._local_shapes[rank]

    def let_go(self) -> None:
        """Unmap the files that were opened; reading opens them again."""
        self._opened.clear()

    # The steps.

    def _box(self, offset: Numbers | None, size: Numbers | None) -> Box:
        offset = tuple(offset) if offset is not None else (0,) * len(self.shape)
        if size is None:
            size = tuple(full - at for full, at in zip(self.shape, offset, strict=False))
        size = tuple(size)
        if len(offset) != len(self.shape) or len(size) != len(self.shape):
            raise UsageError(f"{self.who} is {list(self.shape)}: offset and size have one number for each dim.")
        if any(at < 0 or n < 0 or at + n > full for at, n, full in zip(offset, size, self.shape, strict=True)):
            raise UsageError(f"{self.who} is {list(self.shape)}: the box at {list(offset)} of {list(size)} leaves it.")
        return offset, size

    def _reduced(self, box: Box, copy: int) -> torch.Tensor:
        summands, replicas = self._pieces.summands, self._pieces.replicas
        if summands == 1:
            return self._assembled(box, copy, may_view=True)
        layers = [self._assembled(box, number * replicas + copy, may_view=False) for number in range(summands)]
        resharding = self._pieces.resharding
        assert isinstance(resharding, Resharding)
        try:
            return reduce_summands(layers, resharding)
        except DumpError:
            raise
        except (GrafterError, RuntimeError) as error:
            raise DumpError(f"{self.who}: {error}") from error

    def _assembled(self, box: Box, layer: int, *, may_view: bool) -> torch.Tensor:
        offset, size = box
        pieces = self._pieces
        rows = [row for row in pieces.within(offset, size).tolist() if pieces.layers[row] == layer]
        # Files are opened, and so checked, before memory is taken for what their records claim.
        views = [self._view(row, offset, size) for row in rows]
        if len(views) == 1 and may_view:
            return views[0][1]
        result = torch.empty(size, dtype=self.stored_dtype)
        for at, view in views:
            part = result
            for dim, (start, extent) in enumerate(zip(at, view.shape, strict=True)):
                part = part.narrow(dim, start, extent)
            _copy(part, view)
        return result

    def _view(self, row: int, offset: Numbers, size: Numbers) -> tuple[Numbers, torch.Tensor]:
        """What a piece has of a box: where it begins in the box, and the values."""
        pieces = self._pieces
        view = self._local_tensor(int(pieces.ranks[row]))
        begins: list[int] = []
        rows = zip(pieces.starts[row].tolist(), pieces.sizes[row].tolist(), pieces.local[row].tolist(), strict=True)
        for dim, (start, extent, local) in enumerate(rows):
            low, high = max(start, offset[dim]), min(start + extent, offset[dim] + size[dim])
            view = view.narrow(dim, local + low - start, high - low)
            begins.append(low - offset[dim])
        return tuple(begins), view

    def _local_tensor(self, rank: int) -> torch.Tensor:
        if rank not in self._opened:
            self._opened[rank] = self._local(rank)
        return self._opened[rank]

    def _ranks_of(self, box: Box, copy: int) -> Numbers:
        pieces = self._pieces
        rows = pieces.within(*box)
        return tuple(sorted({int(r) for r in pieces.ranks[rows[pieces.layers[rows] % pieces.replicas == copy]]}))

    def _differing_in(self, offset: Numbers, size: Numbers) -> Iterator[tuple[Numbers, Numbers, Numbers, int]]:
        """Bitwise, summand by summand: equal sums of other summands would be no equal copies."""
        pieces, replicas = self._pieces, self._pieces.replicas
        for summand in range(pieces.summands):
            first = self._assembled((offset, size), summand * replicas, may_view=True)
            for copy in range(1, replicas):
                other = self._assembled((offset, size), summand * replicas + copy, may_view=True)
                if torch.equal(_bits(first), _bits(other)):
                    continue
                apart = _bits(first) != _bits(other)
                apart = apart.any(dim=-1) if apart.dim() > len(size) else apart
                at = torch.nonzero(apart)[0].tolist()
                index = tuple(start + n for start, n in zip(offset, at, strict=True))
                yield self._ranks_at(index, summand, 0), self._ranks_at(index, summand, copy), index, int(apart.sum())

    def _ranks_at(self, index: Numbers, summand: int, copy: int) -> Numbers:
        pieces = self._pieces
        rows = pieces.within(index, (1,) * len(index))
        return tuple(int(r) for r in pieces.ranks[rows[pieces.layers[rows] == summand * pieces.replicas + copy]])


def _copy(part: torch.Tensor, view: torch.Tensor) -> None:
    # Dtypes that torch cannot copy with strides are copied as bytes; those have one byte a value.
    if part.dtype.itemsize == 1 and part.dtype is not torch.bool:
        part, view = part.view(torch.uint8), view.view(torch.uint8)
    part.copy_(view)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its values as whole numbers, so that NaN equals a NaN of the same bits; two for each of a complex128."""
    itemsize = tensor.dtype.itemsize
    if itemsize == 16:
        return torch.view_as_real(tensor).view(torch.int64)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize])
