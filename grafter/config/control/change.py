"""What travels through the store for a change of a run: as checked JSON, bounded in size."""

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
# As the command line has them.
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
    # A field that this grafter does not know would be a change that it does not make.
    model_config = ConfigDict(frozen=True, extra="forbid")


class Change(_Message):
    """What is asked for. settings: for `set`, an empty text unsets. steps, points: for `dump-next`. recorders: for
    `record`."""

    action: Literal["set", "off", "on", "dump-next", "record"]
    settings: dict[ControlField, _Text] = {}
    steps: Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)] = 1
    points: _Text = "True"
    recorders: RecorderChange = RecorderChange()

    def __str__(self) -> str:
        """As one would type it."""
        if self.action == "set":
            return "set " + " ".join(f"{OPTION_OF[name]} {value!r}" for name, value in self.settings.items())
        if self.action == "dump-next":
            return f"dump-next {self.steps}" + (f" --points {self.points!r}" if self.points != "True" else "")
        return f"record {self.recorders}" if self.action == "record" else self.action


class Proposal(_Message):
    """seconds: how long its ranks may be held; each counts from when it first saw the proposal, by its own clock."""

    change: Change
    seconds: Annotated[float, Field(gt=0, le=3600)]
    by: Annotated[str, Field(max_length=300)]
    time: float


class ChangeAnswer(_Message):
    """Of one rank: the step that it is in, and does not end before the decision; or why it refuses. idle: why the
    change, accepted, would change nothing here; where that is so everywhere, it is refused."""

    step: _Step | None = None
    refused: Annotated[str, Field(max_length=_LONGEST_REASON)] | None = None
    idle: Annotated[str, Field(max_length=_LONGEST_REASON)] | None = None

    @classmethod
    def refusal(cls, reason: str) -> ChangeAnswer:
        return cls(refused=reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 3] + "...")


class ChangeDecision(_Message):
    """Of all: the first step in which the change is in force; or why it never is."""

    step: _Step | None = None
    refused: str | None = None


class State(_Message):
    """One rank, as it was asked. count: grows with every answer. changes: how many of the run's have been in force.
    to_come: the steps of those that were decided and are not. last_point: empty where it has had none. recorders: of
    requests, in its process."""

    count: int
    step: _Step
    changes: int
    to_come: tuple[_Step, ...]
    in_force: InForce
    last_point: Annotated[str, Field(max_length=_LONGEST_REASON)] = ""
    recorders: tuple[RecorderState, ...] = ()


# Places in the store.


def proposal_place(run_prefix: str, number: int) -> str:
    return f"{run_prefix}/control/{number}"


def answer_place(run_prefix: str, number: int, graft_rank: int) -> str:
    return f"{proposal_place(run_prefix, number)}/answer/{graft_rank}"


def decision_place(run_prefix: str, number: int) -> str:
    return f"{proposal_place(run_prefix, number)}/decision"


def question_place(run_prefix: str) -> str:
    return f"{run_prefix}/control/question"


def state_place(run_prefix: str, graft_rank: int) -> str:
    return f"{run_prefix}/control/state/{graft_rank}"
