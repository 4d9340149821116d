"""An attachment: hooks on the selected modules of one model, which turn their inputs and outputs into points.

Only selected modules get hooks, and a module without hooks costs nothing. The model itself may be called by
`model.forward(x)`, which runs no hooks, so its `forward` is wrapped instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from grafter.capture.compiled import BREAK, number_of_hooks
from grafter.capture.containers import Arguments, Found, find_tensors, replace_tensors
from grafter.capture.copies import leave_hooks_out, modules_around, stop_leaving_out
from grafter.capture.model_forward import watch_forward
from grafter.capture.module_tree import tree_of
from grafter.capture.naming import Naming
from grafter.capture.selection import select_modules
from grafter.capture.traced import Family, followed, input_hook, output_hook
from grafter.config.names import PointName
from grafter.core.patterns import ROOT, Pattern
from grafter.core.tensor_access import local_tensor
from grafter.core.untraced import forget_compiled_code, untraced

# Offers one tensor as a point: (name and tags, the announcement that it counts as, tensor) -> the tensor to use.
Offer = Callable[[PointName, str, torch.Tensor], torch.Tensor]
# The same for code that is being compiled: (name, path below the module, whether autograd differentiates the tensor) ->
# the result of `compiled.find_site`.
FindSite = Callable[[str, str, bool], int]


def _break_the_graph(name: str, suffix: str, is_differentiated: bool) -> int:
    return BREAK


class ModulePoints:
    """The points of one module. The names of its tensors are computed when the tensors first occur."""

    def __init__(
        self,
        path: str,
        module: torch.nn.Module,
        name: PointName,
        naming: Naming,
        offer: Offer,
        find_site: FindSite,
        family: Family,
    ) -> None:
        self.path, self.name, self.family = path, name, family
        self.fired = False
        self.hook = number_of_hooks(self)
        family.members.add(self)
        self.arguments = Arguments(module)
        self._naming, self._offer, self._find_site = naming, offer, find_site
        self._names: dict[str, PointName] = {}
        # The announcement that each counts as.
        self._announced: dict[str, str] = {}
        # By the paths of the tensors of one call: the order in which they are offered.
        self._orders: dict[tuple[str, ...], list[int]] = {}

    def take_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the module gets instead: the same objects if nothing was replaced."""
        self.fired = True
        found = self.arguments.find(args, kwargs)
        replacements = self._offer_all(found)
        return (args, kwargs) if replacements is None else self.arguments.replace(args, kwargs, iter(replacements))

    def take_output(self, value: Any) -> Any:
        """The output that the module gives instead: the same object if nothing was replaced."""
        self.fired = True
        if type(value) is torch.Tensor:
            return self._offer_one(".out", value)
        found: Found = []
        find_tensors(value, ".out", found)
        replacements = self._offer_all(found)
        return value if replacements is None else replace_tensors(value, iter(replacements))

    def find_sites(self, suffixes: tuple[str, ...], differentiated: tuple[bool, ...]) -> list[tuple[int, int]]:
        """For tensors with these paths, in code that is being compiled: (place, site) in the order of offering."""
        sites = []
        for place in self._order(suffixes):
            name = self._names[suffixes[place]].name
            sites.append((place, self._find_site(name, suffixes[place], differentiated[place])))
        return sites

    def tags_and_key(self, suffix: str) -> tuple[dict[str, Any], str]:
        """The tags of one tensor's point, and the announcement that it counts as."""
        name = self._names.get(suffix) or self._named(suffix)
        return name.tags, self._announced[suffix]

    @property
    def tensor_paths(self) -> tuple[str, ...]:
        """The paths, below the module, of the tensors that have occurred, sorted."""
        return tuple(sorted(self._names))

    @property
    def keys(self) -> list[str]:
        """The keys under which a rank announces the module, and those of its tensors that have names themselves."""
        known = self._naming.known_tensors(self.name, self.path)
        return [self.name.key, *(name.tensor_key for name in known)]

    def _offer_one(self, suffix: str, tensor: torch.Tensor) -> torch.Tensor:
        name = self._names.get(suffix) or self._named(suffix)
        return self._offer(name, self._announced[suffix], tensor)

    def _named(self, suffix: str) -> PointName:
        self._announced[suffix] = self._naming.announced_as(self.name, self.path, suffix)
        name = self._names[suffix] = self._naming.of_tensor(self.name, self.path, suffix)
        return name

    def _offer_all(self, found: Found) -> list[torch.Tensor] | None:
        """Offer all tensors; the tensors to use instead, or None if none was replaced."""
        if len(found) == 1:
            suffix, tensor = found[0]
            replacement = self._offer_one(suffix, tensor)
            return None if replacement is tensor else [replacement]
        replacements = [tensor for _, tensor in found]
        changed = False
        for number in self._order(tuple([suffix for suffix, _ in found])):
            suffix, tensor = found[number]
            replacements[number] = self._offer_one(suffix, tensor)
            changed = changed or replacements[number] is not tensor
        if not changed:
            return None
        return _with_one_for_one([tensor for _, tensor in found], replacements)

    def _order(self, suffixes: tuple[str, ...]) -> list[int]:
        """The order of offering, by name: the other program may have another order, and each point waits for it."""
        order = self._orders.get(suffixes)
        if order is None:
            names = [self._names.get(suffix) or self._named(suffix) for suffix in suffixes]
            order = sorted(range(len(suffixes)), key=lambda number: (names[number].name, names[number].key))
            self._orders[suffixes] = order
        return order


