"""The lookout of a rank: it shows a wait that lasts on the board, and finds what must end it.

What it finds is an error; whether the run ends with it is the monitor thread's to decide.
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
    """One per rank, used by its monitor thread."""

    def __init__(self, board: BoardWriter, members: Members, who: str) -> None:
        self._board, self._members, self._who = board, members, who
        self._confirmation: DeadlockConfirmation | None = None
        # What the rank does: a wait, or a stage of a point; since when it was seen; and whether the board says so.
        self._activity: Wait | tuple[Underway, Stage] | None = None
        self._since = 0.0
        self._is_shown = False
        self._told_stopped: set[int] = set()
        self._graft_rank = -1
        self.step_ends: StepEnds | None = None
        self._absence: Absence | None = None
        self._host_was_stopped = False
        # Asked while this rank waits for the others to join.
        self.check_join: Callable[[StoreClient], RunError | None] | None = None

    def joined(self, roster: Roster, graft_rank: int) -> None:
        self._graft_rank = graft_rank
        self._confirmation = DeadlockConfirmation(roster, graft_rank)
        self.step_ends = StepEnds(roster, graft_rank)
        self._absence = Absence(roster, graft_rank, self.step_ends, self._members.read_board)

    def warn_of_stopped(self, wait: Wait | None) -> None:
        """Say once of each process of this host that keeps this rank waiting that it is stopped."""
        if wait is None or wait.seconds < LOOK_EVERY_SECONDS:
            return
        roster, host = self._members.roster, self._members.host
        stopped = self._members.stopped()
        for rank in stopped.keys() - self._told_stopped:
            assert roster is not None
            logger.warning(
                "grafter: %s waits for %s, and %s cannot answer: %s. The point fails after %.0f s.",
                self._who, wait.what, roster.who(rank), stopped[rank], wait.timeout,
            )  # fmt: skip
        # One that runs again, and is stopped again, is told again.
        self._told_stopped = set(stopped)
        is_stopped = host.graft_rank is None and host.is_stopped
        if is_stopped and not self._host_was_stopped:
            logger.warning(
                "grafter: %s waits for %s, and the rendezvous store cannot answer: %s, which hosts it, is stopped "
                "(SIGSTOP, Ctrl-Z or a debugger). The point fails after %.0f s.",
                self._who, wait.what, host, wait.timeout,
            )  # fmt: skip
        self._host_was_stopped = is_stopped

    def update_board(self, client: StoreClient, wait: Wait | None, underway: Underway | None) -> None:
        """Put what lasts on the board, and take it off once it is over."""
        if wait is not None and wait.stage == "join":
            return
        activity: Wait | tuple[Underway, Stage] | None = wait
        # In a point, its stage says more than the wait for bytes or votes that it may come to.
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
        """Once a second: the last points of a rank that runs, for when it cannot say them any more."""
        if not self._is_shown and self._board.has_new_points:
            self._board.running(client)

    def _show(self, client: StoreClient, activity: Wait | tuple[Underway, Stage]) -> None:
        since = time.time() - (time.monotonic() - self._since)
        if isinstance(activity, tuple):
            underway, stage = activity
            doing = text_of_stage(stage, underway.point)
            self._board.running(client, doing, call_site=underway.call_site, since=since)
        elif activity.stage == "pairing":
            self._board.waiting(
                client,
                digest=activity.digest,
                point=str(activity.what),
                participants=activity.participants,
                awaits=activity.awaits,
                call_site=activity.call_site,
                since=since,
                own_side=activity.own_side,
                one_sided=activity.one_sided,
            )
        else:
            # It goes on by itself, or somebody else watches over it: whoever waits for it waits for one that runs.
            self._board.running(client, text_of_wait(activity.stage, activity.what), since=since)

    def look_after_join(self, client: StoreClient, wait: Wait) -> RunError | None:
        """Why the other ranks will not come, or not in time."""
        for role in ("baseline", "target"):
            record = client.peek(f"{client.job_prefix}/exit/{role}")
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
        """Why the ranks that a one-sided point waits for will not come; None while they may. Called on any thread."""
        assert self._absence is not None
        return self._absence.find(client, wait)

    def look_after(self, client: StoreClient, wait: Wait) -> RunError | None:
        """Why this wait, of a stage after the join, can never end; None also where the receivers have given it up, or
        where this rank gives its point up (`wait.given_up`)."""
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
        """Leaders look for mutual waits; where the own one has left, this rank must."""
        assert self._members.roster is not None
        leader = self._members.roster.graft_rank(self._board.role, min(wait.participants))
        return self._members.read_board(client, [leader])[0].state == "left"

    def _outcome_will_not_come(self, client: StoreClient, wait: Wait) -> bool:
        """In agreement: a rank that was needed has left, and nothing of it has come. What it sent would be here."""
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
    """What was awaited may have been overwritten by somebody else."""
    note = client.seal.ignored.note
    return f"\n{note}" if note else ""
