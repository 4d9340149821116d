"""The status board: one line per rank that says what it does, so that a wait can be explained.

A line is written only for what lasts, by the rank's monitor thread, so that a point whose ranks arrive together costs
none. A rank that moves bytes or votes counts as running, and its line names the stage. The ranks that it needs there
are watched directly.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from grafter.core.messages.roster import PlayedFrom, Roster
from grafter.core.messages.wire import read_message
from grafter.core.points import PointKey
from grafter.core.roles import Role
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

Stage = Literal[
    "pairing", "sending", "receiving", "transforming", "measuring", "voting", "deciding", "writing", "finishing"
]

_TEXTS: dict[str, str] = {
    "pairing": "describes its part of {}",
    "sending": "sends {}",
    "receiving": "receives {}",
    "transforming": "transforms and checks what it has received for {}",
    "measuring": "computes statistics of {}",
    "voting": "votes on {}",
    "deciding": "waits for the outcome of {}",
    "writing": "copies what it has received into {}",
    "finishing": "finishes {}",
}
# The texts of waits that are shown before the dump thread has set a stage.
_WAITS = {"exchange": "waits for the bytes of {}", "agreement": "waits for the outcome of {}"}


class Underway(Protocol):
    """The point that this rank is at. Read on the monitor thread, while the dump thread changes `stage`."""

    @property
    def stage(self) -> Stage: ...

    @property
    def point(self) -> object: ...

    @property
    def call_site(self) -> str: ...


def text_of_stage(stage: Stage, point: object) -> str:
    """What follows the rank's name on the board."""
    return _TEXTS[stage].format(point)


def text_of_wait(stage: str, what: object) -> str:
    """What follows the rank's name on the board, for a wait."""
    return _WAITS.get(stage, "waits for {}").format(what)


_LONGEST_BOARD = 8


class HookFacts(BaseModel):
    """What the models of a rank have done.

    passes: how many outermost forward passes have begun. bypassed: modules whose hooks did not run although those of
    their parts did. models: the prefixes of the names of their points.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    passes: int = 0
    bypassed: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


class BoardLine(BaseModel):
    """What one rank does. Times are on `time.time`'s clock.

    participants: the ranks of its own side at its point; role ranks in the store, graft ranks once `read_line` has read
    the line. awaits: store keys.
    """

    model_config = ConfigDict(frozen=True)

    role: Role
    role_rank: int
    # Set by the reader, which has the roster.
    graft_rank: int = -1
    # Grows with every line that the rank writes, so that readers see whether it has changed.
    sequence: int
    state: Literal["running", "waiting", "left"]
    since: float
    digest: str = ""
    point: str = ""
    participants: tuple[int, ...] = ()
    awaits: tuple[str, ...] = ()
    call_site: str = ""
    # What a running rank does, if that is known.
    doing: str = ""
    # Whether it waits for ranks of its own side alone.
    own_side: bool = False
    # Whether its point is skipped if only one job reaches it; and how many points this rank has given up because ranks
    # waited for each other.
    one_sided: bool = False
    passed_over: int = 0
    last_points: tuple[str, ...] = ()
    # The error with which it left; empty if it left normally.
    note: str = ""
    hooks: HookFacts = HookFacts()
    # Set by the reader, too: the recording that the rank is played from.
    played_from: PlayedFrom | None = None

    @property
    def who(self) -> str:
        """The rank's name, with the recording that it is played from."""
        who = f"{self.role} rank {self.role_rank}"
        return f"{who} ({self.played_from})" if self.played_from is not None else who


class BoardWriter:
    """Writes this rank's line. Used through one client at a time, so that its lines keep their order."""

    def __init__(self, role: Role, role_rank: int) -> None:
        self.role, self._role_rank = role, role_rank
        self.sequence = 0
        # Replaced once both jobs have joined.
        self.hook_facts: Callable[[], HookFacts] = HookFacts
        # Points given up because ranks waited for each other.
        self.passed_over = 0
        # Filled by the dump thread, read when a line is written.
        self.last_points: deque[tuple[PointKey, str]] = deque(maxlen=10)
        # The newest of them that is on the board.
        self._shown_point: tuple[PointKey, str] | None = None

    @property
    def has_new_points(self) -> bool:
        """Whether this rank has ended a point since its line was written."""
        return bool(self.last_points) and self.last_points[-1] is not self._shown_point

    def running(self, client: StoreClient, doing: str = "", *, call_site: str = "", since: float | None = None) -> None:
        """Write that this rank runs. doing: what follows its name. since: on `time.time`'s clock; None: now."""
        self._write(
            client, state="running", doing=doing, call_site=call_site, since=time.time() if since is None else since
        )

    def waiting(self, client: StoreClient, wait: Wait, since: float) -> None:
        """Write that this rank waits in pairing. since: on `time.time`'s clock."""
        self._write(
            client, state="waiting", digest=wait.digest, point=str(wait.what), participants=wait.participants,
            awaits=wait.awaits, call_site=wait.call_site, since=since, own_side=wait.own_side, one_sided=wait.one_sided,
            passed_over=self.passed_over,
        )  # fmt: skip

    def left(self, client: StoreClient, note: str) -> None:
        """Write that this rank has left. note: the error with which it ends; empty if it ends normally."""
        self._write(client, state="left", note=note)

    def _write(self, client: StoreClient, **fields: Any) -> None:
        self.sequence += 1
        # Copied in one step, since the dump thread may add to it meanwhile.
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


def board_key(client: StoreClient, role: Role, role_rank: int) -> str:
    """The store key of a rank's line."""
    return f"{client.run_prefix}/board/{role}/{role_rank}"


def read_line(payload: str, roster: Roster) -> BoardLine:
    """A line with the graft ranks of the reader's roster in it. Raises ProtocolError if it cannot be read."""
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
    """The line that stands for a rank whose own cannot be read."""
    member = roster.all[graft_rank]
    return BoardLine(
        role=member.role, role_rank=member.role_rank, graft_rank=graft_rank, sequence=-1, state="running",
        since=time.time(), doing="has no line on the board that this rank could read", played_from=member.played_from,
    )  # fmt: skip


def describe_line(line: BoardLine, now: float, gone: str | None = None, remark: str | None = None) -> str:
    """One rank's paragraph in a message: what it does, where in the user's code, and its last points.

    now: on `time.time`'s clock. gone: how its process ended. remark: added in brackets.
    """
    if gone is not None:
        head = f"{line.who} {gone}"
        if line.state == "waiting":
            head += f", while it waited for {line.point}"
        elif line.doing:
            head += f"; before that it {line.doing}"
    elif line.state == "waiting":
        head = f"{line.who} waits for {line.point} since {max(0.0, now - line.since):.1f} s"
    elif line.state == "left":
        end = line.played_from.end if line.played_from is not None else "it ended normally"
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
    """The board as text, of both roles, the most telling ranks first.

    gone: graft rank -> how its process ended. remarks: graft rank -> what is added in brackets.
    """
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
