"""The hosted store, with a one-line summary of the ranks that wait and what they wait for. It imports torch."""

from __future__ import annotations

import time

from grafter.core.messages.roster import ANNOUNCEMENTS, Announcement
from grafter.core.roles import ROLES, Role
from grafter.errors import RunError
from grafter.wire.monitor.status_board import BoardLine, board_key
from grafter.wire.store_client import ABORT, StoreClient
from grafter.wire.store_server import HostedStore

_RANKS_NAMED = 8


class WatchedStore(HostedStore):
    """The store that `grafter run` hosts. It summarises in one line which ranks wait, and what they wait for."""

    def __init__(
        self, address: str = "127.0.0.1", port: int = 0, *, group_name: str = "graft", secret: str | None = None
    ) -> None:
        """Opens the store; port 0 takes a free one. Raises JoinError if it cannot listen there."""
        super().__init__(address, port, group_name=group_name, secret=secret)
        # The number of ranks per role, once the role has joined.
        self._world_sizes: dict[Role, int] = {}
        self._joined_since: float | None = None

    def waiting_summary(self) -> str | None:
        """Which rank waits, for which rank or point, and for how long; None while no rank waits.

        Call it from one thread. It takes about 60 us per rank of both jobs and never waits. Raises RunError if the
        store cannot be read.
        """
        client = self._client
        run = client.peek(client.job_keys.run)
        if run is None:
            return "waiting for the baseline job to join; a job joins at its first call of grafter"
        if run.kind == ABORT:
            # The run ended before it was opened, and no rank waits any more.
            return None
        client.seal.run_id = run.payload.partition(" ")[0]
        missing = [summary for role in ROLES if (summary := self._missing(client, role)) is not None]
        if missing:
            if self._joined_since is None:
                self._joined_since = time.monotonic()
            return f"{' and '.join(missing)}, since {time.monotonic() - self._joined_since:.0f} s"
        return summarize_lines(self._read_lines(client), time.time())

    def has_announced(self, role: str) -> bool:
        """Whether any rank of the role has reached its join, however the run ended. False if the store is broken."""
        client = self._client
        try:
            # Ranks of one job start together, so if any rank is there, one of the first ones is.
            return any(client.exists(client.job_keys.hello(role, rank)) for rank in range(8))
        except RunError:
            return False

    def _missing(self, client: StoreClient, role: Role) -> str | None:
        """Which ranks of a role have not joined; None once all have."""
        if role in self._world_sizes:
            return None
        roster = client.peek(client.job_keys.roster(role))
        if roster is not None and roster.kind == ABORT:
            # The run ended before it began; the ranks themselves report why.
            return None
        if roster is not None:
            self._world_sizes[role] = len(ANNOUNCEMENTS.validate_json(roster.payload))
            return None
        first = client.peek(client.job_keys.hello(role, 0))
        if first is None:
            return f"waiting for the {role} job to join"
        world_size = Announcement.model_validate_json(first.payload).role_world_size
        absent = [rank for rank in range(1, world_size) if not client.exists(client.job_keys.hello(role, rank))]
        named = ", ".join(map(str, absent[:_RANKS_NAMED])) + (", ..." if len(absent) > _RANKS_NAMED else "")
        return f"waiting for {role} rank{'s' * (len(absent) != 1)} {named} to join" if absent else None

    def _read_lines(self, client: StoreClient) -> list[BoardLine]:
        found = [
            client.peek(board_key(client, role, rank))
            for role, world_size in self._world_sizes.items()
            for rank in range(world_size)
        ]
        return [BoardLine.model_validate_json(sealed.payload) for sealed in found if sealed is not None]


def summarize_lines(lines: list[BoardLine], now: float) -> str | None:
    """The longest wait, and how many other ranks wait; None if none does. `now`: seconds since 1970."""
    waits = sorted((line for line in lines if line.state == "waiting"), key=lambda line: line.since)
    if not waits:
        return None
    longest = waits[0]
    others = len(waits) - 1
    more = f" ({others} more rank{'s' * (others != 1)} wait{'s' * (others == 1)})" if others else ""
    return f"{longest.who} waits for {longest.point} since {max(0.0, now - longest.since):.0f} s{more}"
