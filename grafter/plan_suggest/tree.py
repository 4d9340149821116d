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
        """Its own part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def weights(self) -> dict[str, Weight]:
        return self.node.weights

    def subtree(self) -> Iterator[Module]:
        """Itself and all below, parents first."""
        yield self
        for child in self.children:
            yield from child.subtree()

    @cached_property
    def is_stack(self) -> bool:
        """Whether its children are numbered layers of like structure, rather than steps of different kinds."""
        if not self.children or self.weights or not all(child.segment.isdecimal() for child in self.children):
            return False
        kinds = Counter(child.node.class_name for child in self.children)
        if len(kinds) == 1:
            return len(self.children) > 1 or not self.node.can_be_called
        return len(kinds) <= len(self.children) // 2

    @cached_property
    def shapes(self) -> Counter[tuple[int, ...]]:
        """Of all weights in it, each as often as it is there."""
        return Counter(weight.shape for module in self.subtree() for weight in module.weights.values())

    def signature(self) -> tuple[object, ...]:
        """Equal for layers of like structure."""
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
class Region:
    """A layer, or the model: the modules below `root`, without what is inside of stacks."""

    root: Module
    modules: list[Module] = field(default_factory=list)
    stacks: list[Module] = field(default_factory=list)

    @cached_property
    def leaves(self) -> list[Module]:
        """Modules with weights of their own."""
        return [module for module in self.modules if module.weights]

    @cached_property
    def inner(self) -> list[Module]:
        """Modules without weights of their own that hold some with."""
        return [module for module in self.modules if not module.weights and module.shapes]

    @cached_property
    def bare(self) -> list[Module]:
        """Modules without any weights: activations, dropout, the attention itself."""
        return [module for module in self.modules if not module.shapes]

    def parent(self, module: Module) -> Module | None:
        """Its parent within the region; None where that is the region's root."""
        return None if module.parent is self.root else module.parent


def region_of(root: Module) -> Region:
    """The region below a module. A list of layers, which nothing calls, is in `stacks` alone."""
    region = Region(root)
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
