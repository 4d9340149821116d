"""What will be read soon, said to the system: it then reads a file while this process still works on what came before.

Mapped memory is otherwise read when it is touched, a few pages at a time, and who touches it waits.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

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
