"""The messages of a change during a run, which travel through the store as checked JSON of bounded size."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from grafter.config.control.in_force import InForce
from grafter.config.control.recorders import RecorderChange, RecorderState
from grafter.core.filters.expression import MAX_LENGTH

ControlField = Literal[
    "b2t_filter", "t2b_filter", "compare_filter", "dump_filter", "stats", "windows", "start", "new_rows_only",
    "dump_level", "dump_steps", "dump_max_bytes", "dump_max_points",
]  # fmt: skip
# The options of the command line.
OPTION_OF: dict[ControlField, str] = {
    "b2t_filter": "--b2t", "t2b_filter": "--t2b", "compare_filter": "--compare", "dump_filter": "--dump",
    "stats": "--stats", "windows": "--windows", "start": "--start", "new_rows_only": "--new-rows-only",
    "dump_level": "--dump-level", "dump_steps": "--dump-steps", "dump_max_bytes": "--dump-max-bytes",
    "dump_max_points": "--dump-max-points",
}  # fmt: skip
_LONGEST_REASON = 4000
_Text = Annotated[str, Field(max_length=MAX_LENGTH)]
_Step = Annotated[int, Field(strict=True, ge=0, le=1 << 60)]


class _Message(BaseModel):
    """The base of all messages: frozen, and without unknown fields."""

    # Not ignored: an unknown field would be a change that this version does not make.
    model_config = ConfigDict(frozen=True, extra="forbid")


class Change(_Message):
    """A requested change.

    settings: for `set`; an empty text unsets. steps, points: for `dump-next`. recorders: for `record`.
    """

    action: Literal["set", "off", "on", "dump-next", "record"]
    settings: dict[ControlField, _Text] = {}
    steps: Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)] = 1
    points: _Text = "True"
    recorders: RecorderChange = RecorderChange()

    def __str__(self) -> str:
        """The change as one types it after `grafter ctl`."""
        if self.action == "set":
            return "set " + " ".join(f"{OPTION_OF[name]} {value!r}" for name, value in self.settings.items())
        if self.action == "dump-next":
            return f"dump-next {self.steps}" + (f" --points {self.points!r}" if self.points != "True" else "")
        return f"record {self.recorders}" if self.action == "record" else self.action


class Proposal(_Message):
    """A change that waits for the ranks' answers.

    seconds: how long ranks may be held; each rank counts from when it first saw the proposal, by its own clock. by: who
    asked. time: seconds since 1970.
    """

    change: Change
    seconds: Annotated[float, Field(gt=0, le=3600)]
    by: Annotated[str, Field(max_length=300)]
    time: float


class ChangeAnswer(_Message):
    """The answer of one rank to a proposal.

    step: the rank's step, which it does not end before the decision. refused: why it refuses the change instead. idle:
    why the change would have no effect here; a change without effect on any rank is refused.
    """

    step: _Step | None = None
    refused: Annotated[str, Field(max_length=_LONGEST_REASON)] | None = None
    idle: Annotated[str, Field(max_length=_LONGEST_REASON)] | None = None

    @classmethod
    def refusal(cls, reason: str) -> ChangeAnswer:
        """An answer that refuses, with a reason of bounded length."""
        return cls(refused=reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 3] + "...")


class ChangeDecision(_Message):
    """The decision on a change for all ranks: the first step with the change, or why it is refused."""

    step: _Step | None = None
    refused: str | None = None


class RankControlState(_Message):
    """The state of one rank when it was asked.

    count: grows with every answer. changes: how many changes of the run have taken effect. to_come: the steps of
    decided changes that have not. last_point: empty if it has had none. recorders: the request recorders of its
    process.
    """

    count: int
    step: _Step
    changes: int
    to_come: tuple[_Step, ...]
    in_force: InForce
    last_point: Annotated[str, Field(max_length=_LONGEST_REASON)] = ""
    recorders: tuple[RecorderState, ...] = ()


def proposal_place(run_prefix: str, number: int) -> str:
    """The store key of the proposal of a change; numbers count from 1."""
    return f"{run_prefix}/control/{number}"


def answer_place(run_prefix: str, number: int, graft_rank: int) -> str:
    """The store key of a rank's answer to a proposal."""
    return f"{proposal_place(run_prefix, number)}/answer/{graft_rank}"


def decision_place(run_prefix: str, number: int) -> str:
    """The store key of the decision on a proposal."""
    return f"{proposal_place(run_prefix, number)}/decision"


def question_place(run_prefix: str) -> str:
    """The store key of the counter that asks all ranks for their states."""
    return f"{run_prefix}/control/question"


def state_place(run_prefix: str, graft_rank: int) -> str:
    """The store key of a rank's state."""
    return f"{run_prefix}/control/state/{graft_rank}"
