"""The life of one rank in its run: it joins, has a session, and leaves with a summary.

with another job     it joins on a thread of its own (`JoinAttempt`); the session exists from then on
with a recording     the same, with ranks that play it
alone                where points are only saved, the run's directory exists at once, and there is no session
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from grafter.config.direction_filters import DirectionFilters
from grafter.config.options import PointOptions
from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.announced_models import NO_HOOKS, AnnouncedHooks
from grafter.core.messages.roster import PlayedFrom, Roster
from grafter.core.point_fate import PointSituation
from grafter.core.records import RankSummary
from grafter.core.roles import Direction
from grafter.errors import GrafterError, PeerLostError, RunError
from grafter.runtime.point_host import HookedModels
from grafter.runtime.rank_context import RankContext
from grafter.runtime.rank_report import summarise
from grafter.runtime.session import BeforeJoining, Session
from grafter.store.dumps.rank_dumps import open_run
from grafter.store.ledger import write_summary
from grafter.store.recording import write_rank_facts
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.rendezvous.channels import Channels
from grafter.wire.rendezvous.connecting import Listener, connect_ranks, open_listener
from grafter.wire.rendezvous.join import LINGER_SECONDS, Membership, StoreServer, join, store_place

logger = logging.getLogger("grafter")


@dataclass(frozen=True)
class Introduction:
    """What one rank joins with.

    config: with the port of the store. hooks: the modules that it has hooks on. played_from: the recording, where this
    is not a live rank. served: the store, where this rank hosts it already.
    """

    config: GrafterConfig
    hooks: AnnouncedHooks = NO_HOOKS
    played_from: PlayedFrom | None = None
    served: StoreServer | None = None


class JoinAttempt:
    """One rank's join, on a thread of its own: a rank whose points never match joins and leaves, too."""

    def __init__(self, context: RankContext, introduction: Introduction, before: BeforeJoining) -> None:
        self._place, self._introduction, self._before = context.place, introduction, before
        self._done = threading.Event()
        self._cancelled = False
        self._session: Session | None = None
        # From when the store is reached.
        self._housekeeping: Housekeeping | None = None
        self._error: BaseException | None = None

    def run(self) -> BaseException | None:
        """Join. The error that kept this rank from it; None if it has a session now. `conclude` must follow."""
        listener = None
        try:
            listener = open_listener()
            self._session = self._begin(self._join(listener), listener)
        except BaseException as error:
            self._error = error
            if listener is not None:
                listener.close()
        return self._error

    def conclude(self) -> None:
        """Wake whatever waits for the result of `run`."""
        self._done.set()

    def _join(self, listener: Listener | None) -> Membership:
        introduction, config = self._introduction, self._introduction.config
        socket_name = listener.name if listener is not None else ""
        run_name = config.run_name or time.strftime("%Y%m%d-%H%M%S")
        membership = join(
            config, self._place, run_name, socket_name, lambda: not self._cancelled, self._connected,
            hooks=introduction.hooks, played_from=introduction.played_from, served=introduction.served,
        )  # fmt: skip
        host = store_place(config, self._place)
        membership.housekeeping.joined(
            membership.roster, membership.graft_rank, membership.roster.graft_rank(*host) if host else None
        )
        return membership

    def _begin(self, membership: Membership, listener: Listener | None) -> Session:
        """The session, with a channel to each rank of this host."""
        channels = None
        config = self._introduction.config
        try:
            if listener is not None:
                channels = _open_channels(membership, listener, config.timeout)
            return Session(config, membership, channels, self._before)
        except BaseException as error:
            # A disk without room for the ledger, say: the others must not wait for a rank that cannot take part.
            self._leave_at_once(membership, error)
            if channels is not None:
                channels.close()
            raise

    @property
    def is_over(self) -> bool:
        """Whether both jobs have joined, or never will."""
        return self._done.is_set()

    def _leave_at_once(self, membership: Membership, error: BaseException) -> None:
        text = f"{self._place.who} has joined, and cannot take part: {type(error).__name__}: {error}"
        with contextlib.suppress(RunError):
            membership.housekeeping.abort(RunError(text), membership.client)
        membership.housekeeping.close(f"{type(error).__name__}: {error}")

    def wait(self) -> Session:
        """The session, once both jobs have joined. Raises what kept them from joining."""
        next_report = time.monotonic() + 10
        while not self._done.wait(0.25):
            if time.monotonic() > next_report:
                next_report = time.monotonic() + 60
                logger.info("grafter: %s waits for all ranks of both jobs to join", self._place.who)
        if self._session is None:
            error = self._error
            if isinstance(error, GrafterError):
                raise error
            raise RunError(f"{self._place.who} could not join: {type(error).__name__}: {error}") from error
        return self._session

    def finish(self, *, patient: bool) -> Session | None:
        """At the end of the program: the session, if there is one by then.

        A rank whose points never matched may end before the others have joined, and they need it to: `patient` waits
        for them, up to `join_timeout`. A program that ends with an error does not.
        """
        if patient and not self._done.wait(2.0):
            logger.warning(
                "grafter: %s has ended, and stays until all ranks of both jobs have joined, since they wait for it "
                "(Ctrl-C ends it)",
                self._place.who,
            )
            try:
                self._done.wait()
            except BaseException as error:
                self._call_off(type(error).__name__)
                raise
        if not self._done.wait(2.0):
            self._call_off("an error")
        return self._session

    def _connected(self, housekeeping: Housekeeping) -> None:
        self._housekeeping = housekeeping

    def _call_off(self, why: str) -> None:
        """This rank ends before all have joined, and the others would wait for it until the join times out."""
        self._cancelled = True
        if self._housekeeping is not None:
            text = f"{self._place.who} has left with {why}, before all ranks of both jobs had joined"
            self._housekeeping.abort_soon(PeerLostError(f"{text}. Look at the end of its output first."))
        # A rank that hosts the store lingers, so that the others can read it there.
        self._done.wait(LINGER_SECONDS + 1)


