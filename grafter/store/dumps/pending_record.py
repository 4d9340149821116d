"""A point that waits for the disk: the program's value as snapshots and metadata, until it is a line and a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grafter.config.options import PointOptions
from grafter.config.settings.field_types import DumpLevel
from grafter.core.layout.declared import DeclaredLayout, by_path, declare_layouts
from grafter.core.layout.dims import parse_dims
from grafter.core.leaves import Leaves, flatten, spec_of
from grafter.core.measures.stats import summarize
from grafter.core.plan.token_shares import row_dims
from grafter.core.points import PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.tensor_access import is_dtensor
from grafter.core.tokens.tokens import Tokens
from grafter.errors import LayoutError, UsageError
from grafter.store.dumps.record import DumpedLeaf, safe_repr
from grafter.store.dumps.snapshot import NothingToSave, Snapshot, saveable
from grafter.store.dumps.writer import StoredTensor


# Many of these may wait for the disk; with slots, Python's garbage collector has half as much to traverse.
@dataclass(slots=True)
class PendingLeaf:
    """One tensor of the point: `value` before the point, `grafted` after a graft changed it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    layout: DeclaredLayout | None = None
    value: Snapshot | None = None
    grafted: Snapshot | None = None


@dataclass(eq=False, slots=True)
class PendingRecord:
    """One point that waits to be written. It refers to no object of the program."""

    order: int
    key: PointKey
    level: DumpLevel
    fields: dict[str, Any]
    leaves: list[PendingLeaf] = field(default_factory=list)
    # By number, as the record's `extras` refer to them.
    extras: dict[int, Snapshot] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    # Paths of tensors, and why they are not saved.
    unsaved: dict[str, str] = field(default_factory=dict)
    reserved: int = 0
    # The saved rows, if only some of them are saved.
    rows: SavedRows | None = None
    # is_over: handed to the writer, or about to be. is_written: set by the writing thread when it begins.
    is_over: bool = False
    is_written: bool = False

    @property
    def snapshots(self) -> list[Snapshot]:
        """All snapshots of the point."""
        found = [leaf.value for leaf in self.leaves] + [leaf.grafted for leaf in self.leaves]
        found += self.extras.values()
        return [snapshot for snapshot in found if snapshot is not None]


class Parts:
    """A point's value, split into tensors and other leaves. `reasons` and `unsaved` say what cannot be saved."""

    def __init__(self, value: Any, options: PointOptions | None) -> None:
        self.leaves: list[tuple[PendingLeaf, torch.Tensor]] = []
        self.others: list[tuple[str, Any]] = []
        self.reasons: list[str] = []
        self.unsaved: dict[str, str] = {}
        self.layout_error: str | None = None
        originals: list[torch.Tensor] = []
        flat = [("", value)] if isinstance(value, torch.Tensor) else sorted(flatten(value)[0], key=lambda leaf: leaf[0])
        for path, leaf in flat:
            if not isinstance(leaf, torch.Tensor):
                self.others.append((path, leaf))
                continue
            try:
                local = saveable(leaf)
            except NothingToSave as reason:
                self.reasons.append(f"{path or 'the tensor'}: {reason}")
                self.unsaved[path] = str(reason)
                continue
            spec = spec_of(path, local)
            pending = PendingLeaf(path, spec.shape, spec.dtype, str(local.device))
            self.leaves.append((pending, local))
            originals.append(leaf)
        if not self.leaves and not self.reasons:
            self.reasons.append("the value holds no tensor")
        says_layout = options is not None and (options.dims is not None or options.layout is not None)
        if options is not None and (says_layout or any(map(is_dtensor, originals))):
            self._declare_layouts(value, originals, options)

    def _declare_layouts(self, value: Any, originals: list[torch.Tensor], options: PointOptions) -> None:
        specs = tuple(spec_of(leaf.path, tensor) for leaf, tensor in self.leaves)
        leaves = Leaves(value, originals, [tensor for _, tensor in self.leaves], specs, "", {})
        try:
            layouts = declare_layouts(leaves, options.dims, options.layout, options.seq_lens)
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            self.layout_error = safe_repr(error)
            return
        for (leaf, _), layout in zip(self.leaves, layouts, strict=False):
            leaf.layout = layout


def leaf_of(leaf: PendingLeaf, pending: PendingRecord) -> DumpedLeaf:
    """The record of one tensor, with the figures of the point's level. A failure to compute them becomes a reason."""
    figures: dict[str, Any] = {}
    for prefix, snapshot in (("", leaf.value), ("grafted_", leaf.grafted)):
        if snapshot is None:
            continue
        if pending.level == "full" and snapshot.stored_as is not None:
            figures["stored_as"] = snapshot.stored_as
        elif pending.level == "checksum":
            figures[f"{prefix}checksum"] = checksum(snapshot.stored)
        elif pending.level == "statistics":
            try:
                figures[f"{prefix}statistics"] = summarize(snapshot.values, "full")
            except (UsageError, RuntimeError) as error:
                pending.reasons.append(f"{leaf.path or 'the tensor'}: no statistics: {error}")
    if not figures and leaf.layout is None:
        return _plain_leaf(leaf.path, leaf.shape, leaf.dtype, leaf.device)
    return DumpedLeaf(
        path=leaf.path, shape=leaf.shape, dtype=leaf.dtype, device=leaf.device, layout=leaf.layout, **figures
    )


@lru_cache(maxsize=4096)
def _plain_leaf(path: str, shape: tuple[int, ...], dtype: str, device: str) -> DumpedLeaf:
    # The same tensors recur at every step.
    return DumpedLeaf(path=path, shape=shape, dtype=dtype, device=device)


def tensors_of(pending: PendingRecord) -> dict[str, StoredTensor]:
    """The tensors of the point's file, by name."""
    named: dict[str, StoredTensor] = {}
    for leaf in pending.leaves:
        if leaf.value is not None:
            named[f"value{leaf.path}"] = leaf.value.stored
        if leaf.grafted is not None:
            named[f"grafted{leaf.path}"] = leaf.grafted.stored
    named.update({f"extras{number}": snapshot.stored for number, snapshot in pending.extras.items()})
    return named


def checksum(values: torch.Tensor | StoredTensor) -> str:
    """SHA-256, hexadecimal, of the bytes of a contiguous CPU tensor, row-major and little-endian."""
    stored = StoredTensor.of(values) if isinstance(values, torch.Tensor) else values
    return hashlib.sha256(stored.memory if stored.nbytes else b"").hexdigest()


_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SavedRows:
    """The rows of a point that are saved, if some of its rows do not count (`start=`, `new_rows_only`).

    segments: int64 [n, 2], (first row, count) of each run of saved rows. dims: for each leaf path, the dim of the rows.
    tokens: those of the saved rows.
    """

    segments: _Numbers
    dims: dict[str, int]
    tokens: Tokens

    def of(self, value: Any) -> Any:
        """The value reduced to these rows."""
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
    """The options with the tokens of the saved rows, and the saved rows; None if all rows are saved.

    starts: for each sequence of the tokens, the position from which rows count. Rows before it are left out if the rows
    lie along one dim. If they lie along two dims (a batch of sequences), all rows are saved, and those before it have
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
    """The dim of the rows in each tensor; None if a tensor has no such dim, or has its rows in several dims."""
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
