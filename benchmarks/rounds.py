"""Rounds in which every way is measured in turn, so that a machine that drifts or is shared drifts for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Measure = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """The median over rounds, and the middle half of them (what noise does to it)."""

    median: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        """Half the width of the middle half, as a fraction of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def interleaved(measures: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """The results of each measure, one per round. Each round begins with the next one, so that none always follows
    the same other."""
    names = list(measures)
    results: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            results[name].append(measures[name]())
    return results


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of fewer than four values, the extremes."""
    if len(values) < 4:
        return Spread(statistics.median(values), min(values), max(values))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the ratios within rounds. Both sequences hold one value per round, in the same order."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])
