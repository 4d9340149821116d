"""A batch on disk: JSON lines, and its tensors in a second file. Both get their names when they are complete, the lines
last.

    requests-<when>-<process>-<random>-000000.jsonl         a header, then one line per request
    requests-<when>-<process>-<random>-000000.safetensors   only if there are tensors
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grafter.store.dumps.record import MetadataEncoder, safe_repr
from grafter.store.dumps.snapshot import Buffers, NothingToSave, saveable, take_snapshot
from grafter.store.dumps.writer import StoredTensor, write_tensors
from grafter.store.written_files import whole_file
from grafter.tools.requests.credentials import (
    holds_headers,
    without_secret_headers,
    without_secrets_in_path,
    without_secrets_in_query,
)
from grafter.tools.requests.entry import LONGEST_LINE, Entry, Later, Part, line_of, tensor_name

logger = logging.getLogger("grafter")

FORMAT = "grafter.tools.requests"
FORMAT_VERSION = 1
FILE_PREFIX = "requests-"

# A lone surrogate has no encoding. This writes it as a JSON escape, which is read back as the same character.
_UTF8 = ("utf-8", "backslashreplace")


class BatchWriter:
    """The files of one recorder. Used only by its writing thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.recorder = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(3)}"
        self._number = 0

    def write(self, entries: Sequence[Entry], facts: dict[str, object]) -> None:
        """Write all of the entries or, if the disk refuses, none. facts: written to the header.

        Raises OSError if the lines cannot be written. Tensors that cannot be written are named in their lines.
        """
        name = f"{FILE_PREFIX}{self.recorder}-{self._number:06d}"
        self._number += 1
        tensor_file = self._write_tensors(f"{name}.safetensors", entries)
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "recorder": self.recorder, **facts}
        # What clients asked is theirs: of no other user of the machine.
        whole = whole_file(self._directory / f"{name}.jsonl", mode=0o600)
        with whole as descriptor, open(descriptor, "wb", closefd=False) as file:
            file.writelines(_lines(header, entries, tensor_file))

    def _write_tensors(self, name: str, entries: Sequence[Entry]) -> str | None:
        """The file's name; None if there are no tensors, or if they cannot be written, which their lines then say."""
        stored: dict[str, StoredTensor] = {}
        holding: list[tuple[str, Part]] = []
        for entry in entries:
            for part_name, part in entry.parts.items():
                if isinstance(part, Part) and part.snapshots:
                    holding.append((part_name, part))
                    for number, snapshot in part.snapshots.items():
                        snapshot.wait()
                        stored[tensor_name(entry.index, part_name, number)] = snapshot.stored
        if not stored:
            return None
        try:
            write_tensors(self._directory / name, stored, {"format": FORMAT, "recorder": self.recorder}, mode=0o600)
        except Exception as error:
            logger.error("grafter: the tensors of a batch of %d requests are lost: %s", len(entries), error)
            for part_name, part in holding:
                for number in part.snapshots:
                    part.not_encoded[f"{part_name}, tensor {number}"] = f"not written: {safe_repr(error)}"
            return None
        return name


def _lines(header: dict[str, object], entries: Sequence[Entry], tensor_file: str | None) -> Iterator[bytes]:
    """The lines one by one, so that a whole batch is never in memory as text."""
    yield json.dumps(header, ensure_ascii=False).encode(*_UTF8) + b"\n"
    for entry in entries:
        # Let the server's own thread run, which would otherwise wait for this one.
        time.sleep(0)
        parts = {name: resolve(part, name, entry.exclude) for name, part in entry.parts.items()}
        time.sleep(0)
        yield _bounded_line(entry, parts, tensor_file).encode(*_UTF8) + b"\n"


def _bounded_line(entry: Entry, parts: dict[str, Part], tensor_file: str | None) -> str:
    """The line. If it would be too long for a reader, its largest parts are left out and named."""
    own = tensor_file if any(part.snapshots for part in parts.values()) else None
    line = line_of(entry, parts, own)
    for name in sorted(parts, key=lambda name: len(parts[name].text), reverse=True):
        if len(line) < LONGEST_LINE // 4 or len(line.encode(*_UTF8)) < LONGEST_LINE:
            break
        reason = f"{len(parts[name].text)} characters of JSON are more than a line takes"
        parts[name] = Part("null", {**parts[name].not_encoded, name: reason}, parts[name].excluded)
        line = line_of(entry, parts, own)
    return line


# Any object as JSON and tensors: what cannot be encoded becomes its repr and is named; the request is kept.

