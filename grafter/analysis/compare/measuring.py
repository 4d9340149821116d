"""One pair of whole tensors measured: aligned, read once, block by block, replicas on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from grafter.analysis.compare.alignment import Alignment, Block, Side, WholeTensor
from grafter.analysis.compare.record import Between, KlRecord, Measures, RowRecord, RowsRecord, UlpRecord
from grafter.core.measures.flat_chunks import PACKED_FLOAT4, is_opaque
from grafter.core.measures.magnitudes import Between as Bounds
from grafter.core.measures.pair_stream import ByteStream, Measurement, PairStream
from grafter.core.measures.rows import Divergence
from grafter.core.records import Difference, TensorStatistics
from grafter.errors import LayoutError

Value = float | int | None


@dataclass(frozen=True)
class ReplicaMeasurement:
    """How far a copy is from the first one of its side. values: by the names that rules use."""

    side: str
    ranks: tuple[int, ...]
    first_ranks: tuple[int, ...]
    difference: Difference
    values: dict[str, Value]


@dataclass(frozen=True)
class Measured:
    """What came of a pair. values: by the names that rules use."""

    measures: Measures
    values: dict[str, Value]
    a: TensorStatistics | None
    b: TensorStatistics | None
    replicas: list[ReplicaMeasurement]
    bytes_read: int


def measure_pair(
    a: WholeTensor,
    b: WholeTensor,
    *,
    kl_dims: frozenset[str | None] = frozenset(),
    block_bytes: int,
    helpers: Executor | None = None,
) -> Measured:
    """How far b is from a. Holds a block of each side (at most `block_bytes`), and of each replica one more.

    kl_dims: over which dims the KL is asked for; None is A's last. helpers: threads that, where they have nothing else
    to do, measure parts of a block. Raises LayoutError where the two do not fit
    together, DumpError where a file is damaged.
    """
    plain = Alignment(a, b)
    of_last = plain.last_of_a
    if kl_dims and of_last is None:
        raise LayoutError("a rule asks for the KL, and the tensor is a single number without dims.")
    wanted = dict.fromkeys(sorted(str(dim or of_last) for dim in kl_dims))
    first, *further = wanted or [None]
    # The KL's dim comes last, so that one pass serves all; a second one is read in a pass of its own.
    alignment = plain if first is None else Alignment(a, b, last=first)
    pass_ = _Pass(alignment, with_kl=first is not None, helpers=helpers)
    pass_.run(block_bytes)
    kl = pass_.kl_records()
    for dim in further:
        once_more = _Pass(Alignment(a, b, last=dim), with_kl=True, only_kl=True)
        once_more.run(block_bytes)
        kl += once_more.kl_records()
    measurement = pass_.stream.finish()
    measures = _measures(measurement, pass_.alignment, kl)
    return Measured(
        measures, values_of(measures, of_last), measurement.y, measurement.x, pass_.replicas(), pass_.bytes_read
    )


class _Reader:
    """One side, of which other copies are measured against the first as they are read."""

    def __init__(self, name: str, side: Side, alignment: Alignment) -> None:
        self.side = side
        self._name, self._alignment = name, alignment
        self._streams: list[PairStream | ByteStream] = []
        self._ranks: list[set[int]] = []
        self._first_ranks: set[int] = set()

    def read(self, block: Block, *, with_copies: bool) -> torch.Tensor:
        """The block's first copy."""
        if self.side.tensor.replicas <= 1 or not with_copies:
            return self.side.read(block)
        copies = self.side.copies(block)
        ranks, first = next(copies)
        self._first_ranks |= set(ranks)
        for number, (ranks, copy) in enumerate(copies):
            if number == len(self._streams):
                dtype = self.side.tensor.dtype
                self._streams.append(_stream(self._alignment, dtype, dtype, statistics=False))
                self._ranks.append(set())
            self._ranks[number] |= set(ranks)
            self._streams[number].add(copy, first)
        return first

    def replicas(self) -> list[ReplicaMeasurement]:
        """Those that are not the same as the first, bit for bit."""
        found = []
        for stream, ranks in zip(self._streams, self._ranks, strict=True):
            measures = _measures(stream.finish(), self._alignment, [])
            if measures.difference.mismatched_fraction:
                ranks_of_both = tuple(sorted(ranks)), tuple(sorted(self._first_ranks))
                found.append(
                    ReplicaMeasurement(self._name, *ranks_of_both, measures.difference, values_of(measures, None))
                )
        return found


