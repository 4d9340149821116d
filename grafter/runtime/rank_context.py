"""The context of one rank: who it is, what its user has set, its clock, its counters, whether it still takes part."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from grafter.config.settings.config import GrafterConfig
from grafter.core.points import StepCounter
from grafter.core.roles import RankIdentity
from grafter.errors import ConfigError, GrafterError, JoinError, PeerLostError, RunError, UsageError
from grafter.runtime.point_rules import PointRules

if TYPE_CHECKING:
    from grafter.wire.monitor.monitor_thread import MonitorThread
    from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")


@dataclass
class Tally:
    """The number of one rank's points: matched ones by outcome, the others by name."""

    outcomes: Counter[str] = field(default_factory=Counter)
    # A plain defaultdict counts in a third of the time that a Counter takes.
    unmatched: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    # Points saved and lost, and those that a limit left out, by limit.
    dumps: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    # Gradients of weights that had been cleared before they could be read, by name.
    gradients_lost: Counter[str] = field(default_factory=Counter)
    # Gradients that arrived after the end of their step, by name.
    gradients_late: Counter[str] = field(default_factory=Counter)

    def replace_posted(self, settled: Counter[str]) -> None:
        """Count posted points by their final outcome instead."""
        self.outcomes.update(settled)
        self.outcomes["posted"] -= sum(settled.values())
        # Unary plus drops the counts that are 0.
        self.outcomes = +self.outcomes


class Connection(Protocol):
    """How a rank that has joined reaches the others: `grafter.runtime.session.Session`."""

    monitor: MonitorThread
    client: StoreClient


class RankStatus:
    """Whether one rank still takes part in its run. Changed under the lock of its points."""

    def __init__(self, config: GrafterConfig, place: RankIdentity) -> None:
        self._config, self.who = config, place.who
        # The process that may graft: a child that is forked from it is another one.
        self.process_id = os.getpid()
        self.is_closed = False
        # What ended the run for this rank.
        self.fault: BaseException | None = None
        # Why it continues ungrafted, where the other job was lost.
        self.detached: str | None = None

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the rank's own process."""
        return os.getpid() != self.process_id

    def refuse_where_impossible(self, name: str, site: str) -> None:
        """Raises UsageError for a matched point that can be neither grafted nor saved here."""
        if self.is_forked:
            raise UsageError(
                f"the point {name!r} at {site} is in a process that was forked from {self.who} (a data loader's "
                f"worker?). Only the process that joined can graft; dump in it, or start the child with spawn."
            )
        if self.is_closed:
            raise UsageError(f"the point {name!r} at {site} comes after grafter.close().")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise UsageError(
                f"the point {name!r} at {site} is in a CUDA graph capture, where nothing can be read or exchanged: the "
                f"replay would repeat the capture's values. Run this part without CUDA graphs (eager, or "
                f"`mode='default'` for torch.compile) while grafting."
            )

    def last_error(self) -> BaseException | None:
        """The error with which this process ends: one that the program did not catch, else what ended the run."""
        unhandled = getattr(sys, "last_value", None)
        if isinstance(unhandled, BaseException) and not isinstance(unhandled, SystemExit):
            return unhandled
        return self.fault if isinstance(self.fault, GrafterError) else None

    def end_where_interrupted(self, session: Connection | None) -> None:
        """This rank leaves with an error while another thread of it is at a point: no rank shall wait there."""
        error = self.last_error()
        if error is not None and session is not None:
            session.monitor.abort(PeerLostError(f"{self.who} has left with {type(error).__name__}: {error}"))

    def end_run(self, error: RunError, session: Connection | None) -> None:
        """The run is over: every rank of both jobs is notified, and raises the same error.

        session: None before both jobs have joined. Returns only where the rank continues ungrafted.
        """
        if session is not None:
            monitor = session.monitor
            if isinstance(error, PeerLostError):
                error = monitor.explain(error)
            elif monitor.aborted is None:
                error = monitor.abort(error, session.client)
        self.fault = error
        if not isinstance(error, PeerLostError) or self._config.on_peer_loss == "raise":
            raise error
        self.detached = str(error)
        logger.warning("grafter: %s continues ungrafted from here (on_peer_loss=detach): %s", self.who, error)


@dataclass(frozen=True)
class RankContext:
    """What every part of one rank is built with. What changes (rules, clock, counters, status) does so under the lock.

    rules: by the settings in force; `config` is what the run began with.
    saves_points: whether this rank saves what the filters choose; a rank that plays a recording does not.
    """

    config: GrafterConfig
    place: RankIdentity
    rules: PointRules
    status: RankStatus
    saves_points: bool = True
    steps: StepCounter = field(default_factory=StepCounter)
    tally: Tally = field(default_factory=Tally)
    # One point of this rank at a time.
    lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def of(cls, config: GrafterConfig, *, saves_points: bool = True) -> RankContext:
        """The context of this process. Raises ConfigError if its rank and the configuration contradict each other."""
        place = find_place(config)
        return cls(
            config, place, PointRules(config, saves_points=saves_points), RankStatus(config, place), saves_points
        )

    def refuse_all(self, error: JoinError) -> None:
        """The two jobs do not fit: this rank's next call raises, also one that no filter matches."""

        def refuse(tags: object) -> bool:
            self.status.fault = error
            raise error.with_traceback(None)

        self.rules.filters.matchers = (refuse,)


def find_place(config: GrafterConfig) -> RankIdentity:
    """This process's rank in its job: the configured one, else torch.distributed's, else RANK, else 0."""
    assert config.role is not None
    initialised = dist.is_available() and dist.is_initialized()
    expected = config.baseline_world_size if config.role == "baseline" else config.target_world_size
    if config.rank is not None:
        role_rank, world_size = config.rank, expected
    elif initialised:
        role_rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        role_rank, world_size = _environment_number("RANK", 0), _environment_number("WORLD_SIZE", 1)
    if config.rank is None and expected not in (None, world_size):
        raise ConfigError(_explain_world_size(config.role, expected, world_size, initialised=initialised))
    if world_size is None:
        world_size = dist.get_world_size() if initialised else _environment_number("WORLD_SIZE", 1)
    if role_rank >= world_size:
        raise ConfigError(
            f"this process is rank {role_rank} of a {config.role} job of {world_size} ranks, which count from 0. Check "
            f"GRAFTER_RANK, GRAFTER_{config.role.upper()}_WORLD_SIZE, RANK and WORLD_SIZE."
        )
    return RankIdentity(config.role, role_rank, world_size)


def _explain_world_size(role: str, expected: object, world_size: object, *, initialised: bool) -> str:
    text = os.environ.get("WORLD_SIZE", "").strip()
    if initialised:
        found = f"torch.distributed says that this job has {world_size}"
    elif text:
        found = f"WORLD_SIZE={text} says that this job has {world_size}"
    else:
        found = "this process sees only itself: torch.distributed is not initialised, and WORLD_SIZE is not set"
    return (
        f"GRAFTER_{role.upper()}_WORLD_SIZE={expected} says that the {role} has {expected} ranks, and {found}. Correct "
        "the variable, or leave it out: the size is then discovered. For a job larger than torch.distributed's "
        "default group, set GRAFTER_RANK in each process, too."
    )


def _environment_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if text and not text.isdigit():
        raise ConfigError(f"{variable}={text!r} is not a number; torchrun sets it, else leave it unset.")
    return int(text) if text else default
