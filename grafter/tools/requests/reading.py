"""Reads recordings without trusting them: bounded lines, checked fields, and each fault with its file and line.

An index comes first (where each request is, and when it arrived), then one request at a time, so that a recording of
any size takes little memory. A request that was written as unfinished and again when it was finished counts once, as
finished.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grafter.errors import DumpError
from grafter.store.dumps.record import TENSOR_MARK
from grafter.store.dumps.record_file import listed, opened, shown
from grafter.store.dumps.tensor_file import map_tensor, read_header
from grafter.tools.requests.batch_file import FILE_PREFIX, FORMAT, FORMAT_VERSION
from grafter.tools.requests.entry import LONGEST_LINE, State, tensor_name

# The limits of one recording; an index entry takes some hundred bytes.
MOST_REQUESTS = 10_000_000
_SUFFIX = ".jsonl"


class _Header(BaseModel):
    """The first line of a recording's file, as far as a reader needs it."""

    model_config = ConfigDict(extra="ignore", strict=True)
    format: str
    format_version: int
    recorder: str = Field(max_length=200)


class Recorded(BaseModel):
    """One request as it was recorded: a line of the file. Times are seconds since 1970."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    index: int = Field(ge=0)
    id: str
    time: float
    finished_time: float | None = None
    state: State
    reason: str | None = None
    request: Any = None
    meta: Any = None
    output: Any = None
    excluded: list[str] = Field(default_factory=list)
    not_encoded: dict[str, str] = Field(default_factory=dict)
    tensor_file: str | None = None
    stored_as: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where one request is, and its order: `number` counts from 0 in the order in which requests arrived."""

    number: int
    id: str
    time: float
    state: State
    file: str
    line: int
    offset: int = field(repr=False)
    length: int = field(repr=False)


class Recording:
    """A file, or all `requests-*.jsonl` of a directory, in the order in which the requests arrived.

    Raises DumpError for a file that is not a recording, is damaged, or is too large. Nothing in it is unpickled or
    evaluated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        whole = given.resolve()
        if whole.is_dir():
            self._directory = whole
            names = [name for name in listed(whole, ".") if name.startswith(FILE_PREFIX) and name.endswith(_SUFFIX)]
            if not names:
                raise DumpError(f"{given}: it holds no {FILE_PREFIX}*{_SUFFIX}, so nothing was recorded in it.")
        else:
            self._directory, names = whole.parent, [whole.name]
        self.places = self._index(names)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, place: Place) -> Recorded:
        """The request at this place. Raises DumpError if the file has changed since."""
        with opened(self._directory, place.file) as descriptor:
            line = os.pread(descriptor, place.length, place.offset)
        recorded = _parsed(line, f"{self._directory}/{place.file}:{place.line}")
        if (recorded.id, recorded.time) != (place.id, place.time):
            raise DumpError(f"{self._directory}/{place.file}:{place.line}: the file was changed while it was read.")
        return recorded

    def tensor(self, recorded: Recorded, part: str, number: int) -> torch.Tensor:
        """A tensor of a request: the one that {"__grafter_tensor__": number} stands for in its part (request, meta,
        output).

        Raises DumpError if it does not exist.
        """
        if recorded.tensor_file is None or "/" in recorded.tensor_file:
            raise DumpError(f"the request {shown(recorded.id)} does not name a file of tensors in its directory.")
        with opened(self._directory, recorded.tensor_file) as descriptor:
            file = read_header(descriptor, f"{self._directory}/{shown(recorded.tensor_file)}")
            name = tensor_name(recorded.index, part, number)
            if name not in file.entries:
                raise DumpError(f"{file.where}: it has no tensor {shown(name)!r}.")
            entry = file.entries[name]
            dtype_name = recorded.stored_as.get(f"{part}.{number}", entry.dtype)
            dtype = getattr(torch, dtype_name, None)
            if not isinstance(dtype, torch.dtype):
                raise DumpError(f"{file.where}: {shown(name)!r} is said to be of the dtype {shown(dtype_name)!r}.")
            shape = entry.shape
            if dtype.is_complex and not entry.dtype.startswith("complex"):
                shape = shape[:-1]
            return map_tensor(descriptor, file, name, dtype, shape)

    def _index(self, names: list[str]) -> tuple[Place, ...]:
        # (recorder, index) -> its last line, or the last one that is finished.
        found: dict[tuple[str, int], Place] = {}
        for name in names:
            with opened(self._directory, name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
                for recorder, recorded, place in _read_lines(file, f"{self._directory}/{name}", name):
                    key = (recorder, recorded.index)
                    if key not in found or found[key].state == "unfinished":
                        found[key] = place
                    if len(found) > MOST_REQUESTS:
                        raise DumpError(f"{self._directory}/{name}: more than {MOST_REQUESTS} requests; give one file.")
        ordered = sorted(found.items(), key=lambda item: (item[1].time, item[0]))
        return tuple(
            Place(number, place.id, place.time, place.state, place.file, place.line, place.offset, place.length)
            for number, (_, place) in enumerate(ordered)
        )


def _read_lines(file: Any, where: str, name: str) -> Iterator[tuple[str, Recorded, Place]]:
    recorder: str | None = None
    number = offset = 0
    while line := file.readline(LONGEST_LINE + 2):
        number += 1
        if not line.endswith(b"\n"):
            why = f"it is longer than {LONGEST_LINE} bytes" if len(line) > LONGEST_LINE else "it is incomplete"
            raise DumpError(f"{where}:{number}: {why}. The file is damaged: batches are written whole or not at all.")
        if recorder is None:
            recorder = _read_header(line, f"{where}:{number}")
        else:
            recorded = _parsed(line, f"{where}:{number}")
            place = Place(0, recorded.id, recorded.time, recorded.state, name, number, offset, len(line))
            yield recorder, recorded, place
        offset += len(line)
    if recorder is None:
        raise DumpError(f"{where}: it is empty, so it is not a recording.")


def _read_header(line: bytes, where: str) -> str:
    try:
        header = _Header.model_validate(_json(line))
    except (ValidationError, ValueError, RecursionError):
        raise DumpError(
            f'{where}: its first line is not the header of a recording ({{"format": "{FORMAT}", ...}}).'
        ) from None
    if header.format != FORMAT:
        raise DumpError(f"{where}: it is of the format {shown(header.format)!r}, and recordings are {FORMAT!r}.")
    if not 1 <= header.format_version <= FORMAT_VERSION:
        raise DumpError(
            f"{where}: it is of version {header.format_version} of the format, and this grafter reads up to version "
            f"{FORMAT_VERSION}. Update grafter here."
        )
    return header.recorder


def _parsed(line: bytes, where: str) -> Recorded:
    try:
        recorded = Recorded.model_validate(_json(line))
    except RecursionError:
        raise DumpError(f"{where}: it is nested too deeply to be read.") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DumpError(f"{where}: it is not a request: {shown(place)}: {shown(first['msg'])}.") from None
    except ValueError as error:
        raise DumpError(f"{where}: it is not JSON: {shown(str(error))}.") from None
    if not math.isfinite(recorded.time):
        raise DumpError(f"{where}: its time is {recorded.time}, which is not a time.")
    return recorded


def _json(line: bytes) -> Any:
    return json.loads(line.decode())


def holds_tensor(value: Any) -> bool:
    """Whether this part of a request held a tensor, which JSON alone cannot send."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if TENSOR_MARK in item:
                return True
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return False
