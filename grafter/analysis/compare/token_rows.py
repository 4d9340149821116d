"""Rows by token: several points of one name as one tensor, of which row r on both sides is the same token.

    A, one packed batch       rows  0 1 2 3 4 5 6 7        sequence 0 from 0, sequence 1 from 0
    B, prefill                      0 1 2   4 5            "req-0", "req-1"
       decode, step by step               3     6  7

What `Tokens` pairs is read here as a tensor `[rows, ...]`, gathered block by block from the points that have the rows;
so the same alignment and the same measures serve.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from grafter.analysis.compare.alignment import ROW_DIMS, Numbers, WholeTensor
from grafter.core.layout.dims import Dim, Factor
from grafter.core.layout.runs import whole
from grafter.core.layout.shares import RoleShares, Share
from grafter.core.layout.space import rectangles
from grafter.core.measures.flat_chunks import copyable
from grafter.core.rows.matching import leading_row_dims
from grafter.core.rows.tokens import SequenceId, Tokens
from grafter.errors import LayoutError
from grafter.store.dumps.lazy_tensor import LazyTensor
from grafter.store.dumps.point import DumpedPoint

_Rows = npt.NDArray[np.int64]


class RowSource:
    """One point's whole tensor as `rows` rows: those of `t`, or of `b s` flattened, or of its first dims.

    row_ndim: how many dims a row has, where the dims have no names and several numbers of first dims will do.
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
        """Rows first..first + count, of the rest a box, as tensors [some rows, *size] in order, each with its ranks.

        copy: which of the copies; the first, and without ranks, where there are not so many.
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
    """The tensor's ndim, and how many of its dims may count so many rows: several where only sizes say it."""
    if tensor.whole.dims is None:
        return len(tensor.shape), leading_row_dims(tensor.shape, rows)
    return len(tensor.shape), [len(_row_dims(tensor, rows))]


def _row_dims(tensor: WholeTensor, rows: int, row_ndim: int | None = None) -> list[int]:
    dims, shape = tensor.whole.dims, tensor.shape
    if dims is not None:
        found = [number for number, dim in enumerate(dims) if dim.names and set(dim.names) <= ROW_DIMS]
        # `s b` in memory is still numbered by sequence of the batch first.
        found.sort(key=lambda number: dims[number].names != ("b",))
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


class TokenRows:
    """Rows of several sources as one tensor: runs of (source, first row, count), one after the other.

    All sources have one dtype and, without rows, one shape and the same dims. Raises LayoutError where they have not.
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
        """A box of it, gathered: memory of its own."""
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
        """Every copy of it; the first is what `read` gives."""
        for copy in range(self.replicas):
            yield self._gathered(offset, size, copy)

    def will_read(self, offset: Numbers | None = None, size: Numbers | None = None) -> None:
        """Nothing: rows lie anywhere."""


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


# --- which tokens the rows of a point, and of several, are


def tokens_of(point: DumpedPoint, path: str, which: Literal["value", "grafted"]) -> Tokens:
    """Which token each row of the whole tensor is, from what each rank says of its own rows.

    Raises DumpError for tokens that are none, LayoutError where ranks and rows do not fit.
    """
    tensor = point.reader(path, which)
    for rank in tensor.ranks:
        # Opened, and so checked against the file, before memory is taken for what a record claims.
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
    """Rows that lie on several ranks: each rank's tokens where its rows are in the whole tensor."""
    dims = tensor.whole.dims
    if dims is None:
        raise LayoutError("the ranks' tokens differ, and nothing says which of the rows each has. Name the dims.")
    row_dims = [number for number, dim in enumerate(dims) if dim.names and set(dim.names) <= ROW_DIMS]
    row_dims.sort(key=lambda number: dims[number].names != ("b",))
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
    """The rows of several points, one after the other. Raises UsageError where a token is there twice."""
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
    if len(values) > len(hashes.get(name, ())):
        hashes[name] = values


@dataclass(frozen=True)
class _Places:
    """Where the rows of several sources, counted through, begin."""

    begins: list[int]

    def cut(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """A run of rows as (source, its row, count), cut where sources end."""
        while count:
            source = bisect_right(self.begins, first) - 1
            end = self.begins[source + 1] if source + 1 < len(self.begins) else first + count
            here = min(count, end - first)
            yield source, first - self.begins[source], here
            first, count = first + here, count - here


def rows_of_sources(runs: Sequence[tuple[int, int]], sources: Sequence[RowSource]) -> list[tuple[int, int, int]]:
    """Runs (first row, count) over all sources' rows counted through, as (source, its row, count)."""
    begins = [0, *accumulate(source.rows for source in sources)][:-1]
    # Of sources without rows, which begin where the next one does, the last is found.
    places = _Places(begins)
    return [piece for first, count in runs for piece in places.cut(first, count)]


def token_at(tokens: Tokens, row: int) -> tuple[SequenceId | None, int]:
    """Sequence and position of one row."""
    ends = np.cumsum(tokens.runs[:, 2])
    number = int(np.searchsorted(ends, row, side="right"))
    sequence, start, count = tokens.runs[number].tolist()
    name = tokens.sequences[sequence] if sequence >= 0 else None
    return name, start + row - (int(ends[number]) - count)


def described(tokens: Tokens, runs: _Rows, limit: int = 5) -> list[str]:
    """The first tokens of some runs of rows, sequence by sequence, as `sequence:position..position`."""
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
