"""The state board: one line per rank that says what it does, so that a wait can explain itself.

A line is written only for a wait that lasts, by the rank's housekeeping thread, so that a point that meets at once
costs none. A rank that moves bytes or votes counts as running: whoever it needs there is watched directly.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from grafter.direction import RoleName
from grafter.points import PointKey
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.store import StoreClient
from grafter.rendezvous.wire import read_message

_LONGEST_BOARD = 8


class BoardLine(BaseModel):
    """What one rank does. `participants` are role ranks of its own side; `awaits` are store keys."""

    model_config = ConfigDict(frozen=True)

    role: RoleName
    role_rank: int
    # Filled in by the reader, who has the roster.
    graft_rank: int = -1
    # Grows with every line, so that two readings can be told apart.
    sequence: int
    state: Literal["running", "waiting", "left"]
    since: float
    digest: str = ""
    point: str = ""
    participants: tuple[int, ...] = ()
    awaits: tuple[str, ...] = ()
    call_site: str = ""
    last_points: tuple[str, ...] = ()
    # How it left, if not in good order: the error.
    note: str = ""

    @property
    def who(self) -> str:
        return f"{self.role} rank {self.role_rank}"


class BoardWriter:
    """Writes this rank's line. The lines of one rank go through one client at a time, so that they keep their order."""

    def __init__(self, role: RoleName, role_rank: int) -> None:
        self.role, self._role_rank = role, role_rank
        self.sequence = 0
        # Filled by the dump thread, read when a line is written.
        self.last_points: deque[tuple[PointKey, str]] = deque(maxlen=10)

    def running(self, client: StoreClient) -> None:
        self._write(client, state="running")

    def waiting(
        self, client: StoreClient, *, digest: str, point: str, participants: tuple[int, ...], awaits: tuple[str, ...],
        call_site: str, since: float,
    ) -> None:  # fmt: skip
        self._write(
            client, state="waiting", digest=digest, point=point, participants=participants, awaits=awaits,
            call_site=call_site, since=since,
        )  # fmt: skip

    def left(self, client: StoreClient, note: str) -> None:
        """`note` is empty where the rank ends in good order, else the error with which it ends."""
        self._write(client, state="left", note=note)

    def _write(self, client: StoreClient, **fields: Any) -> None:
        self.sequence += 1
        line = {
            "role": self.role,
            "role_rank": self._role_rank,
            "sequence": self.sequence,
            "since": time.time(),
            "last_points": [f"{key} {outcome}" for key, outcome in tuple(self.last_points)],
            **fields,
        }
        client.set(board_key(client, self.role, self._role_rank), "board", json.dumps(line))


def board_key(client: StoreClient, role: RoleName, role_rank: int) -> str:
    return f"{client.hall}/board/{role}/{role_rank}"


def read_line(payload: str, roster: Roster) -> BoardLine:
    """A line with the graft ranks of the reader's roster in it."""
    line = read_message(BoardLine.model_validate_json, payload, "a line of the board")
    return line.model_copy(
        update={
            "graft_rank": roster.graft_rank(line.role, line.role_rank),
            "participants": tuple(roster.graft_rank(line.role, rank) for rank in line.participants),
        }
    )


def describe_line(line: BoardLine, now: float, gone: str | None = None, remark: str | None = None) -> str:
    """One rank's paragraph in a message: what it does, where in the user's code, its last points."""
    if gone is not None:
        head = f"{line.who} {gone}"
        if line.state == "waiting":
            head += f", while it waited for {line.point}"
    elif line.state == "waiting":
        head = f"{line.who} waits for {line.point} since {max(0.0, now - line.since):.1f} s"
    elif line.state == "left":
        head = f"{line.who} has left" + (f" with {line.note}" if line.note else " (it ended in good order)")
    else:
        head = f"{line.who} is running and at no point, since {max(0.0, now - line.since):.1f} s"
    if remark:
        head += f" [{remark}]"
    rows = [head]
    if line.state == "waiting" and line.call_site:
        rows.append(f"    at {line.call_site}")
    if line.last_points:
        rows.append("    its last points: " + "; ".join(line.last_points))
    else:
        rows.append("    it has had no point yet")
    return "\n".join(rows)


def describe_board(
    lines: Sequence[BoardLine], gone: dict[int, str] | None = None, remarks: dict[int, str] | None = None
) -> str:
    """The board as a person reads it, both roles, the ranks that tell most first. `gone`: graft rank -> how it went."""
    gone = gone or {}
    remarks = remarks or {}
    now = time.time()
    rows: list[str] = []
    for role in ("baseline", "target"):
        side = [line for line in lines if line.role == role]
        order = {"waiting": 1, "left": 2, "running": 3}
        side.sort(key=lambda line: (line.graft_rank not in gone, order[line.state], line.graft_rank))
        for line in side[:_LONGEST_BOARD]:
            rows.append(describe_line(line, now, gone.get(line.graft_rank), remarks.get(line.graft_rank)))
        if len(side) > _LONGEST_BOARD:
            rows.append(f"(and {len(side) - _LONGEST_BOARD} more {role} ranks)")
    return "\n".join("  " + row.replace("\n", "\n  ") for row in rows)
