"""One request in the recorder's memory: the request, its output, and the line that represents it in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from grafter.store.dumps.snapshot import Snapshot

State = Literal["finished", "unfinished", "failed"]

# Longer lines are neither written nor read.
LONGEST_LINE = 1 << 26


class Later:
    """A value that is made on the writer's thread, so that the server's thread does not wait for it.

    make: returns the value, in JSON's own types; its input must not change until then. nbytes: the memory that it holds
    until then.
    """

    __slots__ = ("make", "nbytes")

    def __init__(self, make: Callable[[], Any], nbytes: int) -> None:
        self.make, self.nbytes = make, nbytes


@dataclass
class Part:
    """A request, its metadata or its output, encoded: JSON text, with tensors apart."""

    text: str
    not_encoded: dict[str, str] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    # By the number in the text.
    snapshots: dict[int, Snapshot] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return len(self.text) + sum(snapshot.nbytes for snapshot in self.snapshots.values())


@dataclass(eq=False)
class Entry:
    """A request from `record` on. `parts`: those of request, meta and output that exist so far; times are seconds since
    1970.
    """

    index: int
    id: str
    time: float
    exclude: frozenset[str]
    parts: dict[str, Part | Later]
    state: State = "unfinished"
    reason: str | None = None
    finished_time: float | None = None
    # Whether a dump wrote it while it was unfinished.
    is_written: bool = False

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def line_of(entry: Entry, parts: dict[str, Part], tensor_file: str | None) -> str:
    """The entry's line, without its end. tensor_file: the name of the file that holds its tensors."""
    not_encoded: dict[str, str] = {}
    excluded: list[str] = []
    stored_as: dict[str, str] = {}
    for name, part in parts.items():
        not_encoded |= part.not_encoded
        excluded += part.excluded
        for number, snapshot in part.snapshots.items():
            if snapshot.stored_as is not None:
                stored_as[f"{name}.{number}"] = str(snapshot.values.dtype).removeprefix("torch.")
    fields = {
        "index": entry.index, "id": entry.id, "time": entry.time, "finished_time": entry.finished_time,
        "state": entry.state, "reason": entry.reason, "excluded": excluded, "not_encoded": not_encoded,
    }  # fmt: skip
    if tensor_file is not None:
        fields |= {"tensor_file": tensor_file, "stored_as": stored_as}
    # The parts are already text.
    bodies = "".join(f', "{name}": {parts[name].text if name in parts else "null"}' for name in PARTS)
    return json.dumps(fields, ensure_ascii=False)[:-1] + bodies + "}"


PARTS = ("request", "meta", "output")


def tensor_name(index: int, part: str, number: int) -> str:
    """A tensor's name in the batch's file."""
    return f"{index}.{part}.{number}"
