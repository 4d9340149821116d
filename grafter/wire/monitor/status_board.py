"""The state board: one line per rank that says what it does, so that a wait can explain itself.

A line is written only for what lasts, by the rank's housekeeping thread, so that a point that meets at once costs
none. A rank that moves bytes or votes counts as running, and its line says which of it: whoever it needs there is
watched directly.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from grafter.core.messages.roster import PlayedFrom, Roster
from grafter.core.messages.wire import read_message
from grafter.core.points import PointKey
from grafter.core.roles import RoleName
from grafter.wire.store_client import StoreClient

_LONGEST_BOARD = 8


class HookFacts(BaseModel):
    """What a rank's models have done. passes: how many outermost forward passes have begun. bypassed: modules whose
    hooks did not run though parts of them did. models: what stands before their points' names."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    passes: int = 0
    bypassed: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


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
    # Of a rank that runs: what it does, where that is known.
    doing: str = ""
    # Whether it waits for ranks of its own side alone.
    own_side: bool = False
    # Whether its point is skipped where only one job comes to it; and how many this rank has given up because ranks
    # waited for each other.
    one_sided: bool = False
    passed_over: int = 0
    last_points: tuple[str, ...] = ()
    # How it left, if not in good order: the error.
    note: str = ""
    hooks: HookFacts = HookFacts()
    # Filled in by the reader, too: the recording that the rank is played from.
    played_from: PlayedFrom | None = None

    @property
    def who(self) -> str:
        who = f"{self.role} rank {self.role_rank}"
        return f"{who} ({self.played_from})" if self.played_from is not None else who


class BoardWriter:
    """Writes this rank's line. The lines of one rank go through one client at a time, so that they keep their order."""

    def __init__(self, role: RoleName, role_rank: int) -> None:
        self.role, self._role_rank = role, role_rank
        self.sequence = 0
        # Set once both jobs have joined.
        self.hook_facts: Callable[[], HookFacts] = HookFacts
        # Points given up because ranks waited for each other.
        self.passed_over = 0
        # Filled by the dump thread, read when a line is written.
        self.last_points: deque[tuple[PointKey, str]] = deque(maxlen=10)
        # The newest of those that are on the board.
        self._shown_point: tuple[PointKey, str] | None = None

    @property
    def has_new_points(self) -> bool:
        """Whether this rank has had a point since its line was written."""
        return bool(self.last_points) and self.last_points[-1] is not self._shown_point

    def running(self, client: StoreClient, doing: str = "", *, call_site: str = "", since: float | None = None) -> None:
        """doing: what follows the rank's name. since: on `time.time`'s clock; None: now."""
        self._write(
            client, state="running", doing=doing, call_site=call_site, since=time.time() if since is None else since
        )

    def waiting(
        self, client: StoreClient, *, digest: str, point: str, participants: tuple[int, ...], awaits: tuple[str, ...],
        call_site: str, since: float, own_side: bool = False, one_sided: bool = False,
    ) -> None:  # fmt: skip
        self._write(
            client, state="waiting", digest=digest, point=point, participants=participants, awaits=awaits,
            call_site=call_site, since=since, own_side=own_side, one_sided=one_sided, passed_over=self.passed_over,
        )  # fmt: skip

    def left(self, client: StoreClient, note: str) -> None:
        """`note` is empty where the rank ends in good order, else the error with which it ends."""
        self._write(client, state="left", note=note)

    def _write(self, client: StoreClient, **fields: Any) -> None:
        self.sequence += 1
        # In one step, since the dump thread may add to it meanwhile.
        points = self.last_points.copy()
        self._shown_point = points[-1] if points else None
        line = {
            "role": self.role,
            "role_rank": self._role_rank,
            "sequence": self.sequence,
            "since": time.time(),
            "last_points": [f"{key} {outcome}" for key, outcome in points],
            "hooks": self.hook_facts().model_dump(),
            **fields,
        }
        client.set(board_key(client, self.role, self._role_rank), "board", json.dumps(line))


def board_key(client: StoreClient, role: RoleName, role_rank: int) -> str:
    return f"{client.run_prefix}/board/{role}/{role_rank}"


def read_line(payload: str, roster: Roster) -> BoardLine:
    """A line with the graft ranks of the reader's roster in it."""
    line = read_message(BoardLine.model_validate_json, payload, "a line of the board")
    side = roster.side(line.role)
    return line.model_copy(
        update={
            "graft_rank": roster.graft_rank(line.role, line.role_rank),
            "participants": tuple(roster.graft_rank(line.role, rank) for rank in line.participants),
            "played_from": side[line.role_rank].played_from if 0 <= line.role_rank < len(side) else None,
        }
    )


def unknown_line(roster: Roster, graft_rank: int) -> BoardLine:
    """Of a rank whose line cannot be read."""
    member = roster.all[graft_rank]
    return BoardLine(
        role=member.role, role_rank=member.role_rank, graft_rank=graft_rank, sequence=-1, state="running",
        since=time.time(), doing="has no line on the board that this rank could read", played_from=member.played_from,
    )  # fmt: skip


def describe_line(line: BoardLine, now: float, gone: str | None = None, remark: str | None = None) -> str:
    """One rank's paragraph in a message: what it does, where in the user's code, its last points."""
    if gone is not None:
        head = f"{line.who} {gone}"
        if line.state == "waiting":
            head += f", while it waited for {line.point}"
        elif line.doing:
            head += f"; before that it {line.doing}"
    elif line.state == "waiting":
        head = f"{line.who} waits for {line.point} since {max(0.0, now - line.since):.1f} s"
    elif line.state == "left":
        end = line.played_from.end if line.played_from is not None else "it ended in good order"
        head = f"{line.who} has left" + (f" with {line.note}" if line.note else f" ({end})")
    else:
        head = f"{line.who} {line.doing or 'is running and at no point'}, since {max(0.0, now - line.since):.1f} s"
    if remark:
        head += f" [{remark}]"
    rows = [head]
    if line.state != "left" and line.call_site:
        rows.append(f"    at {line.call_site}")
    if line.sequence < 0:
        return head
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
