"""A taken point: what the program gave, made grafter's own, until it is a line and a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grafter.config.options import PointOptions
from grafter.core.layout.declared import DeclaredLayout, by_path, declare_layouts
from grafter.core.layout.dims import parse_dims
from grafter.core.leaves import Leaves, flatten, spec_of
from grafter.core.measures.stats import summarize
from grafter.core.plan.token_shares import row_dims
from grafter.core.points import PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.rows.tokens import Tokens
from grafter.core.tensor_access import is_dtensor
from grafter.errors import LayoutError, UsageError
from grafter.store.dumps.record import DumpedLeaf, Level, safe_repr
from grafter.store.dumps.snapshot import NothingToSave, Snapshot, saveable
from grafter.store.dumps.writer import StoredTensor


# Many of these may wait for the disk; with slots, Python's collector has half as much to look at.
@dataclass(slots=True)
class TakenLeaf:
    """One tensor of the point: `value` as the program came to it, `grafted` as it went on; or why there is none."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    layout: DeclaredLayout | None = None
    value: Snapshot | None = None
    grafted: Snapshot | None = None


@dataclass(eq=False, slots=True)
class Taken:
    """One point that is to be written. Nothing in it is the program's any more."""

    order: int
    key: PointKey
    level: Level
    fields: dict[str, Any]
    leaves: list[TakenLeaf] = field(default_factory=list)
    # By their number, as `extras` in the record names them.
    extras: dict[int, Snapshot] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    # Paths of tensors, and why they are not saved.
    unsaved: dict[str, str] = field(default_factory=dict)
    reserved: int = 0
    # Where only some rows are saved: those.
    rows: SavedRows | None = None
    # Over: handed to the writer, or about to be. Written: the writer has it; set by its thread.
    is_over: bool = False
    is_written: bool = False

    @property
    def snapshots(self) -> list[Snapshot]:
        found = [leaf.value for leaf in self.leaves] + [leaf.grafted for leaf in self.leaves]
        found += self.extras.values()
        return [snapshot for snapshot in found if snapshot is not None]


class Parts:
    """A point's value taken apart for saving, which may hold anything: what cannot be saved is told."""

    def __init__(self, value: Any, options: PointOptions | None) -> None:
        self.leaves: list[tuple[TakenLeaf, torch.Tensor]] = []
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
            taken = TakenLeaf(path, spec.shape, spec.dtype, str(local.device))
            self.leaves.append((taken, local))
            originals.append(leaf)
        if not self.leaves and not self.reasons:
            self.reasons.append("the value holds no tensor")
        says_layout = options is not None and (options.dims is not None or options.layout is not None)
        if options is not None and (says_layout or any(map(is_dtensor, originals))):
            self._declare_layouts(value, originals, options)

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        return [tensor for _, tensor in self.leaves]

    def _declare_layouts(self, value: Any, originals: list[torch.Tensor], options: PointOptions) -> None:
        specs = tuple(spec_of(leaf.path, tensor) for leaf, tensor in self.leaves)
        leaves = Leaves(value, originals, list(self.tensors), specs, "", {})
        try:
            layouts = declare_layouts(leaves, options.dims, options.layout, options.seq_lens)
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            self.layout_error = safe_repr(error)
            return
        for (leaf, _), layout in zip(self.leaves, layouts, strict=False):
            leaf.layout = layout


def leaf_of(leaf: TakenLeaf, taken: Taken) -> DumpedLeaf:
    figures: dict[str, Any] = {}
    for prefix, snapshot in (("", leaf.value), ("grafted_", leaf.grafted)):
        if snapshot is None:
            continue
        if taken.level == "full" and snapshot.stored_as is not None:
            figures["stored_as"] = snapshot.stored_as
        elif taken.level == "checksum":
            figures[f"{prefix}checksum"] = checksum(snapshot.stored)
        elif taken.level == "statistics":
            try:
                figures[f"{prefix}statistics"] = summarize(snapshot.values, "full")
            except (UsageError, RuntimeError) as error:
                taken.reasons.append(f"{leaf.path or 'the tensor'}: no statistics: {error}")
    if not figures and leaf.layout is None:
        return _plain_leaf(leaf.path, leaf.shape, leaf.dtype, leaf.device)
    return DumpedLeaf(
        path=leaf.path, shape=leaf.shape, dtype=leaf.dtype, device=leaf.device, layout=leaf.layout, **figures
    )


@lru_cache(maxsize=4096)
def _plain_leaf(path: str, shape: tuple[int, ...], dtype: str, device: str) -> DumpedLeaf:
    # The same tensors come again at every step.
    return DumpedLeaf(path=path, shape=shape, dtype=dtype, device=device)


def tensors_of(taken: Taken) -> dict[str, StoredTensor]:
    """The tensors of the file by name."""
    named: dict[str, StoredTensor] = {}
    for leaf in taken.leaves:
        if leaf.value is not None:
            named[f"value{leaf.path}"] = leaf.value.stored
        if leaf.grafted is not None:
            named[f"grafted{leaf.path}"] = leaf.grafted.stored
    named.update({f"extras{number}": snapshot.stored for number, snapshot in taken.extras.items()})
    return named


def checksum(values: torch.Tensor | StoredTensor) -> str:
    """SHA-256, hexadecimal, of the bytes of a contiguous CPU tensor: row-major, little-endian, nothing else."""
    stored = StoredTensor.of(values) if isinstance(values, torch.Tensor) else values
    return hashlib.sha256(stored.memory if stored.nbytes else b"").hexdigest()


# Saved rows: what of a point goes to disk where some of its rows do not count (`start=`, `new_rows_only`).

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
