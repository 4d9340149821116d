"""What statistics cost, in copies of the same bytes: one thread, CPU, everything warm.

    .venv/bin/python benchmarks/stats.py [--mib 64] [--repeats 9] [--json FILE]

`naive` is the summary that sglang's grafter computes: float32, maximum and mean absolute difference, and rel as
1 - 2*sum(xy)/sum(x²+y²), with full-size temporaries. Each repeat times a copy and every case in turn, so that all see
the same machine; a case's cost is its fastest repeat over the copy's.

The floor of `full` for float32, in copies: reading both inputs 2; converting both 1; subtracting 0.6; three sums of
squares 1.9; five sums 2.1; three absolute values 1.1; five extrema 2; counting mismatches 0.5: 11 in all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grafter.core.measures.stats import compare, summarize

Cases = dict[str, Callable[[], Any]]


def naive_summary(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """The difference as the field computes it; x, y of one shape, any floating dtype."""
    x, y = x.float(), y.float()
    difference = (x - y).abs()
    products = (x * y).sum()
    return {
        "max_abs": difference.max().item(),
        "mean_abs": difference.mean().item(),
        "rel": (1 - 2 * products / (x.square() + y.square()).sum()).item(),
    }


def cases(x: torch.Tensor, y: torch.Tensor) -> Cases:
    equal = x.clone()
    return {
        "full": lambda: compare(x, y, "full"),
        "light": lambda: compare(x, y, "light"),
        "full, equal bits": lambda: compare(x, equal, "full"),
        "summary of one": lambda: summarize(x, "full"),
        "naive": lambda: naive_summary(x, y),
    }


def fastest_seconds(measured: Cases, repeats: int) -> dict[str, float]:
    """The fastest of `repeats` runs of each, after one that is not counted."""
    seconds = {name: float("inf") for name in measured}
    for repeat in range(repeats + 1):
        for name, run in measured.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if repeat:
                seconds[name] = min(seconds[name], elapsed)
    return seconds


def measure(dtype: torch.dtype, mib: int, repeats: int) -> list[dict[str, Any]]:
    """One row a case: dtype, case, milliseconds, and its cost in copies of `mib` MiB."""
    count = mib * 2**20 // dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator).to(dtype)
    y = (x.float() + 1e-3 * torch.randn(count, generator=generator)).to(dtype)
    destination = torch.empty_like(x)
    seconds = fastest_seconds({"memcpy": lambda: destination.copy_(x), **cases(x, y)}, repeats)
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "case": name,
            "milliseconds": value * 1e3,
            "memcpys": value / seconds["memcpy"],
        }
        for name, value in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of statistics in copies of the same bytes.")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for d in (torch.float32, torch.bfloat16) for row in measure(d, arguments.mib, arguments.repeats)]
    print(f"{arguments.mib} MiB against {arguments.mib} MiB, one thread")
    print(f"{'dtype':10} {'case':18} {'ms':>8} {'memcpys':>8}")
    for row in rows:
        print(f"{row['dtype']:10} {row['case']:18} {row['milliseconds']:8.1f} {row['memcpys']:8.1f}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"mib": arguments.mib, "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
