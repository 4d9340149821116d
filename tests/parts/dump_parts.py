"""Dumps for tests of reading, written by `safetensors.torch.save_file` and plain JSON lines: by no writer of ours, so
that the format is what is tested, and not two halves of one program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from grafter.core.layout.declared import Layout, declare


def layout_of(tensor: torch.Tensor, dims: str | None = None, layout: Layout | None = None, seq_lens: Any = None) -> Any:
    """What a rank declares, as JSON has it."""
    declared = declare(tensor, tensor.shape, dims, layout, seq_lens)
    return None if declared is None else json.loads(declared.model_dump_json())


class RankDumps:
    """One rank's dumps in a role's directory. `add` writes a point; `fields` replace what its record would say."""

    def __init__(self, directory: Path, role_rank: int = 0, world_size: int = 1, role: str = "baseline") -> None:
        self.directory, self.role_rank, self.world_size, self.role = directory, role_rank, world_size, role
        self.order = 0
        (directory / f"rank{role_rank}").mkdir(parents=True, exist_ok=True)
        self.lines = directory / f"rank{role_rank}.dumps.jsonl"
        self.lines.touch()

    def record(self, name: str, tensors: Mapping[str, torch.Tensor], dims: Any = None, **fields: Any) -> dict[str, Any]:
        """The record of a point whose leaves are `tensors`, by path."""
        leaves = [
            {
                "path": path,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "device": "cpu",
                "layout": layout_of(tensor, **dims) if isinstance(dims, dict) else layout_of(tensor, dims),
            }
            for path, tensor in tensors.items()
        ]
        return {
            "format_version": 1, "order": self.order, "time": 1000.0 + self.order, "name": name, "tags": {}, "step": 0,
            "phase": "forward", "occurrence": 0, "role": self.role, "role_rank": self.role_rank,
            "role_world_size": self.world_size, "participants": list(range(self.world_size)),
            "call_site": "model.py:7 in forward", "level": "full",
            "file": f"rank{self.role_rank}/{self.order:06d}-{name}.safetensors", "leaves": leaves, **fields,
        }  # fmt: skip

    def add(
        self,
        name: str,
        value: torch.Tensor | Mapping[str, torch.Tensor],
        dims: Any = None,
        *,
        stored: Mapping[str, torch.Tensor] | None = None,
        line: bool = True,
        **fields: Any,
    ) -> Path:
        """A point: its file (`stored` replaces or adds tensors of it), and unless told otherwise its line."""
        tensors = {"": value} if isinstance(value, torch.Tensor) else value
        record = self.record(name, tensors, dims, **fields)
        path = self.directory / f"rank{self.role_rank}" / f"{self.order:06d}-{name}.safetensors"
        content = {f"value{leaf}": tensor.contiguous().clone() for leaf, tensor in tensors.items()}
        content.update(stored or {})
        save_file(content, path, metadata={"grafter": json.dumps(record)})
        if line:
            self.write_line(json.dumps(record))
        self.order += 1
        return path

    def write_line(self, text: str, end: str = "\n") -> None:
        with self.lines.open("a") as file:
            file.write(text + end)
