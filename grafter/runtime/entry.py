"""Entry: how one rank comes into its run, and what it writes there about itself.

with another job     it joins in the background (`Joining`); the session is what exists from then on
with a recording     the same, with ranks that play it (`start_peer`)
alone                where points are only kept on disk: the run's directory is there at once, and nobody is met
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.announced_models import AnnouncedHooks
from grafter.core.messages.roster import PlayedFrom, Roster
from grafter.core.records import RankSummary
from grafter.core.roles import Place
from grafter.errors import JoinError
from grafter.runtime.hooked_models import HookedModels
from grafter.runtime.rank_control import RankControl
from grafter.runtime.session import Begun, Joining, Session
from grafter.store.dumps.rank_dumps import open_standalone_run
from grafter.store.ledger import write_summary
from grafter.store.recording import write_rank_facts
from grafter.wire.store_client import HostedStore

logger = logging.getLogger("grafter")


class RecordedPeer(Protocol):
    """The other job, played from a recording: `grafter.rank.peer.Peer`."""

    config: GrafterConfig

    @property
    def store(self) -> HostedStore | None: ...

    def close(self) -> None: ...


class Entry:
    """Of one rank. Everything but `run_directory` is called under the lock of its points."""

    def __init__(
        self,
        config: GrafterConfig,
        place: Place,
        models: HookedModels,
        control: RankControl,
        announced_hooks: Callable[[], AnnouncedHooks],
        on_refusal: Callable[[JoinError], None],
        on_joined: Callable[[], None],
        begun: Begun,
        start_peer: Callable[[GrafterConfig, Place], RecordedPeer | None],
    ) -> None:
        """on_refusal, on_joined: called, in the background, where the two jobs do not fit, and once both are there."""
        self._config, self._place, self._models, self._control = config, place, models, control
        self._announced_hooks, self._on_refusal, self._on_joined = announced_hooks, on_refusal, on_joined
        self._begun, self._start_peer = begun, start_peer
        self._peer: RecordedPeer | None = None
        self._alone_directory: Path | None = None
        self.joining: Joining | None = None
        # None until both jobs have joined, and where this one is alone.
        self.session: Session | None = None

    def begin(self, recording: PlayedFrom | None) -> None:
        """Called once. recording: what this rank is played from, where it is no live one.

        Raises GrafterError where the run's directory cannot be opened; what keeps this rank from joining is raised by
        `joined`.
        """
        if self._config.only_dumps:
            self._alone_directory = open_standalone_run(self._config, self._place)
            self._write_facts(self._alone_directory, None)
            return
        config, store = self._config, None
        if config.peer is not None:
            self._peer = self._start_peer(config, self._place)
            if self._peer is not None:
                config, store = self._peer.config, self._peer.store
        self.joining = Joining(
            config, self._on_refusal, self._on_joined, self._begun, self._announced_hooks(), recording, store,
            self._control,
        )  # fmt: skip

    @property
    def is_waiting(self) -> bool:
        """Whether `joined` would wait for the other job. Ranks that play a recording come by themselves."""
        joining = self.joining
        return joining is not None and not joining.is_over and self._config.peer is None

    def joined(self) -> Session:
        """Waits until both jobs have joined. Raises what kept them from it."""
        if self.session is None:
            assert self.joining is not None
            session = self.joining.wait()
            self._begun.check(session.run_directory)
            self.session = session
            self._write_facts(self.session.run_directory, self.session.roster)
            session.housekeeping.board.hook_facts = self._models.hook_facts
            self._models.tell_which_are_only_here(self.session.roster)
        return self.session

    def run_directory(self) -> Path:
        """Waits, where this rank has a job to meet and the run has no name yet, until both have joined."""
        if self.is_waiting and self._config.run_name:
            self._begun.directory = Path(self._config.dir) / self._config.run_name
            return self._begun.directory
        return self._alone_directory or self.joined().run_directory

    # At the end.

    def finished(self, *, patient: bool) -> Session | None:
        """The session, if it comes to one. See `Joining.finished`."""
        if self.joining is not None and self.session is None:
            return self.joining.finished(patient=patient)
        return self.session

    def write_last(self, session: Session | None, summary: RankSummary) -> Path | None:
        """The rank's summary, and what else it tells of itself; the directory of its role, where there is a run."""
        directory = session.run_directory if session is not None else self._alone_directory
        if directory is None:
            return None
        role_directory = directory / self._place.role
        try:
            if session is not None:
                session.ledger.write_summary(summary)
            else:
                write_summary(role_directory, summary)
        except OSError as failure:
            logger.error("grafter: the summary of %s cannot be written: %s", self._place.who, failure)
        self._write_facts(directory, session.roster if session is not None else None)
        return role_directory

    def close(self) -> None:
        """After the session, if there was one, is closed."""
        self._control.leave()
        if self._peer is not None:
            self._peer.close()

    def _write_facts(self, run_directory: Path, roster: Roster | None) -> None:
        self._models.write_trees(run_directory, roster)
        if not self._config.record:
            return
        try:
            write_rank_facts(run_directory, self._config, self._place, self._announced_hooks())
        except OSError as failure:
            logger.error("grafter: the recording of %s cannot be grafted from: %s", self._place.who, failure)
