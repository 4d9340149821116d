"""Naming: a module's path in this program becomes the name and tags of its points, which both programs share.

model.layers.3.self_attn, output        'model.layers.self_attn.out'  layer_id=3
with  {path: "model.layers.{layer_id}.self_attn", name: attn}   ->    'attn.out'  layer_id=3
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grafter.names import NameRule, PointName

ROOT = "root"


class Naming:
    """One job's names."""

    def __init__(self, rules: Sequence[NameRule], role: str | None) -> None:
        self._rules = [rule for rule in rules if rule.role in (None, role)]

    def of_module(self, root: torch.nn.Module, path: str) -> PointName:
        """The name that all points of a module begin with."""
        ruled = self._ruled(path)
        return ruled if ruled is not None else default_name(root, path)

    def of_tensor(self, module: PointName, path: str, suffix: str) -> PointName:
        """The name of one of a module's tensors; a rule may name it by itself."""
        ruled = self._ruled(path + suffix)
        return ruled if ruled is not None else module.with_suffix(suffix)

    def _ruled(self, path: str) -> PointName | None:
        for rule in self._rules:
            found = rule.apply(path)
            if found is not None:
                return found
        return None


def default_name(root: torch.nn.Module, path: str) -> PointName:
    """The path without the number of its layer, which becomes the tag `layer_id`."""
    segments = path.split(".") if path else []
    for number, segment in enumerate(segments):
        if segment.isdecimal():
            layer_id = _layer_id(root, segments[: number + 1])
            name = ".".join(segments[:number] + segments[number + 1 :])
            return PointName(name, {"layer_id": layer_id})
    return PointName(path or ROOT, {})


def _layer_id(root: torch.nn.Module, segments: Sequence[str]) -> int:
    """The number that the layer itself has in the whole model: a pipeline stage counts its own from 0.

    Megatron's `layer_number` counts from 1; `layer_idx` (transformers) and `layer_id` (torchtitan) from 0.
    """
    try:
        module = _submodule(root, segments)
    except AttributeError:
        return int(segments[-1])
    for attribute, first in (("layer_number", 1), ("layer_idx", 0), ("layer_id", 0)):
        own = getattr(module, attribute, None)
        if type(own) is int:
            return own - first
    return int(segments[-1])


def _submodule(root: torch.nn.Module, segments: Sequence[str]) -> torch.nn.Module:
    from grafter.capture.selection import WRAPPER_SEGMENTS

    here = root
    for segment in segments:
        while segment not in here._modules:
            inner = next((name for name in here._modules if name in WRAPPER_SEGMENTS or name == "module"), None)
            if inner is None:
                raise AttributeError(segment)
            here = here.get_submodule(inner)
        here = here.get_submodule(segment)
    return here
