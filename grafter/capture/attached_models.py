"""The models that this rank has attached: their hooks' points, on the way to the rank's `dump_point`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grafter.capture.adapters import mesh_axes
from grafter.capture.attachment import Attachment
from grafter.capture.compiled import find_site
from grafter.capture.model_variables import ModelFacts, class_name_of, digest_of, variables_of
from grafter.capture.module_tree import ModuleTree, write_trees
from grafter.capture.naming import Naming
from grafter.capture.packing import PackedSequences
from grafter.capture.parameters import watch_gradients
from grafter.capture.passes import ForwardPasses
from grafter.config.names import PointName
from grafter.core.layout.axes import axes_of_job, set_axes
from grafter.core.messages.announced_models import AnnouncedHooks, AnnouncedModel
from grafter.core.messages.roster import Roster
from grafter.core.patterns import read_patterns
from grafter.errors import UsageError
from grafter.wire.monitor.status_board import HookFacts

if TYPE_CHECKING:
    from grafter.runtime.point_host import PointHost
    from grafter.runtime.rank_context import RankContext


logger = logging.getLogger("grafter")

_NAME = re.compile(r"[^\W\d]\w*(\.\w+)*")
_CLASSES_SHOWN = 20
_MOST_BYPASSED = 100


class AttachedModels:
    """The attached models of one rank, in the order in which they were attached."""

    def __init__(self, host: PointHost, context: RankContext) -> None:
        config = context.config
        self._host, self._config, self._place, self._rules = host, config, context.place, context.rules
        self.naming = Naming(config.names, config.role)
        # Called with each model that the program itself attaches.
        self.before_attach: list[Callable[[torch.nn.Module], None]] = []
        self.attachments: list[Attachment] = []
        self._described: dict[Attachment, tuple[AnnouncedModel, ModelFacts]] = {}
        self.passes = ForwardPasses(config.warm_up)
        # What was announced when this rank joined, and what models were found to be held by.
        self._keys_at_join: set[str] = set()
        self._names_found: set[str] = set()
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
        name: str | None = None,
        naming: Naming | None = None,
        facts: ModelFacts | None = None,
    ) -> Attachment:
        """Hooks on a model's modules. See `grafter.attach`.

        naming, facts: of a model that is attached without a line in the program, whose own `attach` takes its place.
        """
        host, config = self._host, self._config
        if name is not None and not _NAME.fullmatch(str(name)):
            raise UsageError(f"attach(name={name!r}): the name of a model is a word, such as 'policy'.")
        is_programs_own = naming is None
        if is_programs_own:
            for make_room in self.before_attach:
                make_room(model)
        facts = facts or replace(self.facts_of(model, ""), given_name=name)
        naming = naming or self.naming.under(name or "")
        texts = patterns or ((config.attach,) if config.attach else ())
        selected = read_patterns(texts)
        attachment = Attachment(model, selected, naming, self._offer, self._find_site, inputs=inputs, outputs=outputs)
        if not attachment.points:
            logger.warning("grafter: %s: %s", self._place.who, _why_no_module(model, texts))
        if host.gradients is not None:
            paths = [points.path for points in attachment.points]
            attachment.keep(watch_gradients(model, paths, naming, self._gradient_came))
        is_announced = set(attachment.keys) <= self._keys_at_join
        if host.has_begun and not config.only_dumps and not is_announced:
            logger.warning(
                "grafter: %s: this attach comes after the first point, so the names of its modules are not compared",
                self._place.who,
            )
        if config.axes is None and not axes_of_job():
            set_axes(**mesh_axes(model))
        if is_programs_own and self.passes.is_warming_up:
            self.passes.wrap(model)
        if any(axis == "cp" and size > 1 for axis, _, size in host.axes):
            attachment.keep(self._packed.follow(model))
        # What is attached until the first point is announced together, so that is when joining begins.
        if is_programs_own:
            self._warn_of_same_names(attachment, model)
        self.attachments.append(attachment)
        self._described[attachment] = self._describe(model, naming, facts), facts
        return attachment

    def withdraw(self, attachment: Attachment) -> ModelFacts:
        """Detach, as if it had never been attached; what was known of its model."""
        attachment.detach()
        self.attachments.remove(attachment)
        return self._described.pop(attachment)[1]

    def facts_of(self, model: torch.nn.Module, first_call: str) -> ModelFacts:
        """What tells this model from others. Called where the program holds it."""
        given, class_name = self._config.model_names, class_name_of(model)
        variables, arguments = variables_of(model)
        words = (*variables, *arguments, class_name)
        name = next((given[word] for word in words if word in given), None)
        self._names_found.update(words)
        return ModelFacts(class_name, variables, first_call, name)

    def _describe(self, model: torch.nn.Module, naming: Naming, facts: ModelFacts) -> AnnouncedModel:
        return AnnouncedModel(
            name=naming.prefix, class_name=facts.class_name, variables=tuple(facts.variables), weights=digest_of(model),
            first_call=facts.first_call, is_given=facts.given_name is not None,
        )  # fmt: skip

    def _warn_of_same_names(self, attachment: Attachment, model: torch.nn.Module) -> None:
        """Of two models with the same names, only the order of their calls says which is which."""
        if any(attachment.takes_names_of(other) for other in self.attachments):
            logger.warning(
                "grafter: %s: this %s has the same names as one attached before, so their points are distinguished "
                "by the order of their calls alone. Give each a name: grafter.attach(model, name='policy').",
                self._place.who, type(model).__name__,
            )  # fmt: skip

    def announced(self) -> AnnouncedHooks:
        """The modules that this rank has hooks on, and the models that they belong to."""
        modules = tuple(key for attachment in self.attachments for key in attachment.keys)
        self._keys_at_join.update(modules)
        described = [model for model, _ in self._described.values()]
        counts = Counter(variable for model in described for variable in set(model.variables))
        models = tuple(
            model.model_copy(update={"variables": tuple(v for v in model.variables if counts[v] == 1)})
            for model in described
        )
        return AnnouncedHooks(modules if self.attachments else None, models)

    def hook_facts(self) -> HookFacts:
        """For the board; called on any thread."""
        attachments = list(self.attachments)
        return HookFacts(
            passes=self.passes.begun,
            bypassed=tuple(path for attachment in attachments for path in attachment.bypassed())[:_MOST_BYPASSED],
            models=tuple(model.name for model, _ in list(self._described.values())),
        )

    def warn_of_unused_settings(self) -> None:
        """What settings have asked for in vain."""
        self._warn_of_unused_names()
        if self.passes.is_warming_up:
            role = self._place.role
            logger.warning(
                "grafter: %s: GRAFTER_%s_WARM_UP=%d leaves out as many forward passes, and models with hooks were "
                "called %d times, so this rank had no points%s", self._place.who, role.upper(), self.passes.warm_up,
                self.passes.begun, "" if self.attachments else " (none was attached, so none was counted)",
            )  # fmt: skip

    def _warn_of_unused_names(self) -> None:
        """Of `models` that the user named, those that nothing was held by."""
        unused = [word for word in self._config.model_names if word not in self._names_found]
        if unused:
            role = self._place.role
            logger.warning(
                "grafter: %s: GRAFTER_%s_MODELS names %s, and no model was held by that (found: %s)", self._place.who,
                role.upper(), ", ".join(unused), ", ".join(sorted(self._names_found)) or "none",
            )  # fmt: skip

    def warn_of_modules_only_here(self, roster: Roster) -> None:
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

    def _gradient_came(self, name: PointName, parameter: torch.Tensor) -> None:
        gradients = self._host.gradients
        if gradients is not None and not self.passes.is_warming_up:
            gradients.parameter_came(name, parameter)

    def _offer(self, name: PointName, module: str, tensor: torch.Tensor) -> torch.Tensor:
        given = {**self._hook_write, **name.tags}
        if self._packed.lengths is not None and self._has_zigzag(name):
            given["seq_lens"] = self._packed.lengths
        value: torch.Tensor = self._host.dump_point(name.name, tensor, given, module)
        return value

    def _has_zigzag(self, name: PointName) -> bool:
        return "zigzag" in str(self._rules.options.options_of(name.name, {}).dims)

    def _find_site(self, name: str, suffix: str, is_differentiated: bool) -> int:
        has_gradient = is_differentiated and self._rules.has_gradients
        given = tuple(self._hook_write.items())
        return find_site(self._host, name, given, has_gradient=has_gradient, suffix=suffix)


def _why_no_module(model: torch.nn.Module, texts: Sequence[str]) -> str:
    """What was asked for and what there is, as one sentence."""
    classes = sorted({type(module).__name__ for module in model.modules()})
    more = ", ..." if len(classes) > _CLASSES_SHOWN else ""
    shown = ", ".join(classes[:_CLASSES_SHOWN]) + more
    return f"no module of {type(model).__name__} matches {', '.join(map(repr, texts))}; its classes are {shown}"


# The module trees of attached models, written for `grafter plan suggest`.


def write_module_trees(
    directory: Path, attachments: Sequence[Attachment], role_rank: int, roster: Roster | None = None
) -> Path | None:
    """Write what the hooked models of this rank are made of; None where lower ranks have the same modules.

    Called by every rank that has attached, at its first matched point and when it closes: then it is known which
    tensors came. `directory` is the role's, and exists.
    """
    role = directory.name
    if not attachments or (role_rank and roster is not None and not _has_news(attachments, role, role_rank, roster)):
        return None
    path = directory / (f"modules.rank{role_rank}.json" if role_rank else "modules.json")
    write_trees(path, [_with_tensors(attachment) for attachment in attachments], role, role_rank)
    return path


def _has_news(attachments: Sequence[Attachment], role: str, role_rank: int, roster: Roster) -> bool:
    for key in (key for attachment in attachments for key in attachment.keys):
        holders = roster.ranks_with(role, key)  # type: ignore[arg-type]
        if not holders or min(holders) == role_rank:
            return True
    return False


def _with_tensors(attachment: Attachment) -> ModuleTree:
    by_path = {points.path: tuple(sorted(points._names)) for points in attachment.points}
    tree = attachment.tree
    nodes = (
        node.model_copy(update={"tensors": by_path[path]}) if by_path.get(path) else node
        for path, node in zip(tree.own_paths, tree.modules, strict=True)
    )
    return ModuleTree(modules=tuple(nodes))
