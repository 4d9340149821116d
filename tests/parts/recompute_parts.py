"""What the tests of recomputation share."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Jobs, Rank, succeed

from grafter.runtime.recompute.kept_writes import KeptTensor

both_kinds = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "other"])


def own_value(rank: Rank) -> float:
    return 1.0 if rank.is_baseline else 3.0


def run_both(directory: Path, function: Callable[[Rank], Any], *arguments: Any, **settings: Any) -> tuple[Any, Any]:
    """The target's value, and its ledger; one rank on each side."""
    with Jobs(directory, compiler=True, **{"b2t_filter": "True", **settings}) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, function, *arguments)
        values = succeed(jobs.wait())
        return values[1], jobs.ledgers()["target", 0]


def kept_tensors() -> int:
    """How many written tensors this process keeps for a recomputation."""
    return sum(type(thing) is KeptTensor for thing in gc.get_objects())