class _Pass:
    """One reading of both sides."""

    def __init__(
        self, alignment: Alignment, *, with_kl: bool, only_kl: bool = False, helpers: Executor | None = None
    ) -> None:
        self.alignment = alignment
        a, b = alignment.a.tensor, alignment.b.tensor
        if with_kl and not (_has_kl(a.dtype) and _has_kl(b.dtype)):
            raise LayoutError(f"a rule asks for the KL, which values of {a.dtype} and {b.dtype} do not have.")
        self._only_kl = only_kl
        self._divergence = Divergence() if with_kl else None
        # B is x, which is judged, and A is y.
        self.stream = _stream(alignment, b.dtype, a.dtype, helpers=helpers)
        self._a = _Reader("a", alignment.a, alignment)
        self._b = _Reader("b", alignment.b, alignment)
        self.bytes_read = 0

    def run(self, block_bytes: int) -> None:
        sizes = [own.side.tensor.dtype.itemsize for own in (self._a, self._b)]
        most = max(1, block_bytes // max(sizes))
        blocks = self.alignment.blocks(most, last_dim_whole=self._divergence is not None)
        # The disk is busy with the next block while one is measured.
        for block in _one_ahead(blocks, self._will_read):
            a, b = (own.read(block, with_copies=not self._only_kl) for own in (self._a, self._b))
            self.bytes_read += sum(sizes) * prod(block.sizes)
            if self._divergence is not None:
                width = self.alignment.shape[-1]
                self._divergence.add(a.reshape(-1, width), b.reshape(-1, width))
            if not self._only_kl:
                self.stream.add(b, a)

    def _will_read(self, block: Block) -> None:
        self._a.side.will_read(block)
        self._b.side.will_read(block)

    def replicas(self) -> list[ReplicaMeasurement]:
        return [found for own in (self._a, self._b) for found in own.replicas()]

    def kl_records(self) -> list[KlRecord]:
        found = self._divergence
        if found is None:
            return []
        outer = self.alignment.shape[:-1]
        worst = None if found.worst_row is None else _unravelled(found.worst_row, outer)
        return [
            KlRecord(
                dim=self.alignment.dims[-1].name,
                rows=found.rows,
                undefined=found.undefined,
                mean=found.mean(),
                max=found.largest if found.rows > found.undefined else None,
                worst=worst,
            )
        ]


def _stream(
    alignment: Alignment, x: torch.dtype, y: torch.dtype, *, statistics: bool = True, helpers: Executor | None = None
) -> PairStream | ByteStream:
    """What measures values of these dtypes."""
    if is_opaque(x) or is_opaque(y):
        return ByteStream(alignment.shape, x, y, row_ndim=alignment.row_ndim)
    return PairStream(alignment.shape, x, y, row_ndim=alignment.row_ndim, statistics=statistics, helpers=helpers)


def _has_kl(dtype: torch.dtype) -> bool:
    """Whether values of a dtype are real numbers, one an element."""
    return not (dtype.is_complex or is_opaque(dtype) or dtype is PACKED_FLOAT4)


def _one_ahead(blocks: Iterator[Block], announce: Callable[[Block], None]) -> Iterator[Block]:
    """The blocks, each of which is announced before the one before it is given."""
    waiting: Block | None = None
    for block in blocks:
        announce(block)
        if waiting is not None:
            yield waiting
        waiting = block
    if waiting is not None:
        yield waiting


# --- records


def _measures(found: Measurement, alignment: Alignment, kl: list[KlRecord]) -> Measures:
    place = found.difference.max_abs_index
    return Measures(
        difference=found.difference
        if place is None
        else found.difference.model_copy(update={"max_abs_index": alignment.a.index(place)}),
        max_abs_index_b=None if place is None else alignment.b.index(place),
        ulps=None
        if found.ulps is None
        else UlpRecord(counted=found.ulps.counted, max=found.ulps.max, mean=found.ulps.mean),
        percentiles=_bounds(found.percentiles),
        magnitudes=_by_power_of_two(found.magnitudes),
        rows=_rows(found, alignment),
        kl=kl,
        narrow_dtype=str(found.narrow_dtype).removeprefix("torch.") if found.narrow_dtype is not None else None,
        narrow=_measures(found.narrow, alignment, []) if found.narrow is not None else None,
    )


def _rows(found: Measurement, alignment: Alignment) -> RowsRecord | None:
    rows, shape = found.rows, alignment.row_shape
    if rows is None:
        return None
    return RowsRecord(
        dims=alignment.row_dims,
        shape=list(shape),
        count=rows.count,
        differing=rows.differing,
        far=rows.far,
        nonfinite=rows.nonfinite,
        first_nonfinite=None if rows.first_nonfinite is None else _unravelled(rows.first_nonfinite, shape),
        percentiles=_bounds(rows.percentiles),
        worst=[RowRecord(index=_unravelled(row.row, shape), rel=row.rel) for row in rows.worst],
    )


def _unravelled(number: int, shape: Sequence[int]) -> list[int]:
    return [int(place) for place in np.unravel_index(number, shape)] if shape else []


def _bounds(percentiles: dict[str, Bounds]) -> dict[str, Between]:
    return {name: Between(low=found.low, high=found.high) for name, found in percentiles.items()}


def _by_power_of_two(magnitudes: list[tuple[float, float, int]]) -> dict[str, int]:
    folded: dict[str, int] = {}
    for low, _, count in magnitudes:
        key = "0" if low == 0 else f"2**{math.frexp(low)[1] - 1}"
        folded[key] = folded.get(key, 0) + count
    return folded


def values_of(measures: Measures, last_dim: str | None) -> dict[str, Value]:
    """Every measure by the name that rules use. last_dim: whose KL is `kl` itself."""
    found = _plain_values(measures)
    narrow = _plain_values(measures.narrow) if measures.narrow is not None else dict(found)
    found |= {f"narrow_{name}": value for name, value in narrow.items()}
    for kl in measures.kl:
        # A row without a distribution is no row that agrees.
        mean, largest = (None, None) if kl.undefined else (kl.mean, kl.max)
        found |= {f"kl_{kl.dim}": mean, f"max_kl_{kl.dim}": largest}
        if kl.dim == last_dim:
            found |= {"kl": mean, "max_kl": largest}
    return found


def _plain_values(measures: Measures) -> dict[str, Value]:
    difference, ulps, rows = measures.difference, measures.ulps, measures.rows
    worst_row: Value = None
    if rows is not None and difference.rel is not None:
        worst_row = rows.worst[0].rel if rows.worst else 0.0
    if ulps is None and measures.narrow is not None:
        ulps = measures.narrow.ulps
    no_ulps = 0 if difference.mismatched_fraction == 0 else None
    return {
        "rel": difference.rel,
        "rel_l2": difference.rel_l2,
        "max_abs": difference.max_abs,
        "mean_abs": difference.mean_abs,
        "cosine": difference.cosine,
        "mismatched_fraction": difference.mismatched_fraction,
        "nan": difference.nan,
        "inf": difference.inf,
        "max_ulp": ulps.max if ulps is not None else no_ulps,
        "mean_ulp": ulps.mean if ulps is not None else no_ulps,
        # The upper bound: what passes does so wherever in its bin the percentile lies.
        **{name: _upper(measures, name) for name in ("p50", "p90", "p99", "p99_9")},
        "worst_row_rel": worst_row,
        "rows_far": rows.far if rows is not None else None,
        "rows_differing": rows.differing if rows is not None else None,
    }


def _upper(measures: Measures, name: str) -> Value:
    found = measures.percentiles.get(name)
    return found.high if found is not None else measures.difference.max_abs


def with_row_tokens(measures: Measures, token_at: Callable[[int], tuple[str | int, int]]) -> Measures:
    """The same with the sequence and position of each row that is named; the first row dim counts tokens."""
    if measures.rows is None:
        return measures
    worst = []
    for row in measures.rows.worst:
        sequence, position = token_at(row.index[0])
        worst.append(row.model_copy(update={"sequence": sequence, "position": position}))
    return measures.model_copy(update={"rows": measures.rows.model_copy(update={"worst": worst})})
