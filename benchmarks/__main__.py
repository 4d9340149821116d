"""`python -m benchmarks`: measure, print the tables, write JSON."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from benchmarks.calls import measure_calls
from benchmarks.capture import measure_capture
from benchmarks.conversation import measure_conversation
from benchmarks.dumping import measure_large_and_small
from benchmarks.footprint import measure_import, measure_memory
from benchmarks.planning import measure_planning
from benchmarks.report import Report
from benchmarks.resharding import ReshardingEffort, measure_resharding, shape_of
from benchmarks.sglang_grafter import find_dumper
from benchmarks.summaries import measure_summaries
from benchmarks.transfers import Effort, measure_ranks
from benchmarks.units import KIB, MIB, parse_size
from benchmarks.ways import ModelShape, Ranks

Value = TypeVar("Value")

PARTS = (
    "transfers",
    "calls",
    "memory",
    "import",
    "statistics",
    "capture",
    "resharding",
    "planning",
    "conversation",
    "dumping",
)
_RANKS = (Ranks(1, 1), Ranks(2, 2), Ranks(4, 2))
_SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    ranks: Sequence[Ranks]
    sizes: Sequence[int]
    effort: Effort
    call_rounds: int
    calls: int
    memory_bytes: int
    processes: int
    summary_bytes: int
    summary_rounds: int
    capture_rounds: int
    resharding_bytes: int
    resharding: ReshardingEffort
    planning_rounds: int
    conversation_rounds: int
    conversation_stats: Sequence[str]
    dumped_bytes: int
    dumped_files: int
    dumping_rounds: int


FULL = Plan(
    *(_RANKS, _SIZES, Effort(9, 0.1, 5.0, True), 15, 200_000, 64 * MIB, 7, 64 * MIB, 7, 9),
    *(256 * MIB, ReshardingEffort(15, 1, 0.4), 7, 7, ("full", "light", "off")),
    *(1024 * MIB, 10_000, 5),
)
QUICK = Plan(
    *(_RANKS[:2], (4 * KIB, MIB, 64 * MIB), Effort(5, 0.05, 2.0, False), 7, 100_000, 64 * MIB, 3, 64 * MIB, 3, 5),
    *(64 * MIB, ReshardingEffort(5, 1, 0.1), 3, 2, ("full", "off")),
    *(256 * MIB, 1000, 3),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; an unmet target is no failure, since figures depend on what else the machine does."""
    parser = _parser()
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else FULL
    sharded_bytes = max(given.sizes) if given.sizes else plan.resharding_bytes
    if "resharding" in given.parts:
        try:
            shape_of(sharded_bytes)
        except ValueError as error:
            parser.error(f"--sizes, for the part resharding: {error}")
    console = Console(width=None if sys.stdout.isatty() else 180)
    progress = Console(stderr=True)

    def say(text: str) -> None:
        if given.verbose or progress.is_terminal:
            progress.print(f"[dim]{text}[/]")

    start = time.monotonic()
    report = Report(load_before=os.getloadavg()[0])
    if "transfers" in given.parts:
        for ranks in given.ranks or plan.ranks:
            cases, stages = measure_ranks(ranks, given.sizes or plan.sizes, plan.effort, say, sglang=given.sglang)
            report.cases += cases
            report.stages += stages
    if "calls" in given.parts:
        say("calls")
        report.calls = measure_calls(plan.call_rounds, plan.calls, given.sglang)
    if "memory" in given.parts:
        say("memory")
        report.memory = measure_memory(max(given.sizes) if given.sizes else plan.memory_bytes, given.sglang)
    if "import" in given.parts:
        say("import")
        report.imports = measure_import(plan.processes)
    if "statistics" in given.parts:
        say("statistics")
        nbytes = max(given.sizes) if given.sizes else plan.summary_bytes
        report.summaries = measure_summaries(nbytes, plan.summary_rounds, given.sglang)
    if "capture" in given.parts:
        say("capture")
        report.capture = measure_capture(ModelShape(), plan.capture_rounds, 3)
    if "resharding" in given.parts:
        report.resharding = measure_resharding(sharded_bytes, plan.resharding, say)
    if "planning" in given.parts:
        say("planning")
        report.planning = measure_planning(plan.planning_rounds)
    if "conversation" in given.parts:
        for stats in plan.conversation_stats:
            say(f"conversation, statistics {stats}")
            report.conversations.append(measure_conversation(stats, plan.conversation_rounds))
    if "dumping" in given.parts:
        say("dumping")
        report.dumping = measure_large_and_small(plan.dumped_bytes, plan.dumped_files, plan.dumping_rounds)
    report.seconds = time.monotonic() - start
    report.print(console, verbose=given.verbose)
    if given.json is not None:
        report.write(given.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer sizes, ranks and rounds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--ranks", nargs="+", type=_explained(Ranks.parse), metavar="N-M", help="senders-receivers, as 1-1 4-2"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_explained(parse_size),
        metavar="SIZE",
        help="e.g. 4KiB 64MiB; memory, statistics, resharding: the largest",
    )
    parser.add_argument(
        "--sglang",
        type=_explained(_unpacked_wheel),
        metavar="DIR",
        help="an unpacked wheel of sglang 0.5.23",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--verbose", action="store_true", help="progress, and what costs time in the import")
    return parser


def _unpacked_wheel(text: str) -> Path:
    find_dumper(Path(text))
    return Path(text).resolve()


def _explained(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """argparse shows the text of this error, but of a ValueError only that there was one."""

    def parse_or_explain(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_or_explain


if __name__ == "__main__":
    sys.exit(main())
