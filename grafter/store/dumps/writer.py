"""Files: a point's tensors as safetensors, written to a temporary name and renamed; its record as one line.

The format is so simple that writing it takes one call of the system (8 bytes of length, a JSON header, the bytes), and
that call copies nothing: less than half of what the library takes for small tensors (`benchmarks/dumping.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic_core import to_json

from grafter.errors import ConfigError
from grafter.store.dumps.record import METADATA_KEY
from grafter.store.written_files import whole_file, write_pieces

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
_MAX_NAME = 80


class StoredTensor(NamedTuple):
    """One tensor of a file. data: its bytes, row-major; or a flat tensor of dtype uint8 on the CPU."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes | memoryview | torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StoredTensor:
        """tensor: contiguous, on the CPU; its memory, not a copy."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.view(-1).view(torch.uint8))

    @property
    def nbytes(self) -> int:
        return len(self.data)

    @property
    def memory(self) -> memoryview:
        return self.data.numpy().data if isinstance(self.data, torch.Tensor) else memoryview(self.data)


def file_name(order: int, name: str) -> str:
    """`000012-layers.mlp.out.safetensors`: letters, digits and `-_.` of the point's name; the record has all of it."""
    return f"{order:06d}-{_readable(name)}.safetensors"


@lru_cache(maxsize=4096)
def _readable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:_MAX_NAME].strip("._") or "point"


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor | StoredTensor],
    metadata: Mapping[str, str],
    mode: int = 0o644,
) -> None:
    """Write one safetensors file, which is there in full or not at all.

    tensors: contiguous CPU tensors of dtypes in SAFETENSORS_NAMES; nothing is copied. Raises OSError, and then leaves
    nothing behind.
    """
    described = [f'"__metadata__":{to_json(metadata).decode()}']
    pieces: list[memoryview] = []
    offset = 0
    # As the library orders them: each lies where its dtype allows it to be mapped.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if isinstance(tensor, torch.Tensor):
            tensor = StoredTensor.of(tensor)
        end = offset + tensor.nbytes
        # By hand: `json.dumps` takes longer for so little than the system does for the file.
        described.append(
            f'{json.dumps(name)}:{{"dtype":"{SAFETENSORS_NAMES[tensor.dtype]}","shape":{list(tensor.shape)},'
            f'"data_offsets":[{offset},{end}]}}'
        )
        if end > offset:
            pieces.append(tensor.memory)
        offset = end
    text = f"{{{','.join(described)}}}".encode()
    # Tensors begin at a cache line: the format asks for 8, and copies from and to there are faster.
    text += b" " * (-(8 + len(text)) % 64)
    with whole_file(path, mode) as descriptor:
        write_pieces(descriptor, [memoryview(len(text).to_bytes(8, "little") + text), *pieces])


def refuse_earlier_dumps(role_directory: Path, role_rank: int, who: str) -> None:
    """Called before a run writes anything: what an earlier one left would be damaged. Raises ConfigError."""
    if os.path.lexists(role_directory / f"rank{role_rank}.dumps.jsonl"):
        raise earlier_dumps(role_directory, who)


def earlier_dumps(role_directory: Path, who: str) -> ConfigError:
    return ConfigError(
        f"{role_directory} holds dumps of {who} from an earlier run, and two runs would mix. Give this run another "
        f"name (GRAFTER_RUN_NAME), or remove that one."
    )


def record_text(fields: Mapping[str, Any]) -> str:
    """The JSON of a `DumpRecord` of these fields: all of them, in its order. They are our own, and not validated again,
    which would take four times as long."""
    return to_json(fields, inf_nan_mode="constants").decode()


def record_metadata(text: str) -> dict[str, str]:
    return {METADATA_KEY: text}
