"""The seams between a rank and its hooks, as protocols: the rank as hooks know it, and hooks as the rank knows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from grafter.config.control.in_force import Verdict
    from grafter.config.names import PointName
    from grafter.core.messages.announced_models import AnnouncedHooks
    from grafter.core.messages.roster import Roster
    from grafter.runtime.rank_context import RankContext
    from grafter.runtime.recompute.recompute import Recomputations
    from grafter.wire.monitor.status_board import HookFacts


class HostedGradients(Protocol):
    """The gradients of one rank as points: `grafter.runtime.gradients.gradients.GradientPoints`."""

    def parameter_came(self, name: PointName, parameter: torch.Tensor) -> None:
        """The gradient of a parameter has been added to."""
        ...

    def expect(self, name: str, arguments: dict[str, Any], module: str | None = None) -> Any:
        """The gradient of a point in compiled code; None if it is not a point."""
        ...

    def came(self, watched: Any, gradient: torch.Tensor) -> torch.Tensor | None:
        """The tensor that replaces the gradient; None if it stays as it is."""
        ...


class PointHost(Protocol):
    """The rank of a point, as hooks and compiled code know it: `grafter.rank.grafter.Grafter`."""

    context: RankContext
    recomputations: Recomputations
    # Whether the rank has begun to join: hooks that are attached from then on are not announced.
    has_begun: bool

    @property
    def gradients(self) -> HostedGradients | None:
        """None where no gradient is a point."""
        ...

    @property
    def is_warming_up(self) -> bool:
        """Whether the models are not warm yet, so that there are no points."""
        ...

    @property
    def axes(self) -> tuple[tuple[str, int, int], ...]:
        """The place of the rank on its job's mesh: (axis, coordinate, size)."""
        ...

    def dump_point(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        """One point. module: the announced module that it belongs to, if a hook has read it."""
        ...

    def trace(self, name: str, arguments: dict[str, Any]) -> Verdict:
        """How a point in code that is being compiled is taken."""
        ...


class HookedModel(Protocol):
    """The hooks of one model: `grafter.capture.attachment.Attachment`."""

    def never_fired(self) -> Sequence[str]: ...

    def bypassed(self) -> Sequence[str]: ...


class HookedModels(Protocol):
    """The models of one rank, as its lifecycle knows them: `grafter.capture.attached_models.AttachedModels`."""

    @property
    def attachments(self) -> Sequence[HookedModel]: ...

    def announced(self) -> AnnouncedHooks: ...

    def hook_facts(self) -> HookFacts: ...

    def tell_which_are_only_here(self, roster: Roster) -> None: ...

    def tell_at_end(self) -> None: ...

    def write_trees(self, run_directory: Path, roster: Roster | None) -> None: ...
