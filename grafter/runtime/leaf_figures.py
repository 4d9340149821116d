"""The figures of one point's leaves on a receiver: what each leaf is, and how what has arrived differs from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.leaves import Leaves
from grafter.core.measures.flat_chunks import checksum_of_values
from grafter.core.measures.stats import compare
from grafter.core.messages.manifest import Header
from grafter.core.plan.decision import Decision
from grafter.core.plan.resharding import Resharding
from grafter.core.points import PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import CopyRecord, Difference, LeafRecord
from grafter.core.writing.write_back import Written
from grafter.wire.exchange.incoming import IncomingLeaf

logger = logging.getLogger("grafter")

Stats = Literal["full", "light", "off"]


class LeafFigures:
    """The ledger's records of the leaves of one point on one receiver."""

    def __init__(self, key: PointKey, header: Header, decision: Decision, stats: Stats) -> None:
        """header: this rank's own. stats: how much is measured of each leaf."""
        self._key, self._header, self._decision, self._stats = key, header, decision, stats
        self.records: list[LeafRecord] = []
        # Why a leaf has no figures.
        self._why_none: str | None = None

    def measure(self, leaves: Leaves, incoming: Sequence[IncomingLeaf]) -> None:
        """Make the records. incoming: one per leaf, or none where nothing has arrived. Nothing is written."""
        records = []
        layouts, reshardings = self._header.layouts, self._decision.reshardings
        for index, (spec, target) in enumerate(zip(leaves.specs, leaves.tensors, strict=True)):
            layout = layouts[index] if layouts else None
            record = _record_of(spec.path, spec.shape, spec.dtype, target.device, layout)
            figures: dict[str, Any] = {}
            if incoming:
                one = incoming[index]
                if self._stats != "off":
                    figures = self._compare(index, spec.path, one, self._stats)
                if one.replicas is not None:
                    figures["replicas"] = one.replicas
                if reshardings is not None and (copy := self._copy(reshardings[index], one.target)) is not None:
                    figures["copy_of"] = copy
            records.append(record.model_copy(update=figures) if figures else record)
        self.records = records

    def _compare(self, index: int, path: str, one: IncomingLeaf, stats: Literal["full", "light"]) -> dict[str, Any]:
        try:
            before, arrived, difference = compare(one.target, one.value, stats)
            return {
                "before": before, "incoming": arrived, "difference": one.placed(difference),
                "token": self._token_of(index, difference),
            }  # fmt: skip
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            # Out of memory, say: it costs the figures, not the point.
            self._why_none = f"no figures of {path or 'the tensor'}: {type(error).__name__}: {error}"
            logger.warning("grafter: no statistics of %s: %s: %s", self._key, type(error).__name__, error)
            return {}

    def _copy(self, resharding: Resharding, target: torch.Tensor) -> CopyRecord | None:
        """This rank's copy, where other receivers have copies that are to be compared with it, by all ledgers."""
        ranks = resharding.copies_with(self._header.role_rank)
        if not ranks:
            return None
        try:
            return CopyRecord(ranks=list(ranks), checksum=checksum_of_values(target))
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            # As with statistics: it costs the figure, not the point.
            logger.warning("grafter: no checksum of %s: %s: %s", self._key, type(error).__name__, error)
            return CopyRecord(ranks=list(ranks), reason=f"{type(error).__name__}: {error}")

    def _token_of(self, leaf: int, found: Difference | None) -> str | None:
        """The token in which a difference of the rows that have a partner is largest."""
        rows = self._decision.rows
        if rows is None or found is None or not found.max_abs_index:
            return None
        return rows.name(self._header, leaf, found.max_abs_index[0])

    def note_saturated(self, incoming: Sequence[IncomingLeaf], written: Sequence[Written]) -> None:
        """Add how many values were beyond the range of the dtype that they were written in."""
        for index, (one, done) in enumerate(zip(incoming, written, strict=False)):
            count = one.saturated if one.saturated is not None else done.saturated
            if count is not None:
                self.records[index] = self.records[index].model_copy(update={"saturated": count})

    def why_unmeasured(self) -> str | None:
        """Why a comparison has no figures; None where each leaf has some."""
        missing = next((record.path for record in self.records if record.difference is None), None)
        if missing is None:
            return None
        if self._stats == "off":
            return "GRAFTER_STATS=off: no figures were taken"
        return self._why_none or f"no figures of {missing or 'the tensor'} were taken"

    @property
    def worst(self) -> LeafRecord | None:
        """The leaf that differs most; None before `measure`."""
        records = self.records
        return max(records, key=_badness) if len(records) > 1 else records[0] if records else None


@lru_cache(maxsize=4096)
def _record_of(
    path: str, shape: tuple[int, ...], dtype: str, device: torch.device, layout: DeclaredLayout | None
) -> LeafRecord:
    """A leaf without figures. The same ones come again at every step."""
    where = str(layout) if layout is not None else None
    return LeafRecord(path=path, shape=list(shape), dtype=dtype, device=str(device), layout=where)


def _badness(record: LeafRecord) -> tuple[int, float, float]:
    """Orders leaves by how far they differ; unequal infinities and NaN come first."""
    difference = record.difference
    if difference is None:
        return (0, 0.0, 0.0)
    mismatched = difference.mismatched_fraction or 0.0
    # Values that are not numbers, and differ, have no rel.
    rel = difference.rel if difference.rel is not None else 2.0 if mismatched else 0.0
    return (difference.nan + difference.inf, rel, mismatched)
