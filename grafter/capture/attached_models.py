"""The models that this rank has attached: their hooks' points, on the way to the rank's `dump_point`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grafter.capture.adapters import mesh_axes
from grafter.capture.attachment import Attachment
from grafter.capture.module_tree import write_module_trees
from grafter.capture.naming import Naming
from grafter.capture.packing import PackedSequences
from grafter.capture.parameter_gradients import watch_gradients
from grafter.capture.patterns import read_patterns
from grafter.compiled import find_site
from grafter.layout.axes import axes_of_job, set_axes
from grafter.names import PointName
from grafter.rendezvous.join import Place
from grafter.rendezvous.roster import Roster

if TYPE_CHECKING:
    from grafter.grafter import Grafter

logger = logging.getLogger("grafter")

_CLASSES_SHOWN = 20


class AttachedModels:
    """Of one rank, in the order in which they were attached."""

    def __init__(self, grafter: Grafter, place: Place) -> None:
        config = grafter.config
        self._grafter, self._place = grafter, place
        self.naming = Naming(config.names, config.role)
        # Told of each model that the program attaches by itself.
        self.before_attach: list[Callable[[torch.nn.Module], None]] = []
        self.attachments: list[Attachment] = []
        self._packed = PackedSequences()
        # Where a hook can hand on another tensor, nothing needs to be written into the model's memory.
        self._hook_write = {} if "write" in config.model_fields_set else {"write": "return"}

    def attach(
        self,
        model: torch.nn.Module,
        patterns: tuple[str, ...],
        *,
        inputs: bool = True,
        outputs: bool = True,
        naming: Naming | None = None,
    ) -> Attachment:
        """Hooks on a model's modules. See `grafter.attach`.

        naming: for a model that is attached without a line in the program, whose own `attach` takes its place.
        """
        grafter, config = self._grafter, self._grafter.config
        if naming is None:
            for make_room in self.before_attach:
                make_room(model)
        naming = naming or self.naming
        texts = patterns or ((config.attach,) if config.attach else ())
        selected = read_patterns(texts)
        attachment = Attachment(model, selected, naming, self._offer, self._find_site, inputs=inputs, outputs=outputs)
        if not attachment.points:
            logger.warning("grafter: %s: %s", self._place.who, _why_no_module(model, texts))
        if grafter.gradients is not None:
            paths = [points.path for points in attachment.points]
            attachment.keep(watch_gradients(model, paths, naming, grafter.gradients.pending.parameter_came))
        if grafter.has_begun and not config.only_dumps:
            logger.warning(
                "grafter: %s: this attach comes after the first point, so the names of its modules are not compared",
                self._place.who,
            )
        if config.axes is None and not axes_of_job():
            set_axes(**mesh_axes(model))
        if any(axis == "cp" and size > 1 for axis, _, size in grafter.offers.axes(None)):
            attachment.keep(self._packed.follow(model))
        # What is attached until the first point is announced together, so that is when joining begins.
        self.attachments.append(attachment)
        return attachment

    def withdraw(self, attachment: Attachment) -> None:
        """Detach, as if it had never been attached."""
        attachment.detach()
        self.attachments.remove(attachment)

    def announced(self) -> tuple[str, ...] | None:
        """The modules that this rank has hooks on; None where it has none attached."""
        modules = tuple(key for attachment in self.attachments for key in attachment.keys)
        return modules if self.attachments else None

    def tell_which_are_only_here(self, roster: Roster) -> None:
        only_here = roster.only_at(self._place.role)
        if only_here:
            logger.warning(
                "grafter: %s: %d modules with hooks are in this job alone, and their points are skipped: %s%s (give "
                "both jobs' modules one name: `names` in the plan file)",
                self._place.who, len(only_here), ", ".join(only_here[:5]), ", ..." if len(only_here) > 5 else "",
            )  # fmt: skip

    def write_trees(self, run_directory: Path, roster: Roster | None) -> None:
        """For `grafter plan suggest`. A disk that is full costs them, not the run."""
        try:
            write_module_trees(run_directory / self._place.role, self.attachments, self._place.role_rank, roster)
        except OSError as failure:
            logger.error("grafter: the modules of %s cannot be written: %s", self._place.who, failure)

    def _offer(self, name: PointName, module: str, tensor: torch.Tensor) -> torch.Tensor:
        given = {**self._hook_write, **name.tags}
        if self._packed.lengths is not None and self._has_zigzag(name):
            given["seq_lens"] = self._packed.lengths
        value: torch.Tensor = self._grafter.dump_point(name.name, tensor, given, module)
        return value

    def _has_zigzag(self, name: PointName) -> bool:
        return "zigzag" in str(self._grafter.options.options_of(name.name, {}).dims)

    def _find_site(self, name: str, suffix: str, is_differentiated: bool) -> int:
        has_gradient = is_differentiated and self._grafter.has_gradients
        given = tuple(self._hook_write.items())
        return find_site(self._grafter, name, given, has_gradient=has_gradient, suffix=suffix)


def _why_no_module(model: torch.nn.Module, texts: Sequence[str]) -> str:
    """What was asked for and what there is, as one sentence."""
    classes = sorted({type(module).__name__ for module in model.modules()})
    more = ", ..." if len(classes) > _CLASSES_SHOWN else ""
    shown = ", ".join(classes[:_CLASSES_SHOWN]) + more
    return f"no module of {type(model).__name__} matches {', '.join(map(repr, texts))}; its classes are {shown}"
