"""What full statistics cost, in copies of the same bytes, beside the summary that the grafter of sglang prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import Spread, interleaved, ratio, spread
from grafter.core.measures.stats import compare


@dataclass
class SummaryResult:
    """Seconds of one summary of two float32 tensors, and how many copies of one of them that is."""

    case: str
    nbytes: int
    seconds: Spread
    memcpys: Spread

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "bytes": self.nbytes,
            "median_seconds": self.seconds.median,
            "memcpys": self.memcpys.median,
            "noise": self.memcpys.noise,
        }


def measure_summaries(nbytes: int, rounds: int, sglang: Path | None) -> list[SummaryResult]:
    """One thread, this process. Both tensors are normal, a thousandth apart."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(1, nbytes // 4), generator=generator)
    y = x + 1e-3 * torch.randn(x.shape, generator=generator)
    destination = torch.empty_like(x)
    cases: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: destination.copy_(x),
        "full": lambda: compare(x, y, "full"),
        "light": lambda: compare(x, y, "light"),
    }
    if sglang is not None:
        from benchmarks.sglang_grafter import load_dumper_module

        module = load_dumper_module(sglang)
        cases["sglang, difference"] = lambda: module._compare_tensors_quick(x, y)
        # All that its receiver computes for a point; `full` has the same of ours.
        cases["sglang, all of a point"] = lambda: (
            module.get_tensor_info(x),
            module._compare_tensors_quick(x, y),
            module.get_tensor_info(y),
        )
    measures = {name: partial(_seconds, run) for name, run in cases.items()}
    interleaved(measures, 1)
    seconds = interleaved(measures, rounds)
    return [
        SummaryResult(name, x.nbytes, spread(values), ratio(values, seconds["memcpy"]))
        for name, values in seconds.items()
    ]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
