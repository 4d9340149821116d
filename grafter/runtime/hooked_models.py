"""What a rank's life needs of the models that have hooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from grafter.core.messages.roster import Roster
    from grafter.wire.monitor.status_board import HookFacts


class HookedModel(Protocol):
    """The hooks of one model: `grafter.capture.attachment.Attachment`."""

    def never_fired(self) -> Sequence[str]: ...

    def bypassed(self) -> Sequence[str]: ...


class HookedModels(Protocol):
    """The models of one rank: `grafter.capture.attached_models.AttachedModels`."""

    @property
    def attachments(self) -> Sequence[HookedModel]: ...

    def hook_facts(self) -> HookFacts: ...

    def warn_of_modules_only_here(self, roster: Roster) -> None: ...

    def warn_of_unused_settings(self) -> None: ...

    def write_trees(self, run_directory: Path, roster: Roster | None) -> None: ...
