"""Step ends: each rank says which step it is in, so that the others know what it can't come to any more.

Only where points may be one-sided (`one_sided="skip"`). A rank says so through the client that its points use, after
everything that it has said of the step: whoever reads that a step is over finds all of it.
"""

from __future__ import annotations

from grafter.core.messages.roster import Roster
from grafter.core.roles import RoleName
from grafter.wire.store_client import StoreClient

# The step of a rank that has left in good order.
LEFT = 1 << 62
_NOT_SAID = -1


class StepEnds:
    """One per rank. `say` is called by the dump thread; the rest by any thread, with its own client."""

    def __init__(self, roster: Roster, graft_rank: int) -> None:
        self._roster, own = roster, roster.all[graft_rank]
        self._own = own.role, own.role_rank
        self._said = _NOT_SAID
        # By role: the step that all of its ranks have reached, as this rank has last read it.
        self._all_reached: dict[RoleName, int] = {"baseline": _NOT_SAID, "target": _NOT_SAID}

    def say(self, client: StoreClient, step: int) -> None:
        """This rank is in `step` now. Costs nothing where it has said so. Does not wait for the store."""
        if step > self._said:
            self._said = step
            client.set(_key(client, *self._own), "step", str(step))

    def reached(self, client: StoreClient, role: RoleName) -> list[int]:
        """The step that each rank of a job is in, by role rank; -1 for all while one has said nothing yet."""
        side = self._roster.side(role)
        keys = [_key(client, role, rank) for rank in range(len(side))]
        steps = [_NOT_SAID] * len(side)
        if client.all_exist(keys):
            steps = [int(sealed.payload) for sealed in client.get_all(keys)]
        self._all_reached[role] = min(steps)
        return steps

    def have_passed(self, client: StoreClient, role: RoleName, step: int) -> bool:
        """Whether all ranks of a job have passed the end of a step. Asks the store only where that is not known."""
        return self._all_reached[role] > step or min(self.reached(client, role)) > step


def _key(client: StoreClient, role: RoleName, role_rank: int) -> str:
    return f"{client.run_prefix}/step/{role}/{role_rank}"
