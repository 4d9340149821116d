"""What one call costs where no tensor moves: disabled, and enabled with no filter that matches."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.ways import Grafter, Off, Ranks, Sglang
from benchmarks.workers import WayGroup

_ONE_TO_ONE = Ranks(1, 1)


@dataclass
class CallResult:
    """Nanoseconds per call, and how many times those of an empty function with the same arguments."""

    call: str
    nanoseconds: Spread
    over_empty: Spread

    def as_json(self) -> dict[str, Any]:
        return {
            "call": self.call,
            "nanoseconds": self.nanoseconds.median,
            "over_empty": self.over_empty.median,
            "noise": self.over_empty.noise,
        }


def measure_calls(rounds: int, count: int, sglang: Path | None) -> list[CallResult]:
    """`count` calls a batch. Each is compared with an empty function in its own process, in the same round.

    Unmatched calls are those of a rank that has joined a run and has grafted a point.
    """
    with ExitStack() as stack:
        groups = {name: stack.enter_context(WayGroup(name, _ONE_TO_ONE)) for name in (Off.name, Grafter.name)}
        loops = {"disabled": (Off.name, "grafter"), "unmatched": (Grafter.name, "grafter")}
        if sglang is not None:
            groups[Sglang.name] = stack.enter_context(WayGroup(Sglang.name, _ONE_TO_ONE, sglang=sglang))
            loops["sglang, disabled"] = (Sglang.name, "sglang disabled")
            loops["sglang, unmatched"] = (Sglang.name, "sglang")
        for name, group in groups.items():
            if name != Off.name:
                group.prepare(4096)
        results: list[CallResult] = []
        for call, (group_name, loop) in loops.items():
            group = groups[group_name]
            number = count if call == "disabled" else max(1, count // 10)
            measures = {
                "empty": partial(group.nanoseconds, "empty", count),
                "call": partial(group.nanoseconds, loop, number),
            }
            interleaved(measures, 1)
            seconds = interleaved(measures, rounds)
            if not results:
                results.append(CallResult("empty function", spread(seconds["empty"]), Spread(1.0, 1.0, 1.0)))
            results.append(CallResult(call, spread(seconds["call"]), ratio(seconds["call"], seconds["empty"])))
    return results
