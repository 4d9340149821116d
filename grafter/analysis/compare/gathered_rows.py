"""Gathered rows: several points with one name as one tensor, so that row r of both sides is the same token.

    A, one packed batch       rows  0 1 2 3 4 5 6 7        sequence 0 from 0, sequence 1 from 0
    B, prefill                      0 1 2   4 5            "req-0", "req-1"
       decode, step by step               3     6  7

The paired rows are read as a tensor `[rows, ...]`, gathered block by block from the points that hold them, so the same
alignment and measures apply.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from grafter.analysis.compare.alignment import ROW_DIMS, Numbers, WholeTensor
from grafter.core.layout.dims import Dim, Factor
from grafter.core.layout.row_view import leading_row_dims
from grafter.core.layout.runs import whole
from grafter.core.layout.shares import RoleShares, Share
from grafter.core.layout.space import rectangles
from grafter.core.measures.flat_chunks import copyable
from grafter.core.tokens.sequences import SequenceId
from grafter.core.tokens.tokens import Tokens
from grafter.errors import LayoutError
from grafter.store.dumps.lazy_tensor import LazyTensor
from grafter.store.dumps.point import DumpedPoint

_Rows = npt.NDArray[np.int64]


class RowSource:
    """The whole tensor of one point as `rows` rows: those of the dim `t`, of `b s` flattened, or of its first dims.

    row_ndim: the number of dims of a row, needed if the dims have no names and several splits fit. Raises LayoutError.
    """

    def __init__(self, tensor: WholeTensor, rows: int, row_ndim: int | None = None) -> None:
        self.tensor, self.rows = tensor, rows
        self._row_dims = _row_dims(tensor, rows, row_ndim)
        self._rest = [dim for dim in range(len(tensor.shape)) if dim not in self._row_dims]
        self._row_shape = tuple(tensor.shape[dim] for dim in self._row_dims)
        self.rest_shape: Numbers = tuple(tensor.shape[dim] for dim in self._rest)
        dims = tensor.whole.dims
        self.rest_dims: tuple[Dim, ...] | None = None if dims is None else tuple(dims[dim] for dim in self._rest)

    def read(
        self, first: int, count: int, offset: Numbers, size: Numbers, copy: int = 0
    ) -> Iterator[tuple[Numbers, torch.Tensor]]:
        """Rows from `first` on, and a box of the other dims, as tensors [some rows, *size] in order, with their ranks.

        copy: the number of the copy; if there are fewer copies, the first one, without ranks.
        """
        for starts, lengths in rectangles(first, first + count, self._row_shape):
            at, extent = [0] * len(self.tensor.shape), [0] * len(self.tensor.shape)
            for dim, start, length in zip(self._row_dims, starts, lengths, strict=True):
                at[dim], extent[dim] = start, length
            for dim, start, length in zip(self._rest, offset, size, strict=True):
                at[dim], extent[dim] = start, length
            ranks, box = self._copy(tuple(at), tuple(extent), copy)
            rows = copyable(box).permute(*self._row_dims, *self._rest).reshape(-1, *size)
            yield ranks, rows.view(box.dtype)

    def _copy(self, at: Numbers, extent: Numbers, copy: int) -> tuple[Numbers, torch.Tensor]:
        if self.tensor.replicas > 1:
            found = next(islice(self.tensor.copies(at, extent), copy, None), None)
            if found is not None:
                return found
        return (), self.tensor.read(at, extent)


def possible_row_ndims(tensor: WholeTensor, rows: int) -> tuple[int, list[int]]:
    """The tensor's ndim, and the possible numbers of its dims that count rows: several if only sizes decide."""
    if tensor.whole.dims is None:
        return len(tensor.shape), leading_row_dims(tensor.shape, rows)
    return len(tensor.shape), [len(_row_dims(tensor, rows))]


def _row_dims(tensor: WholeTensor, rows: int, row_ndim: int | None = None) -> list[int]:
    dims, shape = tensor.whole.dims, tensor.shape
    if dims is not None:
        found = _named_row_dims(dims)
        if found and prod(shape[number] for number in found) == rows:
            return found
    else:
        possible = leading_row_dims(shape, rows)
        wanted = None if row_ndim is None else len(shape) - row_ndim
        if possible:
            return list(range(wanted if wanted in possible else possible[0]))
    named = f"dims {' '.join(tensor.dim_names)!r}" if tensor.dim_names is not None else "without names of its dims"
    raise LayoutError(
        f"tokens are given for {rows} rows, and the tensor of {list(shape)}, {named}, has not so many of `t`, or of "
        "`b s`. Name its dims with dims=, or give tokens= for each of its rows."
    )


def _named_row_dims(dims: Sequence[Dim]) -> list[int]:
    """The dims that count rows, by their names: the batch first, even if the tensor is `s b` in memory."""
    found = [number for number, dim in enumerate(dims) if dim.names and set(dim.names) <= ROW_DIMS]
    return sorted(found, key=lambda number: dims[number].names != ("b",))


