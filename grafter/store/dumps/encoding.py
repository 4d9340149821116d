"""Metadata as JSON: what cannot be encoded is replaced by its repr and named; it never costs the tensor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from grafter.core.signal_handlers import is_from_signal_handler

TENSOR_MARK = "__grafter_tensor__"
MAX_REPR = 500
_MAX_DEPTH = 32
# Readers in other languages have no larger whole numbers, and Python reads no arbitrarily long ones.
_MAX_INTEGER_BITS = 1024


class MetadataEncoder:
    """Encodes the metadata of one point. What it leaves behind: `not_encoded` (path -> repr), `excluded` (paths), and
    `tensors`, to be stored as `extras<n>`.

    exclude: keys of dicts that are left out, at any depth. The caller's objects are never changed.
    """

    def __init__(self, exclude: frozenset[str] = frozenset()) -> None:
        self._exclude = exclude
        self.not_encoded: dict[str, str] = {}
        self.excluded: list[str] = []
        self.tensors: list[torch.Tensor] = []

    def encode(self, value: Any, path: str) -> Any:
        """JSON data: None, bool, int, float, str, lists and dicts of them; a tensor is {TENSOR_MARK: n}.

        Never raises for what `value` is or does, unless it is a KeyboardInterrupt or the like.
        """
        try:
            return self._encode(value, path, 0)
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            # A container whose iteration fails, a subclass that is not what it says.
            return self._replaced(value, path)

    def text(self, text: str, path: str) -> str:
        """A text that has an encoding: lone surrogates, which have none, are written as escapes."""
        clean = _clean(text)
        if clean != text:
            self.not_encoded[path] = _bounded(clean)
        return clean

    def _encode(self, value: Any, path: str, depth: int) -> Any:
        if value is None or value is True or value is False or type(value) is float:
            return value
        if type(value) is str:
            return self.text(value, path)
        if type(value) is int:
            return value if value.bit_length() <= _MAX_INTEGER_BITS else self._replaced(value, path)
        if depth >= _MAX_DEPTH:
            return self._replaced(value, path)
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            return {TENSOR_MARK: len(self.tensors) - 1}
        if isinstance(value, (list, tuple)):
            return [self._encode(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(value)]
        if isinstance(value, Mapping):
            return self._encode_mapping(value, path, depth)
        return self._encode_number(value, path)

    def _encode_mapping(self, mapping: Mapping[Any, Any], path: str, depth: int) -> Any:
        encoded: dict[str, Any] = {}
        for key, item in mapping.items():
            if type(key) is not str or key == TENSOR_MARK:
                place = f"{path}[{safe_repr(key)}]"
                self.not_encoded[place] = f"the key {safe_repr(key)}"
                encoded[f"key {safe_repr(key)}"] = self._encode(item, place, depth + 1)
            elif key in self._exclude:
                self.excluded.append(f"{path}.{key}")
            else:
                place = f"{path}.{_clean(key)}"
                encoded[self.text(key, place)] = self._encode(item, place, depth + 1)
        return encoded

    def _encode_number(self, value: Any, path: str) -> Any:
        """NumPy scalars and arrays; enums and other subclasses of plain data as what they are made of."""
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            item = value.item()
            return self._encode(item, path, _MAX_DEPTH - 1) if type(item) is not type(value) else item
        if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
            return self._encode(torch.from_numpy(value.copy()), path, 0)
        if isinstance(value, str):
            return self.text(str.__str__(value), path)
        if isinstance(value, int):
            return self._encode(int.__int__(value), path, 0)
        if isinstance(value, float):
            return float.__float__(value)
        return self._replaced(value, path)

    def _replaced(self, value: Any, path: str) -> str:
        shown = safe_repr(value)
        self.not_encoded[_clean(path)] = shown
        return shown


def safe_repr(value: Any) -> str:
    """At most MAX_REPR characters, whatever `value` does when it is asked for its repr."""
    try:
        return _bounded(_clean(str.__str__(repr(value))))
    except Exception as error:
        if is_from_signal_handler(error):
            raise
        return f"<a {_type_name(value)} whose repr raises {_type_name(error)}>"


def _type_name(value: Any) -> str:
    return _bounded(_clean(type.__getattribute__(type(value), "__name__")))


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_REPR else f"{text[: MAX_REPR - 3]}..."


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