_PLAIN = frozenset({int, float, bool, type(None)})
_SMALLEST_RUN = 16
_LARGEST_INTEGER = 1 << 1000


class RequestEncoder(MetadataEncoder):
    """An encoder that also takes dataclasses and pydantic models apart, omits secret headers, and is fast for ids."""

    def _encode(self, value: Any, path: str, depth: int) -> Any:
        if type(value) is list and len(value) >= _SMALLEST_RUN and _is_plain(value):
            return value.copy()
        fields = _fields_of(value)
        return super()._encode(value if fields is None else fields, path, depth)

    def _encode_mapping(self, mapping: Mapping[Any, Any], path: str, depth: int) -> Any:
        safe = {}
        for key, item in mapping.items():
            safe[key] = without_secret_headers(item) if type(key) is str and holds_headers(key) else item
        return super()._encode_mapping(safe, path, depth)


def _is_plain(values: list[Any]) -> bool:
    """A flat list of numbers: token ids, embeddings. Most of a request's size, and recognised by its types alone."""
    kinds = set(map(type, values))
    if not kinds <= _PLAIN:
        return False
    return int not in kinds or all(abs(value) < _LARGEST_INTEGER for value in values if type(value) is int)


def _fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass or of a pydantic model; None for all else."""
    kind = type(value)
    if dataclasses.is_dataclass(kind) and not isinstance(value, type):
        return {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)
        }
    if hasattr(kind, "model_fields") and hasattr(kind, "__pydantic_validator__"):
        return {**vars(value), **(getattr(value, "__pydantic_extra__", None) or {})}
    return None


def encode_part(value: Any, name: str, exclude: frozenset[str], buffers: Buffers) -> Part:
    """`value` as it is now: it may be changed once this returns. Never raises for what it is or does.

    name: of the part; paths in `not_encoded` and `excluded` begin with it. exclude: keys of dicts that are left out, at
    any depth, unread. Tensors are copied to host memory, in their current stream's order.
    """
    encoder = RequestEncoder(exclude)
    try:
        if name == "meta":
            value = _without_secrets_in_url(value)
        text = json.dumps(encoder.encode(value, name), ensure_ascii=False)
    except Exception as error:
        # Such as a list that another thread changes: nothing of it may cost the request.
        encoder = RequestEncoder()
        encoder.not_encoded[name] = f"{safe_repr(value)}: {safe_repr(error)}"
        text = json.dumps(safe_repr(value))
    part = Part(text, encoder.not_encoded, encoder.excluded)
    for number, tensor in enumerate(encoder.tensors):
        try:
            with torch.no_grad():
                part.snapshots[number] = take_snapshot(saveable(tensor), buffers)
        except NothingToSave as reason:
            part.not_encoded[f"{name}, tensor {number}"] = str(reason)
        except Exception as error:
            part.not_encoded[f"{name}, tensor {number}"] = safe_repr(error)
    return part


def _without_secrets_in_url(meta: Any) -> Any:
    """The same of a request's meta data: `path` and `query` are what is sent again."""
    if not isinstance(meta, dict):
        return meta
    path, query = meta.get("path"), meta.get("query")
    return {
        **meta,
        **({"path": without_secrets_in_path(path)} if isinstance(path, str) else {}),
        **({"query": without_secrets_in_query(query)} if isinstance(query, str) else {}),
    }


def resolve(part: Part | Later, name: str, exclude: frozenset[str]) -> Part:
    """The part, made now if it is one for later. Never raises."""
    if isinstance(part, Part):
        return part
    try:
        return encode_json(part.make(), name, exclude)
    except Exception as error:
        failed = Part("null")
        failed.not_encoded[name] = safe_repr(error)
        return failed


def encode_json(value: Any, name: str, exclude: frozenset[str]) -> Part:
    """What was read from JSON, as it is and however deep, without excluded keys and secret headers."""
    text = json.dumps(value, ensure_ascii=False)
    excluded: list[str] = []
    # Most bodies have none of it, and are not walked through.
    if any(f'"{key}"' in text for key in exclude) or re.search('headers?"', text, re.IGNORECASE):
        text = json.dumps(_without(value, name, exclude, excluded), ensure_ascii=False)
    return Part(text, excluded=excluded)


def _without(value: Any, path: str, exclude: frozenset[str], excluded: list[str]) -> Any:
    if isinstance(value, list):
        return [_without(item, f"{path}[{number}]", exclude, excluded) for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if key in exclude:
            excluded.append(f"{path}.{key}")
        else:
            safe = without_secret_headers(item) if holds_headers(key) else item
            kept[key] = _without(safe, f"{path}.{key}", exclude, excluded)
    return kept
