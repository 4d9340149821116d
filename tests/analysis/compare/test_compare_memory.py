"""What a comparison holds follows its blocks, not its tensors. Costs about 5 s of one core."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare_parts import sides

MIB = 1 << 20
TENSOR_MIB = 384
# Beside the mapped files: blocks, chunks as float64, two threads. A copy of one tensor alone would be 384.
ROOM_MIB = 192

COMPARE = """
import resource, sys
from pathlib import Path
import torch
from grafter.analysis.compare.comparison import Choice, compare, open_both
torch.set_num_threads(1)
torch.zeros(100_000).double().sum()
files, room = int(sys.argv[2]), int(sys.argv[3])
status = Path("/proc/self/status").read_text()
used = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + files + room, used + files + room))
(point,) = compare(*open_both(Path(sys.argv[1]), None), Choice(threads=2)).points
print(point.verdict, point.reason, point.values["mismatched_fraction"])
"""


def sparse_file(path: Path, record: dict[str, object], rows: int, begins_with: torch.Tensor) -> None:
    """A tensor of `rows` rows of 4096, most of which is a hole of the file."""
    entry = {"dtype": "F32", "shape": [rows, 4096], "data_offsets": [0, rows * 4096 * 4]}
    header = json.dumps({"__metadata__": {"grafter": json.dumps(record)}, "value": entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + begins_with.numpy().tobytes())
        file.truncate(8 + len(header) + rows * 4096 * 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_memory_follows_the_block_and_not_the_tensor(tmp_path: Path) -> None:
    """With room for less than half of one tensor, a pair of one is measured, by two threads, and no digit is lost."""
    rows = TENSOR_MIB * MIB // 4 // 4096
    for number, side in enumerate(sides(tmp_path)):
        record = side.record("x", {"": torch.empty(0, 4096)}, file="rank0/000000-x.safetensors")
        record["leaves"][0]["shape"] = [rows, 4096]
        path = side.directory / "rank0" / "000000-x.safetensors"
        sparse_file(path, record, rows, torch.full((4096,), 1.0 + number))
        side.write_line(json.dumps(record))
    files = 2 * TENSOR_MIB * MIB
    run = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path), str(files), str(ROOM_MIB * MIB)],
        capture_output=True,
        text=True,
        # Each thread's own heap would be reserved in address space, though not in memory.
        env={"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    verdict, *_, mismatched = run.stdout.split()
    assert (verdict, float(mismatched)) == ("failed", 1 / rows)
