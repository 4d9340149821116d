"""Copies within one host's memory: a long one is shared by two threads, where the ranks leave a core idle for it.

torch copies with as many threads as it was given, and torchrun gives each rank one. But while one rank of a pair
copies, the other waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch

# Waking the other thread costs 50 us, in which one thread copies half a megabyte.
_LONG_BYTES = 8 << 20
_PAGE_BYTES = 4096


class _Helper:
    """This process's second thread for copies. A forked child has none of its threads, and gets its own."""

    def __init__(self) -> None:
        self.is_allowed = False
        self._process_id = 0
        self._executor: ThreadPoolExecutor | None = None

    def copy(self, into: int, value: int, nbytes: int) -> Future[object] | None:
        """None where the interpreter is on its way out and starts no thread."""
        if self._executor is None or self._process_id != os.getpid():
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="grafter-copy")
            self._process_id = os.getpid()
        with contextlib.suppress(RuntimeError):
            return self._executor.submit(ctypes.memmove, into, value, nbytes)
        return None


_helper = _Helper()


def share_long_copies(allowed: bool) -> None:
    """Whether there is a core for a second thread, in this process."""
    _helper.is_allowed = allowed


def copy(into: torch.Tensor, value: torch.Tensor) -> None:
    """`into.copy_(value)`, outside of autograd: into is no tensor that needs a gradient, or the `.data` of one.

    Returns, and raises an interrupt, when all is copied.
    """
    nbytes = value.numel() * value.element_size()
    if nbytes < _LONG_BYTES or not _helper.is_allowed or torch.get_num_threads() > 1 or not _are_alike(into, value):
        into.copy_(value)
        return
    half = nbytes // 2 // _PAGE_BYTES * _PAGE_BYTES
    to, source = into.data_ptr(), value.data_ptr()
    rest = _helper.copy(to + half, source + half, nbytes - half)
    ctypes.memmove(to, source, half if rest is not None else nbytes)
    interrupt: KeyboardInterrupt | None = None
    while rest is not None:
        try:
            rest.result()
            break
        except KeyboardInterrupt as error:
            # The other thread still writes there.
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _are_alike(into: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether one's bytes, in their order, are the other's."""
    return (
        into.is_cpu
        and value.is_cpu
        and into.dtype == value.dtype
        and into.shape == value.shape
        and into.is_contiguous()
        and value.is_contiguous()
        and into.is_conj() == value.is_conj()
        and into.is_neg() == value.is_neg()
        and not into._is_zerotensor()
        and not value._is_zerotensor()
    )
