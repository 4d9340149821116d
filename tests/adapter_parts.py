"""Where a rank stands on its framework's mesh, found in a process of its own over torch's fake process group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMON = """
import sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from grafter.capture.adapters import mesh_axes
rank, size = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
model = torch.nn.Linear(8, 8)
"""


def axes(code: str, rank: int, size: int) -> dict[str, tuple[int, int]]:
    done = subprocess.run(
        [sys.executable, "-c", f"{COMMON}\n{code}\nprint(sorted(mesh_axes(model).items()))", str(rank), str(size)],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return dict(eval(done.stdout.splitlines()[-1], {"__builtins__": {}}))
