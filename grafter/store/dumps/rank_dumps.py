"""One rank's dumps: which points are saved, and the saver. Also the run that only dumps, without another job.

The ranks of a run that only dumps have no store, so each derives the run's name and directory by itself.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grafter.config.options import PointOptions
from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.participants import own_participants
from grafter.core.points import PointKey
from grafter.core.processes import process_state
from grafter.core.records import PointOutcome
from grafter.core.roles import Direction, RankIdentity
from grafter.errors import ConfigError, GrafterError
from grafter.store.dumps.limits import Limits
from grafter.store.dumps.pending_record import PendingRecord, rows_to_save
from grafter.store.dumps.saver import Saver
from grafter.store.dumps.writer import refuse_earlier_dumps
from grafter.store.run_files import write_run_facts

logger = logging.getLogger("grafter")


class RankDumps:
    """The dumps of one rank. Used under the lock of its points; opens no file before the first point is saved."""

    def __init__(
        self,
        config: GrafterConfig,
        place: RankIdentity,
        axes_of: Callable[[Any], tuple[tuple[str, int, int], ...]],
        find_run_directory: Callable[[], Path],
    ) -> None:
        """axes_of: this rank's place on the mesh, from the call's `axes`. find_run_directory: may wait for the run to
        begin.
        """
        self._config, self._place = config, place
        self._axes_of, self._find_run_directory = axes_of, find_run_directory
        self.limits = Limits(config.dump_steps, config.dump_max_bytes, config.dump_max_points, place.who)
        self._saver: Saver | None = None
        self._has_reported_fork = False

    def take_over(self, config: GrafterConfig, also: tuple[int, int] | None) -> None:
        """Use this configuration's limits from now on.

        also: (first, end) of steps whose points are saved whatever the limit of steps says.
        """
        self.limits.change(config.dump_steps, config.dump_max_bytes, config.dump_max_points)
        if also is not None:
            self.limits.also_allow(*also)

    def accepts(self, direction: Direction | None, step: int, *, is_chosen: bool) -> bool:
        """Whether a point is saved. is_chosen: a filter, a rule or the call says so; what is recorded is saved anyway.

        Counts a point that a limit of steps leaves out.
        """
        if self._config.record and direction is not None:
            return True
        return is_chosen and self.limits.allows_step(step)

    def open(self) -> Saver:
        """The saver, created at the first call. Raises ConfigError if the directory holds dumps of an earlier run."""
        if self._saver is None:
            self._saver = Saver(self._config, self._place, self._find_run_directory() / self._place.role, self.limits)
        return self._saver

    def take(
        self,
        key: PointKey,
        direction: Direction | None,
        value: Any,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
        header: str | None = None,
        starts: tuple[int, ...] = (),
    ) -> PendingRecord | None:
        """Take the point as it is now, to be completed by `finish`. None if a limit leaves it out.

        header: given if the point is recorded for a later graft; no limit leaves such a point out. starts: the position
        from which the rows of each sequence count; rows before it are saved only in a recording.
        """
        rows = None
        if starts and header is None:
            options, rows = rows_to_save(value, options, starts)
            value = value if rows is None else rows.of(value)
        participants, axes = own_participants(self._place, options.ranks), self._axes_of(options.axes)
        pending = self.open().take(key, tags, value, options, site, participants, axes, direction, header)
        if pending is not None:
            pending.rows = rows
        return pending

    def finish(
        self,
        pending: PendingRecord | None,
        outcome: PointOutcome | None = None,
        grafted: Any = None,
        reason: str | None = None,
    ) -> None:
        """Complete a point that `take` returned. grafted: the value with which the program continues."""
        if pending is not None and self._saver is not None:
            if pending.rows is not None and outcome == "grafted":
                grafted = pending.rows.of(grafted)
            self._saver.finish(pending, outcome, grafted, reason)

    def finish_failed(self, pending: PendingRecord | None, error: BaseException) -> None:
        """Complete a point that ended with an error; its value is saved as well."""
        text = str(error).splitlines()[0] if isinstance(error, GrafterError) and str(error) else ""
        self.finish(pending, reason=f"the meeting ended with {type(error).__name__}: {text}")

    def report_fork(self, name: str, site: str) -> None:
        """Warn once that this process was forked: it has no writing thread, so it saves no points."""
        if not self._has_reported_fork:
            self._has_reported_fork = True
            logger.warning(
                "grafter: the point %r at %s is in a process that was forked from %s (a data loader's worker?). Only "
                "the process that began the run saves points; this one saves none (start it with spawn to give it a "
                "separate run)", name, site, self._place.who,
            )  # fmt: skip

    def end_step(self) -> None:
        """Wait until the points of earlier steps are on disk."""
        if self._saver is not None:
            self._saver.end_step()

    def flush(self) -> None:
        """Wait until all completed points are on disk."""
        if self._saver is not None:
            self._saver.flush()

    def close(self) -> dict[str, int]:
        """Write everything to disk. Returns how many points were `saved`, and how many `lost`."""
        if self._saver is None:
            return {}
        self._saver.close()
        return dict(self._saver.outcomes)


def open_standalone_run(config: GrafterConfig, place: RankIdentity) -> Path:
    """Create the directory of a run that only dumps, with `<role>/run.json` in it. Every rank calls it once.

    Raises ConfigError if the ranks cannot derive one name. Also raises it, and writes nothing, if the directory holds
    this rank's dumps of an earlier run.
    """
    run_name = config.run_name or find_standalone_run_name(place, os.environ)
    directory = Path(config.dir) / run_name
    refuse_earlier_dumps(directory / place.role, place.role_rank, place.who)
    (directory / place.role).mkdir(parents=True, exist_ok=True)
    if place.role_rank == 0:
        sizes: dict[str, int] = {place.role: place.role_world_size}
        write_run_facts(directory / place.role, config, place, run_name, uuid.uuid4().hex[:16], sizes)
    return directory


def find_standalone_run_name(place: RankIdentity, environ: Mapping[str, str]) -> str:
    """A name that is the same on every rank of the job and differs between runs.

    A single rank uses the time. Several ranks use the run id that torchrun gives them or, on one machine, torchrun's
    process. Raises ConfigError if neither exists.
    """
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
        "they could agree on a name for the run, and each would write into a separate directory. Set "
        "GRAFTER_RUN_NAME to one new name on all ranks (or give torchrun a new --rdzv-id for each run)."
    )
