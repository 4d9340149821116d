"""What the tests of `grafter compare` share: dumps of two sides, made by `dump_parts`, and the command run on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dump_parts import RankDumps
from typer.testing import CliRunner

from grafter.analysis.compare.comparison import Choice, Comparison, compare
from grafter.analysis.compare.record import PointRecord, SummaryRecord, read_line
from grafter.cli.main import app
from grafter.config.settings.config import GrafterConfig
from grafter.config.thresholds import parse_threshold
from grafter.rank.grafter import Grafter
from grafter.store.dumps.reader import open_dumps


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sides(directory: Path) -> tuple[RankDumps, RankDumps]:
    """A run's baseline and target, of one rank each."""
    return RankDumps(directory / "baseline"), RankDumps(directory / "target", role="target")


def dump_by_program(directory: Path, role: Any, values: dict[str, Any], **arguments: Any) -> None:
    """What a program of one rank leaves in a role's directory that dumps these values, each under its name."""
    settings: dict[str, Any] = {"dump_filter": "True", "log_level": "warning", "run_name": directory.name}
    program = Grafter(GrafterConfig(enable=True, role=role, dir=str(directory.parent), **settings))
    try:
        for name, value in values.items():
            program.dump(name, value, **arguments)
    finally:
        program.close()


def dump_passes(directory: Path, role: Any, name: str, passes: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    """The same of one point in several steps: (value, arguments) of each."""
    settings: dict[str, Any] = {"dump_filter": "True", "log_level": "warning", "run_name": directory.name}
    program = Grafter(GrafterConfig(enable=True, role=role, dir=str(directory.parent), **settings))
    try:
        for value, arguments in passes:
            program.dump(name, value, **arguments)
            program.step()
    finally:
        program.close()


def compared(directory: Path, *thresholds: str, **choice: Any) -> Comparison:
    """The baseline's dumps against the target's."""
    a, b = open_dumps(directory, role="baseline"), open_dumps(directory, role="target")
    return compare(a, b, Choice(thresholds=[parse_threshold(text) for text in thresholds], **choice))


def one_point(directory: Path, *thresholds: str, **choice: Any) -> PointRecord:
    """The one pair of points that there is."""
    (point,) = compared(directory, *thresholds, **choice).points
    return point


def told(*arguments: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `grafter compare`."""
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def json_told(*arguments: Any) -> tuple[Sequence[Any], SummaryRecord]:
    """The lines of `--json`, read by the published schema."""
    code, out, _ = told(*arguments, "--json")
    lines = [read_line(line) for line in out.splitlines()]
    assert [json.loads(line)["kind"] for line in out.splitlines()] == [line.kind for line in lines]
    summary = lines[-1]
    assert isinstance(summary, SummaryRecord) and summary.exit_code == code
    return lines, summary
