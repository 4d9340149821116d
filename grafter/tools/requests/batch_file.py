"""A batch on disk: JSON lines, and its tensors in a second file. Both get their names when they are complete, the lines
last.

    requests-<when>-<process>-<random>-000000.jsonl         a header, then one line per request
    requests-<when>-<process>-<random>-000000.safetensors   only if there are tensors
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from grafter.store.dumps.encoding import safe_repr
from grafter.store.dumps.writer import StoredTensor, write_tensors
from grafter.store.written_files import whole_file
from grafter.tools.requests.encoding import resolve
from grafter.tools.requests.entry import LONGEST_LINE, Entry, Part, line_of, tensor_name

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
        told = f"{len(parts[name].text)} characters of JSON are more than a line takes"
        parts[name] = Part("null", {**parts[name].not_encoded, name: told}, parts[name].excluded)
        line = line_of(entry, parts, own)
    return line
