"""Free memory that is touched beforehand, so that no way pays for what the machine does with memory that lay idle.

In a virtual machine the host may take back memory that is free for some seconds, and gives it again page by page when
it is touched: 2.3 s for a GiB were seen, where a memcpy of it takes 0.1 s. Whoever writes files into the page cache or
makes new buffers pays for it, in turn, at random: what looks like a disk whose speed varies tenfold.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from pathlib import Path

import numpy as np

_PAGE_BYTES = 4096
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def touch_free_memory(nbytes: int) -> None:
    """As many bytes of the machine's free memory are there at once for whoever takes them within the next seconds."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(pages, dtype=np.uint8)[::_PAGE_BYTES] = 1
    pages.close()


class PeakMemory:
    """By how many bytes this process grew at most since this was made; None where the system does not tell (Linux
    does)."""

    def __init__(self) -> None:
        self._start: int | None = None
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")
            self._start = _status_bytes("VmRSS")

    def growth_bytes(self) -> int | None:
        peak = _status_bytes("VmHWM")
        return peak - self._start if self._start is not None and peak is not None else None


def _status_bytes(field: str) -> int | None:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found is not None else None
