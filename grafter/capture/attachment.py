"""An attachment: hooks on the selected modules of one model, which turn their inputs and outputs into points.

Only what is selected gets hooks, and a module without one costs nothing. The model that was given is called in many
ways (`model.forward(x)` among them, which runs no hooks), so its own `forward` is wrapped instead.
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
from grafter.capture.copies import around, leave_hooks_out, stop_leaving_out
from grafter.capture.model_forward import watch_forward
from grafter.capture.module_tree import tree_of
from grafter.capture.naming import Naming
from grafter.capture.selection import select_modules
from grafter.capture.traced import Family, followed, input_hook, output_hook
from grafter.config.names import PointName
from grafter.core.patterns import ROOT, Pattern
from grafter.core.tensor_access import local_tensor
from grafter.core.untraced import forget_compiled_code, untraced

# Offers one tensor as a point: (name and tags, as which announcement it counts, tensor) -> what takes its place.
Offer = Callable[[PointName, str, torch.Tensor], torch.Tensor]
# The same for code that is being compiled: (name, path below the module, whether autograd differentiates the tensor) ->
# what `compiled.find_site` gives, whatever the tags are.
FindSite = Callable[[str, str, bool], int]


def _break_the_graph(name: str, suffix: str, is_differentiated: bool) -> int:
    return BREAK


class ModulePoints:
    """The points of one module. Names of its tensors are worked out when they are first met."""

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
        # As which announcement each counts.
        self._announced: dict[str, str] = {}
        # By the paths of tensors that come together: the order in which they are offered.
        self._orders: dict[tuple[str, ...], list[int]] = {}

    def take_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module gets instead: the same objects where nothing was replaced."""
        self.fired = True
        found = self.arguments.find(args, kwargs)
        replacements = self._offer_all(found)
        return (args, kwargs) if replacements is None else self.arguments.replace(args, kwargs, iter(replacements))

    def take_output(self, value: Any) -> Any:
        """What the module gives instead: the same object where nothing was replaced."""
        self.fired = True
        if type(value) is torch.Tensor:
            return self._offer_one(".out", value)
        found: Found = []
        find_tensors(value, ".out", found)
        replacements = self._offer_all(found)
        return value if replacements is None else replace_tensors(value, iter(replacements))

    def find_sites(self, suffixes: tuple[str, ...], differentiated: tuple[bool, ...]) -> list[tuple[int, int]]:
        """Of tensors with these paths, in code that is being compiled: (place, site) in the order of offering."""
        sites = []
        for place in self._order(suffixes):
            name = self._names[suffixes[place]].name
            sites.append((place, self._find_site(name, suffixes[place], differentiated[place])))
        return sites

    def tags_and_key(self, suffix: str) -> tuple[dict[str, Any], str]:
        """The tags of one tensor's point, and as which announcement it counts."""
        name = self._names.get(suffix) or self._named(suffix)
        return name.tags, self._announced[suffix]

    @property
    def keys(self) -> list[str]:
        """As a rank announces them."""
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
        """Offer all; what takes their places, or None where nothing does."""
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
        """By their common names: the other program may have them in another order, and each point waits for the other
        side."""
        order = self._orders.get(suffixes)
        if order is None:
            names = [self._names.get(suffix) or self._named(suffix) for suffix in suffixes]
            order = sorted(range(len(suffixes)), key=lambda number: (names[number].name, names[number].key))
            self._orders[suffixes] = order
        return order


def _with_one_for_one(tensors: list[torch.Tensor], replacements: list[torch.Tensor]) -> list[torch.Tensor]:
    """The replacements, one for all places where one tensor stood: code asks for `key is query`."""
    first: dict[int, torch.Tensor] = {}
    for number, tensor in enumerate(tensors):
        known = first.setdefault(id(tensor), replacements[number])
        if known is not replacements[number] and torch.equal(local_tensor(known), local_tensor(replacements[number])):
            replacements[number] = known
    return replacements


class _Watcher:
    """A module's points, as the model's own `forward` sees them."""

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
        # Weakly, as the handles of the hooks have them: an attachment outlives its model.
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._takes_inputs = inputs
        # For `grafter plan suggest`; the model may be gone when this is written down.
        self.tree = tree_of(model)
        selected = select_modules(model, patterns)
        self.points: list[ModulePoints] = []
        families: dict[str, Family] = {}
        for path, module in selected:
            name = naming.of_module(model, path)
            # Where one tensor may have a name of its own, no two modules need have the same ones.
            family = Family() if naming.names_tensors else families.setdefault(name.name, Family())
            self.points.append(ModulePoints(path, module, name, naming, offer, find_site, family))
        for (path, module), points in zip(selected, self.points, strict=True):
            leave_hooks_out(module)
            self._modules.add(module)
            if path:
                self._hook(module, points, inputs, outputs)
            else:
                self._stop_watching = watch_forward(module, _Watcher(points, inputs, outputs))
        self._around: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet(around(model, self._modules))
        for module in self._around:
            leave_hooks_out(module)
        if selected:
            forget_compiled_code()

    def keep(self, handles: Iterable[RemovableHandle]) -> None:
        """Hooks that go when this attachment does."""
        self._handles += handles

    @property
    def keys(self) -> list[str]:
        """The modules, as a rank announces them, and those of their tensors that have names of their own."""
        return [key for points in self.points for key in points.keys]

    def has_hooks_on(self, modules: Iterable[torch.nn.Module]) -> bool:
        """Whether any of these modules is one of its own."""
        return any(module in self._modules for module in modules)

    def takes_names_of(self, other: Attachment) -> bool:
        """Whether it is on another model, some of whose points have the same names. Parts of one model, which have
        layers of their own each, are none."""
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
        """Paths of selected modules that no call has reached."""
        return [points.path for points in self.points if not points.fired and not points.family.is_silent]

    def bypassed(self) -> list[str]:
        """Paths of those that no call has reached though calls have reached parts of them: called by
        `module.forward(...)`, say. None where inputs are no points, since then a call shows only when it is over."""
        if not self._takes_inputs:
            return []
        around_fired = {path for points in self.points if points.fired for path in _paths_above(points.path)}
        return [path or ROOT for path in self.never_fired() if path in around_fired]

    def detach(self) -> None:
        """Take all hooks away. May be called twice."""
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
    """Of what a module is in, the model itself included."""
    segments = path.split(".") if path else []
    return [".".join(segments[:number]) for number in range(len(segments))]
