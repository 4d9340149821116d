"""The settings that can be changed during a run, before and after a change, and what compiled code allows. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from grafter.config.direction_filters import DirectionFilters
from grafter.config.options import DumpFilter
from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.field_types import FILTER_FIELDS, DumpLevel
from grafter.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grafter.config.control.change import Change, ControlField


_FILTERS = (*FILTER_FIELDS.values(), "dump_filter")
_CHANGEABLE_FIELDS = (
    *_FILTERS, "stats", "windows", "start", "new_rows_only", "dump_level", "dump_steps", "dump_max_bytes",
    "dump_max_points",
)  # fmt: skip


class DumpedSteps(BaseModel):
    """Steps of `grafter ctl dump-next`: the points of the steps from `first` up to `end`, exclusive, that match
    `points` are saved besides those of the dump filter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: str
    first: int
    end: int


class InForce(BaseModel):
    """The settings in force on a rank from some step on, by the names of GrafterConfig's fields.

    is_off: no filter matches, and nothing is saved.
    """

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
        """The settings with which a rank starts."""
        return cls(**{name: getattr(config, name) for name in _CHANGEABLE_FIELDS})

    def after(self, change: Change, step: int) -> InForce:
        """The settings after a change, from `step` on.

        Raises UsageError if the change is pointless, ConfigError if a value is illegal. `configured` checks filters.
        """
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
                raise UsageError("grafting and dumping are off; call `grafter ctl on` first")
            if not change.points.strip():
                raise UsageError("the filter of the points to dump is empty; leave it out to save all points")
            dumped = DumpedSteps(points=change.points, first=step, end=step + change.steps)
            return self.model_copy(update={"dumped_steps": dumped})
        if not change.settings:
            raise UsageError("nothing is set: give a filter or another setting")
        return self.model_copy(update={**_read_settings(change.settings), "dumped_steps": kept})

    def at_end_of_dump(self) -> InForce:
        """The settings once the steps of `dump-next` are over."""
        return self.model_copy(update={"dumped_steps": None})

    def check(self, start: GrafterConfig) -> None:
        """Raise as `configured` does if these settings, or those after `dump-next`, are not valid, even while off."""
        self.configured(start)
        self.at_end_of_dump().configured(start)

    def configured(self, start: GrafterConfig, *, in_any_step: bool = False) -> GrafterConfig:
        """These settings as a checked configuration, as if the rank had started with them.

        start: the rank's real configuration at its start. in_any_step: let `dump-next` apply to all steps. Raises
        FilterError, ConfigError, UsageError.
        """
        values = {name: getattr(start, name) for name in start.model_fields_set}
        # The other fields hold the content of the plan file, which may have changed since.
        values.pop("plan", None)
        values |= {name: getattr(self, name) for name in _CHANGEABLE_FIELDS}
        self._refuse_equal_filters()
        if self.dumped_steps is not None:
            if values["dump_filter"] is not None:
                GrafterConfig(**_given(values))
            values["dump_filter"] = self._saved_points(in_any_step)
        return GrafterConfig(**_given(values))

    def _saved_points(self, in_any_step: bool) -> str:
        dumped = self.dumped_steps
        assert dumped is not None
        # Checked alone first: `a) or (b` would pass in brackets.
        GrafterConfig(dump_filter=dumped.points)
        then = f"({dumped.points})"
        if not in_any_step:
            then = f"({then} and step >= {dumped.first} and step < {dumped.end})"
        return then if self.dump_filter is None else f"({self.dump_filter}) or {then}"

    def _refuse_equal_filters(self) -> None:
        """Raise UsageError if two directions have the same filter. Whether other filters overlap cannot be known."""
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
        """The compiled filters, with the dump filter if this rank `saves` points.

        Raises as `configured` does.
        """
        if self.is_off:
            return DirectionFilters({})
        config = self.configured(start, in_any_step=in_any_step)
        return DirectionFilters(config.filters, DumpFilter(config) if saves else None)

    @property
    def window(self) -> tuple[Any, ...]:
        """The settings that decide which rows of a point count."""
        return self.windows, self.start, self.new_rows_only

    @property
    def text(self) -> str:
        """The settings as messages show them."""
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
    """The values of settings given as texts, as in the environment; an empty text means the default.

    Raises ConfigError. Filters stay texts, because they can only be checked together with the other settings.
    """
    given = {name: text.strip() for name, text in settings.items() if name not in _FILTERS and text.strip()}
    read = GrafterConfig(**given)
    return {
        name: (text if text.strip() else None) if name in _FILTERS else getattr(read, name)
        for name, text in settings.items()
    }


def _given(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class TraceVerdict:
    """How compiled code treats a point, decided when the code was traced.

    only_compares: the point is only compared or saved, and never written.
    """

    kind: Literal["operator", "break", "nothing"]
    only_compares: bool

    def serves(self, wanted: TraceVerdict) -> bool:
        """Whether code traced with this verdict can do what another one requires.

        Each operator asks the filters again at each call, and a graph break calls grafter as eager code does.
        """
        if self.kind == "break" or wanted.kind == "nothing":
            return True
        if self.kind == "nothing" or wanted.kind == "break":
            return False
        return wanted.only_compares or not self.only_compares


Judge = Callable[[Sequence[DirectionFilters], str, dict[str, Any]], TraceVerdict]


class TracedPoints:
    """The points in the compiled code of one rank, which a change of filters must fit.

    Used under the lock of the rank's control, so that a trace and a change cannot run at the same time.
    """

    def __init__(self, judge: Judge) -> None:
        """judge: gives the verdict on a point with a name and arguments if any of the filters may apply."""
        self._judge = judge
        self._points: dict[tuple[str, str], tuple[dict[str, Any], TraceVerdict]] = {}

    def trace(self, filters: Sequence[DirectionFilters], name: str, arguments: dict[str, Any]) -> TraceVerdict:
        """The verdict on a point that is being traced.

        filters: those in force, and all that may follow without another trace.
        """
        verdict = self._judge(filters, name, dict(arguments))
        known = name, repr(sorted(arguments.items()))
        before = self._points.get(known)
        # Older code of the same point may still run, so the most limited verdict counts.
        if before is None or before[1].serves(verdict):
            self._points[known] = dict(arguments), verdict
        return verdict

    def why_not(self, filters: DirectionFilters) -> str | None:
        """Why these filters cannot be put in force now; None if they can."""
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
