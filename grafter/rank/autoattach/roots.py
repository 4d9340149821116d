"""Roots: the models of a program, each the outermost module that holds the others, and hooks on all of them.

The first model has plain names: of those of the called model's class, the one that was made first, since programs
that make the same models call them in other orders. One of another class has its class's name in front; a further one
of a class the variable that holds it, or none and no points where no variable tells which it is. Instances of one class
with other layers are parts of one model, as a pipeline's chunks are. What the user says (`models=`) wins.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from grafter.capture.adapters import mesh_axes
from grafter.capture.attachment import Attachment
from grafter.capture.copies import take_hooks_away
from grafter.capture.model_variables import ModelFacts, class_name_of
from grafter.capture.naming import Naming
from grafter.capture.selection import select_modules
from grafter.core.layout.axes import axes_of_job, set_axes
from grafter.core.patterns import Pattern, read_patterns
from grafter.core.points import call_site
from grafter.rank.autoattach.active import active
from grafter.rank.autoattach.steps import AutomaticSteps
from grafter.rank.grafter import Grafter

logger = logging.getLogger("grafter")


@dataclass(eq=False)
class Root:
    """A model of the program, held weakly. attachment: None where it has no points.

    name: what stands before the names of its points. is_left: the program has attached it by itself since.
    """

    reference: weakref.ref[torch.nn.Module]
    class_name: str
    variables: list[str]
    name: str
    naming: Naming
    attachment: Attachment | None = None
    is_left: bool = False

    @property
    def model(self) -> torch.nn.Module | None:
        return self.reference()


class Roots:
    """What is attached in this process. Made at the first call of a model, `called`; `made` are the modules so far.

    Raises ConfigError, as the first `grafter.dump` would, where a setting is wrong.
    """

    def __init__(self, called: torch.nn.Module, made: list[torch.nn.Module]) -> None:
        self._roots: list[Root] = []
        self._axes_are_ours = False
        self._told_nameless: set[str] = set()
        self._grafter: Grafter = active()
        self._patterns = read_patterns((self._grafter.config.attach or "",))
        self._steps = AutomaticSteps(self._grafter, self._grafter.config.step)
        self._grafter.models.before_attach.append(self._make_room)
        self.extend(called, made)

    def extend(self, called: torch.nn.Module, made: list[torch.nn.Module]) -> None:
        """Attach what is new: other models, or new modules of one that is attached."""
        if {root.class_name for root in self._roots} & {class_name_of(module) for module in made}:
            # The program may hold one model after the other: one that is not referred to any more is not a model of it.
            gc.collect()
        known = {id(model): root for root in self._roots if (model := root.model) is not None}
        parents = _parents_of([*made, *(model for root in self._roots if (model := root.model) is not None)])
        grown = {id(_outermost(module, parents)) for module in made}
        own = _outermost(called, parents)
        for model in self._in_order(own, [_outermost(module, parents) for module in made]):
            root = known.get(id(model))
            if root is None:
                self._attach(model, is_called=model is own)
            elif id(model) in grown:
                self._renew(root, model)
        # Not before all are attached: the other job learns of all of them when this rank joins.
        self._grafter.begin()

    def detach(self) -> None:
        """Leave all models as they were."""
        self._steps.stop()
        self._grafter.models.passes.stop()
        self._grafter.models.before_attach.remove(self._make_room)
        for root in self._roots:
            if root.attachment is not None:
                root.attachment.detach()
        self._roots.clear()

    def _in_order(self, called: torch.nn.Module, made: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        """The models, those of the called one's class first, each in the order in which they were made."""
        models = list(dict.fromkeys([*made, called]))
        kind = class_name_of(called)
        return [model for model in models if class_name_of(model) == kind] + [
            model for model in models if class_name_of(model) != kind
        ]

    def _attach(self, model: torch.nn.Module, *, is_called: bool) -> None:
        if not _is_model(model) or self._holds_attached(model):
            return
        for module in model.modules():
            take_hooks_away(module)
        facts = self._grafter.models.facts_of(model, call_site() if is_called else "")
        name = self._name_of(model, facts)
        naming = self._grafter.models.naming.under(name or "")
        root = Root(weakref.ref(model), facts.class_name, facts.variables, name or "", naming)
        if name is None:
            self._tell_nameless(facts)
        else:
            level = logging.DEBUG if self._replace_gone(name) else logging.INFO
            self._set_axes(model)
            root.attachment = self._hook(root, model, facts)
            logger.log(
                level, "grafter: %s: %d modules of %s have hooks%s", self._grafter.who, len(root.attachment.points),
                type(model).__name__, f"; their points' names begin with {name}." if name else "",
            )  # fmt: skip
            self._grafter.models.passes.wrap(model)
        self._roots.append(root)

    def _renew(self, root: Root, model: torch.nn.Module) -> None:
        """A model has got new modules (adapters, a new head): they get their hooks, too."""
        if root.is_left or root.attachment is None:
            return
        old = root.attachment
        self._grafter.models.passes.unwrap(model)
        facts = self._grafter.models.withdraw(old)
        root.attachment = self._hook(root, model, facts)
        self._grafter.models.passes.wrap(model)

    def _hook(self, root: Root, model: torch.nn.Module, facts: ModelFacts | None) -> Attachment:
        return self._grafter.models.attach(model, (), naming=root.naming, facts=facts)

    def _make_room(self, model: torch.nn.Module) -> None:
        """The program attaches a model by itself, and would get each point twice."""
        modules = list(model.modules())
        for root in self._roots:
            if root.attachment is not None and not root.is_left and root.attachment.has_hooks_on(modules):
                root.is_left = True
                self._grafter.models.withdraw(root.attachment)

    def _holds_attached(self, model: torch.nn.Module) -> bool:
        """Whether the program itself has attached a part of it, or what is attached was wrapped since."""
        inside = list(model.modules())
        known = [other for root in self._roots if root.attachment is not None and (other := root.model) is not None]
        if any(module is other for other in known for module in inside):
            return True
        return any(attachment.has_hooks_on(inside) for attachment in self._grafter.models.attachments)

    # Names.

    def _name_of(self, model: torch.nn.Module, facts: ModelFacts) -> str | None:
        """What stands before the names of its points; None: nothing says which model of its class this is."""
        if facts.given_name is not None:
            return facts.given_name
        if self._is_chunk(model):
            return ""
        same = [root for root in self._roots if root.class_name == facts.class_name and not root.is_left]
        gone = [root for root in same if root.model is None]
        held_alike = [root for root in gone if not set(root.variables).isdisjoint(facts.variables)]
        if held_alike or (gone and len(gone) == len(same)):
            # It takes the place of one that is gone.
            return (held_alike or gone)[-1].name
        if not same:
            return facts.class_name if any(root.attachment is not None for root in self._roots) else ""
        taken = {word for root in self._roots for word in (root.name, root.class_name)}
        return next((variable for variable in facts.variables if variable not in taken), None)

    def _is_chunk(self, model: torch.nn.Module) -> bool:
        """Whether this is another chunk of the model that has plain names: the same class, other layers."""
        plain = [r.model for r in self._roots if not r.name and r.attachment is not None and r.model is not None]
        same = [other for other in plain if class_name_of(other) == class_name_of(model)]
        own = _layers(model, self._patterns, self._grafter.models.naming)
        layers = [_layers(other, self._patterns, self._grafter.models.naming) for other in same]
        return bool(own) and bool(layers) and all(other and own.isdisjoint(other) for other in layers)

    def _replace_gone(self, name: str) -> bool:
        """Of a model that is gone, and whose place another takes, nothing is left. Whether there was one."""
        gone = [root for root in self._roots if root.model is None and root.name == name]
        for root in gone:
            if root.attachment is not None and not root.is_left:
                self._grafter.models.withdraw(root.attachment)
            self._roots.remove(root)
        return bool(gone)

    def _tell_nameless(self, facts: ModelFacts) -> None:
        if facts.class_name in self._told_nameless:
            return
        self._told_nameless.add(facts.class_name)
        where = f" (first called at {facts.first_call})" if facts.first_call else ""
        role = self._grafter.config.role
        logger.warning(
            "grafter: %s: a further model of class %s%s has no points: no variable of the program says which it is, "
            "and by its order it could be taken for another one of the other job. Name it: "
            "--set %s_models=VARIABLE=NAME (GRAFTER_%s_MODELS), or grafter.attach(model, name='...') in the program.",
            self._grafter.who, facts.class_name, where, role, str(role).upper(),
        )  # fmt: skip

    def _set_axes(self, model: torch.nn.Module) -> None:
        """Where the program has not said it: this rank's place on the mesh that its framework has."""
        if self._grafter.config.axes is None and (self._axes_are_ours or not axes_of_job()):
            axes = mesh_axes(model)
            self._axes_are_ours = self._axes_are_ours or bool(axes)
            set_axes(**axes)


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
