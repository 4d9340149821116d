"""The words of an entry: what lies at the meeting place, the states it goes through, and what each means to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from grafter.core.messages.wire import Sealed
from grafter.core.records import Outcome
from grafter.core.roles import Direction
from grafter.errors import ProtocolError

# What lies at a meeting place, besides the manifest of a leader that waits there.
POSTED, MISSED, GONE = "posted", "missed", "gone"
# What a leader tells its followers where there is no pair.
NOT_MET = "unmet"

OPEN, CLAIMED, TAKEN, SKIPPED, FAILED = "open", "claimed", "taken", "skipped", "failed"
EXPIRED, DISPLACED, WITHDRAWN = "expired", "displaced", "withdrawn"
# No rank of the other job came to it in its step, or not all ranks of its own.
ONE_SIDED = "one-sided"
# Final ones that no receiver has seen: whoever comes must be told.
UNSEEN = frozenset({EXPIRED, DISPLACED, WITHDRAWN})
FINAL = UNSEEN | {TAKEN, SKIPPED, FAILED, MISSED, ONE_SIDED}


class OutboxPlace(BaseModel):
    """Where a rank's snapshot lies: a descriptor of its process, which memory that is, and from which byte on.

    address, port: who delivers it to those that cannot open that memory; empty and 0 where all can.
    """

    model_config = ConfigDict(frozen=True)

    fd: int = Field(ge=0)
    inode: int
    device: int
    offset: int = Field(ge=0)
    nbytes: int = Field(ge=0)
    address: str = ""
    port: int = Field(default=0, ge=0, le=65535)


def open_state(role: str, leader: int) -> Sealed:
    """The state of an entry that its senders' leader has posted: what a change of it must find."""
    return Sealed(OPEN, f"{role}/{leader}", "")


@dataclass(frozen=True)
class NotMet:
    """There is no pair: the two sides did not come together at this point. The same on all ranks of a side.

    skipped: the point is one-sided, and the others have passed the end of its step, or wait elsewhere.
    """

    outcome: Literal["missed", "failed", "skipped"]
    reason: str

    @property
    def text(self) -> str:
        return f"{self.outcome}\n{self.reason}"


def read_not_met(text: str) -> NotMet:
    """What a leader tells its followers. Raises ProtocolError for anything else."""
    outcome, _, reason = text.partition("\n")
    if outcome not in ("missed", "failed", "skipped"):
        raise ProtocolError(f"{outcome[:40]!r} is no way to have missed a point; both jobs need the same grafter.")
    return NotMet(outcome, reason)  # type: ignore[arg-type]


def gone_text(state: str, reason: str) -> str:
    """What lies at the meeting place of an entry that is no more."""
    return f"{state}\n{reason}"


def receivers_account(state: str, reason: str) -> NotMet:
    """What it means to the receivers that the entry ended in this state before they had it."""
    told = f"the sender's entry is {state}: {reason}" if reason else f"the sender's entry is {state}"
    return NotMet("failed" if state in (WITHDRAWN, FAILED) else "missed", told)


def senders_outcome(state: str, direction: Direction) -> Outcome:
    """What the ledger of a sender says of an entry that has ended so."""
    outcomes: dict[str, Outcome] = {
        TAKEN: "compared" if direction == "compare" else "sent",
        SKIPPED: "skipped",
        ONE_SIDED: "skipped",
        FAILED: "failed",
        WITHDRAWN: "failed",
        EXPIRED: "expired",
        DISPLACED: "displaced",
        MISSED: "missed",
    }
    if state not in outcomes:
        raise ProtocolError(f"{state[:40]!r} is no state of an entry; both jobs need the same grafter.")
    return outcomes[state]
