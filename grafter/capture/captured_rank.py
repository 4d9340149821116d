"""The rank to which captured points belong, as capture knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from grafter.config.control.in_force import Verdict
    from grafter.config.options import OptionChooser
    from grafter.config.settings.config import GrafterConfig
    from grafter.core.points import StepCounter
    from grafter.runtime.offer import OfferMaker
    from grafter.runtime.point_host import GradientPoints
    from grafter.runtime.recompute.recompute import Recomputations


class CapturedRank(Protocol):
    """The rank of hooks and of compiled points: `grafter.Grafter`."""

    @property
    def config(self) -> GrafterConfig: ...

    @property
    def steps(self) -> StepCounter: ...

    @property
    def options(self) -> OptionChooser: ...

    @property
    def offers(self) -> OfferMaker: ...

    @property
    def recomputations(self) -> Recomputations: ...

    @property
    def gradients(self) -> GradientPoints | None: ...

    @property
    def has_begun(self) -> bool:
        """Whether the first point has begun, so that this rank has announced its modules."""

    @property
    def has_gradients(self) -> bool:
        """Whether gradients are points."""

    @property
    def is_warming_up(self) -> bool:
        """Whether no forward pass that counts has begun."""

    def dump_point(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        """What `grafter.dump` returns. module: the announcement that the point counts as."""

    def trace(self, name: str, arguments: dict[str, Any]) -> Verdict:
        """What the filters say of a point in code that is being traced."""
