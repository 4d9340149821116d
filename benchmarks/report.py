"""What a run of the benchmarks found, as tables for a person and as JSON for a program."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.calls import CallResult
from benchmarks.capture import CaptureResult
from benchmarks.conversation import ConversationResult
from benchmarks.dumping import DumpingResult
from benchmarks.dumping_table import dumping_table, dumping_targets
from benchmarks.footprint import ImportResult, MemoryResult
from benchmarks.planning import PlanningResult
from benchmarks.resharding import ReshardingResult
from benchmarks.summaries import SummaryResult
from benchmarks.targets import (
    Target,
    call_targets,
    capture_targets,
    conversation_targets,
    import_targets,
    planning_targets,
    resharding_targets,
    summary_targets,
    transfer_targets,
)
from benchmarks.transfers import CaseResult, StageResult
from benchmarks.units import size_text

SCHEMA_VERSION = 1


@dataclass
class Report:
    """Everything that was measured; parts that were not asked for are empty."""

    cases: list[CaseResult] = field(default_factory=list)
    stages: list[StageResult] = field(default_factory=list)
    calls: list[CallResult] = field(default_factory=list)
    memory: list[MemoryResult] = field(default_factory=list)
    imports: ImportResult | None = None
    summaries: list[SummaryResult] = field(default_factory=list)
    capture: list[CaptureResult] = field(default_factory=list)
    resharding: list[ReshardingResult] = field(default_factory=list)
    planning: list[PlanningResult] = field(default_factory=list)
    conversations: list[ConversationResult] = field(default_factory=list)
    dumping: list[DumpingResult] = field(default_factory=list)
    seconds: float = 0.0
    load_before: float = 0.0

    @property
    def targets(self) -> list[Target]:
        return [
            *transfer_targets(self.cases),
            *call_targets(self.calls),
            *(import_targets(self.imports) if self.imports is not None else []),
            *summary_targets(self.summaries),
            *capture_targets(self.capture),
            *resharding_targets(self.resharding),
            *planning_targets(self.planning),
            *conversation_targets(self.conversations),
            *dumping_targets(self.dumping),
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "machine": machine_facts(),
            "seconds": self.seconds,
            "load_before": self.load_before,
            "transfers": [case.as_json() for case in self.cases],
            "stages": [stage.as_json() for stage in self.stages],
            "calls": [call.as_json() for call in self.calls],
            "memory": [memory.as_json() for memory in self.memory],
            "import": self.imports.as_json() if self.imports is not None else None,
            "statistics": [summary.as_json() for summary in self.summaries],
            "capture": [result.as_json() for result in self.capture],
            "resharding": [result.as_json() for result in self.resharding],
            "planning": [result.as_json() for result in self.planning],
            "conversation": [result.as_json() for result in self.conversations],
            "dumping": [result.as_json() for result in self.dumping],
            "targets": [target.as_json() for target in self.targets],
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n")

    def print(self, console: Console, *, verbose: bool) -> None:
        facts = machine_facts()
        console.print(
            f"{facts['cpus']} CPUs ({facts['processor']}), torch {facts['torch']}, Python {facts['python']}, "
            f"{facts['date']}; {self.seconds:.0f} s; load before: {self.load_before:.2f}"
        )
        found = [
            tables.transfer_table(self.cases) if self.cases else None,
            tables.stage_table(self.stages) if self.stages else None,
            tables.call_table(self.calls) if self.calls else None,
            tables.memory_table(self.memory) if self.memory else None,
            tables.summary_table(self.summaries) if self.summaries else None,
            tables.capture_table(self.capture) if self.capture else None,
            tables.resharding_table(self.resharding) if self.resharding else None,
            tables.resharding_stage_table(self.resharding) if self.resharding and verbose else None,
            tables.planning_table(self.planning) if self.planning else None,
            tables.scaling_table(self.planning) if self.planning else None,
            tables.conversation_table(self.conversations) if self.conversations else None,
            dumping_table(self.dumping) if self.dumping else None,
            tables.import_table(self.imports) if self.imports is not None and verbose else None,
            tables.target_table(self.targets) if self.targets else None,
        ]
        for table in found:
            if table is not None:
                console.print()
                console.print(table)
        for case in self.cases:
            for reason in case.left_out.values():
                console.print(f"left out of {case.ranks}, {size_text(case.nbytes)}: {reason}")
        for result in self.resharding:
            for reason in result.left_out.values():
                console.print(f"left out of {result}: {reason}")


def machine_facts() -> dict[str, Any]:
    """What the figures depend on; nothing that names this machine."""
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
