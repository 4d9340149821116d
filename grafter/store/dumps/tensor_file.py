"""One safetensors file, read without trust: a bounded header that must fit the file to the byte, then mapped memory.

    8 bytes               n bytes                          the rest
    n, little-endian      JSON: name -> dtype, shape,      the tensors' bytes, row-major, little-endian, without gaps
                          [begin, end) in the rest

Own code, and not `safetensors.safe_open`, for three reasons: that takes a path, which may have come to mean another
file since it was checked, where this takes the descriptor that was checked; it has no word for dtypes that a dump
stores as others; and it reads a header of up to 100 MB before anyone has asked whether there is reason to.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeGuard

import torch

from grafter.errors import DumpError

# Of what a file may claim. A header holds names and the point's metadata.
LONGEST_HEADER = 1 << 26
_MOST_DIMS = 64
# From here on, bytes: files that are mapped without setting memory aside, at a descriptor each while they are.
_LARGE_FILE = 1 << 30
_LARGEST_SIZE = 1 << 62

# safetensors' names of dtypes -> torch's, without `torch.`; and how many bytes one value has.
_DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "U16": ("uint16", 2), "I16": ("int16", 2),
    "U32": ("uint32", 4), "I32": ("int32", 4), "U64": ("uint64", 8), "I64": ("int64", 8), "F16": ("float16", 2),
    "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8), "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `begin` and `end` are from the start of the file; `dtype` without `torch.`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """What a header says, checked against the file: `size` in bytes, its entries, and its metadata."""

    where: str
    size: int
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(repr=False)


def read_header(descriptor: int, where: str) -> TensorFile:
    """Raises DumpError, naming the file (`where`) and what is wrong, for whatever is no sound safetensors file."""
    try:
        return _read_header(descriptor, where)
    except _Unsound as unsound:
        raise DumpError(f"{where}: {unsound}") from None


class _Unsound(Exception):
    pass


def _read_header(descriptor: int, where: str) -> TensorFile:
    size = os.fstat(descriptor).st_size
    if size < 10:
        raise _Unsound(f"it has {size} bytes and is no safetensors file. It was truncated, probably.")
    length = int.from_bytes(_bytes_at(descriptor, 0, 8), "little")
    if length > size - 8:
        raise _Unsound(f"its header claims {length} bytes, and the file has {size}. It was truncated, or is damaged.")
    if not 2 <= length <= LONGEST_HEADER:
        raise _Unsound(f"its header claims {length} bytes; between 2 and {LONGEST_HEADER} are read. It is damaged.")
    header = _parsed(_bytes_at(descriptor, 8, length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Unsound("its __metadata__ is no map from text to text.")
    entries = {name: _entry(name, described, 8 + length) for name, described in header.items()}
    _check_regions(entries, 8 + length, size)
    return TensorFile(where, size, entries, metadata)


def _bytes_at(descriptor: int, offset: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.pread(descriptor, count, offset)
        if not part:
            raise _Unsound("it became shorter while it was read.")
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return b"".join(parts)


def _parsed(text: bytes) -> dict[str, Any]:
    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _Unsound("a name is there twice in its header.")
        return found

    try:
        header = json.loads(text.decode(), object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise _Unsound(f"its header is no JSON ({str(error)[:100]}). It is damaged.") from None
    if not isinstance(header, dict):
        raise _Unsound("its header is no JSON object.")
    return header


def _entry(name: str, described: Any, start: int) -> Entry:
    if not isinstance(described, dict):
        raise _Unsound(f"its header has no description of the tensor {name[:80]!r}.")
    dtype, shape, offsets = described.get("dtype"), described.get("shape"), described.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Unsound(f"the tensor {name[:80]!r} has the dtype {str(dtype)[:40]!r}, which is none of this format.")
    if not (_are_sizes(shape) and len(shape) <= _MOST_DIMS and _are_sizes(offsets) and len(offsets) == 2):
        raise _Unsound(f"the tensor {name[:80]!r} has no shape or no place in the file that could be.")
    own, itemsize = _DTYPES[dtype]
    begin, end = offsets
    if end - begin != prod(shape) * itemsize:
        raise _Unsound(f"the tensor {name[:80]!r} is {dtype}{shape}, and has {end - begin} bytes. The file is damaged.")
    return Entry(own, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in value)


def _check_regions(entries: dict[str, Entry], start: int, size: int) -> None:
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise _Unsound(
                f"the tensor {name[:80]!r} ends at byte {entry.end}, and the file has {size}. It was truncated."
            )
        if entry.begin != at:
            fault = "lies over another" if entry.begin < at else "leaves a gap before it"
            raise _Unsound(f"the tensor {name[:80]!r} {fault}. The file is damaged.")
        at = entry.end
    if at != size:
        raise _Unsound(f"it has {size - at} bytes after its last tensor. The file is damaged.")


def map_tensor(
    descriptor: int, file: TensorFile, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """The bytes of an entry as a tensor of this dtype and shape, which must need exactly as many; nothing is copied.

    The memory is the file's pages, read when first touched. Writing to it changes this process's copy of a page, and
    never the file. Raises DumpError where bytes and shape do not fit, or where a bool is neither 0 nor 1.
    """
    entry = file.entries[name]
    count = entry.end - entry.begin
    if count != prod(shape) * dtype.itemsize:
        raise DumpError(
            f"{file.where}: the record says {dtype}{list(shape)} of {name!r}, and the file has {count} bytes of it."
        )
    if not count:
        return _empty(file, dtype, shape)
    try:
        raw = _mapped(descriptor, file.size)[entry.begin : entry.end]
    except (RuntimeError, OSError, ValueError) as error:
        raise DumpError(f"{file.where}: it cannot be mapped: {str(error).splitlines()[0]}") from error
    if dtype is torch.bool and int(raw.max()) > 1:
        # What torch makes of such a bool is undefined.
        raise DumpError(f"{file.where}: the bool tensor {name!r} has bytes that are neither 0 nor 1. It is damaged.")
    if entry.begin % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    """The open file itself, and no name of it, as bytes that are this process's own once they are written to."""
    if size < _LARGE_FILE:
        # torch keeps no descriptor, so that any number of tensors can live.
        return torch.from_file(f"/dev/fd/{descriptor}", shared=False, size=size, dtype=torch.uint8)
    # Without it the system refuses a file that is larger than the memory, since all of it could be written to.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    pages = mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _empty(file: TensorFile, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        raise DumpError(f"{file.where}: no tensor can have the shape {list(shape)}: {error}") from error


# What will be read soon, said to the system: it then reads a file while this process still works on what came before.
#
# Mapped memory is otherwise read when it is touched, a few pages at a time, and who touches it waits.

_WILL_NEED: int | None = getattr(mmap, "MADV_WILLNEED", None)
# Of a view with gaps, so many times its own bytes may be read for it.
_MOST_GAPS = 4


def will_read(view: torch.Tensor) -> None:
    """Start to read the pages of a view of a mapped file. A hint: nothing happens where the system knows no such.

    No page of memory that is no file's is harmed by it; a view with large gaps is left to be read when it is touched.
    """
    if _WILL_NEED is None or not view.numel():
        return
    itemsize = view.element_size()
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    span = (last + 1) * itemsize
    if span > _MOST_GAPS * view.numel() * itemsize:
        return
    first = view.data_ptr()
    begin = first - first % mmap.PAGESIZE
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(first + span - begin), ctypes.c_int(_WILL_NEED))
