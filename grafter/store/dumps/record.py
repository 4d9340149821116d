"""The record of one dumped point: the schema of the files, which docs/dump-format.md describes for other languages.

Each rank writes its own files below `<dir>/<run_name>/<role>/`:

    rank<r>.dumps.jsonl                       one `DumpRecord` a line, in the order of the program; a line is appended
                                              once its file is complete
    rank<r>/<order>-<name>.safetensors        the tensors of one point (level `full`); the same record, as JSON, is the
                                              value of "grafter" in its `__metadata__`, so each file can be read alone

`value<path>` is a tensor before the point, and `grafted<path>` the same tensor after a graft changed it; `<path>` is
the leaf's, empty for a bare tensor. `extras<n>` are tensors within extras. A dtype that safetensors lacks is stored as
another one, which the leaf's `stored_as` names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from grafter.config.settings.field_types import DumpLevel
from grafter.core.layout.declared import DeclaredLayout
from grafter.core.leaves import TENSOR_MARK
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import PointOutcome, Record, TensorStatistics
from grafter.core.roles import Direction, Role
from grafter.core.tokens.tokens import TokenRuns

DUMP_FORMAT_VERSION = 1
METADATA_KEY = "grafter"


class DumpedLeaf(Record):
    """One tensor of the point. shape: the local one. dtype: without `torch.`."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    # Its place in the global tensor, as declared; None if no layout was declared.
    layout: DeclaredLayout | None = None
    # Of the value before the point, and of the value after a graft changed it.
    statistics: TensorStatistics | None = None
    grafted_statistics: TensorStatistics | None = None
    # Hexadecimal; docs/dump-format.md names the function.
    checksum: str | None = None
    grafted_checksum: str | None = None
    stored_as: str | None = None


class DumpRecord(Record):
    """One point on one rank. order: the number of the point among this rank's dumped points, in the program's order."""

    format_version: int = DUMP_FORMAT_VERSION
    order: int
    time: float
    name: str
    tags: dict[str, Any]
    step: int
    phase: str
    occurrence: int
    role: Role
    role_rank: int
    role_world_size: int
    # Role ranks that share the point.
    participants: tuple[int, ...]
    call_site: str
    level: DumpLevel
    # Relative to the role's directory; None below level `full`, or if nothing could be saved (`reason` says why).
    file: str | None = None
    reason: str | None = None
    # The tensors of the value that are not saved, or not both before and after a graft: path -> why. None in files of
    # older versions, which did not record it.
    unsaved: dict[str, str] | None = None
    leaves: tuple[DumpedLeaf, ...] = ()
    # The leaves that are not tensors: path -> value.
    others: dict[str, Any] = Field(default_factory=dict)
    # This rank's place on the mesh: (axis, coordinate, size).
    axes: tuple[tuple[str, int, int], ...] = ()
    # As given to the call; a tensor is {"__grafter_tensor__": n}, stored as `extras<n>`.
    extras: dict[str, Any] | None = None
    # Metadata that cannot be encoded: path -> repr. excluded: the paths that GRAFTER_DUMP_EXCLUDE left out.
    not_encoded: dict[str, str] = Field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    tokens: TokenRuns | None = None
    # The result of grafting or comparing this point; None if no filter of a direction matched.
    direction: Direction | None = None
    outcome: PointOutcome | None = None
    # GRAFTER_RECORD: the header that this rank would have sent, for a graft from this recording.
    header: str | None = None


@dataclass(frozen=True)
class Problem:
    """A fault in a directory of dumps of which the rest can be read.

    file: relative to the role's directory, with a line if it has one (`rank0.dumps.jsonl:3`). what: the fault.
    """

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


MAX_REPR = 500
_MAX_DEPTH = 32
# Other languages have no larger integers, and Python refuses to read very long ones.
_MAX_INTEGER_BITS = 1024


class MetadataEncoder:
    """The encoder of one point's metadata as JSON.

    A value that cannot be encoded is replaced by its repr and noted in `not_encoded` (path -> repr). `excluded` holds
    the paths that were left out, and `tensors` the tensors to be stored as `extras<n>`.

    exclude: keys of dicts to leave out, at any depth. The caller's objects are never changed.
    """

    def __init__(self, exclude: frozenset[str] = frozenset()) -> None:
        self._exclude = exclude
        self.not_encoded: dict[str, str] = {}
        self.excluded: list[str] = []
        self.tensors: list[torch.Tensor] = []

    def encode(self, value: Any, path: str) -> Any:
        """JSON data: None, bool, int, float, str, lists and dicts of them; a tensor is {TENSOR_MARK: n}.

        Never raises because of `value`, except KeyboardInterrupt and the like.
        """
        try:
            return self._encode(value, path, 0)
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            # A container whose iteration fails, or a subclass that misbehaves.
            return self._replaced(value, path)

    def text(self, text: str, path: str) -> str:
        """The text with lone surrogates, which have no encoding, as escapes."""
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
        """NumPy scalars and arrays; enums and other subclasses of plain types as their plain values."""
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
    """The repr of `value`, at most MAX_REPR characters. Never raises, even if the repr does."""
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
