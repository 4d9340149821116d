"""One rank's dumps, as its points see them: which are saved, and a saver once there is a run to save into."""

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
from grafter.core.records import Outcome
from grafter.core.roles import Direction, Place
from grafter.errors import ConfigError, GrafterError
from grafter.store.dumps.limits import Limits
from grafter.store.dumps.saver import Saver
from grafter.store.dumps.taken import Taken, rows_to_save
from grafter.store.dumps.writer import refuse_earlier_dumps
from grafter.store.run_files import write_run_facts

logger = logging.getLogger("grafter")


class RankDumps:
    """Used under the lock of the rank's points. Nothing is opened before the first point is saved."""

    def __init__(
        self,
        config: GrafterConfig,
        place: Place,
        axes_of: Callable[[Any], tuple[tuple[str, int, int], ...]],
        find_run_directory: Callable[[], Path],
    ) -> None:
        """axes_of: this rank's place on the mesh, of what a call says. find_run_directory: may wait for the run to
        begin."""
        self._config, self._place = config, place
        self._axes_of, self._find_run_directory = axes_of, find_run_directory
        self.limits = Limits(config.dump_steps, config.dump_max_bytes, config.dump_max_points, place.who)
        self._saver: Saver | None = None
        self._has_told_fork = False

    def take_over(self, config: GrafterConfig, also: tuple[int, int] | None) -> None:
        """From now on by this configuration's limits. also: steps from the one on and before the other, whose points
        are saved whatever the limit of steps."""
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
        """Raises ConfigError where the directory holds an earlier run's dumps."""
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
    ) -> Taken | None:
        """The point as it is now; None where a limit leaves it out. `finish` is to follow. header: where the point is
        recorded for a later graft, which no limit leaves out. starts: where rows of the point's tokens begin to count;
        those before are not saved, unless it is recorded."""
        rows = None
        if starts and header is None:
            options, rows = rows_to_save(value, options, starts)
            value = value if rows is None else rows.of(value)
        participants, axes = own_participants(self._place, options.ranks), self._axes_of(options.axes)
        taken = self.open().take(key, tags, value, options, site, participants, axes, direction, header)
        if taken is not None:
            taken.rows = rows
        return taken

    def finish(
        self, taken: Taken | None, outcome: Outcome | None = None, grafted: Any = None, reason: str | None = None
    ) -> None:
        """What the point came to. grafted: what the program goes on with."""
        if taken is not None and self._saver is not None:
            if taken.rows is not None and outcome == "grafted":
                grafted = taken.rows.of(grafted)
            self._saver.finish(taken, outcome, grafted, reason)

    def finish_failed(self, taken: Taken | None, error: BaseException) -> None:
        """The point ended with an error; what it held is saved all the same."""
        text = str(error).splitlines()[0] if isinstance(error, GrafterError) and str(error) else ""
        self.finish(taken, reason=f"the meeting ended with {type(error).__name__}: {text}")

    def tell_fork(self, name: str, site: str) -> None:
        """A forked process has no thread that writes. It goes on without dumps, which is said once in each."""
        if not self._has_told_fork:
            self._has_told_fork = True
            logger.warning(
                "grafter: the point %r at %s is in a process that was forked from %s (a data loader's worker?). Only "
                "the process that began the run saves points; this one saves none (start it with spawn to have a run "
                "of its own)", name, site, self._place.who,
            )  # fmt: skip

    def end_step(self) -> None:
        if self._saver is not None:
            self._saver.end_step()

    def flush(self) -> None:
        if self._saver is not None:
            self._saver.flush()

    def close(self) -> dict[str, int]:
        """Everything is on disk when this returns: how many points were saved, and how many lost."""
        if self._saver is None:
            return {}
        self._saver.close()
        return dict(self._saver.outcomes)


# A run that only dumps: no other job, no store. What the ranks of a job must agree on, they know without asking.


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
