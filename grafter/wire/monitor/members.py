"""All ranks of the run as one of them sees them: their lines on the board, and what has become of their processes.

Also the process that hosts the rendezvous store, which may be a rank or `grafter run`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from grafter.core.messages.roster import Roster
from grafter.core.process_identity import ProcessIdentity, how_gone, is_stopped
from grafter.core.processes import SILENT_AFTER_SECONDS, HeartbeatWatch, host_identity
from grafter.errors import RunError
from grafter.wire.monitor.status_board import BoardLine, board_key, describe_board, read_line, unknown_line
from grafter.wire.store_client import StoreClient


class ProcessWatch:
    """The processes of all ranks: which are gone, silent or stopped. One per rank, used by its monitor thread.

    Ranks are graft ranks.
    """

    def __init__(self, roster: Roster, graft_rank: int) -> None:
        self._roster, self._graft_rank = roster, graft_rank
        own_host = roster.all[graft_rank].process.host
        self._here = {rank for rank, member in enumerate(roster.all) if member.process.host == own_host}
        self._beats = HeartbeatWatch()
        self._beat_count = 0

    def beat(self, client: StoreClient) -> None:
        """Publish once a second that this process lives: other hosts cannot look, and all report when it lived last."""
        self._beat_count += 1
        client.set(self._beat_key(client, self._graft_rank), "beat", f"{self._beat_count} {time.time():.1f}")

    def gone(self, client: StoreClient, *, all_hosts: bool) -> dict[int, str]:
        """Rank -> how its process ended, as a phrase that follows its name; also of ranks that left normally before.

        Every waiting rank looks at its own host, and at the leaders elsewhere; `all_hosts` is for leaders. A few round
        trips; never waits.
        """
        exits = {role: client.peek(client.job_keys.exit(role)) for role in ("baseline", "target")}
        gone: dict[int, str] = {}
        for rank, member in enumerate(self._roster.all):
            how = None
            if rank in self._here:
                how = how_gone(member.process)
            elif all_hosts or member.role_rank == 0:
                how = self._silence(client, rank)
            report = exits[member.role]
            if report is not None:
                how = f"{how or 'is gone'} (its job {report.payload})"
            if how is not None:
                gone[rank] = how + self._last_heard_of(client, rank)
        return gone

    def gone_here(self) -> dict[int, str]:
        """The same for this host alone, without asking the store."""
        return {rank: how for rank in self._here if (how := how_gone(self._roster.all[rank].process))}

    def stopped(self) -> dict[int, str]:
        """Rank -> a remark, for the ranks of this host that are stopped."""
        return {
            rank: f"its process, pid {self._roster.all[rank].process.pid}, is stopped (SIGSTOP, Ctrl-Z or a debugger)"
            for rank in sorted(self._here)
            if is_stopped(self._roster.all[rank].process)
        }

    def _last_heard_of(self, client: StoreClient, rank: int) -> str:
        beat = client.peek(self._beat_key(client, rank))
        if beat is None:
            return ""
        return f", last heard of {max(0.0, time.time() - float(beat.payload.partition(' ')[2])):.0f} s ago"

    def _silence(self, client: StoreClient, rank: int) -> str | None:
        beat = client.peek(self._beat_key(client, rank))
        silent = self._beats.silent_seconds(rank, beat.payload if beat else "")
        return f"is silent for {silent:.0f} s" if silent > SILENT_AFTER_SECONDS else None

    def _beat_key(self, client: StoreClient, graft_rank: int) -> str:
        return f"{client.run_prefix}/beat/{graft_rank}"


@dataclass(frozen=True)
class StoreHost:
    """The process that hosts the rendezvous store.

    name: as messages name it. process: None if it is not known. graft_rank: None if it is not a rank.
    """

    name: str
    process: ProcessIdentity | None = None
    graft_rank: int | None = None

    def __str__(self) -> str:
        if self.process is None:
            return self.name
        return f"{self.name} (pid {self.process.pid} on {self.process.hostname})"

    @property
    def is_here(self) -> bool:
        """Whether it runs on this host, so that this process can look at it."""
        return self.process is not None and self.process.host == host_identity()

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped; False if it runs on another host."""
        return self.process is not None and self.is_here and is_stopped(self.process)

    @property
    def is_gone(self) -> bool:
        """Whether it has ended; False if it runs on another host."""
        return self.process is not None and self.is_here and how_gone(self.process) is not None


# How many lines of the board are read per second, in turn, for when the store does not answer any more.
_LINES_A_SECOND = 32


class Members:
    """All ranks of the run, known from `joined` on. One per rank, used by its monitor thread. Ranks are graft ranks.

    What asks the store takes a client of the calling thread, and raises PeerLostError if the store is lost.
    """

    def __init__(self, host: StoreHost) -> None:
        """host: the process that hosts the store."""
        self.host = host
        self.roster: Roster | None = None
        self._processes: ProcessWatch | None = None
        self._last_lines: dict[int, BoardLine] = {}
        self._next_line = 0

    def joined(self, roster: Roster, graft_rank: int, host_rank: int | None) -> None:
        """All ranks are known from here on. host_rank: the rank that hosts the store; None if none does."""
        self.roster = roster
        self._processes = ProcessWatch(roster, graft_rank)
        if host_rank is not None:
            self.host = StoreHost(roster.who(host_rank), roster.all[host_rank].process, host_rank)

    def beat(self, client: StoreClient) -> None:
        """Publish that this process lives. Called once a second."""
        if self._processes is not None:
            self._processes.beat(client)

    def read_board(self, client: StoreClient, ranks: Sequence[int] | None = None) -> list[BoardLine]:
        """The lines of these ranks (None: of all), in their order. Two round trips.

        A line that is missing, because another program has deleted or overwritten it, is as this rank read it last.
        """
        assert self.roster is not None
        wanted = range(len(self.roster.all)) if ranks is None else ranks
        members = [self.roster.all[rank] for rank in wanted]
        found = client.peek_all([board_key(client, member.role, member.role_rank) for member in members])
        for rank, sealed in zip(wanted, found, strict=True):
            if sealed is not None:
                self._last_lines[rank] = read_line(sealed.payload, self.roster)
        return [self._last_lines.get(rank) or unknown_line(self.roster, rank) for rank in wanted]

    def keep_up(self, client: StoreClient) -> None:
        """Read a part of the board, for when the store does not answer, or ends with its host. Called once a second."""
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
        """Graft rank -> how its process ended, without those that left normally."""
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
        """The board as this rank has read it last, without asking the store; empty before it has joined."""
        if self.roster is None:
            return ""
        lines = [self._last_lines.get(rank) or unknown_line(self.roster, rank) for rank in range(len(self.roster.all))]
        return describe_board(lines, self.gone_here(), remarks)
