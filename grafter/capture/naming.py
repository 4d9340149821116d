"""Naming: a module's path in this program becomes the name and tags of its points, which both jobs share.

model.layers.3.self_attn, output        'model.layers.self_attn.out'  layer_id=3
with  {path: "model.layers.{layer_id}.self_attn", name: attn}   ->    'attn.out'  layer_id=3
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch

from grafter.capture.selection import module_at
from grafter.config.names import LayerIdAt, NameRule, PointName
from grafter.core.patterns import ROOT

# Attributes with a layer's own number, and the number of a model's first layer (Megatron, transformers, torchtitan).
_LAYER_NUMBERS = (("layer_number", 1), ("layer_idx", 0), ("layer_id", 0))


class Naming:
    """The names of one job's points. prefix: what all of them begin with."""

    prefix = ""

    def __init__(self, rules: Sequence[NameRule], role: str | None) -> None:
        self._rules = [rule for rule in rules if rule.role in (None, role)]

    def under(self, name: str) -> Naming:
        """The same names behind the name of a model; these names if it has none."""
        return PrefixedNaming(self, name) if name else self

    @property
    def names_tensors(self) -> bool:
        """Whether a rule names a single tensor of a module."""
        return any(rule.names_a_tensor for rule in self._rules)

    def of_module(self, root: torch.nn.Module, path: str) -> PointName:
        """The name that all points of a module begin with."""
        numbers = _numbers_in(root, path)
        name = self._ruled(path, numbers) or default_name(root, path)
        return replace(name, layer_id_at=numbers)

    def of_tensor(self, module: PointName, path: str, suffix: str) -> PointName:
        """The name of one of a module's tensors, such as `.out.0`, which a rule may name."""
        ruled = self._ruled_tensor(module, path, suffix)
        return module.with_suffix(suffix) if ruled is None else ruled[1]

    def announced_as(self, module: PointName, path: str, suffix: str) -> str:
        """The announcement of either job that one of a module's tensors counts as."""
        ruled = self._ruled_tensor(module, path, suffix)
        is_known = ruled is None or ruled[0].known_suffix == suffix
        return self.of_tensor(module, path, suffix).announced_as(module, suffix, is_known=is_known)

    def known_tensors(self, module: PointName, path: str) -> list[PointName]:
        """The names of a module's tensors that rules name, if they are known before the first call."""
        found = []
        for suffix in dict.fromkeys(rule.known_suffix for rule in self._rules):
            ruled = None if suffix is None else self._ruled_tensor(module, path, suffix)
            if ruled is not None and suffix is not None and ruled[0].known_suffix == suffix:
                found.append(self.of_tensor(module, path, suffix))
        return found

    def _ruled_tensor(self, module: PointName, path: str, suffix: str) -> tuple[NameRule, PointName] | None:
        for rule in self._rules:
            found = rule.apply_to_tensor(path or ROOT, suffix, module.layer_id_at)
            if found is not None:
                return rule, found
        return None

    def of_weight(self, root: torch.nn.Module, path: str) -> PointName:
        """The name of a parameter or buffer: by a rule for it, else by one for its module."""
        owner, _, own = path.rpartition(".")
        ruled = self._ruled(path, _numbers_in(root, path))
        if ruled is not None:
            return ruled
        if self._ruled(owner) is not None:
            return self.of_module(root, owner).with_suffix(f".{own}")
        return self.of_module(root, path)

    def _ruled(self, path: str, numbers: LayerIdAt | None = None) -> PointName | None:
        for rule in self._rules:
            found = rule.apply(path or ROOT, numbers)
            if found is not None:
                return found
        return None


class PrefixedNaming(Naming):
    """The names of another naming, behind the name of a model."""

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


def _numbers_in(root: torch.nn.Module, path: str) -> LayerIdAt:
    """`layer_id_at` for this path, as long as the model exists."""
    model = weakref.ref(root)

    def numbers(position: int) -> int | str:
        return layer_id_at(model(), path, position)

    return numbers


def default_name(root: torch.nn.Module, path: str) -> PointName:
    """The path without the first number in it, that of the layer, which becomes the tag `layer_id`."""
    segments = path.split(".") if path else []
    for number, segment in enumerate(segments):
        if segment.isdecimal():
            name = ".".join(segments[:number] + segments[number + 1 :])
            return PointName(name or ROOT, {"layer_id": layer_id_at(root, path, number)})
    return PointName(path or ROOT, {})


def layer_id_at(root: torch.nn.Module | None, path: str, position: int) -> int | str:
    """The layer id in a segment of a path: the layer's own number, else the segment.

    A pipeline stage may count its layers from 0, so the layer's own number comes first. root: None if the model no
    longer exists.
    """
    segments = path.split(".")
    segment = segments[position]
    if not segment.isdecimal():
        return segment
    try:
        layer = module_at(root, ".".join(segments[: position + 1])) if root is not None else None
    except AttributeError:
        layer = None
    for attribute, first in _LAYER_NUMBERS:
        own = getattr(layer, attribute, None)
        if type(own) is int:
            return own - first
    return int(segment)
