"""A run of two programs, and what came of it: both ledgers, and what each rank had in hand."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from common import SEQUENCE
from safetensors import safe_open

from grafter.core.records import LedgerRecord
from grafter.store.ledger import read_run
from grafter.tools.launch.launcher import run_pair

PROGRAMS = Path(__file__).parent / "programs"
ROLES = ("baseline", "target")


@dataclass(frozen=True)
class Program:
    """One of `programs/`. `split_dim`: by point, the dim over which its ranks' values are split; absent: replicated.

    sequence_first: its tensors begin with s, b where the others' begin with b, s.
    """

    file: str
    ranks: int
    split_dim: dict[str, int]
    sequence_first: bool = False

    def command(self, *arguments: str) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks)] if self.ranks > 1 else []
        return [sys.executable, *torchrun, str(PROGRAMS / self.file), *arguments]

    def whole(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """The global tensor [b, s, features], put together from all ranks' without grafter; copies must be equal."""
        if name in self.split_dim:
            value = torch.cat(parts, self.split_dim[name])
        else:
            value = parts[0]
            assert all(torch.equal(value, other) for other in parts), f"the copies of {name} differ"
        if self.sequence_first and name != "logits":
            value = value.transpose(0, 1)
        assert value.shape[1] == SEQUENCE
        return value.flatten(2)


_HEADS = {"q": 2, "k": 2, "v": 2, "attn": 2, "mlp_hidden": 2}
LLAMA = Program("llama.py", 1, {})
LLAMA_TP = Program("llama.py", 2, _HEADS)
TITAN = Program("titan.py", 2, {**_HEADS, "layer_in": 1, "layer_out": 1, "mlp_out": 1})
MEGATRON = Program("megatron_gpt.py", 2, _HEADS, sequence_first=True)


@dataclass(frozen=True)
class PairRun:
    """A finished run. Records and tensors are found by step, name and layer."""

    programs: dict[str, Program]
    run_directory: Path
    saved: Path

    @cached_property
    def records(self) -> dict[tuple[str, int], dict[tuple[int, str, int], LedgerRecord]]:
        """By role and role rank."""
        return {
            (role, rank): {(record.step, record.name, record.tags["layer_id"]): record for record in records}
            for role, rank, records in read_run(self.run_directory)
        }

    def difference(self, step: int, name: str, layer: int) -> float:
        """`rel` on the target's worst rank."""
        found = [of_rank[step, name, layer] for (role, _), of_rank in self.records.items() if role == "target"]
        assert all(record.outcome == "compared" for record in found), [record.reason for record in found]
        return max(_rel(record) for record in found)

    @cached_property
    def _tensors(self) -> dict[str, list[dict[str, torch.Tensor]]]:
        return {role: [_read(path) for path in self._files(role)] for role in ROLES}

    def _files(self, role: str) -> list[Path]:
        return [self.saved / role / f"rank{rank}.safetensors" for rank in range(self.programs[role].ranks)]

    def whole(self, role: str, step: int, name: str, layer: int) -> torch.Tensor:
        """What a role had in hand at a point after `dump`, put together."""
        parts = [tensors[f"{step}.{name}.{layer}"] for tensors in self._tensors[role]]
        return self.programs[role].whole(name, parts)

    def logits(self, role: str, step: int) -> torch.Tensor:
        """[b, s, vocabulary]; every rank has them all."""
        return self.programs[role].whole("logits", [tensors[f"{step}.logits"] for tensors in self._tensors[role]])

    def kinds(self, role: str) -> set[str]:
        """The classes of the values that the points of a role were given."""
        found: set[str] = set()
        for path in self._files(role):
            with safe_open(path, "pt") as file:
                found |= set(json.loads(file.metadata()["kinds"]).values())
        return found - {""}


def _rel(record: LedgerRecord) -> float:
    assert record.difference is not None and record.difference.rel is not None
    return record.difference.rel


def _read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def run_programs(
    programs: dict[str, Program],
    settings: dict[str, str],
    directory: Path,
    weights: Path,
    own_layers: list[int],
    steps: int,
) -> PairRun:
    """Run both to their end; each role has a seed of its own. Fails with all output where a job does."""
    commands = {
        role: program.command(
            *(str(directory / "saved" / role), "--weights", str(weights), "--seed", str(seed), "--steps", str(steps)),
            *("--own-layers", *map(str, own_layers)),
        )
        for seed, (role, program) in enumerate(programs.items(), start=1)
    }
    return run_commands(programs, commands, settings, directory)


def run_commands(
    programs: dict[str, Program], commands: dict[str, list[str]], settings: dict[str, str], directory: Path
) -> PairRun:
    """Run both to their end; each saves into `directory/saved/<role>`. Fails with all output where one does."""
    output = io.StringIO()
    settings = {"timeout": "60", "join_timeout": "90", "log_level": "warning", **settings}
    result = run_pair(commands["baseline"], commands["target"], settings=settings, out=directory / "out", output=output)
    assert result.exit_codes == dict.fromkeys(ROLES, 0), output.getvalue()
    return PairRun(programs, result.run_directory, directory / "saved")
