"""What `grafter compare` costs, in readings of the same files: 1 GiB of pairs, all cores.

    .venv/bin/python -m benchmarks.comparing [--mib 1024] [--tensor-mib 64] [--rounds 5] [--json FILE] [--dir DIR]
                                             [--msprobe PROGRAM]

The floor reads both sides once and sums them: `safetensors.torch.load_file` of each file, then `sum` of each tensor,
with as many threads as torch takes. `compare` finds pairs, aligns, and measures everything that docs/compare.md
defines, on as many threads. Each round does all ways in turn, on files in the page cache, and once more after they were
dropped from it; a ratio is taken within a round, and the table has the median over rounds. Where something else runs on
the machine, the ratio of processor seconds says more than that of the clock.

Whole processes are beside them, as a user sees them: `grafter compare`, with what it imports.
With `--msprobe`, the `msprobe` of an environment that has mindstudio-probe and torch, its `compare` reads the same
float32 tensors in its own format (torch.save, dump.json), and gives cosine, Euclidean distance, largest absolute and
relative error, and the shares of values within two relative errors.

Memory is that of such a process at its highest, less what the mapped files are of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory_pages import status_bytes
from benchmarks.units import MIB
from grafter.analysis.compare.comparison import Choice, compare, open_both
from grafter.config.thresholds import parse_threshold
from grafter.store.dumps.record import DumpedLeaf, DumpRecord

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAIRS = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "both": ("float32", "bfloat16"),
}
RULE = "*: rel <= 1e-3"


def make_dumps(directory: Path, mib: int, tensor_mib: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """`mib` MiB of pairs in tensors of `tensor_mib`, the target's a thousandth off."""
    width = 4096
    rows = tensor_mib * 2**20 // 4 // width
    for side, (role, dtype) in enumerate(zip(("baseline", "target"), dtypes, strict=True)):
        (directory / role / "rank0").mkdir(parents=True)
        with (directory / role / "rank0.dumps.jsonl").open("w") as lines:
            for order in range(max(1, mib // tensor_mib // 2)):
                generator = torch.Generator().manual_seed(order)
                count = rows * 4 // dtype.itemsize if dtypes[0] == dtypes[1] else rows
                x = torch.randn(count, width, generator=generator)
                if side:
                    x += 1e-3 * torch.randn(count, width, generator=generator)
                x = x.to(dtype)
                record = _record(order, role, x)
                save_file({"value": x}, directory / role / str(record.file), {"grafter": record.model_dump_json()})
                lines.write(record.model_dump_json() + "\n")


def _record(order: int, role: Any, x: torch.Tensor) -> DumpRecord:
    leaf = DumpedLeaf(path="", shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), device="cpu")
    return DumpRecord(
        order=order,
        time=float(order),
        name="x",
        tags={"layer_id": order},
        step=0,
        phase="forward",
        occurrence=0,
        role=role,
        role_rank=0,
        role_world_size=1,
        participants=(0,),
        call_site="",
        level="full",
        file=f"rank0/{order:06d}-x.safetensors",
        leaves=(leaf,),
    )


def read_and_sum(directory: Path) -> None:
    """Both sides once."""
    total = 0.0
    for role in ("baseline", "target"):
        for path in sorted((directory / role / "rank0").iterdir()):
            for tensor in load_file(path).values():
                total += tensor.sum().item()


def read_and_sum_in_float64(directory: Path) -> None:
    """The same with the sums as exact as those of a comparison."""
    for role in ("baseline", "target"):
        for path in sorted((directory / role / "rank0").iterdir()):
            for tensor in load_file(path).values():
                tensor.sum(dtype=torch.float64).item()


def compare_in_process(directory: Path) -> None:
    """All points, as the command does it once it is imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = compare(*open_both(directory, None), Choice(thresholds=[parse_threshold(RULE)]))
    finally:
        torch.set_num_threads(threads)
    if found.summary.exit_code:
        raise RuntimeError(found.summary.sentence)


def run_command(directory: Path) -> None:
    """The whole program."""
    subprocess.run(
        [sys.executable, "-m", "grafter.cli.main", "compare", str(directory), "--threshold", RULE],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def make_msprobe_dumps(directory: Path) -> None:
    """The same tensors as msprobe's dump has them: an output of one module each."""
    for role in ("baseline", "target"):
        own = directory / "msprobe" / role / "step0" / "rank0"
        (own / "dump_tensor_data").mkdir(parents=True)
        data, stack = {}, {}
        for number, path in enumerate(sorted((directory / role / "rank0").iterdir())):
            x = load_file(path)["value"]
            module = f"Module.layers.{number}.Linear.forward.0"
            name = f"{module}.output.0.pt"
            torch.save(x, own / "dump_tensor_data" / name)
            described = {"type": "torch.Tensor", "dtype": str(x.dtype), "shape": list(x.shape), "requires_grad": False}
            described |= {name.title(): getattr(x, name)().item() for name in ("max", "min", "mean", "norm")}
            output = [{**described, "data_name": name}]
            data[module] = {"input_args": [], "input_kwargs": {}, "output": output, "is_recompute": False}
            stack[str(number)] = [[module], ["File a.py, line 1, in f"]]
        head = {"task": "tensor", "level": "L0", "framework": "pytorch"}
        (own / "dump.json").write_text(
            json.dumps({**head, "dump_data_dir": str(own / "dump_tensor_data"), "data": data})
        )
        (own / "stack.json").write_text(json.dumps(stack))
        (own / "construct.json").write_text(json.dumps(dict.fromkeys(data)))


def run_msprobe(program: Path, directory: Path) -> None:
    """Raises RuntimeError where it has no result for each pair."""
    own = directory / "msprobe"
    out = own / "out"
    shutil.rmtree(out, ignore_errors=True)
    sides = [own / "target" / "step0", own / "baseline" / "step0"]
    arguments: list[str | Path] = ["compare", "--target_path", sides[0], "--golden_path", sides[1]]
    environment = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(
        [program, *arguments, "--output_path", out],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines = [line for path in out.glob("*.csv") for line in path.read_text().splitlines() if ".output.0" in line]
    if len(lines) != len(list((directory / "target" / "rank0").iterdir())):
        raise RuntimeError(f"msprobe has compared {len(lines)} pairs.")


def forget_files(directory: Path) -> None:
    """Drop the files from the page cache, as far as the system allows it."""
    for path in (*directory.rglob("*.safetensors"), *directory.rglob("*.pt")):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(directory: Path, rounds: int, msprobe: Path | None) -> list[dict[str, Any]]:
    """One row a way: median seconds, and the median over rounds of its ratio to reading and summing."""
    ways: dict[str, Callable[[Path], None]] = {
        "read and sum": read_and_sum,
        "sum in float64": read_and_sum_in_float64,
        "compare": compare_in_process,
        "grafter compare": run_command,
    }
    if msprobe is not None:
        make_msprobe_dumps(directory)
        ways["msprobe compare"] = partial(run_msprobe, msprobe)
    rows = []
    for cached in (True, False):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        processor: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + cached):
            for name, way in ways.items():
                if not cached:
                    forget_files(directory)
                start, used = time.perf_counter(), processor_seconds()
                way(directory)
                # The first round fills the cache.
                if number or not cached:
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(processor_seconds() - used)
        for name in ways:
            rows.append(
                {
                    "cached": cached,
                    "way": name,
                    "seconds": statistics.median(seconds[name]),
                    "ratio": median_ratio(seconds[name], seconds["read and sum"]),
                    "processor_seconds": statistics.median(processor[name]),
                    "processor_ratio": median_ratio(processor[name], processor["read and sum"]),
                }
            )
    return rows


def processor_seconds() -> float:
    """What this process and those that it waited for have used, of all cores together."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def median_ratio(own: list[float], floor: list[float]) -> float:
    """Of each round, to the floor in the same round."""
    return statistics.median(a / b for a, b in zip(own, floor, strict=True))


def anonymous_mib_of_command(directory: Path) -> float:
    """The command's highest memory that is no file's, in MiB, sampled; beyond that of comparing no point."""
    return _highest_anonymous(["compare", str(directory), "--threshold", RULE]) - _highest_anonymous(
        ["compare", str(directory), "--filter", "False"]
    )


def _highest_anonymous(arguments: list[str]) -> float:
    process = subprocess.Popen(
        [sys.executable, "-m", "grafter.cli.main", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    highest = 0
    while process.poll() is None:
        # A process that has just ended has neither the file nor the field.
        with contextlib.suppress(OSError, RuntimeError):
            highest = max(highest, status_bytes("RssAnon", process.pid))
        time.sleep(0.005)
    return highest / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of comparing dumps in readings of the same files.")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--tensor-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="for the files; default: the system's directory for such")
    parser.add_argument("--msprobe", type=Path, metavar="PROGRAM", help="an environment's bin/msprobe")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "both"), default=list(PAIRS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for first, second in (PAIRS[name] for name in arguments.dtypes):
        with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
            directory = Path(name) / "run"
            make_dumps(directory, arguments.mib, arguments.tensor_mib, (DTYPES[first], DTYPES[second]))
            own = measure(directory, arguments.rounds, arguments.msprobe if first == second == "float32" else None)
            memory = anonymous_mib_of_command(directory)
            rows += [{"a": first, "b": second, **row, "memory_mib": memory} for row in own]
    print(f"{arguments.mib} MiB of pairs, tensors of {arguments.tensor_mib} MiB, {torch.get_num_threads()} threads")
    print(f"{'dtypes':20} {'files':8} {'way':16} {'s':>7} {'ratio':>6} {'cpu s':>7} {'ratio':>6} {'MiB':>6}")
    for row in rows:
        dtypes = row["a"] if row["a"] == row["b"] else f"{row['a']} {row['b']}"
        cpu = f"{row['processor_seconds']:7.2f} {row['processor_ratio']:6.1f}"
        where = "cached" if row["cached"] else "on disk"
        shown = f"{row['memory_mib']:6.0f}" if row["way"] == "grafter compare" and row["cached"] else ""
        print(f"{dtypes:20} {where:8} {row['way']:16} {row['seconds']:7.2f} {row['ratio']:6.1f} {cpu} {shown}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"mib": arguments.mib, "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
