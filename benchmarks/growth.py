"""Whether something grows with time: samples of a process, their slope, and a verdict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.memory_pages import status_bytes
from benchmarks.units import MIB

# What a measure may gain after the warm-up, over the whole rest of a part. What grows with time gains more in ten
# minutes; the allocator's own pieces gain less, and of descriptors, threads, mappings and keys a few come and go.
ALLOWED = {"resident": 8 * MIB, "descriptors": 2, "threads": 1, "mappings": 32, "keys": 64}
WARM_UP_FRACTION = 1 / 3


def sample_process() -> dict[str, int]:
    """This process's resident bytes, open descriptors, threads and memory mappings."""
    with open("/proc/self/maps") as maps:
        mappings = sum(1 for _ in maps)
    return {
        "resident": status_bytes("VmRSS"),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": mappings,
    }


@dataclass(frozen=True)
class Trend:
    """One measure of one process after the warm-up. slope: its gain for each minute, by least squares over all samples;
    gain: by that slope, over all of the time."""

    who: str
    measure: str
    first: float
    last: float
    highest: float
    slope: float
    gain: float
    is_judged: bool = True

    @property
    def grows(self) -> bool:
        """By both: a slope alone may be one late step, and two samples alone may be a peak and a trough."""
        allowed = ALLOWED[self.measure]
        return self.is_judged and self.gain > allowed and self.last - self.first > allowed


@dataclass
class Samples:
    """What was seen of several processes, in the order of time. work: how much had been done by then."""

    seconds: list[float] = field(default_factory=list)
    work: list[int] = field(default_factory=list)
    values: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def add(self, seconds: float, work: int, seen: Mapping[str, Mapping[str, int]]) -> None:
        """seen: by process, its measures."""
        self.seconds.append(seconds)
        self.work.append(work)
        for who, measures in seen.items():
            for measure, value in measures.items():
                self.values.setdefault((who, measure), []).append(value)

    def trends(self) -> list[Trend]:
        start = int(len(self.seconds) * WARM_UP_FRACTION)
        seconds = self.seconds[start:]
        return [_trend(who, measure, seconds, values[start:]) for (who, measure), values in self.values.items()]


def _trend(who: str, measure: str, seconds: Sequence[float], values: Sequence[float]) -> Trend:
    slope = _slope(seconds, values)
    quarter = max(1, len(values) // 4)
    # The middle of the first and of the last quarter: one sample may be a peak.
    first, last = sorted(values[:quarter])[quarter // 2], sorted(values[-quarter:])[quarter // 2]
    return Trend(who, measure, first, last, max(values), slope * 60, slope * (seconds[-1] - seconds[0]))


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((each - middle_x) ** 2 for each in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


@dataclass
class PartResult:
    """What one part of the soak showed. facts: figures by name; faults: what must not be, in words."""

    part: str
    facts: dict[str, Any] = field(default_factory=dict)
    trends: list[Trend] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def expect(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    @property
    def growing(self) -> list[Trend]:
        return [trend for trend in self.trends if trend.grows]

    def as_json(self) -> dict[str, Any]:
        trends = [{**asdict(trend), "grows": trend.grows} for trend in self.trends]
        return {"part": self.part, "facts": self.facts, "trends": trends, "faults": self.faults}
