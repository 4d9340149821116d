"""The models that this rank has attached. The points of their hooks go to the rank's `dump_point`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from grafter.capture.adapters import mesh_axes
from grafter.capture.attachment import Attachment
from grafter.capture.captured_rank import CapturedRank
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
from grafter.core.roles import RankIdentity
from grafter.errors import UsageError
from grafter.wire.monitor.status_board import HookFacts

logger = logging.getLogger("grafter")

_NAME = re.compile(r"[^\W\d]\w*(\.\w+)*")
_CLASSES_SHOWN = 20
_MOST_BYPASSED = 100


class AttachedModels:
    """The attached models of one rank, in the order in which they were attached."""

    def __init__(self, grafter: CapturedRank, place: RankIdentity) -> None:
        config = grafter.config
        self._grafter, self._place = grafter, place
        self.naming = Naming(config.names, config.role)
        # Called with each model that the program itself attaches.
        self.before_attach: list[Callable[[torch.nn.Module], None]] = []
        self.attachments: list[Attachment] = []
        self._described: dict[Attachment, tuple[AnnouncedModel, ModelFacts]] = {}
        self.passes = ForwardPasses(config.warm_up)
        # The keys announced when this rank joined; the variables that were found to hold a model.
        self._keys_at_join: set[str] = set()
        self._names_found: set[str] = set()
        self._packed = PackedSequences()
        # A hook can return another tensor, so nothing needs to be written into the model's memory.
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
        """Put hooks on a model's modules. See `grafter.attach`.

        naming, facts: given if grafter attaches the model by itself; a later `attach` of the program replaces that.
        """
        config = self._grafter.config
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
        if config.axes is None and not axes_of_job():
            set_axes(**mesh_axes(model))
        self._add_handles(attachment, model, naming)
        if is_programs_own and self.passes.is_warming_up:
            self.passes.wrap(model)
        self._warn_if_late(attachment)
        if is_programs_own:
            self._warn_of_same_names(attachment, model)
        self.attachments.append(attachment)
        self._described[attachment] = self._describe(model, naming, facts), facts
        return attachment

    def _add_handles(self, attachment: Attachment, model: torch.nn.Module, naming: Naming) -> None:
        """Hooks for gradients of weights, and for the lengths of packed sequences, where they are needed."""
        gradients = self._grafter.gradients
        if gradients is not None:
            paths = [points.path for points in attachment.points]
            attachment.keep(watch_gradients(model, paths, naming, gradients.pending.parameter_came))
        if any(axis == "cp" and size > 1 for axis, _, size in self._grafter.offers.axes(None)):
            attachment.keep(self._packed.follow(model))

    def _warn_if_late(self, attachment: Attachment) -> None:
        is_announced = set(attachment.keys) <= self._keys_at_join
        if self._grafter.has_begun and not self._grafter.config.only_dumps and not is_announced:
            logger.warning(
                "grafter: %s: this attach comes after the first point, so the names of its modules are not compared",
                self._place.who,
            )

    def withdraw(self, attachment: Attachment) -> ModelFacts:
        """Detach, as if it had never been attached, and return the facts of its model."""
        attachment.detach()
        self.attachments.remove(attachment)
        return self._described.pop(attachment)[1]

    def facts_of(self, model: torch.nn.Module, first_call: str) -> ModelFacts:
        """The facts that distinguish this model from others. Called while the program calls the model."""
        given, class_name = self._grafter.config.model_names, class_name_of(model)
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
        """Warn if two models have the same names, since then only the order of their calls distinguishes them."""
        if any(attachment.takes_names_of(other) for other in self.attachments):
            logger.warning(
                "grafter: %s: this %s has the same names as one attached before, so only the order of their calls "
                "distinguishes their points. Give each a name: grafter.attach(model, name='policy').",
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
        """The facts for the status board. Any thread may call this."""
        attachments = list(self.attachments)
        return HookFacts(
            passes=self.passes.begun,
            bypassed=tuple(path for attachment in attachments for path in attachment.bypassed())[:_MOST_BYPASSED],
            models=tuple(model.name for model, _ in list(self._described.values())),
        )

    def warn_of_unused_settings(self) -> None:
        """Warn of settings that had no effect. Called at close."""
        self._warn_of_unused_names()
        if self.passes.is_warming_up:
            role = self._place.role
            logger.warning(
                "grafter: %s: GRAFTER_%s_WARM_UP=%d leaves out as many forward passes, and models with hooks were "
                "called %d times, so this rank had no points%s", self._place.who, role.upper(), self.passes.warm_up,
                self.passes.begun, "" if self.attachments else " (none was attached, so none was counted)",
            )  # fmt: skip

    def _warn_of_unused_names(self) -> None:
        """Warn of names in the setting `models` that are not names of variables that hold a model."""
        unused = [word for word in self._grafter.config.model_names if word not in self._names_found]
        if unused:
            role = self._place.role
            logger.warning(
                "grafter: %s: GRAFTER_%s_MODELS names %s, and no variable of this name held a model (found: %s)",
                self._place.who, role.upper(), ", ".join(unused), ", ".join(sorted(self._names_found)) or "none",
            )  # fmt: skip

    def warn_of_modules_only_here(self, roster: Roster) -> None:
        """Warn of modules with hooks that no rank of the other job has."""
        only_here = roster.only_at(self._place.role)
        if only_here:
            logger.warning(
                "grafter: %s: %d modules with hooks are in this job alone, and their points are skipped: %s%s (give "
                "both jobs' modules one name: `names` in the plan file)",
                self._place.who, len(only_here), ", ".join(only_here[:5]), ", ..." if len(only_here) > 5 else "",
            )  # fmt: skip

    def write_trees(self, run_directory: Path, roster: Roster | None) -> None:
        """Write the module trees for `grafter plan suggest`. If the disk is full, the run continues without them."""
        try:
            write_module_trees(run_directory / self._place.role, self.attachments, self._place.role_rank, roster)
        except OSError as failure:
            logger.error("grafter: the modules of %s cannot be written: %s", self._place.who, failure)

    def _offer(self, name: PointName, module: str, tensor: torch.Tensor) -> torch.Tensor:
        given = {**self._hook_write, **name.tags}
        if self._packed.lengths is not None and "zigzag" in str(self._grafter.options.options_of(name.name, {}).dims):
            given["seq_lens"] = self._packed.lengths
        value: torch.Tensor = self._grafter.dump_point(name.name, tensor, given, module)
        return value

    def _find_site(self, name: str, suffix: str, is_differentiated: bool) -> int:
        has_gradient = is_differentiated and self._grafter.has_gradients
        given = tuple(self._hook_write.items())
        return find_site(self._grafter, name, given, has_gradient=has_gradient, suffix=suffix)


def _why_no_module(model: torch.nn.Module, texts: Sequence[str]) -> str:
    """The message that no module matches, with the classes that there are."""
    classes = sorted({type(module).__name__ for module in model.modules()})
    more = ", ..." if len(classes) > _CLASSES_SHOWN else ""
    shown = ", ".join(classes[:_CLASSES_SHOWN]) + more
    return f"no module of {type(model).__name__} matches {', '.join(map(repr, texts))}; its classes are {shown}"


def write_module_trees(
    directory: Path, attachments: Sequence[Attachment], role_rank: int, roster: Roster | None = None
) -> Path | None:
    """Write the module trees of this rank's models, and return the path; None if lower ranks have the same modules.

    Every rank that has attached calls this at its first matched point, and at close, when the tensors that its hooks
    saw are known. directory: that of the role; it must exist.
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
    by_path = {points.path: points.tensor_paths for points in attachment.points}
    tree = attachment.tree
    nodes = (
        node.model_copy(update={"tensors": by_path[path]}) if by_path.get(path) else node
        for path, node in zip(tree.own_paths, tree.modules, strict=True)
    )
    return ModuleTree(modules=tuple(nodes))
