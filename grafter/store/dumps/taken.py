"""A taken point: what the program gave, made grafter's own, until it is a line and a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from grafter.config.options import PointOptions
from grafter.core.layout.declared import DeclaredLayout, declare_layouts
from grafter.core.leaves import Leaves, flatten, spec_of
from grafter.core.measures.stats import summarize
from grafter.core.points import PointKey
from grafter.core.signal_handlers import is_from_signal_handler
from grafter.core.tensor_access import is_dtensor
from grafter.errors import UsageError
from grafter.store.dumps.encoding import safe_repr
from grafter.store.dumps.record import DumpedLeaf, Level
from grafter.store.dumps.saved_rows import SavedRows
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
