"""The tables of the benchmarks' report, a function per table."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from benchmarks.calls import CallResult
from benchmarks.capture import CaptureResult
from benchmarks.conversation import GATHERED as GATHERED_TURNS
from benchmarks.conversation import ConversationResult
from benchmarks.footprint import ImportResult, MemoryResult
from benchmarks.planning import PlanningResult
from benchmarks.resharding import PLAIN, ReshardingResult
from benchmarks.rounds import Spread, spread
from benchmarks.sharding import GATHERED, RESHARDED
from benchmarks.summaries import SummaryResult
from benchmarks.targets import (
    Target,
    call_targets,
    capture_targets,
    planning_targets,
    resharding_targets,
    transfer_targets,
)
from benchmarks.transfers import CaseResult, StageResult
from benchmarks.units import size_text, three_digits, time_text
from benchmarks.ways import AllGatherObject, AllGatherObjectOfAll, Grafter, Memcpy, RawGloo, Sglang

_STAGES = ("pairing", "exchange", "transform", "agreement", "write", "statistics")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def transfer_table(cases: list[CaseResult]) -> Table:
    """Ratios as the targets have them: how many times faster than the others, and how many copies long."""
    others = [AllGatherObject.name, AllGatherObjectOfAll.name, RawGloo.name, Sglang.name]
    others = [way for way in others if any(way in case.seconds for case in cases)]
    columns = [column for way in others for column in (way, "x")]
    table = _table(
        "One call. x: how many times grafter's; copies: grafter's in copies; ±: half of the middle half of rounds",
        *("ranks, size", "grafter", "±", *columns, "memcpy", "copies", "target", "met"),
    )
    for case in cases:
        own, targets = case.spread(Grafter.name), transfer_targets([case])
        cells = [f"{case.ranks}, {size_text(case.nbytes)}", time_text(own.median), f"{own.noise:.0%}"]
        for way in others:
            ratio = case.ratio(way, Grafter.name)
            cells += ["", ""] if ratio is None else [time_text(case.spread(way).median), _ratio_text(ratio)]
        copies = case.ratio(Grafter.name, Memcpy.name)
        cells += ["", ""] if copies is None else [time_text(case.spread(Memcpy.name).median), _ratio_text(copies)]
        cells += [
            "\n".join(f"{'≥' if t.at_least else '≤'} {t.limit:g} {_against(t)}" for t in targets),
            "\n".join(_met_text(t) for t in targets),
        ]
        table.add_row(*cells)
    return table


def _against(target: Target) -> str:
    return "x gather" if target.unit == "times" else target.unit


def stage_table(stages: list[StageResult]) -> Table:
    table = _table(
        "Where grafter's call spends its time (rank 0 of each job)", "ranks, size, role", *_STAGES, "elsewhere"
    )
    for stage in stages:
        own = [*(stage.stages.get(name, 0.0) for name in _STAGES), stage.elsewhere]
        table.add_row(
            f"{stage.ranks}, {size_text(stage.nbytes)}, {stage.role}", *(time_text(s) if s else "" for s in own)
        )
    return table


def call_table(calls: list[CallResult]) -> Table:
    table = _table("A call that moves nothing", "call", "time", "x empty", "±", "target", "met")
    for call in calls:
        targets = call_targets([call])
        table.add_row(
            call.call,
            time_text(call.nanoseconds.median / 1e9),
            _ratio_text(call.over_empty),
            f"{call.over_empty.noise:.0%}",
            "\n".join(f"≤ {t.limit:g}" for t in targets),
            "\n".join(_met_text(t) for t in targets),
        )
    return table


def memory_table(memory: list[MemoryResult]) -> Table:
    table = _table(
        "Peak memory over the tensor's own, 1->1", "way", "tensor", "sender", "receiver", "receiver, tensors"
    )
    for result in memory:
        table.add_row(
            result.way,
            size_text(result.nbytes),
            f"{result.sender_bytes / 2**20:.0f} MiB",
            f"{result.receiver_bytes / 2**20:.0f} MiB",
            f"{result.receiver_bytes / result.nbytes:.1f}",
        )
    return table


def summary_table(summaries: list[SummaryResult]) -> Table:
    table = _table("Statistics of two float32 tensors, one thread", "what", "size each", "time", "memcpys", "±")
    for summary in summaries:
        table.add_row(
            summary.case,
            size_text(summary.nbytes),
            time_text(summary.seconds.median),
            f"{summary.memcpys.median:.1f}",
            f"{summary.memcpys.noise:.0%}",
        )
    return table


def capture_table(results: list[CaptureResult]) -> Table:
    table = _table("A forward pass of a model", "pass", "time", "x plain", "±", "hooks", "points", "target", "met")
    for result in results:
        targets = capture_targets([result])
        table.add_row(
            result.case,
            time_text(result.seconds.median),
            f"{result.over_plain.median:.3f}",
            f"{result.over_plain.noise:.1%}",
            str(result.hooks or ""),
            str(result.points or ""),
            "\n".join(f"≤ {t.limit:g}" for t in targets),
            "\n".join(_met_text(t) for t in targets),
        )
    return table


def resharding_table(results: list[ReshardingResult]) -> Table:
    table = _table(
        r"Another number of shards of \[b, s, h]. x: resharded in grafts that reshard nothing; faster: than gathering",
        *("shards, split dim, size", RESHARDED, *(column for way in PLAIN for column in (way, "x"))),
        *("x the faster", "±", "target", "met", GATHERED, "faster"),
    )
    for result in results:
        cells = [str(result), time_text(result.spread(RESHARDED).median)]
        for way in PLAIN:
            over = result.ratio(RESHARDED, way)
            assert over is not None
            cells += [time_text(result.spread(way).median), _ratio_text(over)]
        targets = resharding_targets([result])
        cells += [
            _ratio_text(result.over_plain),
            f"{result.over_plain.noise:.0%}",
            "".join(f"≤ {t.limit:g}" for t in targets),
            "".join(_met_text(t) for t in targets),
        ]
        faster = result.ratio(GATHERED, RESHARDED)
        cells += ["", ""] if faster is None else [time_text(result.spread(GATHERED).median), _ratio_text(faster)]
        table.add_row(*cells)
    return table


def resharding_stage_table(results: list[ReshardingResult]) -> Table:
    table = _table("Where its calls spend their time (rank 0 of each job)", "shards, way, role", *_STAGES)
    for result in results:
        for stage in result.stages:
            own = [stage.stages.get(name, 0.0) for name in _STAGES]
            table.add_row(f"{result.ranks}, {stage.case}, {stage.role}", *(time_text(s) if s else "" for s in own))
    return table


def planning_table(results: list[PlanningResult]) -> Table:
    table = _table(
        "Decision and plan of one rank among 1024 + 1024, both axes of 32 ranks; parsing: of both manifests",
        *("layouts", "pieces", "decision", "sender", "receiver", "±", "target", "met", "parsing", "JSON"),
    )
    for result in results:
        if result.table != "layouts" or result.parsing is None:
            continue
        targets = planning_targets([result])
        table.add_row(
            f"{result.name}\n  {escape(result.layouts)}",
            str(max(result.pieces.values())),
            time_text(result.decision.median),
            *(time_text(result.seconds[role].median) for role in ("baseline", "target")),
            f"{result.slower_seconds.noise:.0%}",
            "".join(f"≤ {t.limit:g} ms" for t in targets),
            "".join(_met_text(t) for t in targets),
            time_text(result.parsing.median),
            f"{result.message_bytes / 2**20:.1f} MiB",
        )
    return table


def scaling_table(results: list[PlanningResult]) -> Table:
    """More: what each piece, or each rank of a job, costs beyond the row above."""
    table = _table(
        "By pieces, and by ranks; more: per piece or rank of a job beyond the row above",
        *("what", "sender", "more", "receiver", "more"),
    )
    for name in ("pieces", "world"):
        rows = [result for result in results if result.table == name]
        for before, result in zip([None, *rows], rows, strict=False):
            cells = [result.name]
            for role in ("baseline", "target"):
                seconds = result.seconds[role].median
                cells.append(time_text(seconds))
                if before is None:
                    cells.append("")
                    continue
                more = (seconds - before.seconds[role].median) * 1e6
                number = result.pieces[role] - before.pieces[role] if name == "pieces" else result.world - before.world
                cells.append(f"{more / number:.1f} us")
            table.add_row(*cells, end_section=result is rows[-1])
    return table


def conversation_table(results: list[ConversationResult]) -> Table:
    last = results[0].lengths[-1]
    table = _table(
        f"A turn of a conversation of {last} tokens in {len(results[0].lengths)} turns; cpu: processor time of both",
        *("statistics, way", "first turns", "last turns", "x the first", "cpu", "x the first"),
        *("faster than all rows", "±", "by cpu", "than gathering"),
    )
    for result in results:
        for way, seconds in result.seconds_late.items():
            table.add_row(
                f"{result.stats}, {way}",
                time_text(spread(result.seconds_early[way]).median),
                time_text(spread(seconds).median),
                "" if way == GATHERED_TURNS else _ratio_text(result.growth(way)),
                time_text(spread(result.processor_late[way]).median),
                "" if way == GATHERED_TURNS else _ratio_text(result.processor_growth(way)),
                _ratio_text(result.faster(way)),
                f"{result.faster(way).noise:.0%}",
                _ratio_text(result.cheaper(way)),
                _ratio_text(result.faster(way, GATHERED_TURNS)),
                end_section=way == GATHERED_TURNS,
            )
    return table


def import_table(result: ImportResult) -> Table:
    table = _table("What import grafter imports beyond torch, by own time", "module", "time")
    for module, seconds in result.costliest:
        table.add_row(module, time_text(seconds))
    return table


def target_table(targets: list[Target]) -> Table:
    table = _table("Targets", "what", "measured", "±", "target", "met")
    for target in targets:
        table.add_row(
            target.what, f"{target.measured:.3g} {target.unit}", f"{target.noise:.0%}", target.text, _met_text(target)
        )
    return table


def _met_text(target: Target) -> str:
    return "[green]met[/]" if target.met else "[red]not met[/]"


def _ratio_text(ratio: Spread) -> str:
    return three_digits(ratio.median)
