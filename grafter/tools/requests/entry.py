"""One request in the recorder's memory: the request, its output, and the line that represents it in the file."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Sequence
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


# What the bytes of a body say: JSON, the events of a stream, text, or else the bytes themselves.

# A body that is small on the wire may be large once it is unpacked.
MOST_UNPACKED = 1 << 26
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


def body_fields(pieces: Sequence[bytes], nbytes: int, content_type: str, encoding: str = "") -> dict[str, Any]:
    """A body as fields of a record.

    pieces: what was kept of it. nbytes: how long it was. Returns {"kind": "json" | "events" | "text" | "base64" |
    "none", "body": ..., "bytes": nbytes}, with "kept_bytes" where it was not kept whole. Of server-sent events, `body`
    is the list of their data, each as JSON where it is.
    """
    data = b"".join(pieces)
    fields: dict[str, Any] = {"bytes": nbytes}
    is_whole = len(data) == nbytes
    if not is_whole:
        fields["kept_bytes"] = len(data)
    unpacked = _unpacked(data, encoding.strip().lower())
    if unpacked is None:
        return {"kind": "base64", "body": base64.b64encode(data).decode(), "content_encoding": encoding, **fields}
    kind, body = _read(unpacked, content_type.partition(";")[0].strip().lower(), is_whole)
    return {"kind": kind, "body": body, **fields}


def _read(data: bytes, media_type: str, is_whole: bool) -> tuple[str, Any]:
    if not data:
        return "none", None
    try:
        # Where it was cut, half a character is no reason to lose the rest.
        text = data.decode("utf-8", "strict" if is_whole else "ignore")
    except UnicodeDecodeError:
        return "base64", base64.b64encode(data).decode()
    if media_type == "text/event-stream":
        return "events", read_events(text)
    if is_whole and (media_type.endswith("json") or text[:1] in "{["):
        try:
            return "json", json.loads(text)
        except (ValueError, RecursionError):
            pass
    return "text", text


def read_events(text: str) -> list[Any]:
    """The data of server-sent events, in order: JSON where it is, else text (`[DONE]`). A cut one is left out."""
    events: list[Any] = []
    data: list[str] = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            events.append(_json_or_text("\n".join(data)))
            data = []
    return events


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _unpacked(data: bytes, encoding: str) -> bytes | None:
    """None where the encoding is not known here, or the data is not in it."""
    if encoding in ("", "identity"):
        return data
    if encoding not in _WINDOW_BITS:
        return None
    try:
        unpacking = zlib.decompressobj(_WINDOW_BITS[encoding])
        unpacked = unpacking.decompress(data, MOST_UNPACKED)
    except zlib.error:
        return None
    return unpacked if not unpacking.unconsumed_tail else None


def body_bytes(kind: Any, body: Any) -> bytes:
    """The bytes to send for a recorded body of this kind. Raises ValueError for what is none."""
    if kind == "none" or (kind == "json" and body is None):
        return b"" if kind == "none" else b"null"
    if kind == "json":
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if kind == "text" and isinstance(body, str):
        return body.encode("utf-8", "surrogatepass")
    if kind == "base64" and isinstance(body, str):
        return base64.b64decode(body, validate=True)
    raise ValueError(f"a body of the kind {str(kind)[:40]!r} cannot be sent")
