"""What hooks, gradients and compiled points know of the rank that they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from grafter.config.control.in_force import TraceVerdict
    from grafter.config.direction_filters import DirectionFilters
    from grafter.config.names import PointName
    from grafter.config.options import OptionChooser
    from grafter.config.settings.config import GrafterConfig
    from grafter.core.points import StepCounter
    from grafter.runtime.early_points import EarlyPoints
    from grafter.runtime.entry import Entry
    from grafter.runtime.matched_points import MatchedPoints
    from grafter.runtime.meetings import Meetings
    from grafter.runtime.offer import OfferMaker
    from grafter.runtime.rank_status import RankStatus
    from grafter.runtime.recompute.recompute import Recomputations
    from grafter.runtime.session import Session
    from grafter.store.dumps.rank_dumps import RankDumps


class PendingPoints(Protocol):
    """The gradients that are still to come."""

    def parameter_came(self, name: PointName, parameter: torch.Tensor) -> None: ...


class GradientPoints(Protocol):
    """The gradients of one rank as points: `grafter.runtime.gradients.points.BackwardPoints`."""

    @property
    def pending(self) -> PendingPoints: ...

    def watch(self, name: str, value: Any, arguments: dict[str, Any], module: str | None) -> None: ...

    def expect(self, name: str, arguments: dict[str, Any], module: str | None = None) -> Any: ...

    def came(self, watched: Any, gradient: torch.Tensor) -> torch.Tensor | None: ...


class PointHost(Protocol):
    """The rank of a point: `grafter.Grafter`."""

    config: GrafterConfig
    steps: StepCounter
    lock: Any
    filters: DirectionFilters
    options: OptionChooser
    offers: OfferMaker
    dumps: RankDumps
    recomputations: Recomputations
    entry: Entry
    early: EarlyPoints
    meetings: Meetings
    matched: MatchedPoints
    rank_status: RankStatus
    has_gradients: bool
    has_begun: bool

    @property
    def gradients(self) -> GradientPoints | None: ...

    @property
    def is_warming_up(self) -> bool: ...

    @property
    def session(self) -> Session: ...

    def dump_point(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any: ...

    def trace(self, name: str, arguments: dict[str, Any]) -> TraceVerdict: ...
