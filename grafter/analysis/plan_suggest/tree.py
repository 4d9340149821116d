"""A module tree with links, the stacks of numbered layers in it, and the regions between stacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from grafter.capture.module_tree import ModuleNode, ModuleTree, Weight


@dataclass(eq=False)
class Module:
    """One module, with its parent and children."""

    node: ModuleNode
    parent: Module | None = None
    children: list[Module] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.node.path

    @property
    def segment(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    @property
    def weights(self) -> dict[str, Weight]:
        return self.node.weights

    def subtree(self) -> Iterator[Module]:
        """This module and all modules below it, parents first."""
        yield self
        for child in self.children:
            yield from child.subtree()

    @cached_property
    def is_stack(self) -> bool:
        """Whether its children are numbered layers of similar structure, rather than steps of different kinds."""
        if not self.children or self.weights or not all(child.segment.isdecimal() for child in self.children):
            return False
        kinds = Counter(child.node.class_name for child in self.children)
        if len(kinds) == 1:
            return len(self.children) > 1 or not self.node.can_be_called
        return len(kinds) <= len(self.children) // 2

    @cached_property
    def shapes(self) -> Counter[tuple[int, ...]]:
        """The shapes of all weights in it, with their counts."""
        return Counter(weight.shape for module in self.subtree() for weight in module.weights.values())

    def signature(self) -> tuple[object, ...]:
        """Equal for layers with the same structure."""
        skip = len(self.path)
        return tuple(
            (module.path[skip:], module.node.class_name, *((n, w.shape) for n, w in module.weights.items()))
            for module in self.subtree()
        )


def linked(tree: ModuleTree) -> Module:
    """The model, with all modules below it."""
    modules = {node.path: Module(node) for node in tree.modules}
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        if parent is not None:
            module.parent = parent
            parent.children.append(module)
    return modules[""]


@dataclass(eq=False)
class ModuleRegion:
    """A layer, or the model: the modules below `root`, without the contents of stacks."""

    root: Module
    modules: list[Module] = field(default_factory=list)
    stacks: list[Module] = field(default_factory=list)

    @cached_property
    def leaves(self) -> list[Module]:
        """Modules with their own weights."""
        return [module for module in self.modules if module.weights]

    @cached_property
    def inner(self) -> list[Module]:
        """Modules without their own weights that contain modules with weights."""
        return [module for module in self.modules if not module.weights and module.shapes]

    @cached_property
    def bare(self) -> list[Module]:
        """Modules without any weights: activations, dropout, the attention itself."""
        return [module for module in self.modules if not module.shapes]

    def parent(self, module: Module) -> Module | None:
        """Its parent within the region; None if that is the region's root."""
        return None if module.parent is self.root else module.parent


def region_of(root: Module) -> ModuleRegion:
    """The region below a module. A list of layers, which is never called, is only in `stacks`."""
    region = ModuleRegion(root)
    pending = list(reversed(root.children))
    while pending:
        module = pending.pop()
        if module.is_stack:
            region.stacks.append(module)
            if module.node.can_be_called:
                region.modules.append(module)
        else:
            region.modules.append(module)
            pending += reversed(module.children)
    return region
