"""Runs for the tests of `grafter report`, as ranks would have left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dump_parts import RankDumps

from grafter.core.records import Difference, LeafRecord, LedgerRecord, RankSummary, Role
from grafter.store.ledger import LedgerWriter

ROLES: tuple[Role, Role] = ("baseline", "target")
LAYERS = 4
# Left alone: the fault of layer 2 goes on. Grafted: it stays there. By layer.
ALONE = [0.0, 2e-14, 1.8e-6, 1.4e-6]
ADDED = [0.0, 1.4e-14, 1.8e-6, 0.9e-14]
FLOOR = [0.0, 1.4e-14, 1.2e-14, 0.9e-14]
RUN_FACTS: dict[str, Any] = {
    "schema_version": 1,
    "run_name": "run",
    "hostname": "node1",
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "baseline_world_size": 1,
    "target_world_size": 1,
}


def difference(rel: float, **changes: Any) -> Difference:
    """What a point of this `rel` would have."""
    fields = {"rel": rel, "rel_l2": rel**0.5, "max_abs": rel**0.5, "mean_abs": rel, "cosine": 1 - rel / 2}
    return Difference(**{**fields, **changes})


def record(
    role: Role, sequence: int, rel: float | None = None, *, layer: int, step: int = 0, **changes: Any
) -> LedgerRecord:
    """One rank's line of a compared point of one baseline and one target rank."""
    name = changes.pop("name", "layers.out")
    direction = changes.get("direction", "compare")
    sent = direction != "compare" and role == "baseline"
    own = difference(rel) if rel is not None and role == "target" else None
    shape = [2, 8, 16]
    fields: dict[str, Any] = {
        "sequence": sequence, "time": 1.0 + sequence, "name": name, "tags": {"layer_id": layer}, "step": step,
        "phase": "forward", "occurrence": 0, "direction": direction, "role": role, "role_rank": 0,
        "outcome": "sent" if sent else "compared" if direction == "compare" else "grafted",
        "call_site": "model.py:7 in forward", "participants": {"baseline": [0], "target": [0]},
        "bytes_received": 0 if sent else 1024, "seconds": {"pairing": 0.001 * (1 + layer), "exchange": 0.002},
        "difference": own, "leaves": [LeafRecord(path="", shape=shape, dtype="float32", device="cpu", difference=own)],
    }  # fmt: skip
    return LedgerRecord(**{**fields, **changes})


def summary(role: Role, **changes: Any) -> RankSummary:
    fields: dict[str, Any] = {"outcomes": {}, "unmatched": {}, "filters_never_matched": [], "tags_never_seen": []}
    return RankSummary(role=role, role_rank=0, **{**fields, **changes})


def layers(rels: list[float], *, steps: int = 2, direction: str = "compare") -> list[LedgerRecord]:
    """Both ranks' lines of LAYERS points in each step."""
    return [
        record(role, step * len(rels) + layer, rel, layer=layer, step=step, direction=direction)
        for step in range(steps)
        for layer, rel in enumerate(rels)
        for role in ROLES
    ]


def write_run(run: Path, records: list[LedgerRecord], **facts: Any) -> Path:
    """`records` and a summary of each rank, and run.json, which says `facts` of the target besides."""
    for role in ROLES:
        writer = LedgerWriter(run / role, 0)
        for each in records:
            if each.role == role:
                writer.write(each)
        writer.write_summary(summary(role))
        writer.close()
        own = {"role": role, "command": ["python", f"{role}.py"], "configuration": {"enable": True, "role": role}}
        said = {**RUN_FACTS, **own}
        (run / role / "run.json").write_text(json.dumps({**said, **(facts if role == "target" else {})}))
    return run


def write_locate(out: Path) -> Path:
    """What `grafter locate` leaves of a target that is wrong in layer 2, but for verdict.json."""
    write_run(out / "alone", layers(ALONE))
    write_run(out / "grafted", layers(ADDED, direction="b2t"))
    write_run(out / "floor-alone", layers(FLOOR))
    write_run(out / "floor-grafted", layers(FLOOR, direction="b2t"))
    return out


def write_dumps(run: Path, *, steps: int = 1) -> Path:
    """Tensors [2, 8, 16] of LAYERS points; layer 2 of the target differs in one row, by far in one value of it."""
    torch.manual_seed(1)
    sides = [RankDumps(run / role, role=role) for role in ROLES]
    for step in range(steps):
        for layer in range(LAYERS):
            value = torch.randn(2, 8, 16)
            other = value.clone()
            if layer == 2:
                other[1, 3] += 0.001
                other[1, 3, 5] += 2.0
            for side, tensor in zip(sides, (value, other), strict=True):
                side.add("layers.out", tensor, "b s h", tags={"layer_id": layer}, step=step)
    return run
