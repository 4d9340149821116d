"""Saved rows: what of a point goes to disk where some of its rows do not count (`start=`, `new_rows_only`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grafter.config.options import PointOptions
from grafter.core.layout.declared import by_path
from grafter.core.layout.dims import parse_dims
from grafter.core.leaves import flatten
from grafter.core.plan.token_shares import row_dims
from grafter.core.rows.tokens import Tokens
from grafter.core.tensor_access import is_dtensor
from grafter.errors import LayoutError

_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SavedRows:
    """The rows of a point that are saved.

    segments: int64 [n, 2], (first row, count) of each run of saved rows. dims: for each leaf, the dim that the rows run
    along. tokens: those of the saved rows.
    """

    segments: _Numbers
    dims: dict[str, int]
    tokens: Tokens

    def of(self, value: Any) -> Any:
        """The value, with these rows alone."""
        if isinstance(value, torch.Tensor):
            return self._cut(value, "")
        flat, tree = flatten(value)
        cut = [self._cut(leaf, path) if isinstance(leaf, torch.Tensor) else leaf for path, leaf in flat]
        return torch.utils._pytree.tree_unflatten(cut, tree)

    def _cut(self, tensor: torch.Tensor, path: str) -> torch.Tensor:
        dim = self.dims[path]
        if len(self.segments) == 1:
            first, count = self.segments[0].tolist()
            return tensor.detach().narrow(dim, first, count)
        index = [torch.arange(first, first + count) for first, count in self.segments.tolist()]
        return tensor.detach().index_select(dim, torch.cat([torch.arange(0), *index]).to(tensor.device))


def rows_to_save(value: Any, options: PointOptions, starts: tuple[int, ...]) -> tuple[PointOptions, SavedRows | None]:
    """The options with the tokens of the rows that are saved; and these rows, where they can be told from the others.

    starts: for each sequence of the tokens the position from which on rows count. Rows before it are left out where
    they run along one dim; in a batch of two dims, of which no part is a batch, all are saved, and those before it have
    no token. Padding is saved.
    """
    tokens: Tokens = options.tokens
    runs = tokens.runs
    rows = np.cumsum(runs[:, 2]) - runs[:, 2]
    first = np.array([*starts, 0], dtype=np.int64)[runs[:, 0]]
    before = np.clip(np.where(runs[:, 0] >= 0, first - runs[:, 1], 0), 0, runs[:, 2])
    kept = np.stack([runs[:, 0], runs[:, 1] + before, runs[:, 2] - before], axis=1)
    dims = _row_dims(value, options, tokens.rows)
    if dims is None:
        outside = np.stack([np.full_like(before, -1), np.zeros_like(before), before], axis=1)
        both = np.stack([outside, kept], axis=1).reshape(-1, 3)
        return replace(options, tokens=Tokens(tokens.sequences, both[both[:, 2] > 0], tokens.hashes)), None
    there = kept[:, 2] > 0
    saved = Tokens(tokens.sequences, kept[there], tokens.hashes)
    segments = np.stack([rows + before, kept[:, 2]], axis=1)[there]
    return replace(options, tokens=saved), SavedRows(segments, dims, saved)


def _row_dims(value: Any, options: PointOptions, rows: int) -> dict[str, int] | None:
    """The dim of the rows in each tensor; None where one of them has none, or has the rows in several dims."""
    flat = [("", value)] if isinstance(value, torch.Tensor) else flatten(value)[0]
    tensors = [(path, leaf) for path, leaf in flat if isinstance(leaf, torch.Tensor)]
    found = {}
    try:
        texts = by_path(options.dims, [path for path, _ in tensors], "dims")
        for (path, tensor), text in zip(tensors, texts, strict=True):
            named = parse_dims(text).dims if text is not None else None
            dims = row_dims(named, tensor.shape, rows)
            if is_dtensor(tensor) or dims is None or len(dims) != 1 or tensor.shape[dims[0]] != rows:
                return None
            found[path] = dims[0]
    except LayoutError:
        return None
    return found
