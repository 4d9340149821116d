"""What tests look for in recordings. Imports nothing that a test's own processes would have to import for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_until(condition: Callable[[], bool], seconds: float = 250) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to it"
        time.sleep(0.005)


def lines_in(directory: Path) -> list[dict[str, Any]]:
    """All requests in a directory, as they were written; headers of files are left out."""
    found = []
    for file in sorted(directory.glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return found
