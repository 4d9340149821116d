"""Absence: whether the ranks that a point waits for can still come to it, where points may be one-sided.

It is certain once they have passed the end of the point's step (`step_ends`) and nothing of them is here. Ranks that
wait for each other never get there: then one of the two jobs passes its points over (`choose_passed_over`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grafter.core.messages.roster import Roster, other_role
from grafter.core.roles import RoleName
from grafter.wire.monitor.status_board import BoardLine
from grafter.wire.monitor.step_ends import StepEnds
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

ReadBoard = Callable[[StoreClient, Sequence[int]], list[BoardLine]]


class Absence:
    """One per rank, used by its housekeeping thread."""

    def __init__(self, roster: Roster, graft_rank: int, step_ends: StepEnds, read_board: ReadBoard) -> None:
        self._roster, self._step_ends, self._read_board = roster, step_ends, read_board
        own = roster.all[graft_rank]
        self._role, self._role_rank = own.role, own.role_rank

    def find(self, client: StoreClient, wait: Wait) -> str | None:
        """Why nobody will end this wait of a point; None while somebody may."""
        if not wait.leader:
            reason = self._leader_is_absent(client, wait)
        elif wait.collects:
            reason = self._follower_is_absent(client, wait)
        else:
            passed = self._step_ends.have_passed(client, other_role(self._role), wait.step)
            reason = only_one_job_came(self._role) if passed else None
        # Looked at last: what a rank brought before it passed the end of the step is here by now.
        return reason if reason is not None and not _has_news(client, wait) else None

    def _leader_is_absent(self, client: StoreClient, wait: Wait) -> str | None:
        leader = min(wait.participants)
        if self._step_ends.reached(client, self._role)[leader] <= wait.step:
            return None
        return _only_some_came(self._role, [leader])

    def _follower_is_absent(self, client: StoreClient, wait: Wait) -> str | None:
        """Once each of the others has passed the end of the step or waits here, all that will come of them is here."""
        reached = self._step_ends.reached(client, self._role)
        others = [rank for rank in wait.participants if rank != self._role_rank]
        passed = [rank for rank in others if reached[rank] > wait.step]
        if not passed:
            return None
        rest = [self._roster.graft_rank(self._role, rank) for rank in others if rank not in passed]
        if rest and not all(line.digest == wait.digest for line in self._read_board(client, rest)):
            return None
        return _only_some_came(self._role, passed)


def _has_news(client: StoreClient, wait: Wait) -> bool:
    if wait.has_news is not None and wait.has_news():
        return True
    return bool(wait.awaits) and client.all_exist(wait.awaits)


def only_one_job_came(role: RoleName) -> str:
    """The reason of a point that the other job did not come to in its step."""
    return f"only the {role} came to this point"


def _only_some_came(role: RoleName, others: Sequence[int]) -> str:
    missing = f"{role} rank {others[0]}" if len(others) == 1 else f"{role} ranks {', '.join(map(str, others))}"
    verb = "has" if len(others) == 1 else "have, or some of them have,"
    return f"not all ranks of the {role} came to this point: {missing} {verb} passed the end of the step without it"


# Where ranks wait for each other.


def choose_passed_over(stuck: Sequence[BoardLine]) -> list[BoardLine]:
    """Of ranks that wait for each other for ever, those that give their point up now. Pure; the same on every rank.

    They are the leaders of one job, or its ranks that wait where their leader does not: those that have given up less
    often, so that all take turns and each is soon behind the point that only it has.
    """
    at_point = {(line.digest, line.graft_rank) for line in stuck}
    groups: dict[tuple[bool, RoleName], list[BoardLine]] = {}
    for line in stuck:
        leader = min(line.participants)
        if line.one_sided and (leader == line.graft_rank or (line.digest, leader) not in at_point):
            groups.setdefault((leader == line.graft_rank, line.role), []).append(line)
    # In equal cases those without their leader come first, and then the target.
    in_order = sorted(groups.items(), key=lambda group: (group[0][0], group[0][1] != "target"))
    return min((lines for _, lines in in_order), key=lambda lines: max(one.passed_over for one in lines), default=[])


def explain_passed_over(stuck: Sequence[BoardLine]) -> str:
    """The reason of a point that was given up since ranks waited for each other."""
    waits = sorted({f"the {line.role} for {line.point}" for line in stuck})
    return f"ranks waited for each other, so this point was given up: {'; '.join(waits[:4])}" + (
        "; ..." if len(waits) > 4 else ""
    )
