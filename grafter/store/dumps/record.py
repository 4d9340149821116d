"""What one dumped point says of itself: the schema of the files, described for other languages in docs/dump-format.md.

Below `<dir>/<run_name>/<role>/`, each rank writes alone:

    rank<r>.dumps.jsonl                       one `DumpRecord` a line, in the order of the program, each appended once
                                              its file is in place
    rank<r>/<order>-<name>.safetensors        the tensors of one point (level `full`); the same record, as JSON, is the
                                              value of "grafter" in its `__metadata__`, so that a file stands alone

A tensor is called `value<path>` as it was when the program came to the point, and `grafted<path>` as the program went
on with it, where a graft changed it; `<path>` is the leaf's, empty for a bare tensor. `extras<n>` are tensors within
extras. A dtype that safetensors lacks is stored as another, which the leaf's `stored_as` names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import DirectionName, Outcome, Role, TensorStatistics
from grafter.core.rows.tokens import TokenRuns

FORMAT_VERSION = 1
METADATA_KEY = "grafter"

Level = Literal["full", "statistics", "checksum"]


class _Record(BaseModel):
    # Unknown fields are kept out, not refused: a newer grafter may have written the file.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class DumpedLeaf(_Record):
    """One tensor of the point. `dtype` as in `torch.float32`, without `torch.`; the shape is the local one."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    # Where it lies in the global tensor, as it was declared; None where nothing was.
    layout: DeclaredLayout | None = None
    # Of the value when the program came to the point; of what it went on with, where a graft changed it.
    statistics: TensorStatistics | None = None
    grafted_statistics: TensorStatistics | None = None
    # Hexadecimal; which function is said in docs/dump-format.md.
    checksum: str | None = None
    grafted_checksum: str | None = None
    stored_as: str | None = None


class DumpRecord(_Record):
    """One point on one rank. `order` counts this rank's dumped points over the whole run, in the program's order."""

    format_version: int = FORMAT_VERSION
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
    level: Level
    # Relative to the role's directory; None below level `full`, or where nothing could be saved (`reason` says why).
    file: str | None = None
    reason: str | None = None
    # The tensors of the value that are not saved, or not both before and after a graft: path -> why. None in files of
    # grafters that did not tell.
    unsaved: dict[str, str] | None = None
    leaves: tuple[DumpedLeaf, ...] = ()
    # The leaves that are no tensors: path -> value.
    others: dict[str, Any] = {}
    # This rank's place on the mesh: (axis, coordinate, size).
    axes: tuple[tuple[str, int, int], ...] = ()
    # As they were given; a tensor is {"__grafter_tensor__": n}, stored as `extras<n>`.
    extras: dict[str, Any] | None = None
    # Metadata that cannot be encoded: its path -> its repr. And what GRAFTER_DUMP_EXCLUDE left out.
    not_encoded: dict[str, str] = {}
    excluded: tuple[str, ...] = ()
    tokens: TokenRuns | None = None
    # What the graft of this point came to; None where no filter of a direction matched.
    direction: DirectionName | None = None
    outcome: Outcome | None = None
    # GRAFTER_RECORD: this rank's header as it would have travelled, for a graft from this recording.
    header: str | None = None


# What is wrong with a directory of dumps, where the rest of it can be read: said, and never passed over in silence.


@dataclass(frozen=True)
class Problem:
    """`file`, relative to the role's directory, or with a line as `rank0.dumps.jsonl:3`; and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


# Metadata as JSON: what cannot be encoded is replaced by its repr and named; it never costs the tensor.

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
