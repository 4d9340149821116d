"""Writes a point's tensors as a safetensors file, and holds the queue of points that wait for the disk.

The format is simple (8 bytes of length, a JSON header, the bytes), so one system call writes a file without copying.
For small tensors this takes less than half of the time that the library takes (`benchmarks/dumping.py`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic_core import to_json

from grafter.errors import ConfigError
from grafter.store.dumps.record import METADATA_KEY
from grafter.store.written_files import whole_file, write_pieces

logger = logging.getLogger("grafter")

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
    """One tensor of a file. data: its bytes, row-major, or a flat uint8 tensor on the CPU."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes | memoryview | torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StoredTensor:
        """Refer to the memory of a contiguous CPU tensor, without a copy."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.view(-1).view(torch.uint8))

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return len(self.data)

    @property
    def memory(self) -> memoryview:
        """The bytes, without a copy."""
        return self.data.numpy().data if isinstance(self.data, torch.Tensor) else memoryview(self.data)


def file_name(order: int, name: str) -> str:
    """`000012-layers.mlp.out.safetensors`: only letters, digits and `-_.` of the name are kept."""
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
    """Write one safetensors file, completely or not at all. Raises OSError.

    tensors: contiguous CPU tensors of dtypes in SAFETENSORS_NAMES; they are not copied.
    """
    described = [f'"__metadata__":{to_json(metadata).decode()}']
    pieces: list[memoryview] = []
    offset = 0
    # In the library's order: each tensor is aligned to its dtype, so that it can be mapped.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if isinstance(tensor, torch.Tensor):
            tensor = StoredTensor.of(tensor)
        end = offset + tensor.nbytes
        # Formatted by hand: `json.dumps` takes longer than writing a small file.
        described.append(
            f'{json.dumps(name)}:{{"dtype":"{SAFETENSORS_NAMES[tensor.dtype]}","shape":{list(tensor.shape)},'
            f'"data_offsets":[{offset},{end}]}}'
        )
        if end > offset:
            pieces.append(tensor.memory)
        offset = end
    text = f"{{{','.join(described)}}}".encode()
    # Tensors begin at a cache line, which makes copies faster; the format asks for a multiple of 8.
    text += b" " * (-(8 + len(text)) % 64)
    with whole_file(path, mode) as descriptor:
        write_pieces(descriptor, [memoryview(len(text).to_bytes(8, "little") + text), *pieces])


def refuse_earlier_dumps(role_directory: Path, role_rank: int, who: str) -> None:
    """Raise ConfigError if an earlier run left dumps of this rank here. Called before a run writes anything."""
    if os.path.lexists(role_directory / f"rank{role_rank}.dumps.jsonl"):
        raise earlier_dumps(role_directory, who)


def earlier_dumps(role_directory: Path, who: str) -> ConfigError:
    """The error for a directory that holds dumps of an earlier run."""
    return ConfigError(
        f"{role_directory} holds dumps of {who} from an earlier run, and two runs would mix. Give this run another "
        f"name (GRAFTER_RUN_NAME), or remove that one."
    )


def record_text(fields: Mapping[str, Any]) -> str:
    """The JSON of a `DumpRecord`, given all of its fields in order. Validating them would take four times as long."""
    return to_json(fields, inf_nan_mode="constants").decode()


def record_metadata(text: str) -> dict[str, str]:
    """The `__metadata__` of a file whose record is `text`."""
    return {METADATA_KEY: text}


# How long a wait for the disk may last before it is reported.
_REPORT_AFTER_SECONDS = 10.0


class WriteQueue:
    """The writes of one rank that wait for the disk: one thread does them in order, and their bytes are bounded.

    All methods may be called from several threads.
    """

    def __init__(self, limit_bytes: int, who: str) -> None:
        self._limit, self._who = limit_bytes, who
        self._jobs: deque[Callable[[], None]] = deque()
        self._bytes = self._done = 0
        self._is_working = False
        self._marks: tuple[int, int] = (0, 0)
        # Reentrant, because a signal handler may run while its own thread holds the lock.
        lock = threading.RLock()
        self._has_work, self._changed = threading.Condition(lock), threading.Condition(lock)
        # The conditions that threads wait for. They are woken once one of them holds: waking them after every job would
        # double the cost of a small one.
        self._awaited: list[Callable[[], bool]] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="grafter-dump", daemon=True)
        # Started here rather than with the first job, because a signal may interrupt `put` anywhere.
        self._thread.start()

    @property
    def _put(self) -> int:
        """The number of jobs so far. A counter would be wrong if a signal came between a job and its count."""
        return self._done + self._is_working + len(self._jobs)

    def reserve(self, nbytes: int) -> None:
        """Wait for `nbytes` of room. A point larger than the limit waits until the queue is empty."""
        with self._changed:
            self._wait(lambda: self._bytes + nbytes <= self._limit or self._done == self._put)
            self._bytes += nbytes

    def release(self, nbytes: int) -> None:
        """Give back `nbytes` of room that `reserve` took."""
        with self._changed:
            self._bytes -= nbytes
            self._wake()

    def put(self, job: Callable[[], None]) -> None:
        """Append a job, which must not raise and which releases its own bytes."""
        with self._changed:
            self._jobs.append(job)
            self._has_work.notify()

    def wait_for_last_step(self) -> None:
        """Wait for the jobs that were put before the previous call of this method: one step's jobs may still wait."""
        with self._changed:
            due = self._marks[1]
            self._wait(lambda: self._done >= due)
            self._marks = (self._marks[1], self._put)

    def flush(self, patience_seconds: float | None = None) -> None:
        """Wait until all jobs so far are done; give up if one job takes longer than `patience_seconds`."""
        with self._changed:
            due = self._put
            self._wait(lambda: self._done >= due, patience_seconds)

    def close(self) -> None:
        """Do the remaining jobs and end the thread. No method may be called afterwards."""
        with self._changed:
            self._is_closing = True
            self._has_work.notify()
        self._thread.join()

    def _wait(self, is_enough: Callable[[], bool], patience_seconds: float | None = None) -> None:
        """Wait, and report a long wait, so that a run with a slow disk does not look hung."""
        if is_enough():
            return
        self._awaited.append(is_enough)
        try:
            report_at = time.monotonic() + _REPORT_AFTER_SECONDS
            done, since = self._done, time.monotonic()
            while not is_enough():
                self._changed.wait(1.0)
                if self._done != done:
                    done, since = self._done, time.monotonic()
                if patience_seconds is not None and time.monotonic() > since + patience_seconds:
                    return
                if time.monotonic() > report_at:
                    report_at = time.monotonic() + _REPORT_AFTER_SECONDS
                    logger.warning(
                        "grafter: %s waits for the disk: %d dumped points (%d MiB) are not written yet",
                        self._who, self._put - self._done, self._bytes >> 20,
                    )  # fmt: skip
        finally:
            self._awaited.remove(is_enough)

    def _wake(self) -> None:
        if any(is_enough() for is_enough in self._awaited):
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._has_work:
                while not self._jobs:
                    if self._is_closing:
                        return
                    self._has_work.wait()
                self._is_working = True
                job = self._jobs.popleft()
            job()
            del job
            with self._changed:
                self._is_working = False
                self._done += 1
                self._wake()