def _open_channels(membership: Membership, listener: Listener, timeout: float) -> Channels:
    roster, graft_rank, seal = membership.roster, membership.graft_rank, membership.client.seal
    connections = connect_ranks(listener, roster, graft_rank, seal, timeout, membership.housekeeping.check)
    return Channels(graft_rank, roster, seal, connections)


class Lifecycle:
    """The life of one rank, from its first call until it leaves. Called under the lock of its points."""

    def __init__(self, context: RankContext, models: HookedModels, before: BeforeJoining) -> None:
        self._context, self._models, self._before = context, models, before
        self._records_alone = context.config.records_alone
        self._alone_directory: Path | None = None
        self.join_attempt: JoinAttempt | None = None
        # None until both jobs have joined, and where this one is alone.
        self.session: Session | None = None

    def begin_alone(self) -> None:
        """Called once, where points are only saved. Raises GrafterError where the run's directory cannot be opened."""
        self._alone_directory = open_run(self._context.config, self._context.place)
        self._write_facts(self._alone_directory, None)

    def begin(self, introduction: Introduction) -> JoinAttempt:
        """Called once, in a run with another job. The caller runs the attempt; `joined` raises what comes of it."""
        self.join_attempt = JoinAttempt(self._context, introduction, self._before)
        return self.join_attempt

    @property
    def is_waiting(self) -> bool:
        """Whether `joined` would wait for the other job. Ranks that play a recording join without being waited for."""
        attempt = self.join_attempt
        return attempt is not None and not attempt.is_over and self._context.config.peer is None

    def situation_of(self, direction: Direction | None, options: PointOptions, *, is_saved: bool) -> PointSituation:
        """What the fate of a point depends on, as long as nothing is known of the other job's modules."""
        context = self._context
        is_detached, is_too_early = context.status.detached is not None, options.wait == "job" and self.is_waiting
        return PointSituation(direction, is_saved, is_detached, self._records_alone, is_too_early)

    def is_too_early(self, options: PointOptions) -> bool:
        """Whether both jobs have not joined yet, and a point with these options does not wait for that."""
        return options.wait == "job" and self.is_waiting

    def joined(self) -> Session:
        """Waits until both jobs have joined. Raises what kept them from it."""
        if self.session is None:
            assert self.join_attempt is not None
            session = self.join_attempt.wait()
            self._before.check(session.run_directory)
            self.session = session
            self._write_facts(session.run_directory, session.roster)
            session.housekeeping.board.hook_facts = self._models.hook_facts
            self._models.tell_which_are_only_here(session.roster)
        return self.session

    def run_directory(self) -> Path:
        """Waits until both have joined if there is a job to meet and the run has no name yet."""
        config = self._context.config
        if self.is_waiting and config.run_name:
            self._before.dumps_directory = Path(config.dir) / config.run_name
            return self._before.dumps_directory
        return self._alone_directory or self.joined().run_directory

    # At the end.

    def finish(self, *, patient: bool) -> Session | None:
        """The session, if there is one by then. See `JoinAttempt.finish`."""
        if self.join_attempt is not None and self.session is None:
            return self.join_attempt.finish(patient=patient)
        return self.session

    def leave(self, session: Session | None, filters: DirectionFilters, error: BaseException | None) -> Path | None:
        """Tell the other ranks, and write the summary; the directory of this rank's role, where there is a run.

        session: what `finish` returned. filters: those in force at the end. error: the one with which the rank ends.
        """
        context, roster = self._context, session.roster if session is not None else None
        if session is not None:
            session.outbox.close(session.client, patient=error is None)
            context.tally.replace_posted(session.outbox.settled)
        else:
            self._before.outbox.release()
        summary = summarise(context, roster, filters, self._models.attachments, error)
        directory = self._write_last(session, summary)
        if session is not None:
            session.close(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" if error else ""
            )
        self._before.control.leave()
        return directory

    def _write_last(self, session: Session | None, summary: RankSummary) -> Path | None:
        directory = session.run_directory if session is not None else self._alone_directory
        if directory is None:
            return None
        place = self._context.place
        role_directory = directory / place.role
        try:
            if session is not None:
                session.ledger.write_summary(summary)
            else:
                write_summary(role_directory, summary)
        except OSError as failure:
            logger.error("grafter: the summary of %s cannot be written: %s", place.who, failure)
        self._write_facts(directory, session.roster if session is not None else None)
        return role_directory

    def _write_facts(self, run_directory: Path, roster: Roster | None) -> None:
        context = self._context
        self._models.write_trees(run_directory, roster)
        if not context.config.record:
            return
        try:
            write_rank_facts(run_directory, context.config, context.place, self._models.announced())
        except OSError as failure:
            logger.error("grafter: the recording of %s cannot be grafted from: %s", context.place.who, failure)
