"""The settings that can be changed while a run goes on, as they are and as a change leaves them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from grafter.config.direction_filters import DirectionFilters
from grafter.config.options import DumpChoice
from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.field_types import FILTER_FIELDS, DumpLevel
from grafter.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grafter.config.control.change import Change, ControlField


_FILTERS = (*FILTER_FIELDS.values(), "dump_filter")
_FIELDS = (
    *_FILTERS, "stats", "windows", "start", "new_rows_only", "dump_level", "dump_steps", "dump_max_bytes",
    "dump_max_points",
)  # fmt: skip


class DumpedSteps(BaseModel):
    """Steps whose points are saved besides what the dump filter saves: from `first` on, before `end`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: str
    first: int
    end: int


class InForce(BaseModel):
    """What a rank goes by from some step on, by the names of the settings. is_off: no filter matches, and nothing is
    saved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    b2t_filter: str | None = None
    t2b_filter: str | None = None
    compare_filter: str | None = None
    dump_filter: str | None = None
    stats: Literal["full", "light", "off"] = "full"
    windows: bool = True
    start: Annotated[int, Field(ge=0)] = 0
    new_rows_only: bool = False
    dump_level: DumpLevel = "full"
    dump_steps: str | None = None
    dump_max_bytes: str | None = None
    dump_max_points: Annotated[int, Field(ge=1)] | None = None
    is_off: bool = False
    dumped_steps: DumpedSteps | None = None

    @classmethod
    def at_start(cls, config: GrafterConfig) -> InForce:
        return cls(**{name: getattr(config, name) for name in _FIELDS})

    def after(self, change: Change, step: int) -> InForce:
        """As this change leaves it, from `step` on. Raises UsageError where it makes no sense, ConfigError for a value
        that is none of its setting. What the filters hold is checked by `configured`."""
        kept = self.dumped_steps if self.dumped_steps is not None and self.dumped_steps.end > step else None
        if change.action == "off":
            return self.model_copy(update={"is_off": True, "dumped_steps": None})
        if change.action == "on":
            return self.model_copy(update={"is_off": False, "dumped_steps": kept})
        if change.action == "record":
            change.recorders.check()
            return self.model_copy(update={"dumped_steps": kept})
        if change.action == "dump-next":
            if self.is_off:
                raise UsageError("grafting and dumping are off: `grafter ctl on` comes first")
            if not change.points.strip():
                raise UsageError("the filter of the points to dump is empty; leave it out to save all points")
            dumped = DumpedSteps(points=change.points, first=step, end=step + change.steps)
            return self.model_copy(update={"dumped_steps": dumped})
        if not change.settings:
            raise UsageError("nothing is set: give a filter or another setting")
        return self.model_copy(update={**_read_settings(change.settings), "dumped_steps": kept})

    def at_end_of_dump(self) -> InForce:
        return self.model_copy(update={"dumped_steps": None})

    def check(self, start: GrafterConfig) -> None:
        """Raises what is wrong with these settings, and with those that follow by themselves; also while all is off."""
        self.configured(start)
        self.at_end_of_dump().configured(start)

    def configured(self, start: GrafterConfig, *, in_any_step: bool = False) -> GrafterConfig:
        """The configuration that one would have begun with, checked as one that is read at the start.

        start: what the rank did begin with. in_any_step: as if the steps to dump were all. Raises FilterError,
        ConfigError, UsageError.
        """
        values = {name: getattr(start, name) for name in start.model_fields_set}
        # What stood there is in the other fields; the file itself may have changed since.
        values.pop("plan", None)
        values |= {name: getattr(self, name) for name in _FIELDS}
        self._refuse_equal_filters()
        if self.dumped_steps is not None:
            if values["dump_filter"] is not None:
                GrafterConfig(**_given(values))
            values["dump_filter"] = self._saved_points(in_any_step)
        return GrafterConfig(**_given(values))

    def _saved_points(self, in_any_step: bool) -> str:
        dumped = self.dumped_steps
        assert dumped is not None
        # One by one first: `a) or (b` would pass in brackets.
        GrafterConfig(dump_filter=dumped.points)
        then = f"({dumped.points})"
        if not in_any_step:
            then = f"({then} and step >= {dumped.first} and step < {dumped.end})"
        return then if self.dump_filter is None else f"({self.dump_filter}) or {then}"

    def _refuse_equal_filters(self) -> None:
        """Whether two filters overlap cannot be known; that two equal ones do, can."""
        seen: dict[str, str] = {}
        for direction, name in FILTER_FIELDS.items():
            source = getattr(self, name)
            if source is None:
                continue
            other = seen.setdefault(source.strip(), direction)
            if other != direction:
                raise UsageError(
                    f"{other} and {direction} have the same filter, {source!r}, so the direction of its points is not "
                    "decided. Unset one of them (an empty text)"
                )

    def filters(self, start: GrafterConfig, *, saves: bool, in_any_step: bool = False) -> DirectionFilters:
        """The filters, compiled. saves: whether this rank saves any points.

        Raises as `configured` does.
        """
        if self.is_off:
            return DirectionFilters({})
        config = self.configured(start, in_any_step=in_any_step)
        return DirectionFilters(config.filters, DumpChoice(config) if saves else None)

    @property
    def window(self) -> tuple[Any, ...]:
        """Which rows of a point count."""
        return self.windows, self.start, self.new_rows_only

    @property
    def text(self) -> str:
        """As messages show it."""
        if self.is_off:
            return "off: no filter matches, and nothing is saved"
        named = {"b2t": self.b2t_filter, "t2b": self.t2b_filter, "compare": self.compare_filter}
        parts = [f"{name}: {source}" for name, source in named.items() if source is not None]
        if self.dump_filter is not None:
            parts.append(f"dump: {self.dump_filter}")
        if self.dumped_steps is not None:
            dumped = self.dumped_steps
            more = dumped.end > dumped.first + 1
            steps = f"steps {dumped.first}-{dumped.end - 1}" if more else f"step {dumped.first}"
            parts.append(f"dump in {steps}: {dumped.points if dumped.points != 'True' else 'every point'}")
        return "; ".join([*parts, *self._limits_of_dumps(), f"stats: {self.stats}", *self._windows()])

    def _limits_of_dumps(self) -> list[str]:
        named = {"steps": self.dump_steps, "bytes": self.dump_max_bytes, "points": self.dump_max_points}
        limits = [f"{name} {limit}" for name, limit in named.items() if limit is not None]
        level = [f"dump level: {self.dump_level}"] if self.dump_level != "full" else []
        return level + ([f"dump limits: {', '.join(limits)}"] if limits else [])

    def _windows(self) -> list[str]:
        if not self.windows:
            return ["windows: off"]
        start = [f"start: {self.start}"] if self.start else []
        return start + (["new rows only"] if self.new_rows_only else [])


def _read_settings(settings: Mapping[ControlField, str]) -> dict[str, Any]:
    """What a text sets, as the environment is read; an empty one: the default. Raises ConfigError."""
    # A filter may only be judged with the other settings.
    given = {name: text.strip() for name, text in settings.items() if name not in _FILTERS and text.strip()}
    read = GrafterConfig(**given)
    return {
        name: (text if text.strip() else None) if name in _FILTERS else getattr(read, name)
        for name, text in settings.items()
    }


def _given(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


# Points in compiled code: how each is taken was settled when its code was traced, and a change must fit that.


@dataclass(frozen=True)
class Verdict:
    """How a point in compiled code is taken, and whether it is only compared (or saved) there."""

    kind: Literal["operator", "break", "nothing"]
    only_compares: bool

    def serves(self, wanted: Verdict) -> bool:
        """Whether code that was traced with this verdict does what another one wants. Each operator asks the filters
        again at each call, and a break is a call as in eager code."""
        if self.kind == "break" or wanted.kind == "nothing":
            return True
        if self.kind == "nothing" or wanted.kind == "break":
            return False
        return wanted.only_compares or not self.only_compares


Judge = Callable[[Sequence[DirectionFilters], str, dict[str, Any]], Verdict]


class TracedPoints:
    """Those of one rank. Used under the lock of its control: a trace and a change never pass each other unseen."""

    def __init__(self, judge: Judge) -> None:
        """judge: the verdict of a point with this name and these arguments, whichever of the filters matches."""
        self._judge = judge
        self._points: dict[tuple[str, str], tuple[dict[str, Any], Verdict]] = {}

    def trace(self, filters: Sequence[DirectionFilters], name: str, arguments: dict[str, Any]) -> Verdict:
        """filters: those in force, and all that may follow without the code being traced again."""
        verdict = self._judge(filters, name, dict(arguments))
        known = name, repr(sorted(arguments.items()))
        before = self._points.get(known)
        # Older code of the same point may still run: what the least able of them can do counts.
        if before is None or before[1].serves(verdict):
            self._points[known] = dict(arguments), verdict
        return verdict

    def why_not(self, filters: DirectionFilters) -> str | None:
        """Why these filters cannot come now; None where they can."""
        unfit = [
            name
            for (name, _), (arguments, traced) in self._points.items()
            if not traced.serves(self._judge([filters], name, dict(arguments)))
        ]
        if not unfit:
            return None
        shown = ", ".join(dict.fromkeys(unfit[:5])) + (", ..." if len(unfit) > 5 else "")
        return (
            f"the points {shown} are in compiled code that was traced for other filters: what no filter could match "
            "then was left out of it, and what could only be compared cannot be grafted. Start the run with filters "
            "that could match them (`... and step < 0` matches nothing, and keeps the points), or leave them out of "
            "this change"
        )
