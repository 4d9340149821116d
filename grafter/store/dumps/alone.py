"""A run that only dumps: no other job, no store. What the ranks of a job must agree on, they know without asking."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from grafter.config.settings.config import GrafterConfig
from grafter.core.place import Place
from grafter.core.processes.liveness import process_state
from grafter.errors import ConfigError
from grafter.store.dumps.writer import refuse_earlier_dumps
from grafter.store.run_facts import write_run_facts


def open_run(config: GrafterConfig, place: Place) -> Path:
    """The run's directory, made, with `<role>/run.json` in it. Called once by every rank of the job, on its own.

    Raises ConfigError where the ranks could not come to one name, and, with nothing written, where this rank's dumps of
    an earlier run are there.
    """
    run_name = config.run_name or find_run_name(place, os.environ)
    directory = Path(config.dir) / run_name
    refuse_earlier_dumps(directory / place.role, place.role_rank, place.who)
    (directory / place.role).mkdir(parents=True, exist_ok=True)
    if place.role_rank == 0:
        sizes: dict[str, int] = {place.role: place.role_world_size}
        write_run_facts(directory / place.role, config, place, run_name, uuid.uuid4().hex[:16], sizes)
    return directory


def find_run_name(place: Place, environ: Mapping[str, str]) -> str:
    """The same on every rank of one job, and another one in the next run: of a single rank the time; else what
    torchrun gives all its ranks, or, on one machine, which torchrun it is. Raises ConfigError where nothing says it."""
    if place.role_world_size == 1:
        return time.strftime("%Y%m%d-%H%M%S")
    run_id = environ.get("TORCHELASTIC_RUN_ID", "").strip()
    if run_id not in ("", "none"):
        return "job-" + re.sub(r"[^\w.+-]", "_", run_id, flags=re.ASCII)[:150]
    if environ.get("LOCAL_WORLD_SIZE", "").strip() == str(place.role_world_size) and "TORCHELASTIC_RUN_ID" in environ:
        starter = os.getppid()
        started = process_state(starter)[1]
        if started:
            return f"job-{starter}-{started}"
    raise ConfigError(
        f"the {place.role} job has {place.role_world_size} ranks and only dumps, so there is no store through which "
        "they could agree on a name for the run, and each would write into a directory of its own. Set "
        "GRAFTER_RUN_NAME to one new name on all ranks (or give torchrun an --rdzv-id of its own for each run)."
    )
