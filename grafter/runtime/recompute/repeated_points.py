"""Repeated points: those that fire again in a recomputation. Each meets nobody, and writes what it wrote before."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from grafter.config.direction_filters import DirectionFilters
from grafter.config.settings.config import GrafterConfig
from grafter.core.points import FORWARD, StepCounter, call_site, check_tags, point_context, split_options
from grafter.errors import UsageError
from grafter.runtime.rank_status import RankStatus
from grafter.runtime.recompute.recompute import Recomputations
from grafter.runtime.recompute.regions import Recomputation


class RepeatedPoints:
    """Those of one rank."""

    def __init__(
        self, config: GrafterConfig, steps: StepCounter, recomputations: Recomputations, rank_status: RankStatus
    ) -> None:
        self._config, self._steps, self._recomputations, self._rank_status = config, steps, recomputations, rank_status
        # Filters of earlier steps, with the step before which each was in force: a recomputation may ask for them.
        self._past_filters: deque[tuple[int, DirectionFilters]] = deque(maxlen=8)

    def take(
        self,
        recomputation: Recomputation,
        name: str,
        value: Any,
        arguments: dict[str, Any],
        filters: DirectionFilters,
    ) -> Any:
        """One point; what `dump` returns. filters: those in force now."""
        own, _ = split_options(arguments)
        check_tags(own)
        kept = recomputation.next_kept(self._steps, name, own, self._config.key_tags)
        if kept is not None:
            if callable(value) and not isinstance(value, torch.Tensor):
                value = value()
            self._recomputations.keep_entry(kept)
            recomputation.has_cut |= kept.is_cut
            return kept.write_again(value)
        step = recomputation.step_of(self._steps)
        tags = {**point_context.get().tags, **own, "name": name, "step": step, "phase": FORWARD}
        if self._rank_status.detached is None and self._filters_of(step, filters).direction_of(tags) is not None:
            raise UsageError(recomputation.why_unknown(name, call_site()))
        return value

    def remember(self, filters: DirectionFilters, before_step: int) -> None:
        """These were in force until a step."""
        self._past_filters.append((before_step, filters))

    def _filters_of(self, step: int, now: DirectionFilters) -> DirectionFilters:
        for before, filters in self._past_filters:
            if step < before:
                return filters
        return now
