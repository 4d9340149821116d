"""Load: whether anything grows with time, and whether what exceeds a limit is refused with it. Not part of the suite.

    .venv/bin/python -m benchmarks.soak                                    # all parts, ten minutes of points
    .venv/bin/python -m benchmarks.soak --parts points outbox --seconds 60
    .venv/bin/python -m benchmarks.soak --quick                            # seconds each, to see that it works

points   1 + 1 ranks, grafts of small and large tensors and pytrees, as fast as they go
ranks    16 + 16 ranks on whatever cores there are
tensor   one tensor of 2 GiB, grafted five times
pytree   one point of 100,000 tensors
dumps    10,000 saved points, and more than a limit allows
outbox   a sender that does not wait, and a receiver that takes nothing: before and after the other job has joined

Exit code: 0; 1 where something grows, a value is wrong, or a limit does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import grafter
from benchmarks.growth import PartResult, Samples, Trend
from benchmarks.soak_ranks import SoakGroup
from benchmarks.units import MIB, parse_size
from benchmarks.ways import Ranks
from benchmarks.workers import WorkerError
from grafter.runtime.point_preparation import MOST_DESCRIBED_BYTES
from grafter.store.ledger import read_summaries

_OUTBOX_BYTES = 16 * MIB
_MANY_RANKS = Ranks(16, 16)
# A shorter part says nothing about growth: caches still fill.
_SECONDS_TO_JUDGE = 30.0


@dataclass(frozen=True)
class Load:
    """How much. seconds: of points; the parts that are counted take as long as they take."""

    seconds: float = 600.0
    ranks: Ranks = _MANY_RANKS
    tensor_bytes: int = 2048 * MIB
    leaves: int = 100_000
    files: int = 10_000
    # Until an outbox of `_OUTBOX_BYTES` is full, and words are kept for 16,384 points; and until 262,144 points from
    # before the join are remembered (docs/non-blocking.md). From there on nothing may grow.
    posted_first: int = 25_000
    grown_first: int = 600
    early_points: int = 270_000


QUICK = Load(3.0, Ranks(3, 3), 16 * MIB, 2000, 300, 1000, 20, 1000)


def soak_points(load: Load) -> PartResult:
    """Resident memory, descriptors, threads and keys, while points go through for a long time."""
    result = PartResult("points")
    with SoakGroup(Ranks(1, 1)) as group:
        group.do("join")
        # What is remembered of pytrees whose shapes never recur is bounded; growth is looked for beyond the bound.
        group.do("grow", 0, load.grown_first)
        _add_samples(result, group.soak("points", load.seconds, 200))
        group.close()
    return result


def soak_ranks(load: Load) -> PartResult:
    """Many more ranks than cores: all join, no point fails, and nothing grows."""
    result = PartResult("ranks")
    with SoakGroup(load.ranks) as group:
        result.facts["join_seconds"] = max(group.do("join"))
        _add_samples(result, group.soak("points", load.seconds / 4, 20))
        group.close()
    return result


def soak_tensor(load: Load) -> PartResult:
    """One very large tensor, several times: every value is right, and its memory is given back."""
    result, samples = PartResult("tensor"), Samples()
    with SoakGroup(Ranks(1, 1)) as group:
        group.do("join")
        for number in range(5):
            result.facts[f"seconds_{number}"] = max(group.do("tensor", load.tensor_bytes, number))
            samples.add(float(number), number, group.sample())
        highest = group.do("highest")
        result.facts["highest_resident_of_sender"], result.facts["highest_resident_of_receiver"] = highest
        # Its tensor, one full incoming value, and staging (docs/how-it-works.md).
        allowed = 2.5 * load.tensor_bytes + 600 * MIB
        result.expect(max(highest) < allowed, f"a rank held {max(highest) / MIB:.0f} MiB, above {allowed / MIB:.0f}")
        group.close()
    result.trends = samples.trends()
    return result


def soak_pytree(load: Load) -> PartResult:
    """One point of very many tensors: all are grafted, or it is refused with the limit, and the run continues."""
    result, samples = PartResult("pytree", {"leaves": load.leaves}), Samples()
    with SoakGroup(Ranks(1, 1)) as group:
        group.do("join")
        for number in range(2):
            result.facts[f"seconds_{number}"] = max(group.do("tree", load.leaves, number))
        (written,) = group.do("tree_was_written", of="target")
        # What follows goes through, and it is here that growth is looked for.
        for number in range(2, 42):
            group.do("tree", load.leaves // 100, number)
            samples.add(float(number), number, group.sample())
        group.close()
        lines = [line for line in group.records()["target 0"] if line.name == "tree"]
    outcome, reason = lines[0].outcome, lines[0].reason
    result.expect(all(line.outcome == "grafted" for line in lines[2:]), "a small pytree after the large one is lost")
    result.facts |= {"outcome": outcome, "reason": reason}
    named = outcome == "failed" and reason is not None and str(MOST_DESCRIBED_BYTES) in reason and not written
    result.expect((outcome == "grafted" and written) or named, f"{outcome}: {reason}")
    result.trends = samples.trends()
    return result


def soak_dumps(load: Load) -> PartResult:
    """Very many saved points: nothing grows with them, all are read back, and what a limit leaves out is counted."""
    result = PartResult("dumps", {"files": load.files})
    above = max(1, load.files // 100)
    settings = {"b2t_filter": None, "dump_filter": "True", "dump_max_points": str(load.files)}
    with SoakGroup(Ranks(1, 0), **settings) as group:
        samples, start = Samples(), time.monotonic()
        batch = max(1, load.files // 100)
        for done in range(0, load.files, batch):
            group.do("save", done, min(batch, load.files - done))
            samples.add(time.monotonic() - start, done, group.sample())
        result.facts["seconds"] = time.monotonic() - start
        result.facts["files_per_second"] = load.files / result.facts["seconds"]
        group.do("save", load.files, above)
        group.close()
        start = time.monotonic()
        read = sum(1 for _ in grafter.open_dumps(group.run_directory / "baseline"))
        result.facts["seconds_to_read_the_records"] = time.monotonic() - start
        (summary,) = read_summaries(group.run_directory)
        kept = len(list((group.run_directory / "baseline" / "rank0").iterdir()))
    result.trends = samples.trends()
    result.facts["left_out"] = summary.dumps_left_out
    result.expect(kept == load.files == summary.dumped, f"{kept} files and {summary.dumped} points, of {load.files}")
    result.expect(read >= load.files, f"{read} records are read back, of {load.files}")
    result.expect(summary.dumps_left_out == {"points": above}, f"left out: {summary.dumps_left_out}")
    return result


def soak_outbox(load: Load) -> PartResult:
    """No rank takes what is posted: the outbox stays within its limit, and what cannot fit is refused with it."""
    result = PartResult("outbox")
    settings = {"outbox_bytes": str(_OUTBOX_BYTES), "outbox_seconds": 3600.0}
    with SoakGroup(Ranks(1, 1), **settings) as group:
        group.do("join")
        group.do("post", 0, load.posted_first, of="baseline")
        samples = group.soak("post_after", load.seconds / 4, 500, of="baseline")
        _add_samples(result, samples)
        ((entries, nbytes),) = group.do("pending", of="baseline")
        result.facts["pending_entries"], result.facts["pending_bytes"] = entries, nbytes
        result.expect(0 < nbytes <= _OUTBOX_BYTES, f"{nbytes} bytes are pending, of {_OUTBOX_BYTES}")
        group.do("post_large", 2 * _OUTBOX_BYTES, of="baseline")
        (refusal,) = _lines_of(group.run_directory / "baseline" / "rank0.ledger.jsonl", "large")
        result.facts["refusal"] = refusal["reason"]
        is_named = f"outbox of {_OUTBOX_BYTES} (GRAFTER_OUTBOX_BYTES)" in refusal["reason"]
        is_refused = refusal["outcome"] == "failed" and is_named
        result.expect(is_refused, f"a value larger than the outbox: {refusal['reason']}")
        group.close()
    with SoakGroup(Ranks(1, 0), **settings, target_world_size=1) as group:
        # The other job never joins, so the sender is not closed: it would wait for it.
        group.do("post", 0, load.early_points)
        early = group.soak("post_after", load.seconds / 4, 500)
        ((entries, nbytes),) = group.do("pending")
        result.expect(nbytes <= _OUTBOX_BYTES, f"{nbytes} bytes wait for the other job, of {_OUTBOX_BYTES}")
        result.facts["early_entries"] = entries
        result.facts["early_points_per_second"] = early.work[-1] / early.seconds[-1]
        result.trends += [_renamed(trend, "alone, ") for trend in early.trends()]
    return result


PARTS = {
    "points": soak_points,
    "ranks": soak_ranks,
    "tensor": soak_tensor,
    "pytree": soak_pytree,
    "dumps": soak_dumps,
    "outbox": soak_outbox,
}


def _add_samples(result: PartResult, samples: Samples) -> None:
    result.trends += samples.trends()
    result.facts["points"] = samples.work[-1]
    result.facts["points_per_second"] = samples.work[-1] / samples.seconds[-1]


def _renamed(trend: Trend, before: str) -> Trend:
    return replace(trend, who=before + trend.who)


def _lines_of(ledger: Path, name: str) -> list[dict[str, str]]:
    """The last line about each point of this name, from a ledger that may be too long to be read as records."""
    found: dict[int, dict[str, str]] = {}
    with ledger.open() as file:
        for text in file:
            if f'"name":"{name}"' in text:
                line = json.loads(text)
                found[line["sequence"]] = line
    return list(found.values())


def tables(result: PartResult) -> list[Table]:
    """The facts, and the trend of each process: of many, those of the ranks that gained most."""
    facts = Table("", "", title=result.part, title_justify="left", show_header=False)
    for name, value in result.facts.items():
        facts.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    trends = Table("process", "measure", "first", "last", "highest", "a minute", "")
    shown = sorted(result.trends, key=lambda trend: (trend.measure, -trend.gain))
    for trend in shown:
        same = [each for each in shown if each.measure == trend.measure]
        if trend not in same[:4] and not trend.grows:
            continue
        show = _mib if trend.measure == "resident" else _plain
        row = (show(trend.first), show(trend.last), show(trend.highest), f"{show(trend.slope)}")
        trends.add_row(trend.who, trend.measure, *row, "GROWS" if trend.grows else "")
    return [facts, trends] if result.facts else [trends]


def _mib(value: float) -> str:
    return f"{value / MIB:.2f} MiB"


def _plain(value: float) -> str:
    return f"{value:.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether anything grows with time.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, help="of points; ranks and outbox take a quarter of it each")
    parser.add_argument("--tensor", type=parse_size, help="the size of the one large tensor, such as 2048MiB")
    parser.add_argument("--leaves", type=int, help="of the pytree")
    parser.add_argument("--quick", action="store_true", help="seconds for each part")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    load = QUICK if given.quick else Load()
    changes = {"seconds": given.seconds, "tensor_bytes": given.tensor, "leaves": given.leaves}
    load = Load(**{**vars(load), **{name: value for name, value in changes.items() if value is not None}})
    console = Console(width=max(110, Console().width))
    results = []
    for name in given.parts:
        try:
            result = PARTS[name](load)
        except WorkerError as error:
            result = PartResult(name, faults=[str(error)])
        if load.seconds < _SECONDS_TO_JUDGE:
            result.trends = [replace(trend, is_judged=False) for trend in result.trends]
        results.append(result)
        for table in tables(result):
            console.print(table)
        for fault in result.faults:
            console.print(f"[{name}] {fault}", markup=False, soft_wrap=True)
        if given.json is not None:
            given.json.write_text(json.dumps([each.as_json() for each in results], indent=1) + "\n")
    bad = [each.part for each in results if each.faults or each.growing]
    judged = "Nothing grows" if load.seconds >= _SECONDS_TO_JUDGE else "Too short to tell what grows"
    console.print(f"grows or fails: {', '.join(bad)}" if bad else f"{judged}, and every limit held.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
