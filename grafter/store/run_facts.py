"""run.json: what this run of a role was, written by its first rank when it begins."""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from pathlib import Path

import torch

from grafter.config.settings.config import GrafterConfig
from grafter.core.place import Place
from grafter.store.written_files import write_whole


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
