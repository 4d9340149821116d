"""The verdict of a point in code that is being compiled: what a call of it may want, whichever filter matches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafter.config.control.in_force import TraceVerdict
from grafter.config.direction_filters import DirectionFilters
from grafter.config.options import OptionChooser
from grafter.core.points import PHASE, split_options


class TraceJudge:
    """Of one rank. Also asked on the housekeeping thread, where filters are about to change."""

    def __init__(self, options: OptionChooser, *, has_gradients: bool) -> None:
        """has_gradients: whether gradients of any point are points."""
        self._options, self._has_gradients = options, has_gradients

    def judge(self, filters: Sequence[DirectionFilters], name: str, arguments: dict[str, Any]) -> TraceVerdict:
        """The verdict where any of these filters may match."""
        tags, given = split_options(arguments)
        named = {**tags, "save": given.pop("save", None), "name": name, "phase": PHASE}
        possible = {found for each in filters for found in each.could_match(named)}
        options = self._options.options_of(name, given)
        if not possible and not (self._has_gradients and options.gradients):
            return TraceVerdict("nothing", only_compares=True)
        if possible <= {"compare", "dump"}:
            return TraceVerdict("operator", only_compares=True)
        # Whether a gradient is cut off depends on what matches, which is settled at each call.
        breaks = options.write == "in_place" or options.gradient == "cut"
        return TraceVerdict("break" if breaks else "operator", only_compares=False)
