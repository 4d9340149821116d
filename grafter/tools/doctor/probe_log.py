"""Reads what the probes of one run recorded, and compares two such logs to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# For each tensor by its path: shape, dtype, digest; for weights also the mean of their absolute values.
Tensors = dict[str, dict[str, Any]]


@dataclass
class ProcessLog:
    """The log of one process that called a model.

    `first` is its first call; `outputs` by call; `end` None: it recorded no end. `trouble`: what failed in the probe.
    """

    first: dict[str, Any]
    outputs: dict[int, Tensors] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    trouble: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return int(self.first["rank"])


@dataclass
class JobLog:
    """The logs of one job.

    `pythons`: how many Pythons loaded the probe. `uses_grafter`: whether one of them did. `processes`: those that
    called a model, by rank.
    """

    pythons: int = 0
    uses_grafter: bool = False
    processes: list[ProcessLog] = field(default_factory=list)

    @property
    def first_process(self) -> ProcessLog | None:
        return self.processes[0] if self.processes else None


def read_probe_logs(directory: Path) -> dict[str, JobLog]:
    """The logs by role. A line that a killed process did not finish is ignored."""
    jobs = {"baseline": JobLog(), "target": JobLog()}
    for path in sorted(directory.glob("*.jsonl")):
        job = jobs.get(path.name.split("-")[0])
        if job is None:
            continue
        job.pythons += 1
        lines = list(_lines(path))
        job.uses_grafter = job.uses_grafter or any(line.get("uses_grafter") for line in lines)
        process = _read_process(lines)
        if process is not None:
            job.processes.append(process)
    for job in jobs.values():
        job.processes.sort(key=lambda process: (process.rank, process.first["time"]))
    return jobs


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _read_process(lines: Sequence[dict[str, Any]]) -> ProcessLog | None:
    first = next((line for line in lines if line["kind"] == "first call"), None)
    if first is None:
        return None
    process = ProcessLog(first)
    for line in lines:
        if line["kind"] == "call":
            process.outputs[line["number"]] = line["outputs"]
        elif line["kind"] == "end":
            process.end = line
        elif line["kind"] == "trouble":
            process.trouble.append(line["text"])
    return process


def first_change(one: JobLog, other: JobLog) -> str | None:
    """The earliest difference between two runs of one command; None if they agree to the last bit."""
    if len(one.processes) != len(other.processes):
        return f"{len(one.processes)} processes called a model in one run, {len(other.processes)} in the other"
    for a, b in zip(one.processes, other.processes, strict=True):
        change = _change(a, b)
        if change is not None:
            return change if len(one.processes) == 1 else f"{change} (rank {a.rank})"
    return None


def _change(a: ProcessLog, b: ProcessLog) -> str | None:
    for what in ("weights", "inputs"):
        name = first_different(a.first[what], b.first[what])
        if name is not None:
            return f"{what[:-1]} {name} of the first call differs"
    if _calls(a) != _calls(b):
        return f"models were called {_calls(a)} times in one run, {_calls(b)} in the other"
    for number in sorted(a.outputs.keys() & b.outputs.keys()):
        name = first_different(a.outputs[number], b.outputs[number])
        if name is not None:
            return f"output {name} of call {number + 1} differs"
    if a.end is not None and b.end is not None:
        name = first_different(a.end["weights"], b.end["weights"])
        if name is not None:
            return f"weight {name} at the end differs"
        for kind, before in a.first["random_states"].items():
            # A random state that was never seeded differs from the start, and shows nothing.
            was_equal = b.first["random_states"].get(kind) == before
            if was_equal and a.end["random_states"].get(kind) != b.end["random_states"].get(kind):
                return f"the random state of {kind} at the end differs"
    return None


def _calls(process: ProcessLog) -> int:
    return int(process.end["calls"]) if process.end is not None else len(process.outputs)


def first_different(one: Tensors, other: Tensors) -> str | None:
    """The first tensor that only one side has, or that is not equal to the last bit. Unreadable ones are skipped."""
    for name in {**one, **other}:
        if name not in one or name not in other:
            return name
        digests = one[name].get("digest"), other[name].get("digest")
        if None not in digests and digests[0] != digests[1]:
            return name
    return None


def what_was_seen(job: JobLog) -> str:
    """The facts behind an agreement: `3 calls, 12 weights at the end, random states`."""
    calls = sum(len(process.outputs) for process in job.processes)
    seen = [f"{calls} model call{'s' * (calls != 1)}"]
    ends = [process.end for process in job.processes if process.end is not None]
    if ends:
        seen += [f"{sum(len(end['weights']) for end in ends)} weights at the end", "random states"]
    return ", ".join(seen)
