"""The processes of the run, as one rank watches them: which are gone, silent or stopped."""

from __future__ import annotations

import time

from grafter.core.messages.roster import Roster
from grafter.core.process_identity import how_gone, is_stopped
from grafter.core.processes import SILENT_AFTER_SECONDS, HeartbeatWatch
from grafter.wire.store_client import StoreClient


class ProcessWatch:
    """One per rank, used by its housekeeping thread. Ranks are graft ranks."""

    def __init__(self, roster: Roster, graft_rank: int) -> None:
        self._roster, self._graft_rank = roster, graft_rank
        own_host = roster.all[graft_rank].process.host
        self._here = {rank for rank, member in enumerate(roster.all) if member.process.host == own_host}
        self._beats = HeartbeatWatch()
        self._beat_count = 0

    def beat(self, client: StoreClient) -> None:
        """Say once a second that this process lives: other hosts cannot see it, and all want to know until when."""
        self._beat_count += 1
        client.set(self._beat_key(client, self._graft_rank), "beat", f"{self._beat_count} {time.time():.1f}")

    def gone(self, client: StoreClient, *, all_hosts: bool) -> dict[int, str]:
        """Rank -> how its process went, as a phrase that follows its name; also ranks that closed before they ended.

        Every waiting rank looks at its own host, and at the leaders elsewhere; `all_hosts` is for leaders.
        """
        exits = {role: client.peek(f"{client.job_prefix}/exit/{role}") for role in ("baseline", "target")}
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
