"""All ranks of the run as one of them sees them: what they say on the board, and what has become of their processes."""

from __future__ import annotations

from collections.abc import Sequence

from grafter.core.messages.roster import Roster
from grafter.errors import RunError
from grafter.wire.monitor.processes import ProcessWatch
from grafter.wire.monitor.status_board import BoardLine, board_key, describe_board, read_line, unknown_line
from grafter.wire.monitor.store_host import StoreHost
from grafter.wire.store_client import StoreClient

# So many lines a second are read in turn: what is known of the board when the store falls silent.
_LINES_A_SECOND = 32


class Members:
    """One per rank, used by its housekeeping thread. It knows nobody before `joined`. Ranks are graft ranks."""

    def __init__(self, host: StoreHost) -> None:
        """host: of the store."""
        self.host = host
        self.roster: Roster | None = None
        self._processes: ProcessWatch | None = None
        self._last_lines: dict[int, BoardLine] = {}
        self._next_line = 0

    def joined(self, roster: Roster, graft_rank: int, host_rank: int | None) -> None:
        self.roster = roster
        self._processes = ProcessWatch(roster, graft_rank)
        if host_rank is not None:
            self.host = StoreHost(roster.who(host_rank), roster.all[host_rank].process, host_rank)

    def beat(self, client: StoreClient) -> None:
        if self._processes is not None:
            self._processes.beat(client)

    def read_board(self, client: StoreClient, ranks: Sequence[int] | None = None) -> list[BoardLine]:
        """One that is not there, since a stranger has deleted or overwritten it, is as this rank read it last."""
        assert self.roster is not None
        wanted = range(len(self.roster.all)) if ranks is None else ranks
        members = [self.roster.all[rank] for rank in wanted]
        found = client.peek_all([board_key(client, member.role, member.role_rank) for member in members])
        for rank, sealed in zip(wanted, found, strict=True):
            if sealed is not None:
                self._last_lines[rank] = read_line(sealed.payload, self.roster)
        return [self._last_lines.get(rank) or unknown_line(self.roster, rank) for rank in wanted]

    def keep_up(self, client: StoreClient) -> None:
        """Read some of the board, for when the store falls silent, or is gone with its host. Once a second."""
        if self.roster is None:
            return
        count = len(self.roster.all)
        ranks = {(self._next_line + number) % count for number in range(min(count, _LINES_A_SECOND))}
        self._next_line = (self._next_line + _LINES_A_SECOND) % count
        if self.host.graft_rank is not None:
            ranks.add(self.host.graft_rank)
        self.read_board(client, sorted(ranks))

    def wake_waiting(self, client: StoreClient, error: RunError) -> None:
        """Put the error under every key that a rank on the board waits for."""
        if self.roster is not None:
            for line in self.read_board(client):
                if line.state == "waiting":
                    for awaited in line.awaits:
                        client.wake(awaited, error)

    def gone(self, client: StoreClient, *, all_hosts: bool) -> dict[int, str]:
        """Graft rank -> how its process went, without those that left in good order."""
        assert self._processes is not None
        gone = self._processes.gone(client, all_hosts=all_hosts)
        for line in self.read_board(client, list(gone)):
            if line.state == "left":
                del gone[line.graft_rank]
        return gone

    def gone_here(self) -> dict[int, str]:
        """The same for this host alone, without asking the store."""
        if self._processes is None:
            return {}
        left = {line.graft_rank for line in self._last_lines.values() if line.state == "left"}
        return {rank: how for rank, how in self._processes.gone_here().items() if rank not in left}

    def stopped(self) -> dict[int, str]:
        """Graft rank -> a remark, for the ranks of this host that are stopped."""
        stopped = self._processes.stopped() if self._processes is not None else {}
        hosting = self.host.graft_rank
        if hosting is not None and hosting in stopped:
            stopped[hosting] += ", and it hosts the rendezvous store"
        return stopped

    def last_seen(self, role: str) -> list[BoardLine]:
        """The lines of a job, as this rank has last read them; empty until it has read all of them."""
        side = self.roster.side("baseline" if role == "baseline" else "target") if self.roster is not None else ()
        lines = [line for line in list(self._last_lines.values()) if line.role == role]
        return lines if len(lines) == len(side) else []

    def describe_last_board(self, remarks: dict[int, str] | None = None) -> str:
        """Of the lines that this rank has read last, without asking the store; empty before it has joined."""
        if self.roster is None:
            return ""
        lines = [self._last_lines.get(rank) or unknown_line(self.roster, rank) for rank in range(len(self.roster.all))]
        return describe_board(lines, self.gone_here(), remarks)
