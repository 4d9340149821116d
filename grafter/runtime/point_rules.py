"""The rules for the points of one rank, by the settings in force: which are points, and how each is treated."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafter.config.control.change import Proposal
from grafter.config.control.in_force import InForce, Verdict
from grafter.config.direction_filters import DirectionFilters
from grafter.config.options import DumpChoice, OptionChooser
from grafter.config.settings.config import GrafterConfig
from grafter.core.points import PHASE, split_options


@dataclass(frozen=True)
class SettingsChange:
    """The settings that come into force in a step.

    config: the configuration as if the run had begun with them. number: of the change; None where the end of a range of
    steps to dump brings it.
    """

    step: int
    in_force: InForce
    config: GrafterConfig
    filters: DirectionFilters
    number: int | None = None
    proposal: Proposal | None = None


class PointRules:
    """The filters, the options and the statistics of one rank's points. A change of the run replaces them in a step."""

    def __init__(self, config: GrafterConfig, *, saves_points: bool) -> None:
        """saves_points: whether this rank saves any. Raises GrafterError where a filter or a transform is wrong."""
        self.filters = DirectionFilters(config.filters, DumpChoice(config) if saves_points else None)
        self.options = OptionChooser(config)
        self.stats = config.stats
        # Whether the gradients of any point are points.
        self.has_gradients = config.gradients or any(rule.gradients for rule in config.own_rules)
        # Filters of earlier steps, each with the step before which it was in force: a recomputation may need them.
        self._past_filters: deque[tuple[int, DirectionFilters]] = deque(maxlen=8)

    def change(self, coming: SettingsChange) -> None:
        """Called under the lock of the points, when the step begins. May be called twice with one change."""
        if self.filters is not coming.filters:
            coming.filters.continue_from(self.filters)
            self._past_filters.append((coming.step, self.filters))
            self.filters = coming.filters
        self.stats = coming.in_force.stats
        self.options.take_over(coming.config)

    def filters_at(self, step: int) -> DirectionFilters:
        """The filters that were in force in a step."""
        return next((filters for before, filters in self._past_filters if step < before), self.filters)

    def judge(self, filters: Sequence[DirectionFilters], name: str, arguments: dict[str, Any]) -> Verdict:
        """How a point in compiled code is taken, where any of these filters may match. Called on any thread."""
        tags, given = split_options(arguments)
        named = {**tags, "save": given.pop("save", None), "name": name, "phase": PHASE}
        possible = {found for each in filters for found in each.could_match(named)}
        options = self.options.options_of(name, given)
        if not possible and not (self.has_gradients and options.gradients):
            return Verdict("nothing", only_compares=True)
        if possible <= {"compare", "dump"}:
            return Verdict("operator", only_compares=True)
        # Whether a gradient is cut off depends on what matches, which is settled at each call.
        breaks = options.write == "in_place" or options.gradient == "cut"
        return Verdict("break" if breaks else "operator", only_compares=False)
