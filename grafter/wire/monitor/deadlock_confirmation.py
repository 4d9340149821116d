"""From the board to a diagnosis: ranks that look stuck are suspected, and called stuck once they have confirmed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grafter.core.messages.roster import Announcement, Roster
from grafter.wire.monitor.deadlock import find_stuck
from grafter.wire.monitor.status_board import BoardLine
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient


class DeadlockConfirmation:
    """One per rank, used by its housekeeping thread.

    Each waiting rank confirms, about twice a second, that it still waits and that nothing has come which could end its
    wait. A rank is called stuck once it, and all that are stuck with it, have confirmed twice since being suspected.
    The second confirmation began after the suspicion. Whatever could end one of these waits would have to come from
    another of them, or was sent before, and then it has arrived and would have been seen.
    """

    def __init__(self, roster: Roster, graft_rank: int) -> None:
        self._roster, self._own = roster, roster.all[graft_rank]
        self._confirmations = 0
        # Graft rank -> (sequence of its line, its confirmations) when it was suspected.
        self._suspected: dict[int, tuple[int, int]] = {}

    def confirm_idle(self, client: StoreClient, wait: Wait, sequence: int) -> None:
        """For this rank's own wait, whose line on the board has this sequence."""
        if wait.has_news is not None and wait.has_news():
            return
        if any(client.exists(key) for key in wait.awaits):
            return
        if not wait.over:
            self._confirmations += 1
            client.set(_idle_key(client, self._own), "idle", f"{sequence} {self._confirmations}")

    def find_stuck(self, client: StoreClient, lines: Sequence[BoardLine], gone: Mapping[int, str]) -> list[BoardLine]:
        """The ranks that are stuck beyond doubt; empty while there is none, or while it is not yet sure."""
        stuck = find_stuck(lines, gone)
        confirmed = {line.graft_rank: self._confirmation(client, line) for line in stuck}
        if not stuck or None in confirmed.values():
            self._suspected = {}
            return []
        known = {rank: found for rank, found in confirmed.items() if found is not None}
        suspected = self._suspected
        if {rank: sequence for rank, (sequence, _) in suspected.items()} != {r: s for r, (s, _) in known.items()}:
            self._suspected = known
            return []
        return stuck if all(count >= suspected[rank][1] + 2 for rank, (_, count) in known.items()) else []

    def _confirmation(self, client: StoreClient, line: BoardLine) -> tuple[int, int] | None:
        """(sequence of the rank's line, how often it has confirmed this very wait); None if it has not yet."""
        sealed = client.peek(_idle_key(client, self._roster.all[line.graft_rank]))
        if sealed is None:
            return None
        sequence, _, count = sealed.payload.partition(" ")
        return (line.sequence, int(count)) if int(sequence) == line.sequence else None


def _idle_key(client: StoreClient, member: Announcement) -> str:
    return f"{client.run_prefix}/idle/{member.role}/{member.role_rank}"
