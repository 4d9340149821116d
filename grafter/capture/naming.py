"""Naming: a module's path in this program becomes the name and tags of its points, which both programs share.

model.layers.3.self_attn, output        'model.layers.self_attn.out'  layer_id=3
with  {path: "model.layers.{layer_id}.self_attn", name: attn}   ->    'attn.out'  layer_id=3
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch

from grafter.capture.selection import ROOT, module_at
from grafter.names import LayerIdAt, NameRule, PointName

# A layer's own number: the attribute, and what a model's first layer has there (Megatron, transformers, torchtitan).
_NUMBERS = (("layer_number", 1), ("layer_idx", 0), ("layer_id", 0))


class Naming:
    """One job's names."""

    def __init__(self, rules: Sequence[NameRule], role: str | None) -> None:
        self._rules = [rule for rule in rules if rule.role in (None, role)]

    def of_module(self, root: torch.nn.Module, path: str) -> PointName:
        """The name that all points of a module begin with."""
        numbers = _numbers_in(root, path)
        name = self._ruled(path, numbers) or default_name(root, path)
        return replace(name, layer_id_at=numbers)

    def of_tensor(self, module: PointName, path: str, suffix: str) -> PointName:
        """The name of one of a module's tensors, such as `.out.0`; a rule may name it by itself."""
        for rule in self._rules:
            found = rule.apply_to_tensor(path or ROOT, suffix, module.layer_id_at)
            if found is not None:
                return found
        return module.with_suffix(suffix)

    def of_weight(self, root: torch.nn.Module, path: str) -> PointName:
        """The name of a parameter or buffer: by a rule for it, else by one for the module that owns it."""
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


def _numbers_in(root: torch.nn.Module, path: str) -> LayerIdAt:
    """What `layer_id_at` says of this path, for as long as the model lives."""
    model = weakref.ref(root)

    def numbers(position: int) -> int | str:
        return layer_id_at(model(), path, position)

    return numbers


def default_name(root: torch.nn.Module, path: str) -> PointName:
    """The path without the number of its layer, the first in it, which becomes the tag `layer_id`."""
    segments = path.split(".") if path else []
    for number, segment in enumerate(segments):
        if segment.isdecimal():
            name = ".".join(segments[:number] + segments[number + 1 :])
            return PointName(name or ROOT, {"layer_id": layer_id_at(root, path, number)})
    return PointName(path or ROOT, {})


def layer_id_at(root: torch.nn.Module | None, path: str, position: int) -> int | str:
    """What a path's segment says of the layer: the number that the layer itself has, else the segment.

    The layer knows better: a pipeline stage counts its own from 0. None: the model is gone.
    """
    segments = path.split(".")
    segment = segments[position]
    if not segment.isdecimal():
        return segment
    try:
        layer = module_at(root, ".".join(segments[: position + 1])) if root is not None else None
    except AttributeError:
        layer = None
    for attribute, first in _NUMBERS:
        own = getattr(layer, attribute, None)
        if type(own) is int:
            return own - first
    return int(segment)
