"""The wait monitor of a rank: it shows a wait that lasts on the board, and finds what must end it.

It returns an error; the monitor thread decides whether the run ends with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from grafter.core.messages.roster import Roster
from grafter.errors import PeerLostError, PointTimeoutError, RunError
from grafter.wire.monitor.absence import Absence, StepEnds, choose_passed_over, explain_passed_over
from grafter.wire.monitor.deadlock import DeadlockConfirmation, explain_stuck, find_conflict
from grafter.wire.monitor.members import Members
from grafter.wire.monitor.status_board import BoardWriter, Stage, Underway, describe_board, text_of_stage, text_of_wait
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")

LOOK_EVERY_SECONDS = 0.5
_SHOWN_AFTER_SECONDS = 0.25


class WaitMonitor:
    """What lasts on one rank: its wait, or a stage of its point. One per rank, used by its monitor thread.

    What asks the store takes a client of the calling thread, never waits, and raises PeerLostError if the store is
    lost."""

    def __init__(self, board: BoardWriter, members: Members, who: str) -> None:
        self._board, self._members, self._who = board, members, who
        self._confirmation: DeadlockConfirmation | None = None
        # What the rank does: a wait, or a stage of a point; since when; and whether the board shows it.
        self._activity: Wait | tuple[Underway, Stage] | None = None
        self._since = 0.0
        self._is_shown = False
        self._reported_stopped: set[int] = set()
        self._graft_rank = -1
        self.step_ends: StepEnds | None = None
        self._absence: Absence | None = None
        self._host_was_stopped = False
        # Why the other ranks will not join; asked while this rank waits for them.
        self.check_join: Callable[[StoreClient], RunError | None] | None = None

    def joined(self, roster: Roster, graft_rank: int) -> None:
        """All ranks are known from here on."""
        self._graft_rank = graft_rank
        self._confirmation = DeadlockConfirmation(roster, graft_rank)
        self.step_ends = StepEnds(roster, graft_rank)
        self._absence = Absence(roster, graft_rank, self.step_ends, self._members.read_board)

    def warn_of_stopped(self, wait: Wait | None) -> None:
        """Log once for each stopped process of this host that this rank waits while it is stopped."""
        if wait is None or wait.seconds < LOOK_EVERY_SECONDS:
            return
        roster, host = self._members.roster, self._members.host
        stopped = self._members.stopped()
        for rank in stopped.keys() - self._reported_stopped:
            assert roster is not None
            logger.warning(
                "grafter: %s waits for %s, and %s cannot answer: %s. The point fails after %.0f s.",
                self._who, wait.what, roster.who(rank), stopped[rank], wait.timeout,
            )  # fmt: skip
        # A process that runs again, and is stopped again, is logged again.
        self._reported_stopped = set(stopped)
        is_stopped = host.graft_rank is None and host.is_stopped
        if is_stopped and not self._host_was_stopped:
            logger.warning(
                "grafter: %s waits for %s, and the rendezvous store cannot answer: %s, which hosts it, is stopped "
                "(SIGSTOP, Ctrl-Z or a debugger). The point fails after %.0f s.",
                self._who, wait.what, host, wait.timeout,
            )  # fmt: skip
        self._host_was_stopped = is_stopped

    def update_board(self, client: StoreClient, wait: Wait | None, underway: Underway | None) -> None:
        """Show what lasts on the board, and remove it once it is over."""
        if wait is not None and wait.stage == "join":
            return
        activity: Wait | tuple[Underway, Stage] | None = wait
        # The stage of a point says more than its waits for bytes or votes.
        if underway is not None and (wait is None or wait.stage in ("exchange", "agreement")):
            activity = (underway, underway.stage)
        if not _is_same(activity, self._activity):
            if self._is_shown:
                self._board.running(client)
            self._activity, self._is_shown = activity, False
            self._since = time.monotonic() - (wait.seconds if isinstance(activity, Wait) and wait is not None else 0.0)
        if activity is not None and not self._is_shown and time.monotonic() - self._since >= _SHOWN_AFTER_SECONDS:
            self._show(client, activity)
            self._is_shown = True

    def refresh_board(self, client: StoreClient) -> None:
        """Called once a second: write the last points of a running rank, for when it cannot write them any more."""
        if not self._is_shown and self._board.has_new_points:
            self._board.running(client)

    def _show(self, client: StoreClient, activity: Wait | tuple[Underway, Stage]) -> None:
        since = time.time() - (time.monotonic() - self._since)
        if isinstance(activity, tuple):
            underway, stage = activity
            doing = text_of_stage(stage, underway.point)
            self._board.running(client, doing, call_site=underway.call_site, since=since)
        elif activity.stage == "pairing":
            self._board.waiting(client, activity, since)
        else:
            # Such a wait ends by itself or is watched elsewhere, so for other ranks this one runs.
            self._board.running(client, text_of_wait(activity.stage, activity.what), since=since)

    def look_after_join(self, client: StoreClient, wait: Wait) -> RunError | None:
        """The error that ends this wait of the join: the other ranks will not join, or not in time. None if none
        does."""
        for role in ("baseline", "target"):
            record = client.peek(client.job_keys.exit(role))
            if record is not None:
                return PeerLostError(
                    f"the {role} job {record.payload}, and {self._who} was still waiting for the two jobs to join. "
                    f"Look at the end of that job's output: it ended before its first call of grafter took effect."
                )
        error = self.check_join(client) if self.check_join is not None else None
        if error is None and wait.seconds > wait.timeout:
            return PointTimeoutError(
                f"{self._who} waited {wait.timeout:.0f} s for {wait.what}, and gives up. Check that the other job was "
                f"started, has GRAFTER_ENABLE=1, the same master address, port and group_name, and calls grafter "
                f"in every rank. Raise GRAFTER_JOIN_TIMEOUT if it only needs more time to load.{_ignored(client)}"
            )
        return error

    def find_absent(self, client: StoreClient, wait: Wait) -> str | None:
        """Why the ranks that a one-sided point waits for will not reach it; None while they may. Called on any
        thread."""
        assert self._absence is not None
        return self._absence.find(client, wait)

    def look_after(self, client: StoreClient, wait: Wait) -> RunError | None:
        """The error of a wait, of a stage after the join, that can never end; None if it may.

        None also if the receivers have given the point up (`wait.abandoned`), or this rank does (`wait.given_up`).
        """
        if wait.outcome_key is not None:
            outcome = client.peek(wait.outcome_key)
            if outcome is not None and outcome.kind == "refuse":
                wait.abandoned = outcome.payload
                return None
        gone = self._members.gone(client, all_hosts=wait.leader)
        if wait.stage == "pairing":
            assert self._confirmation is not None
            if wait is self._activity and self._is_shown:
                self._confirmation.confirm_idle(client, wait, self._board.sequence)
            if wait.leader or wait.one_sided or gone or self._leader_has_left(client, wait):
                return self._look_for_stuck(client, wait, gone)
        elif any(rank in wait.needs for rank in gone) or self._outcome_will_not_come(client, wait):
            board = describe_board(self._members.read_board(client), gone)
            return PeerLostError(
                f"a process of the run ended during {wait.what} ({wait.stage}). Ranks that had not learnt the outcome "
                f"of this point have written nothing.\n{board}\nLook at the end of that process's output first."
            )
        return None

    def _leader_has_left(self, client: StoreClient, wait: Wait) -> bool:
        """Whether this rank must look for mutual waits: its leader, which does that, has left."""
        assert self._members.roster is not None
        leader = self._members.roster.graft_rank(self._board.role, min(wait.participants))
        return self._members.read_board(client, [leader])[0].state == "left"

    def _outcome_will_not_come(self, client: StoreClient, wait: Wait) -> bool:
        """In agreement: a needed rank has left, and nothing of it has arrived. What it sent would be here by now."""
        if wait.stage != "agreement":
            return False
        left = any(line.state == "left" for line in self._members.read_board(client, sorted(wait.needs)))
        news = any(ask is not None and ask() for ask in (wait.has_news, wait.has_grown))
        return left and not news and not any(client.exists(key) for key in wait.awaits) and not wait.over

    def _look_for_stuck(self, client: StoreClient, wait: Wait, gone: dict[int, str]) -> RunError | None:
        assert self._confirmation is not None
        lines = self._members.read_board(client)
        stuck = self._confirmation.find_stuck(client, lines, gone)
        if not stuck:
            return None
        crashed = {
            line.graft_rank: f"has left with {line.note}" for line in lines if line.state == "left" and line.note
        }
        if not gone and not crashed and find_conflict(stuck) is None and (chosen := choose_passed_over(stuck)):
            own = (self._graft_rank, self._board.sequence)
            if (
                wait is self._activity
                and self._is_shown
                and own in [(line.graft_rank, line.sequence) for line in chosen]
            ):
                self._board.passed_over += 1
                wait.given_up = explain_passed_over(stuck)
            return None
        board = describe_board(lines, gone, self._members.stopped())
        return explain_stuck(stuck, gone | crashed, board, lines)

    def time_is_up(self, client: StoreClient, wait: Wait) -> RunError:
        """The error of a wait that has lasted for its timeout."""
        gone = self._members.gone(client, all_hosts=wait.leader)
        board = describe_board(self._members.read_board(client), gone, self._members.stopped())
        ahead = ""
        if wait.one_sided:
            ahead = (
                f"The others have not passed the end of step {wait.step}, so the point cannot be skipped yet: a step "
                "ends at grafter.step(), or with the program. "
            )
        return PointTimeoutError(
            f"{self._who} waited {wait.timeout:.0f} s for {wait.what} ({wait.stage}), which is GRAFTER_TIMEOUT.\n"
            f"{board}\n{ahead}"
            f"No process is known to have ended, and the waits could still end. A rank that is shown as running is "
            f"probably slow, stopped, or blocked in its own job's collectives: `py-spy dump --pid PID` shows where. "
            f"Raise GRAFTER_TIMEOUT if it only needs more time.{_ignored(client)}"
        )


def _is_same(one: Wait | tuple[Underway, Stage] | None, other: Wait | tuple[Underway, Stage] | None) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[0] is other[0] and one[1] == other[1]
    return one is other


def _ignored(client: StoreClient) -> str:
    """The note that awaited values may have been overwritten by another program; empty if none were."""
    note = client.seal.ignored.note
    return f"\n{note}" if note else ""
