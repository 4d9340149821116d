"""Ledgers as a run would have left them, for the tests of `grafter locate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafter.analysis.locate.measure import RunMeasurement, measure_run
from grafter.core.records import Difference, LedgerRecord

NAMES = ["embedding", "layer 0", "layer 1", "layer 2", "layer 3"]

# DESIGN section 9: transformers Llama, TP=2 against one eager rank; that layer's RMSNorm epsilon wrong at layer 2.
CLEAN = [0.0, 1.3e-14, 3.5e-14, 4.8e-14, 4.8e-14]
ALONE = [0.0, 1.3e-14, 3.5e-14, 1.8e-6, 1.4e-6]
FLOOR_ADDED = [0.0, 1.4e-14, 1.3e-14, 1.0e-14, 0.9e-14]
ADDED = [0.0, 1.4e-14, 1.3e-14, 1.8e-6, 0.9e-14]


def record(name: str = "layer", sequence: int = 0, rel: float | None = 0.0, **changes: Any) -> LedgerRecord:
    """A target's record of a compared point."""
    mismatched = None if rel is None else float(rel > 0)
    fields: dict[str, Any] = {
        "sequence": sequence,
        "time": float(sequence),
        "name": name,
        "tags": {},
        "step": 0,
        "phase": "forward",
        "occurrence": 0,
        "direction": "compare",
        "role": "target",
        "role_rank": 0,
        "outcome": "compared",
        "call_site": "model.py:1 in forward",
        "participants": {"baseline": [0], "target": [0]},
        "difference": Difference(rel=rel, mismatched_fraction=mismatched),
    }
    return LedgerRecord(**(fields | changes))


def measurement(rels: Sequence[float | None], **changes: Any) -> RunMeasurement:
    """One run whose points are NAMES, in this order, one step, one rank."""
    baseline = [record(n, i, None, role="baseline", difference=None) for i, n in enumerate(NAMES[: len(rels)])]
    target = [record(n, i, rel, **changes) for i, (n, rel) in enumerate(zip(NAMES, rels, strict=False))]
    return measure_run([("baseline", 0, baseline), ("target", 0, target)])


def measured(names: Sequence[str], rels: Sequence[float]) -> RunMeasurement:
    """One run of the target alone, whose points have these names."""
    records = [record(name, i, rel) for i, (name, rel) in enumerate(zip(names, rels, strict=True))]
    return measure_run([("target", 0, records)])
