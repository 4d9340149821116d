"""Two files of a run beside its ledgers: run.json (what this run of a role was) and control.jsonl (what was in force
from which step on).
"""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from grafter.config.control.in_force import InForce
from grafter.config.settings.config import GrafterConfig
from grafter.core.roles import Place
from grafter.errors import GrafterError
from grafter.store.written_files import LineFile, write_whole


def write_run_facts(
    role_directory: Path,
    config: GrafterConfig,
    place: Place,
    run_name: str,
    run_id: str,
    world_sizes: dict[str, int],
) -> None:
    """world_sizes: of the roles that are known; a run that only dumps knows its own. Raises OSError."""
    facts = {
        "schema_version": 1,
        "run_id": run_id,
        "run_name": run_name,
        "role": place.role,
        "time": time.time(),
        "configuration": config.public_dict(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": _command(),
        "hostname": socket.gethostname(),
        **{f"{role}_world_size": size for role, size in world_sizes.items()},
    }
    write_whole(role_directory / "run.json", json.dumps(facts, indent=1))


def _command() -> list[str]:
    """As it was typed, interpreter and all: `python -m train` and `python train.py` are two commands."""
    return sys.orig_argv or sys.argv


# control.jsonl, beside the ledgers: what was in force from which step on. One line for each change that took effect.
#
# Each role's first rank writes its role's file when it comes to that step, so a change that was agreed and never came
# to anything is in none.

FILE_NAME = "control.jsonl"
_LINES_SHOWN = 8


class HistoryLine(BaseModel):
    """number: of the change, None where steps to dump were over. asked: as one would type it. time: since 1970."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: float
    number: int | None
    step: int
    asked: str | None
    by: str | None
    in_force: InForce


def append_history(role_directory: Path, line: HistoryLine) -> None:
    """Raises OSError."""
    file = LineFile(role_directory / FILE_NAME)
    try:
        file.append(line.model_dump_json().encode())
    finally:
        file.close()


def read_history(run_directory: Path) -> dict[str, list[HistoryLine]]:
    """By role. A last line without its newline is left out. Raises GrafterError where a line is none."""
    found = {}
    for path in sorted(run_directory.glob(f"*/{FILE_NAME}")):
        lines = []
        for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                lines.append(HistoryLine.model_validate_json(text))
            except ValidationError as error:
                raise GrafterError(f"{path}:{number}: not a line of changes: {error.errors()[0]['msg']}") from error
        found[path.parent.name] = lines
    return found


def history_notes(run_directory: Path) -> list[str]:
    """What a reader of the ledgers must know: from which step on other settings were in force."""
    roles = read_history(run_directory)
    by_text: dict[str, list[str]] = {}
    steps: dict[str, int] = {}
    for role, lines in roles.items():
        for line in lines:
            head = "the steps to dump were over" if line.asked is None else f"grafter ctl {line.asked}"
            text = f"changed while it ran, from step {line.step} on ({head}): {line.in_force.text}"
            if role not in by_text.setdefault(text, []):
                by_text[text].append(role)
            steps[text] = line.step
    # One job may have ended before it came to that step, or its files may be on another machine.
    notes = [
        text if len(where) == len(roles) > 1 else f"{text} (in the {where[0]}'s files alone)"
        for text, where in sorted(by_text.items(), key=lambda item: steps[item[0]])
    ]
    left_out = len(notes) - _LINES_SHOWN
    return notes[:_LINES_SHOWN] + ([f"and {left_out} more changes (control.jsonl)"] if left_out > 0 else [])
