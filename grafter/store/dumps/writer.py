"""Files: a point's tensors as safetensors, written to a temporary name and renamed; its record as one line.

The format is so simple that writing it takes one call of the system (8 bytes of length, a JSON header, the bytes), and
that call copies nothing: less than half of what the library takes for small tensors (`benchmarks/dumping.py`).
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


# The backlog: what was snapshot and is not on disk yet. One thread works it off, in order; its bytes are bounded.

logger = logging.getLogger("grafter")

_TELL_AFTER_SECONDS = 10.0


class Backlog:
    """Jobs of one rank. What is used from several threads: all of it."""

    def __init__(self, limit_bytes: int, who: str) -> None:
        self._limit, self._who = limit_bytes, who
        self._jobs: deque[Callable[[], None]] = deque()
        self._bytes = self._done = 0
        # Whether a job is under way.
        self._is_working = False
        self._marks: tuple[int, int] = (0, 0)
        # A lock that may be taken again by the thread that holds it: a signal handler runs in the middle of anything.
        lock = threading.RLock()
        self._has_work, self._changed = threading.Condition(lock), threading.Condition(lock)
        # What threads wait for. They are woken once one of it is so, and not by every job that is done: that would cost
        # a small one as much again.
        self._awaited: list[Callable[[], bool]] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="grafter-dump", daemon=True)
        # At once, and not with the first job: a signal may come between any two steps of `put`.
        self._thread.start()

    @property
    def _put(self) -> int:
        """How many jobs there were. Not counted, since a signal may come between the job and its count."""
        return self._done + self._is_working + len(self._jobs)

    def reserve(self, nbytes: int) -> None:
        """Wait for room. One point that is larger than all of it passes alone."""
        with self._changed:
            self._wait(lambda: self._bytes + nbytes <= self._limit or self._done == self._put)
            self._bytes += nbytes

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._wake()

    def put(self, job: Callable[[], None]) -> None:
        """job: never raises. What it reserved, it releases itself."""
        with self._changed:
            self._jobs.append(job)
            self._has_work.notify()

    def wait_for_last_step(self) -> None:
        """Wait until what was put before the previous call of this is done: one step's worth may be under way."""
        with self._changed:
            due = self._marks[1]
            self._wait(lambda: self._done >= due)
            self._marks = (self._marks[1], self._put)

    def flush(self, patience_seconds: float | None = None) -> None:
        """Wait until all that was put so far is done; at most so long for one job."""
        with self._changed:
            due = self._put
            self._wait(lambda: self._done >= due, patience_seconds)

    def close(self) -> None:
        """The last call: works off what is there, and ends the thread."""
        with self._changed:
            self._is_closing = True
            self._has_work.notify()
        self._thread.join()

    def _wait(self, is_enough: Callable[[], bool], patience_seconds: float | None = None) -> None:
        """Wait, and say so where it takes long: a run that is slow for its disk shall not look hung."""
        if is_enough():
            return
        self._awaited.append(is_enough)
        try:
            told = time.monotonic() + _TELL_AFTER_SECONDS
            done, since = self._done, time.monotonic()
            while not is_enough():
                self._changed.wait(1.0)
                if self._done != done:
                    done, since = self._done, time.monotonic()
                if patience_seconds is not None and time.monotonic() > since + patience_seconds:
                    return
                if time.monotonic() > told:
                    told = time.monotonic() + _TELL_AFTER_SECONDS
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
