"""What hooks on every module of a model cost: a forward pass with none, with no match, compared, and grafted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.ways import Model, ModelShape, Ranks
from benchmarks.workers import WayGroup

# One process alone, so that no other slows it down, against the same model without hooks in the same process.
ALONE = "hooks, no match"


@dataclass
class CaptureResult:
    """Seconds of one forward pass, and how many times those of the same pass without hooks, in the same round."""

    case: str
    seconds: Spread
    over_plain: Spread
    hooks: int
    points: int

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "seconds": self.seconds.median,
            "over_plain": self.over_plain.median,
            "noise": self.over_plain.noise,
            "hooks": self.hooks,
            "points": self.points,
        }


def measure_capture(shape: ModelShape, rounds: int, passes: int) -> list[CaptureResult]:
    """`passes` forward passes a batch. With no match, one rank runs alone; compared and grafted, both jobs run, and
    are measured against both running without hooks at once."""
    settings = {name: str(value) for name, value in asdict(shape).items()}
    with WayGroup(Model.name, Ranks(1, 1), **settings) as group:
        measures = {
            "plain": partial(group.seconds_per_pass, "plain", passes, alone=True),
            ALONE: partial(group.seconds_per_pass, "unmatched", passes, alone=True),
            "plain, both jobs": partial(group.seconds_per_pass, "plain", passes),
            "compared": partial(group.seconds_per_pass, "compare", passes),
            "grafted": partial(group.seconds_per_pass, "graft", passes),
        }
        interleaved(measures, 1)
        seconds = interleaved(measures, rounds)
        hooks, points = group.model_facts()
    results = []
    for case in measures:
        plain = seconds["plain" if case in ("plain", ALONE) else "plain, both jobs"]
        hooked = not case.startswith("plain")
        results.append(
            CaptureResult(
                case,
                spread(seconds[case]),
                ratio(seconds[case], plain),
                hooks if hooked else 0,
                points if hooked else 0,
            )
        )
    return results
