"""The lookout of a rank: it shows a wait that lasts on the board, and finds what must end it.

What it finds is an error; whether the run ends with it is the housekeeping's to decide.
"""

from __future__ import annotations

import logging
import time

from grafter.errors import PeerLostError, PointTimeoutError, RunError
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.store import StoreClient
from grafter.watching.absence import Absence, choose_passed_over, explain_passed_over
from grafter.watching.board import BoardWriter, describe_board
from grafter.watching.diagnosis import explain_stuck, find_conflict
from grafter.watching.members import Members
from grafter.watching.step_ends import StepEnds
from grafter.watching.suspicion import Suspicion
from grafter.watching.waits import Wait

logger = logging.getLogger("grafter")

LOOK_EVERY_SECONDS = 0.5
_SHOWN_AFTER_SECONDS = 0.25


class Lookout:
    """One per rank, used by its housekeeping thread."""

    def __init__(self, board: BoardWriter, members: Members, who: str) -> None:
        self._board, self._members, self._who = board, members, who
        self._suspicion: Suspicion | None = None
        self._wait_on_board: Wait | None = None
        self._told_stopped: set[int] = set()
        self._graft_rank = -1
        self.step_ends: StepEnds | None = None
        self._absence: Absence | None = None

    def joined(self, roster: Roster, graft_rank: int) -> None:
        self._graft_rank = graft_rank
        self._suspicion = Suspicion(roster, graft_rank)
        self.step_ends = StepEnds(roster, graft_rank)
        self._absence = Absence(roster, graft_rank, self.step_ends, self._members.read_board)

    def warn_of_stopped(self, wait: Wait | None) -> None:
        roster = self._members.roster
        if wait is None or wait.seconds < LOOK_EVERY_SECONDS or roster is None:
            return
        for rank, remark in self._members.stopped().items():
            if rank not in self._told_stopped:
                self._told_stopped.add(rank)
                logger.warning(
                    "grafter: %s waits for %s, and %s cannot answer: %s. The point fails after %.0f s.",
                    self._who, wait.what, roster.who(rank), remark, wait.timeout,
                )  # fmt: skip

    def update_board(self, client: StoreClient, wait: Wait | None) -> None:
        """Put a pairing wait that lasts on the board, and take it off once it is over."""
        if self._wait_on_board is not None and wait is not self._wait_on_board:
            self._board.running(client)
            self._wait_on_board = None
        if wait is None or wait.stage not in ("pairing", "control", "outbox") or self._wait_on_board is not None:
            return
        if wait.seconds >= _SHOWN_AFTER_SECONDS and wait.stage != "pairing":
            # It goes on by itself, so whoever waits for it waits for one that runs.
            self._board.running(client, f"waits for {wait.what}")
            self._wait_on_board = wait
        elif wait.seconds >= _SHOWN_AFTER_SECONDS:
            self._board.waiting(
                client,
                digest=wait.digest,
                point=str(wait.what),
                participants=wait.participants,
                awaits=wait.awaits,
                call_site=wait.call_site,
                since=time.time() - wait.seconds,
                own_side=wait.own_side,
                one_sided=wait.one_sided,
            )
            self._wait_on_board = wait

    def look_after_join(self, client: StoreClient, wait: Wait) -> RunError | None:
        """Why the other ranks will not come, or not in time."""
        for role in ("baseline", "target"):
            record = client.peek(f"{client.lobby}/exit/{role}")
            if record is not None:
                return PeerLostError(
                    f"the {role} job {record.payload}, and {self._who} was still waiting for the two jobs to join. "
                    f"Look at the end of that job's output: it ended before its first call of grafter took effect."
                )
        if wait.seconds > wait.timeout:
            return PointTimeoutError(
                f"{self._who} waited {wait.timeout:.0f} s for {wait.what} in vain. Check that the other job was "
                f"started, has GRAFTER_ENABLE=1, the same master address, port and group_name, and calls grafter "
                f"in every rank; raise GRAFTER_JOIN_TIMEOUT if it only needs longer to load."
            )
        return None

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
            assert self._suspicion is not None
            if wait is self._wait_on_board:
                self._suspicion.confirm_idle(client, wait, self._board.sequence)
            if wait.leader or wait.one_sided or gone or self._leader_has_left(client, wait):
                return self._look_for_stuck(client, wait, gone)
        elif any(rank in wait.needs for rank in gone) or self._outcome_will_not_come(client, wait):
            board = describe_board(self._members.read_board(client), gone)
            return PeerLostError(
                f"a process of the run is gone in the middle of {wait.what} ({wait.stage}); nothing of it was "
                f"written where the outcome was not decided yet.\n{board}\nLook at the end of its output first."
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
        news = wait.has_news is not None and wait.has_news()
        return left and not news and not any(client.exists(key) for key in wait.awaits) and not wait.over

    def _look_for_stuck(self, client: StoreClient, wait: Wait, gone: dict[int, str]) -> RunError | None:
        assert self._suspicion is not None
        lines = self._members.read_board(client)
        stuck = self._suspicion.find_stuck(client, lines, gone)
        if not stuck:
            return None
        crashed = {
            line.graft_rank: f"has left with {line.note}" for line in lines if line.state == "left" and line.note
        }
        if not gone and not crashed and find_conflict(stuck) is None and (chosen := choose_passed_over(stuck)):
            own = (self._graft_rank, self._board.sequence)
            if wait is self._wait_on_board and own in [(line.graft_rank, line.sequence) for line in chosen]:
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
            f"{self._who} waited {wait.timeout:.0f} s for {wait.what} ({wait.stage}), and the time is "
            f"up.\n{board}\n"
            f"{ahead}"
            f"No process is known to be gone and the waits do not exclude each other, so a rank that seems to run "
            f"is probably slow, stopped, or stuck in its own job's collectives (py-spy dump --pid tells). "
            f"Raise GRAFTER_TIMEOUT if it only needs longer."
        )
