"""What saving points costs, as a table and as targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from benchmarks.targets import Target
from benchmarks.units import MIB, three_digits, time_text

if TYPE_CHECKING:
    from benchmarks.dumping import DumpingResult

# What must be reached.
LARGE_FASTER_THAN_TORCH_SAVE = 1.5
SMALL_FASTER_THAN_TORCH_SAVE = 1.0
STALL_MEMCPYS = 1.3


def dumping_table(results: Sequence[DumpingResult]) -> Table:
    table = Table(
        title="Saving tensors. cpu: processor time of all threads; stall: in `dump`, in copies of the same bytes",
        title_justify="left", title_style="bold",
    )  # fmt: skip
    columns = ("what, way", "until saved", "x torch.save", "±", "cpu", "x torch.save", "stall", "copies", "±", "by cpu")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for result in results:
        for way, seconds in result.seconds.items():
            processor, faster = result.processor_seconds.get(way), result.faster.get(way)
            cheaper, kind = result.less_processor.get(way), way.removeprefix("dump, ")
            stall, copies = result.stalls.get(kind), result.stall_memcpys.get(kind)
            by_processor = result.stall_processor_memcpys.get(kind)
            table.add_row(
                f"{result}, {way}",
                time_text(seconds.median),
                three_digits(faster.median) if faster is not None else "",
                f"{faster.noise:.0%}" if faster is not None else "",
                time_text(processor.median) if processor is not None else "",
                three_digits(cheaper.median) if cheaper is not None else "",
                time_text(stall.median) if stall is not None else "",
                three_digits(copies.median) if copies is not None else "",
                f"{copies.noise:.0%}" if copies is not None else "",
                three_digits(by_processor.median) if by_processor is not None else "",
                end_section=way == list(result.seconds)[-1],
            )
    table.caption = "; ".join(
        f"{result}, queue of {result.queue_bytes // MIB} MiB: {result.peak_bytes / MIB:.0f} MiB more memory at most"
        for result in results
        if result.peak_bytes is not None
    )
    return table


def dumping_targets(results: Sequence[DumpingResult]) -> list[Target]:
    targets = []
    for result in results:
        faster, limit = result.faster["dump, warm"], SMALL_FASTER_THAN_TORCH_SAVE
        if result.nbytes >= MIB:
            limit = LARGE_FASTER_THAN_TORCH_SAVE
            for kind in ("warm", "spaced"):
                stall = result.stall_memcpys[kind]
                what = f"saving {result}, {kind}: the program waits as long as"
                targets.append(Target(what, stall.median, STALL_MEMCPYS, False, "memcpys", stall.noise))
        what = f"saving {result}: faster than torch.save"
        targets.append(Target(what, faster.median, limit, True, "times", faster.noise))
    return targets
