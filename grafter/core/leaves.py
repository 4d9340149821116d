"""The value of a point as leaves: a tensor, or a pytree of tensors and plain data, taken apart and put together."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils import _pytree as pytree

from grafter.core.processes import is_from_signal_handler
from grafter.core.tensor_access import local_tensor
from grafter.errors import UsageError

# Numbers whose JSON form keeps apart what Python keeps apart.
_DATA = (str, int, float, bool, type(None))
# Texts travel in headers, at every point.
_LONGEST_TEXT, _SHOWN_OF_TEXT = 1024, 200


class TensorSpec(BaseModel):
    """What the other side must know of a tensor before it moves. `dtype` as in `torch.float32`, without `torch.`."""

    model_config = ConfigDict(frozen=True)

    path: str
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"a peer names a dtype that this torch {torch.__version__} does not have: {self.dtype[:40]!r}"
            )
        return dtype

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def spec_of(path: str, tensor: torch.Tensor) -> TensorSpec:
    return _spec(path, tuple(tensor.shape), tensor.dtype, tensor.device.type)


@lru_cache(maxsize=4096)
def _spec(path: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> TensorSpec:
    # The same tensors come again at every step, and a model that is validated costs ten times a look-up.
    return TensorSpec(path=path, shape=shape, dtype=str(dtype).removeprefix("torch."), device=device)


# Not frozen: made at every point, and freezing triples what that costs.
@dataclass
class Leaves:
    """A value taken apart. `tensors` are local tensors without autograd wrappers, parallel to `paths` and `specs`.

    `structure` names the containers, and `others` the leaves that are no tensors: both must be equal on both sides.
    """

    value: Any
    originals: list[torch.Tensor]
    tensors: list[torch.Tensor]
    specs: tuple[TensorSpec, ...]
    structure: str
    others: dict[str, str]

    def rebuilt(self, replaced: Sequence[torch.Tensor]) -> Any:
        """The value with other tensors in it; the value itself if none is another."""
        if all(new is old for new, old in zip(replaced, self.originals, strict=True)):
            return self.value
        if isinstance(self.value, torch.Tensor):
            return replaced[0]
        by_path = {spec.path: new for spec, new in zip(self.specs, replaced, strict=True)}
        flat, tree = flatten(self.value)
        return pytree.tree_unflatten([by_path.get(path, leaf) for path, leaf in flat], tree)


class NothingToOffer(Exception):
    """This rank's value can't be grafted; the text says why and travels to the other side.

    plain: path and value, as JSON, of a value that is plain data alone, and can be compared; else empty.
    """

    def __init__(self, reason: str, plain: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.plain = plain or {}


def take_apart(value: Any) -> Leaves:
    """Raises NothingToOffer, with the reason, for a value that holds no tensor or holds what is no data."""
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
    # By path, so that two dicts with another order of insertion are the same point.
    paths = sorted(found)
    originals = [found[path] for path in paths]
    tensors = [local_tensor(original) for original in originals]
    for path, tensor in zip(paths, tensors, strict=True):
        _check_storage(path, tensor)
    specs = tuple(spec_of(path, tensor) for path, tensor in zip(paths, tensors, strict=True))
    structure = json.dumps(sorted(path for path, _ in flat))
    return Leaves(value, originals, tensors, specs, structure, others)


def _as_json(leaf: Any) -> str:
    """Type and value of a plain leaf, by which it is compared; of a long text its beginning and a checksum."""
    if isinstance(leaf, str) and len(leaf) > _LONGEST_TEXT:
        checksum = hashlib.sha256(leaf.encode("utf-8", "surrogatepass")).hexdigest()
        leaf_text = f"{leaf[:_SHOWN_OF_TEXT]}... ({len(leaf)} characters, SHA-256 {checksum})"
        return json.dumps([type(leaf).__name__, leaf_text])
    return json.dumps([type(leaf).__name__, leaf])


def flatten(value: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """(path, leaf) of all leaves, and what puts them together again. The path is as in Python: `['kv'][0]`."""
    try:
        flat, tree = pytree.tree_flatten_with_path(value)
    except ValueError as error:
        if is_from_signal_handler(error):
            raise
        # A container registered without names for its parts (a library's own output class): they are numbered.
        leaves, tree = pytree.tree_flatten(value)
        return [(f"[{number}]" if tree.num_children else "", leaf) for number, leaf in enumerate(leaves)], tree
    return [(pytree.keystr(key_path), leaf) for key_path, leaf in flat], tree


def _check_storage(name: str, tensor: torch.Tensor) -> None:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise NothingToOffer(
            f"{name} is a tensor inside a torch.func transform (vmap, grad, ...), where it has no one value"
        )
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = (
            "on the meta device"
            if tensor.is_meta
            else "nested"
            if tensor.is_nested
            else f"{tensor.layout}, {tensor.dtype}"
        )
        raise NothingToOffer(f"{name} is a tensor without plain memory ({kind}); pass a dense one")


def _a(value: Any) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


_TENSOR_MARK = "__grafter_tensor__"


def encode_extras(extras: Any) -> tuple[str, list[torch.Tensor]]:
    """Extras as JSON text, and the tensors in it, which travel as payload. Raises UsageError where it is no data."""
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
        return {_TENSOR_MARK: len(tensors) - 1}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _TENSOR_MARK:
                raise UsageError(f"{path} has the key {key!r}; keys must be strings")
        return {key: _encode(item, f"{path}[{key!r}]", tensors) for key, item in value.items()}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and type(value.item()) in _DATA:
        return value.item()
    raise UsageError(
        f"{path} is {_a(value)}. Extras are data: None, bool, int, float, str, tensors, and lists and dicts of them"
    )


def decode_extras(text: str, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The other side's extras; tuples arrive as lists."""

    def restore(mapping: dict[str, Any]) -> Any:
        if set(mapping) == {_TENSOR_MARK}:
            return tensors[mapping[_TENSOR_MARK]]
        return mapping

    decoded = json.loads(text, object_hook=restore)
    if not isinstance(decoded, dict):
        raise ValueError("extras that came are not a dict")
    return decoded


# The keys under which a rank announces single tensors.

# Begins the key of one tensor's point; keys of modules begin with their names.
_TENSOR_KEY_MARK = "\t"


def is_tensor_key(key: str) -> bool:
    """Of what a rank has announced: whether it is one tensor's."""
    return key.startswith(_TENSOR_KEY_MARK)
