"""Repeated points: those that fire again in a recomputation. Each writes what it wrote before, and is not exchanged."""

from __future__ import annotations

from typing import Any

import torch

from grafter.core.points import FORWARD, call_site, check_tags, point_context, split_options
from grafter.errors import UsageError
from grafter.runtime.rank_context import RankContext
from grafter.runtime.recompute.recompute import Recomputations
from grafter.runtime.recompute.regions import Recomputation


class RepeatedPoints:
    """The repeated points of one rank."""

    def __init__(self, context: RankContext, recomputations: Recomputations) -> None:
        self._config, self._steps, self._rules = context.config, context.steps, context.rules
        self._rank_status, self._recomputations = context.status, recomputations

    def take(self, recomputation: Recomputation, name: str, value: Any, arguments: dict[str, Any]) -> Any:
        """One point; what `dump` returns."""
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
        if self._rank_status.detached is None and self._rules.filters_at(step).direction_of(tags) is not None:
            raise UsageError(recomputation.why_unknown(name, call_site()))
        return value
