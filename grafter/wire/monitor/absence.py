"""Absence: whether the ranks that a one-sided point waits for can still reach it (`one_sided="skip"`).

Each rank publishes the step that it is in. Ranks that have passed the end of a point's step, and have left nothing for
the point, do not reach it any more. Ranks that wait for each other never pass the end of a step: then one of the two
jobs passes its points over (`choose_passed_over`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grafter.core.messages.roster import Roster, other_role
from grafter.core.roles import Role
from grafter.wire.monitor.status_board import BoardLine
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

# The step of a rank that has left normally.
LEFT = 1 << 62
_NOT_SAID = -1


class StepEnds:
    """The steps that all ranks are in, as one rank publishes its own and reads the others'.

    `say` is called by the dump thread; the other methods by any thread, with its own client. Raises PeerLostError if
    the store is lost.
    """

    def __init__(self, roster: Roster, graft_rank: int) -> None:
        self._roster, own = roster, roster.all[graft_rank]
        self._own = own.role, own.role_rank
        self._said = _NOT_SAID
        # By role: the step that all of its ranks have reached, as this rank has last read it.
        self._all_reached: dict[Role, int] = {"baseline": _NOT_SAID, "target": _NOT_SAID}

    def say(self, client: StoreClient, step: int) -> None:
        """Publish that this rank is in `step` now; free if it is published already. Does not wait for the store.

        client: the one that this rank's points use. What they wrote before is in the store before this: a rank that
        reads that a step is over finds everything that was written in it.
        """
        if step > self._said:
            self._said = step
            client.set(_key(client, *self._own), "step", str(step))

    def reached(self, client: StoreClient, role: Role) -> list[int]:
        """The step that each rank of a job is in, by role rank; -1 for all until each has published one."""
        side = self._roster.side(role)
        keys = [_key(client, role, rank) for rank in range(len(side))]
        steps = [_NOT_SAID] * len(side)
        if client.all_exist(keys):
            steps = [int(sealed.payload) for sealed in client.get_all(keys)]
        self._all_reached[role] = min(steps)
        return steps

    def have_passed(self, client: StoreClient, role: Role, step: int) -> bool:
        """Whether all ranks of a job have passed the end of a step. Asks the store only if that is not known yet."""
        return self._all_reached[role] > step or min(self.reached(client, role)) > step


def _key(client: StoreClient, role: Role, role_rank: int) -> str:
    return f"{client.run_prefix}/step/{role}/{role_rank}"


ReadBoard = Callable[[StoreClient, Sequence[int]], list[BoardLine]]


class Absence:
    """Whether the ranks that a wait of one rank needs can still come. Used by its monitor thread, and before a
    wait begins by its dump thread."""

    def __init__(self, roster: Roster, graft_rank: int, step_ends: StepEnds, read_board: ReadBoard) -> None:
        self._roster, self._step_ends, self._read_board = roster, step_ends, read_board
        own = roster.all[graft_rank]
        self._role, self._role_rank = own.role, own.role_rank

    def find(self, client: StoreClient, wait: Wait) -> str | None:
        """Why no rank will end this wait of a one-sided point; None while one may. A few round trips; never waits."""
        if not wait.leader:
            reason = self._leader_is_absent(client, wait)
        elif wait.collects:
            reason = self._follower_is_absent(client, wait)
        else:
            passed = self._step_ends.have_passed(client, other_role(self._role), wait.step)
            reason = only_one_job_came(self._role) if passed else None
        # In this order: what a rank sent before it passed the end of the step has arrived by now.
        return reason if reason is not None and not _has_news(client, wait) else None

    def _leader_is_absent(self, client: StoreClient, wait: Wait) -> str | None:
        leader = min(wait.participants)
        if self._step_ends.reached(client, self._role)[leader] <= wait.step:
            return None
        return _only_some_came(self._role, [leader])

    def _follower_is_absent(self, client: StoreClient, wait: Wait) -> str | None:
        """Once each other rank has passed the end of the step or waits at this point, all they send has arrived."""
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


def only_one_job_came(role: Role) -> str:
    """The reason of a point that the other job did not reach in the point's step."""
    return f"only the {role} reached this point"


def _only_some_came(role: Role, others: Sequence[int]) -> str:
    missing = f"{role} rank {others[0]}" if len(others) == 1 else f"{role} ranks {', '.join(map(str, others))}"
    verb = "has" if len(others) == 1 else "have, or some of them have,"
    return f"not all ranks of the {role} reached this point: {missing} {verb} passed the end of the step without it"


def choose_passed_over(stuck: Sequence[BoardLine]) -> list[BoardLine]:
    """The lines of the ranks that give their point up now, out of ranks that wait for each other for ever. Pure, and
    the same on every rank.

    They are the leaders of one job, or ranks of one job that wait at a point where their leader is not. The group that
    has given up less often is chosen, so that the jobs take turns, and each soon passes the point that only it has.
    """
    at_point = {(line.digest, line.graft_rank) for line in stuck}
    groups: dict[tuple[bool, Role], list[BoardLine]] = {}
    for line in stuck:
        leader = min(line.participants)
        if line.one_sided and (leader == line.graft_rank or (line.digest, leader) not in at_point):
            groups.setdefault((leader == line.graft_rank, line.role), []).append(line)
    # Among equals, ranks without their leader come first, and then the target.
    in_order = sorted(groups.items(), key=lambda group: (group[0][0], group[0][1] != "target"))
    return min((lines for _, lines in in_order), key=lambda lines: max(one.passed_over for one in lines), default=[])


def explain_passed_over(stuck: Sequence[BoardLine]) -> str:
    """The reason of a point that was given up because ranks waited for each other."""
    waits = sorted({f"the {line.role} for {line.point}" for line in stuck})
    return f"ranks waited for each other, so this point was given up: {'; '.join(waits[:4])}" + (
        "; ..." if len(waits) > 4 else ""
    )
