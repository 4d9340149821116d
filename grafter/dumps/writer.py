"""Files: a point's tensors as safetensors, written to a temporary name and renamed; its record as one line.

The format is so simple that writing it takes one call of the system (8 bytes of length, a JSON header, the bytes), and
that call copies nothing: less than half of what the library takes for small tensors (`benchmarks/dumping.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from grafter.dumps.record import METADATA_KEY, DumpRecord
from grafter.errors import ConfigError

# The dtypes that every reader of safetensors knows.
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TEMPORARY_SUFFIX = ".tmp"
_MAX_NAME = 80
# The system takes at most so many pieces in one call.
_MAX_PIECES = 1024


def file_name(order: int, name: str) -> str:
    """`000012-layers.mlp.out.safetensors`: letters, digits and `-_.` of the point's name; the record has all of it."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:_MAX_NAME].strip("._") or "point"
    return f"{order:06d}-{readable}.safetensors"


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, which is there in full or not at all.

    tensors: contiguous CPU tensors of dtypes in SAFETENSORS_NAMES; nothing is copied. Raises OSError, and then leaves
    nothing behind.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    pieces: list[memoryview] = []
    offset = 0
    # As the library orders them: each lies where its dtype allows it to be mapped.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        if end > offset:
            pieces.append(tensor.view(-1).view(torch.uint8).numpy().data)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = f"{path}{TEMPORARY_SUFFIX}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _write_all(fd, [memoryview(len(text).to_bytes(8, "little") + text), *pieces])
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _write_all(fd: int, pieces: list[memoryview]) -> None:
    # The system writes at most 2 GiB in one call.
    while pieces:
        written = os.writev(fd, pieces[:_MAX_PIECES])
        while pieces and written >= len(pieces[0]):
            written -= len(pieces.pop(0))
        if written:
            pieces[0] = pieces[0][written:]


def refuse_earlier_dumps(role_directory: Path, role_rank: int, who: str) -> None:
    """Called before a run writes anything: what an earlier one left would be damaged. Raises ConfigError."""
    if os.path.lexists(role_directory / f"rank{role_rank}.dumps.jsonl"):
        raise earlier_dumps(role_directory, who)


def earlier_dumps(role_directory: Path, who: str) -> ConfigError:
    return ConfigError(
        f"{role_directory} holds dumps of {who} from an earlier run, and two runs would mix. Give this run another "
        f"name (GRAFTER_RUN_NAME), or remove that one."
    )


class RecordLog:
    """One rank's `rank<r>.dumps.jsonl`. What was appended survives a crash of the process."""

    def __init__(self, path: Path) -> None:
        """Raises FileExistsError where there is one already: two runs would mix."""
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o644)
        self._end = 0

    def append(self, line: str) -> None:
        """Raises OSError where the line cannot be written in full, and then takes back what was."""
        data = memoryview(line.encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            # Half a line would spoil the next one, too.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise
        self._end = os.fstat(self._fd).st_size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def record_text(record: DumpRecord) -> str:
    return record.model_dump_json()


def record_metadata(text: str) -> dict[str, str]:
    return {METADATA_KEY: text}
