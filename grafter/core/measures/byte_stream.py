"""Values of a dtype that torch does not read as numbers, compared block by block: how many have other bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from grafter.core.measures.flat_chunks import bits
from grafter.core.measures.pair_stream import Measurement, RowMeasures
from grafter.core.measures.stats import byte_difference, check_pair


class ByteStream:
    """As `PairStream`, of two tensors of one such dtype (UsageError for two).

    row_ndim: how many dims count the rows.
    """

    def __init__(self, shape: Sequence[int], x: torch.dtype, y: torch.dtype, *, row_ndim: int) -> None:
        check_pair(x, y)
        self._numel = math.prod(shape)
        self._row_count = math.prod(shape[:row_ndim])
        self._done = self._unequal = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The next values of both, as many of each."""
        self._unequal += int(torch.count_nonzero(bits(x) != bits(y)))
        self._done += x.numel()

    def finish(self) -> Measurement:
        """What was measured; all values have been added. Of unequal values only their number is known."""
        if self._done != self._numel:
            raise RuntimeError(f"{self._done} of {self._numel} values were compared.")
        rows = None if self._unequal else RowMeasures(self._row_count, 0, [], {}, 0, 0, None)
        return Measurement(byte_difference(self._unequal, self._numel), None, {}, rows, [])
