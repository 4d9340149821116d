"""Roots: the models of a program, each the outermost module that holds the others, and hooks on all of them.

The model that is called first has the plain names. Another has its class's name in front of them, since its layers
would else be taken for the first one's; unless it is the same class with other layers, as a pipeline's chunks are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from dataclasses import replace

import torch

import grafter
from grafter.capture.adapters import mesh_axes
from grafter.capture.attachment import Attachment
from grafter.capture.copies import take_hooks_away
from grafter.capture.naming import Naming
from grafter.capture.patterns import Pattern, read_patterns
from grafter.capture.selection import select_modules
from grafter.capture.steps import AutomaticSteps
from grafter.grafter import Grafter
from grafter.layout.axes import axes_of_job, set_axes
from grafter.names import PointName

logger = logging.getLogger("grafter")


class Roots:
    """What is attached in this process. Made at the first call of a model, `called`; `made` are the modules so far.

    Raises ConfigError, as the first `grafter.dump` would, where a setting is wrong.
    """

    def __init__(self, called: torch.nn.Module, made: list[torch.nn.Module]) -> None:
        self._attached: list[tuple[torch.nn.Module, Attachment]] = []
        self._namings: dict[int, Naming] = {}
        # Models that the program has attached by itself since.
        self._left_to_program: set[int] = set()
        self._axes_are_ours = False
        self._grafter: Grafter = grafter._active()
        self._patterns = read_patterns((self._grafter.config.attach or "",))
        self._steps = AutomaticSteps(self._grafter, self._grafter.config.step)
        self._grafter.models.before_attach.append(self._make_room)
        self.extend(called, made)

    def extend(self, called: torch.nn.Module, made: list[torch.nn.Module]) -> None:
        """Attach what is new: other models, or new modules of one that is attached."""
        known = [model for model, _ in self._attached]
        parents = _parents_of([*made, *known])
        grown = {id(_outermost(module, parents)) for module in made}
        for root in dict.fromkeys(_outermost(module, parents) for module in (called, *made)):
            if not any(root is model for model in known):
                self._attach(root)
            elif id(root) in grown:
                self._renew(root)
        # Not before all are attached: the other job hears of all of them when this rank joins.
        self._grafter.begin()

    def detach(self) -> None:
        """Leave all models as they were."""
        self._steps.stop()
        self._grafter.models.before_attach.remove(self._make_room)
        for _, attachment in self._attached:
            attachment.detach()
        self._attached.clear()

    def _attach(self, root: torch.nn.Module) -> None:
        if not _is_model(root) or self._holds_attached(root):
            return
        for module in root.modules():
            take_hooks_away(module)
        self._namings[id(root)] = self._naming_of(root)
        self._set_axes(root)
        attachment = self._hook(root)
        logger.info(
            "grafter: %s: %d modules of %s have hooks",
            self._grafter.who, len(attachment.points), type(root).__name__,
        )  # fmt: skip
        self._attached.append((root, attachment))
        self._steps.wrap(root)

    def _renew(self, root: torch.nn.Module) -> None:
        """A model has got new modules (adapters, a new head): they get their hooks, too."""
        if id(root) in self._left_to_program:
            return
        position = next(number for number, (model, _) in enumerate(self._attached) if model is root)
        _, old = self._attached[position]
        self._steps.unwrap(root)
        self._grafter.models.withdraw(old)
        self._attached[position] = (root, self._hook(root))
        self._steps.wrap(root)

    def _hook(self, root: torch.nn.Module) -> Attachment:
        return self._grafter.models.attach(root, (), naming=self._namings[id(root)])

    def _make_room(self, model: torch.nn.Module) -> None:
        """The program attaches a model by itself, and would get each point twice."""
        modules = list(model.modules())
        for root, attachment in self._attached:
            if id(root) not in self._left_to_program and attachment.has_hooks_on(modules):
                self._left_to_program.add(id(root))
                self._grafter.models.withdraw(attachment)

    def _holds_attached(self, root: torch.nn.Module) -> bool:
        """Whether the program itself has attached a part of it, or what is attached was wrapped since."""
        inside = list(root.modules())
        if any(module is model for model, _ in self._attached for module in inside):
            return True
        return any(attachment.has_hooks_on(inside) for attachment in self._grafter.models.attachments)

    def _naming_of(self, root: torch.nn.Module) -> Naming:
        naming = self._grafter.models.naming
        if self._attached and not self._is_part_of_first(root, naming):
            taken = {other.prefix for other in self._namings.values() if isinstance(other, PrefixedNaming)}
            kind = type(root).__name__
            numbered = (f"{kind}{number}" for number in itertools.count(2))
            prefix = next(name for name in itertools.chain([kind], numbered) if name not in taken)
            naming = PrefixedNaming(naming, prefix)
        return naming

    def _is_part_of_first(self, root: torch.nn.Module, naming: Naming) -> bool:
        """Whether this is another chunk of the model that was called first: the same class, other layers."""
        first, _ = self._attached[0]
        if type(first) is not type(root):
            return False
        own, others = (_layers(model, self._patterns, naming) for model in (root, first))
        return bool(own) and bool(others) and own.isdisjoint(others)

    def _set_axes(self, root: torch.nn.Module) -> None:
        """Where the program has not said it: this rank's place on the mesh that its framework has."""
        if self._grafter.config.axes is None and (self._axes_are_ours or not axes_of_job()):
            axes = mesh_axes(root)
            self._axes_are_ours = self._axes_are_ours or bool(axes)
            set_axes(**axes)


class PrefixedNaming(Naming):
    """The plain names, those of the plan file's rules too, behind a prefix."""

    def __init__(self, plain: Naming, prefix: str) -> None:
        self._rules, self._plain, self.prefix = plain._rules, plain, prefix

    def of_module(self, root: torch.nn.Module, path: str) -> PointName:
        return self._prefixed(self._plain.of_module(root, path))

    def of_tensor(self, module: PointName, path: str, suffix: str) -> PointName:
        plain = replace(module, name=module.name.removeprefix(f"{self.prefix}."))
        return self._prefixed(self._plain.of_tensor(plain, path, suffix))

    def of_weight(self, root: torch.nn.Module, path: str) -> PointName:
        return self._prefixed(self._plain.of_weight(root, path))

    def _prefixed(self, name: PointName) -> PointName:
        return replace(name, name=f"{self.prefix}.{name.name}")


def _is_model(root: torch.nn.Module) -> bool:
    """A loss function or a data transform has no parameters; a scripted module takes no hooks of ours."""
    return next(root.parameters(), None) is not None and not isinstance(root, torch.jit.ScriptModule)


def _layers(model: torch.nn.Module, patterns: tuple[Pattern, ...], naming: Naming) -> set[str]:
    names = (naming.of_module(model, path) for path, _ in select_modules(model, patterns))
    return {name.key for name in names if "layer_id" in name.tags}


def _parents_of(modules: Iterable[torch.nn.Module]) -> dict[int, torch.nn.Module]:
    """Each submodule's parent, by the submodule's id: of several, the one that was made first."""
    parents: dict[int, torch.nn.Module] = {}
    for module in modules:
        for parent in module.modules():
            for child in parent._modules.values():
                if child is not None:
                    parents.setdefault(id(child), parent)
    return parents


def _outermost(module: torch.nn.Module, parents: dict[int, torch.nn.Module]) -> torch.nn.Module:
    seen = {id(module)}
    while (parent := parents.get(id(module))) is not None and id(parent) not in seen:
        seen.add(id(parent))
        module = parent
    return module
