"""The memory of this machine and process, and free memory that is touched beforehand, so that no way pays for it.

In a virtual machine the host may take back memory that is free for some seconds, and gives it again page by page when
it is touched: 2.3 s for a GiB were seen, where a memcpy of it takes 0.1 s. A way that writes files or makes new
buffers pays for it at random, which looks like a disk whose speed varies tenfold.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from pathlib import Path

import numpy as np

_PAGE_BYTES = 4096
_CLEAR_REFS = Path("/proc/self/clear_refs")


def touch_free_memory(nbytes: int) -> None:
    """Touch as many bytes of free memory, so that the system can give them out at once within the next seconds."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(pages, dtype=np.uint8)[::_PAGE_BYTES] = 1
    pages.close()


class PeakMemory:
    """The largest growth of this process, in bytes, since this was made; None where the system does not allow it."""

    def __init__(self) -> None:
        self._start: int | None = None
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")
            self._start = status_bytes("VmRSS")

    def growth_bytes(self) -> int | None:
        return None if self._start is None else status_bytes("VmHWM") - self._start


def status_bytes(field: str, process: int | str = "self") -> int:
    """A field of /proc/PROCESS/status, such as VmRSS. Raises OSError if the process has ended, RuntimeError if there is
    no such field."""
    return _bytes_in(f"/proc/{process}/status", field)


def available_bytes() -> int:
    """The free memory of the machine."""
    return _bytes_in("/proc/meminfo", "MemAvailable")


def _bytes_in(path: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{path} has no {field}")
    return int(found[1]) * 1024