class GatheredRows:
    """The rows of several sources as one tensor, given as runs of (source, first row, count).

    All sources must have the same dtype and, apart from the rows, the same shape and dims. Raises LayoutError.
    """

    def __init__(self, who: str, sources: Sequence[RowSource], runs: Sequence[tuple[int, int, int]]) -> None:
        first = sources[0]
        for source in sources[1:]:
            if (source.rest_shape, source.rest_dims, source.tensor.dtype) != (
                first.rest_shape,
                first.rest_dims,
                first.tensor.dtype,
            ):
                raise LayoutError(
                    f"the points of {who} are not of one kind: a row of the first is {_kind(first)}, of another "
                    f"{_kind(source)}.{_how_to_name(first, source)}"
                )
        self._sources, self._runs = list(sources), list(runs)
        self._ends = list(accumulate(count for _, _, count in runs))
        count = self._ends[-1] if self._ends else 0
        self.shape: Numbers = (count, *first.rest_shape)
        self.dtype = first.tensor.dtype
        dims = None if first.rest_dims is None else (Dim((Factor("t"),)), *first.rest_dims)
        self.dim_names = None if dims is None else tuple(str(Dim(dim.factors)) for dim in dims)
        text = "rows by token" if self.dim_names is None else " ".join(self.dim_names)
        share = Share(tuple(whole(size) for size in self.shape))
        self.whole = RoleShares(who, text, dims, self.shape, {0: share})
        self.replicas = max(source.tensor.replicas for source in sources)

    def read(self, offset: Numbers | None = None, size: Numbers | None = None) -> torch.Tensor:
        """A box of the tensor, gathered into new memory."""
        return self._gathered(offset, size, 0)[1]

    def _gathered(self, offset: Numbers | None, size: Numbers | None, copy: int) -> tuple[Numbers, torch.Tensor]:
        offset = offset if offset is not None else (0,) * len(self.shape)
        size = size if size is not None else tuple(n - at for n, at in zip(self.shape, offset, strict=True))
        result = torch.empty(size, dtype=self.dtype)
        row, end, filled = offset[0], offset[0] + size[0], 0
        number = bisect_right(self._ends, row)
        ranks: set[int] = set()
        while row < end:
            source, first, count = self._runs[number]
            begin = self._ends[number] - count
            stop = min(end, self._ends[number])
            rows = self._sources[source].read(first + row - begin, stop - row, offset[1:], size[1:], copy)
            for of_ranks, part in rows:
                ranks.update(of_ranks)
                copyable(result[filled : filled + len(part)]).copy_(copyable(part))
                filled += len(part)
            row, number = stop, number + 1
        return tuple(sorted(ranks)), result

    def copies(
        self, offset: Numbers | None = None, size: Numbers | None = None
    ) -> Iterator[tuple[Numbers, torch.Tensor]]:
        """Every copy of a box, with the ranks that hold it; the first copy is the one that `read` returns."""
        for copy in range(self.replicas):
            yield self._gathered(offset, size, copy)

    def will_read(self, offset: Numbers | None = None, size: Numbers | None = None) -> None:
        """Does nothing, because the rows are scattered over files."""


def _how_to_name(*sources: RowSource) -> str:
    if all(source.rest_dims is not None for source in sources):
        return ""
    return (
        ' Name the dims of the rows in both, so that sizes need not tell them: dims="b s h" or dims="t h" at the '
        "dump, or `dims:` in a rule of the plan file."
    )


def _kind(source: RowSource) -> str:
    dims = "" if source.rest_dims is None else f" ({' '.join(map(str, source.rest_dims))})"
    return f"{str(source.tensor.dtype).removeprefix('torch.')}{list(source.rest_shape)}{dims}"


def tokens_of(point: DumpedPoint, path: str, which: Literal["value", "grafted"]) -> Tokens:
    """The token of each row of the whole tensor, from the tokens of each rank's rows.

    Raises DumpError for damaged tokens, LayoutError if ranks and rows do not fit together.
    """
    tensor = point.reader(path, which)
    for rank in tensor.ranks:
        # Opening the file checks the record before memory is allocated for what it claims.
        point.local(rank, path, which)
    of_ranks = {rank: point.tokens(rank) for rank in tensor.ranks}
    known = {rank: tokens for rank, tokens in of_ranks.items() if tokens is not None}
    if len(known) != len(of_ranks):
        raise LayoutError(f"ranks {sorted(of_ranks.keys() - known.keys())} give no tokens, and others do.")
    first = next(iter(known.values()))
    if all(tokens == first for tokens in known.values()) and _fits(tensor, first.rows):
        return first
    return _assembled(tensor, known)


def _fits(tensor: LazyTensor, rows: int) -> bool:
    try:
        _row_dims(tensor, rows)
    except LayoutError:
        return False
    return True


