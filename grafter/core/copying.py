"""Copies within one host's memory.

A long copy is shared by two threads if the ranks leave a core idle for the second one: torchrun gives each rank one
thread, but while one rank of a pair copies, the other waits for it. A long copy is also made in chunks, and between
chunks its owner checks whether it is still wanted.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import torch

from grafter.core.processes import is_from_signal_handler

# Waking the second thread costs 50 us, in which one thread copies half a megabyte.
_LONG_BYTES = 8 << 20
_PAGE_BYTES = 4096
# Takes 0.1 s in slow memory. Each chunk costs the 50 us of the second thread.
COPY_CHUNK_BYTES = 64 << 20
# torch transposes this much in about a second.
_MATRIX_BYTES, _MATRIX_CHUNK_BYTES = 1 << 30, 4 << 20
# Of other classes, the memory at a tensor's address may not hold its values.
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_Part = tuple["Future[None]", int, int, int]


class _CopyThread:
    """This process's second thread for copies. A forked child, which does not inherit it, starts its own."""

    def __init__(self) -> None:
        self.is_allowed = False
        self._process_id = 0
        self._parts: queue.SimpleQueue[_Part] = queue.SimpleQueue()

    def offer(self, part: _Part) -> None:
        """Offer a part of a copy to the thread. The caller copies it if it can still cancel it."""
        if self._process_id != os.getpid():
            parts: queue.SimpleQueue[_Part] = queue.SimpleQueue()
            try:
                # `threading.Thread.start` never returns if the new thread has no memory to start in.
                _thread.start_new_thread(_copy_parts, (parts,))
            except RuntimeError as error:
                if is_from_signal_handler(error):
                    raise
                # The process may not start more threads, or is about to exit.
                return
            self._parts, self._process_id = parts, os.getpid()
        self._parts.put(part)


def _copy_parts(parts: queue.SimpleQueue[_Part]) -> None:
    while True:
        done, into, value, nbytes = parts.get()
        if done.set_running_or_notify_cancel():
            ctypes.memmove(into, value, nbytes)
            done.set_result(None)


_helper = _CopyThread()


def share_long_copies(allowed: bool) -> None:
    """Set whether this process has a core for a second thread."""
    _helper.is_allowed = allowed


def copy(into: torch.Tensor, value: torch.Tensor, between_chunks: Callable[[], None] | None = None) -> None:
    """`into.copy_(value)`, outside of autograd: `into` must not require a gradient (use its `.data`).

    between_chunks: called every 64 MiB; its exceptions end the copy there. An interrupt is raised when the chunk is
    complete. Nothing is written after this returns or raises.
    """
    nbytes = value.numel() * value.element_size()
    if between_chunks is None or nbytes <= COPY_CHUNK_BYTES or into.shape != value.shape:
        _copy_chunk(into, value)
        return
    is_first = True
    for into_chunk, value_chunk in _chunks(into, value):
        if not is_first:
            between_chunks()
        is_first = False
        _copy_chunk(into_chunk, value_chunk)


def _chunks(into: torch.Tensor, value: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors, of one shape, in parts of at most COPY_CHUNK_BYTES, or of one element."""
    nbytes = value.numel() * value.element_size()
    if nbytes <= COPY_CHUNK_BYTES or value.dim() == 0:
        yield into, value
    elif _is_transposed(into, value):
        yield from _transposed_chunks(into, value, nbytes)
    else:
        if _are_alike(into, value):
            into, value = into.view(-1), value.view(-1)
        rows = value.shape[0]
        step = max(1, COPY_CHUNK_BYTES * rows // nbytes)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            if count == 1:
                yield from _chunks(into[start], value[start])
            else:
                yield into.narrow(0, start, count), value.narrow(0, start, count)


def _is_transposed(into: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch copies this as a transposition: only as a whole, and in a seventh of the time."""
    return value.dim() == 2 and into.is_contiguous() and value.stride() == (1, value.shape[0])


def _transposed_chunks(
    into: torch.Tensor, value: torch.Tensor, nbytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A very large transposition in chunks. Each is made contiguous first, to be a whole transposition again."""
    rows = value.shape[0]
    step = rows if nbytes <= _MATRIX_BYTES else max(1, _MATRIX_CHUNK_BYTES * rows // nbytes)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part = value.narrow(0, start, count)
        yield into.narrow(0, start, count), part if count == rows else part.t().contiguous().t()


def _copy_chunk(into: torch.Tensor, value: torch.Tensor) -> None:
    nbytes = value.numel() * value.element_size()
    if nbytes < _LONG_BYTES or not _helper.is_allowed or torch.get_num_threads() > 1 or not _are_alike(into, value):
        into.copy_(value)
        return
    _copy_in_two(into.data_ptr(), value.data_ptr(), nbytes)


def _copy_in_two(into: int, value: int, nbytes: int) -> None:
    half = nbytes // 2 // _PAGE_BYTES * _PAGE_BYTES
    done: Future[None] = Future()
    rest = (done, into + half, value + half, nbytes - half)
    is_offered = False
    interrupt: BaseException | None = None
    while True:
        # An interrupt, or a signal handler's exception, may come between any two steps, while the other thread still
        # writes. Each step can be repeated.
        try:
            if not is_offered:
                is_offered = True
                _helper.offer(rest)
            ctypes.memmove(into, value, half)
            if done.cancel():
                # The other thread has not begun.
                ctypes.memmove(*rest[1:])
            else:
                done.result()
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _are_alike(into: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a copy of the bytes, in order, is a copy of the values."""
    return (
        type(into) in _PLAIN
        and type(value) in _PLAIN
        and into.is_cpu
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
