"""The value of a point as leaves: a tensor, or a pytree of tensors and plain data, taken apart and put together."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils import _pytree as pytree

from grafter.core.processes import is_from_signal_handler
from grafter.core.tensor_access import local_tensor
from grafter.errors import UsageError

# Plain data: its JSON keeps values apart that Python keeps apart.
_DATA = (str, int, float, bool, type(None))
# Texts travel in the header of every point, so long ones are cut.
_LONGEST_TEXT, _SHOWN_OF_TEXT = 1024, 200


class TensorSpec(BaseModel):
    """What the other side must know of a tensor before it moves. dtype: its name without `torch.`, such as float32."""

    model_config = ConfigDict(frozen=True)

    path: str
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype. Raises ValueError if this torch does not have it."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"a peer names a dtype that this torch {torch.__version__} does not have: {self.dtype[:40]!r}"
            )
        return dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def spec_of(path: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec of a plain tensor at a path."""
    return _spec(path, tuple(tensor.shape), tensor.dtype, tensor.device.type)


@lru_cache(maxsize=4096)
def _spec(path: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> TensorSpec:
    # Every step has the same tensors, and validating a model costs ten times a look-up.
    return TensorSpec(path=path, shape=shape, dtype=str(dtype).removeprefix("torch."), device=device)


# Not frozen: every point makes one, and freezing would triple its cost.
@dataclass
class Leaves:
    """A value taken apart into its leaves.

    originals, tensors, specs: the tensors as the value holds them, as local tensors, and described; sorted by path.
    structure: the paths of all leaves. others: the leaves that are plain data, as JSON by path. Both sides must have
    equal ones.
    """

    value: Any
    originals: list[torch.Tensor]
    tensors: list[torch.Tensor]
    specs: tuple[TensorSpec, ...]
    structure: str
    others: dict[str, str]

    def rebuilt(self, replaced: Sequence[torch.Tensor]) -> Any:
        """The value with other tensors in it; the value itself if no tensor was replaced."""
        if all(new is old for new, old in zip(replaced, self.originals, strict=True)):
            return self.value
        if isinstance(self.value, torch.Tensor):
            return replaced[0]
        by_path = {spec.path: new for spec, new in zip(self.specs, replaced, strict=True)}
        flat, tree = flatten(self.value)
        return pytree.tree_unflatten([by_path.get(path, leaf) for path, leaf in flat], tree)


class NothingToOffer(Exception):
    """This rank's value cannot be grafted. The text says why, and travels to the other side.

    plain: the leaves as JSON by path, if the value is plain data alone, which can be compared; else empty.
    """

    def __init__(self, reason: str, plain: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.plain = plain or {}


def take_apart(value: Any) -> Leaves:
    """The leaves of a tensor or a pytree. Raises NothingToOffer, with the reason, if it holds no tensor, or anything
    that is neither a tensor nor plain data."""
    if isinstance(value, torch.Tensor):
        tensor = local_tensor(value)
        _check_storage("the value", tensor)
        return Leaves(value, [value], [tensor], (spec_of("", tensor),), "tensor", {})
    flat, _ = flatten(value)
    found: dict[str, torch.Tensor] = {}
    others: dict[str, str] = {}
    for path, leaf in flat:
        if isinstance(leaf, torch.Tensor):
            found[path] = leaf
        elif isinstance(leaf, _DATA):
            others[path] = _as_json(leaf)
        elif not path:
            raise NothingToOffer(f"the value is {_a(leaf)}, not a tensor")
        else:
            raise NothingToOffer(f"the leaf {path} is {_a(leaf)}, neither a tensor nor plain data")
    if not found:
        what = ", not a tensor" if "" in others else " and holds no tensor"
        raise NothingToOffer(f"the value is {_a(value)}{what}", others)
    # By path, so that the order of insertion into a dict does not matter.
    paths = sorted(found)
    originals = [found[path] for path in paths]
    tensors = [local_tensor(original) for original in originals]
    for path, tensor in zip(paths, tensors, strict=True):
        _check_storage(path, tensor)
    specs = tuple(spec_of(path, tensor) for path, tensor in zip(paths, tensors, strict=True))
    structure = json.dumps(sorted(path for path, _ in flat))
    return Leaves(value, originals, tensors, specs, structure, others)


def _as_json(leaf: Any) -> str:
    """The type and value of a plain leaf, by which it is compared; for a long text, its beginning and a checksum."""
    if isinstance(leaf, str) and len(leaf) > _LONGEST_TEXT:
        checksum = hashlib.sha256(leaf.encode("utf-8", "surrogatepass")).hexdigest()
        leaf_text = f"{leaf[:_SHOWN_OF_TEXT]}... ({len(leaf)} characters, SHA-256 {checksum})"
        return json.dumps([type(leaf).__name__, leaf_text])
    return json.dumps([type(leaf).__name__, leaf])


def flatten(value: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """(path, leaf) of all leaves, and the tree that they form. A path is written as in Python: `['kv'][0]`."""
    try:
        flat, tree = pytree.tree_flatten_with_path(value)
    except ValueError as error:
        if is_from_signal_handler(error):
            raise
        # A container that is registered without names for its parts (a library's output class): they are numbered.
        leaves, tree = pytree.tree_flatten(value)
        return [(f"[{number}]" if tree.num_children else "", leaf) for number, leaf in enumerate(leaves)], tree
    return [(pytree.keystr(key_path), leaf) for key_path, leaf in flat], tree


def _check_storage(name: str, tensor: torch.Tensor) -> None:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise NothingToOffer(
            f"{name} is a tensor inside a torch.func transform (vmap, grad, ...), where it has no one value"
        )
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        special = "on the meta device" if tensor.is_meta else "nested" if tensor.is_nested else ""
        kind = special or f"{tensor.layout}, {tensor.dtype}"
        raise NothingToOffer(f"{name} is a tensor without plain memory ({kind}); pass a dense one")


def _a(value: Any) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


TENSOR_MARK = "__grafter_tensor__"


def encode_extras(extras: Any) -> tuple[str, list[torch.Tensor]]:
    """Extras as JSON text, and the tensors in them, which travel as payload. Raises UsageError for anything else than
    data."""
    if not isinstance(extras, Mapping):
        raise UsageError(f"extras must be a dict, not {_a(extras)}")
    tensors: list[torch.Tensor] = []
    return json.dumps(_encode(extras, "extras", tensors)), tensors


def _encode(value: Any, path: str, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, _DATA) and type(value) in _DATA:
        return value
    if isinstance(value, torch.Tensor):
        tensor = local_tensor(value)
        try:
            _check_storage(path, tensor)
        except NothingToOffer as nothing:
            raise UsageError(str(nothing)) from None
        tensors.append(tensor)
        return {TENSOR_MARK: len(tensors) - 1}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == TENSOR_MARK:
                raise UsageError(f"{path} has the key {key!r}; keys must be strings")
        return {key: _encode(item, f"{path}[{key!r}]", tensors) for key, item in value.items()}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and type(value.item()) in _DATA:
        return value.item()
    raise UsageError(
        f"{path} is {_a(value)}. Extras are data: None, bool, int, float, str, tensors, and lists and dicts of them"
    )


def decode_extras(text: str, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The other side's extras. Tuples arrive as lists."""

    def restore(mapping: dict[str, Any]) -> Any:
        if set(mapping) == {TENSOR_MARK}:
            return tensors[mapping[TENSOR_MARK]]
        return mapping

    decoded = json.loads(text, object_hook=restore)
    if not isinstance(decoded, dict):
        raise ValueError("the extras received are not a dict")
    return decoded