def _assembled(tensor: LazyTensor, of_ranks: dict[int, Tokens]) -> Tokens:
    """The tokens of rows that are distributed over ranks: each rank's tokens at its rows in the whole tensor."""
    dims = tensor.whole.dims
    if dims is None:
        raise LayoutError("the ranks' tokens differ, and it is unknown which rows each rank has. Name the dims.")
    row_dims = _named_row_dims(dims)
    shape = tuple(tensor.shape[dim] for dim in row_dims)
    ids: npt.NDArray[np.object_] = np.full(shape, None, dtype=object)
    positions: _Rows = np.full(shape, -1, dtype=np.int64)
    hashes: dict[SequenceId, npt.NDArray[np.uint64]] = {}
    for rank, tokens in of_ranks.items():
        rows_of_rank = {prod(shape[dim] for dim in row_dims) for _, _, _, shape in tensor.boxes_of(rank)}
        if rows_of_rank and rows_of_rank != {tokens.rows}:
            raise LayoutError(f"rank {rank} gives tokens for {tokens.rows} rows, and has {max(rows_of_rank)} of them.")
        if not rows_of_rank:
            continue
        own_ids, own_positions = _each_row(tokens)
        for number, values in tokens.hashes.items():
            keep_longer(hashes, tokens.sequences[number], values)
        for start, size, local, local_shape in tensor.boxes_of(rank):
            local_rows = tuple(local_shape[dim] for dim in row_dims)
            if prod(local_rows) != len(own_positions):
                raise LayoutError(
                    f"rank {rank} gives tokens for {len(own_positions)} rows, and has {prod(local_rows)}."
                )
            here = tuple(slice(local[dim], local[dim] + size[dim]) for dim in row_dims)
            there = tuple(slice(start[dim], start[dim] + size[dim]) for dim in row_dims)
            ids[there] = own_ids.reshape(local_rows)[here]
            positions[there] = own_positions.reshape(local_rows)[here]
    found = Tokens.from_positions(ids.reshape(-1).tolist(), positions.reshape(-1))
    found.hashes = {n: hashes[name] for n, name in enumerate(found.sequences) if name in hashes}
    return found


def _each_row(tokens: Tokens) -> tuple[npt.NDArray[np.object_], _Rows]:
    ids: npt.NDArray[np.object_] = np.empty(tokens.rows, dtype=object)
    positions: _Rows = np.empty(tokens.rows, dtype=np.int64)
    at = 0
    for number, start, count in tokens.runs.tolist():
        ids[at : at + count] = tokens.sequences[number] if number >= 0 else None
        positions[at : at + count] = np.arange(start, start + count) if number >= 0 else -1
        at += count
    return ids, positions


def joined(several: Sequence[Tokens]) -> Tokens:
    """The tokens of several points' rows, concatenated. Raises UsageError if a token occurs twice."""
    numbers: dict[SequenceId, int] = {}
    hashes: dict[SequenceId, npt.NDArray[np.uint64]] = {}
    runs = []
    for tokens in several:
        for number, start, count in tokens.runs.tolist():
            if number < 0:
                runs.append((-1, 0, count))
            else:
                runs.append((numbers.setdefault(tokens.sequences[number], len(numbers)), start, count))
        for number, values in tokens.hashes.items():
            keep_longer(hashes, tokens.sequences[number], values)
    return Tokens(
        tuple(numbers),
        np.array(runs, dtype=np.int64).reshape(-1, 3),
        {numbers[name]: values for name, values in hashes.items() if name in numbers},
    )


def keep_longer(
    hashes: dict[SequenceId, npt.NDArray[np.uint64]], name: SequenceId, values: npt.NDArray[np.uint64]
) -> None:
    """Set the hashes of a sequence to `values` if these are longer."""
    if len(values) > len(hashes.get(name, ())):
        hashes[name] = values


def rows_of_sources(runs: Sequence[tuple[int, int]], sources: Sequence[RowSource]) -> list[tuple[int, int, int]]:
    """Runs (first row, count) over the concatenated rows of all sources, as (source, row in the source, count)."""
    ends = list(accumulate(source.rows for source in sources))
    pieces = []
    for first, count in runs:
        while count:
            # The first source that ends after the row; sources without rows are passed over.
            source = bisect_right(ends, first)
            here = min(count, ends[source] - first)
            pieces.append((source, first - (ends[source] - sources[source].rows), here))
            first, count = first + here, count - here
    return pieces


def token_at(tokens: Tokens, row: int) -> tuple[SequenceId | None, int]:
    """The sequence and position of one row; (None, ...) for padding."""
    ends = np.cumsum(tokens.runs[:, 2])
    number = int(np.searchsorted(ends, row, side="right"))
    sequence, start, count = tokens.runs[number].tolist()
    name = tokens.sequences[sequence] if sequence >= 0 else None
    return name, start + row - (int(ends[number]) - count)


def described(tokens: Tokens, runs: _Rows, limit: int = 5) -> list[str]:
    """The first tokens of runs (first row, count), at most `limit` texts `sequence:position..position`."""
    ends = np.cumsum(tokens.runs[:, 2])
    found: list[str] = []
    for first, count in runs.tolist():
        end = first + count
        while first < end and len(found) < limit:
            number = int(np.searchsorted(ends, first, side="right"))
            here = min(end, int(ends[number])) - first
            sequence, position = token_at(tokens, first)
            found.append(f"{sequence}:{position}" + (f"..{position + here - 1}" if here > 1 else ""))
            first += here
    return found
