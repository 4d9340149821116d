"""Two files of a run beside its ledgers: run.json describes the run, control.jsonl lists the changes of its settings.

Each role's first rank writes both. A change gets its line in control.jsonl when the rank reaches the step from which
the change holds, so an agreed change whose step never came has no line.
"""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from grafter.config.control.in_force import InForce
from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.field_types import split_key
from grafter.core.roles import RankIdentity
from grafter.store.ledger import read_json_lines
from grafter.store.written_files import LineFile, write_whole

CONTROL_LOG_NAME = "control.jsonl"
_CHANGES_SHOWN = 8


def write_run_facts(
    role_directory: Path,
    config: GrafterConfig,
    place: RankIdentity,
    run_name: str,
    run_id: str,
    world_sizes: dict[str, int],
) -> None:
    """Write run.json. world_sizes: by role; a run that only dumps knows only its own. Raises OSError."""
    facts = {
        "schema_version": 1,
        "run_id": run_id,
        "run_name": run_name,
        "role": place.role,
        "time": time.time(),
        "configuration": config.public_dict(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        # As it was typed, with the interpreter: `python -m train` and `python train.py` are two commands.
        "command": sys.orig_argv or sys.argv,
        "hostname": socket.gethostname(),
        **{f"{role}_world_size": size for role, size in world_sizes.items()},
    }
    write_whole(role_directory / "run.json", json.dumps(facts, indent=1))


def recorded_configuration(facts: object) -> Mapping[str, Any]:
    """The settings in the content of a run.json; empty if it is damaged."""
    configuration = facts.get("configuration") if isinstance(facts, dict) else None
    return configuration if isinstance(configuration, dict) else {}


def recorded_key_tags(facts: object) -> frozenset[str] | None:
    """The tags that identify a point, if the run of this run.json had GRAFTER_KEY set. None: all except rank tags."""
    key = recorded_configuration(facts).get("key")
    return frozenset(split_key(key)) or None if isinstance(key, str) else None


class HistoryLine(BaseModel):
    """One change of settings in control.jsonl.

    time: seconds since 1970. number: the change's number; None if the line marks the end of `grafter ctl dump-next`.
    step: the first step with the new settings. asked: the change as one types it. by: who asked.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: float
    number: int | None
    step: int
    asked: str | None
    by: str | None
    in_force: InForce


def append_history(role_directory: Path, line: HistoryLine) -> None:
    """Append one line to the role's control.jsonl. Raises OSError."""
    file = LineFile(role_directory / CONTROL_LOG_NAME)
    try:
        file.append(line.model_dump_json().encode())
    finally:
        file.close()


def read_history(run_directory: Path) -> dict[str, list[HistoryLine]]:
    """The changes of a run, by role. Raises GrafterError for a line that is not a change."""
    return {
        path.parent.name: list(read_json_lines(path, HistoryLine, "a line of changes"))
        for path in sorted(run_directory.glob(f"*/{CONTROL_LOG_NAME}"))
    }


def history_notes(run_directory: Path) -> list[str]:
    """One sentence for each change of settings, for readers of the ledgers."""
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
    # One job may have ended before that step, or its files may be on another machine.
    notes = [
        text if len(where) == len(roles) > 1 else f"{text} (in the {where[0]}'s files alone)"
        for text, where in sorted(by_text.items(), key=lambda item: steps[item[0]])
    ]
    left_out = len(notes) - _CHANGES_SHOWN
    return notes[:_CHANGES_SHOWN] + ([f"and {left_out} more changes (control.jsonl)"] if left_out > 0 else [])