def _with_one_for_one(tensors: list[torch.Tensor], replacements: list[torch.Tensor]) -> list[torch.Tensor]:
    """The replacements, with one object for all places of one tensor, since code may test `key is query`."""
    first: dict[int, torch.Tensor] = {}
    for number, tensor in enumerate(tensors):
        known = first.setdefault(id(tensor), replacements[number])
        if known is not replacements[number] and torch.equal(local_tensor(known), local_tensor(replacements[number])):
            replacements[number] = known
    return replacements


class _Watcher:
    """The points of the model itself, as its wrapped `forward` uses them."""

    def __init__(self, points: ModulePoints, inputs: bool, outputs: bool) -> None:
        self.inputs = input_hook(points, untraced(points.take_inputs)) if inputs else None
        self.output = output_hook(points, untraced(points.take_output)) if outputs else None


class Attachment:
    """What `grafter.attach` returns. `detach()` leaves the model as it was; so does the end of a `with` block."""

    def __init__(
        self,
        model: torch.nn.Module,
        patterns: tuple[Pattern, ...],
        naming: Naming,
        offer: Offer,
        find_site: FindSite = _break_the_graph,
        *,
        inputs: bool = True,
        outputs: bool = True,
    ) -> None:
        self._handles: list[RemovableHandle] = []
        self._stop_watching: Callable[[], None] | None = None
        # Weakly, as in the handles of the hooks, since an attachment may outlive its model.
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._takes_inputs = inputs
        # For `grafter plan suggest`. The model may no longer exist when the tree is written.
        self.tree = tree_of(model)
        selected = select_modules(model, patterns)
        self.points: list[ModulePoints] = []
        families: dict[str, Family] = {}
        for path, module in selected:
            name = naming.of_module(model, path)
            # If a rule names single tensors, two modules need not have the same names.
            family = Family() if naming.names_tensors else families.setdefault(name.name, Family())
            self.points.append(ModulePoints(path, module, name, naming, offer, find_site, family))
        for (path, module), points in zip(selected, self.points, strict=True):
            leave_hooks_out(module)
            self._modules.add(module)
            if path:
                self._hook(module, points, inputs, outputs)
            else:
                self._stop_watching = watch_forward(module, _Watcher(points, inputs, outputs))
        self._around: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet(modules_around(model, self._modules))
        for module in self._around:
            leave_hooks_out(module)
        if selected:
            forget_compiled_code()

    def keep(self, handles: Iterable[RemovableHandle]) -> None:
        """Remove these hooks, too, when this attachment is detached."""
        self._handles += handles

    @property
    def keys(self) -> list[str]:
        """The keys under which a rank announces the modules, and the tensors that have names themselves."""
        return [key for points in self.points for key in points.keys]

    def has_hooks_on(self, modules: Iterable[torch.nn.Module]) -> bool:
        """Whether any of these modules has hooks of this attachment."""
        return any(module in self._modules for module in modules)

    def takes_names_of(self, other: Attachment) -> bool:
        """Whether `other` is on another model, and some points of both have the same names. Parts of one model, each
        with its own layers, do not count."""
        if not other._modules or self.has_hooks_on(other._modules):
            return False
        own, others = set(self.keys), set(other.keys)
        layers, other_layers = ({key for key in keys if "layer_id" in key} for keys in (own, others))
        return not layers.isdisjoint(other_layers) if layers and other_layers else not own.isdisjoint(others)

    @property
    def hook_count(self) -> int:
        """Hooks in the model, but for the wrapper around its own `forward`."""
        return len(self._handles)

    def never_fired(self) -> list[str]:
        """The paths of selected modules that no call has reached."""
        return [points.path for points in self.points if not points.fired and not points.family.is_silent]

    def bypassed(self) -> list[str]:
        """The paths of modules that no call has reached though calls have reached their parts: they were called by
        `module.forward(...)`, say. None if inputs are not points, since then a call is seen only when it ends."""
        if not self._takes_inputs:
            return []
        around_fired = {path for points in self.points if points.fired for path in _paths_above(points.path)}
        return [path or ROOT for path in self.never_fired() if path in around_fired]

    def detach(self) -> None:
        """Remove all hooks. May be called twice."""
        if not self._handles and self._stop_watching is None:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        for module in (*self._modules, *self._around):
            stop_leaving_out(module)
        self._modules.clear()
        self._around.clear()
        forget_compiled_code()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _hook(self, module: torch.nn.Module, points: ModulePoints, inputs: bool, outputs: bool) -> None:
        if inputs:
            take_inputs = input_hook(points, untraced(points.take_inputs))

            @followed
            def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return take_inputs(args, kwargs)

            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if outputs:
            take_output = output_hook(points, untraced(points.take_output))

            @followed
            def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                return take_output(output)

            self._handles.append(module.register_forward_hook(after))


def _paths_above(path: str) -> list[str]:
    """The paths of the modules that contain a module, including the model itself."""
    segments = path.split(".") if path else []
    return [".".join(segments[:number]) for number in range(len(segments))]
