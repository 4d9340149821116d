"""Copies within one host's memory: a long one is shared by two threads, where the ranks leave a core idle for it, and
made in chunks, between which its owner looks whether it is still wanted.

torch copies with as many threads as it was given, and torchrun gives each rank one. But while one rank of a pair
copies, the other waits for it.
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

# Waking the other thread costs 50 us, in which one thread copies half a megabyte.
_LONG_BYTES = 8 << 20
_PAGE_BYTES = 4096
# Slow memory takes 0.1 s for it; a chunk costs the 50 us of the other thread.
CHUNK_BYTES = 64 << 20
# torch transposes so much in about a second.
_MATRIX_BYTES, _MATRIX_CHUNK_BYTES = 1 << 30, 4 << 20
# Of anything else, what lies at its address is not what it shows, or nothing does.
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_Part = tuple["Future[None]", int, int, int]


class _Helper:
    """This process's second thread for copies. A forked child has none of its threads, and gets its own."""

    def __init__(self) -> None:
        self.is_allowed = False
        self._process_id = 0
        self._parts: queue.SimpleQueue[_Part] = queue.SimpleQueue()

    def offer(self, part: _Part) -> None:
        """It may be copied there; whoever offers it copies it where it can still be cancelled."""
        if self._process_id != os.getpid():
            parts: queue.SimpleQueue[_Part] = queue.SimpleQueue()
            try:
                # `threading.Thread.start` would wait for ever for a thread that has no memory to begin in.
                _thread.start_new_thread(_copy_parts, (parts,))
            except RuntimeError as error:
                if is_from_signal_handler(error):
                    raise
                # The process may have no more threads, or is on its way out.
                return
            self._parts, self._process_id = parts, os.getpid()
        self._parts.put(part)


def _copy_parts(parts: queue.SimpleQueue[_Part]) -> None:
    while True:
        done, into, value, nbytes = parts.get()
        if done.set_running_or_notify_cancel():
            ctypes.memmove(into, value, nbytes)
            done.set_result(None)


_helper = _Helper()


def share_long_copies(allowed: bool) -> None:
    """Whether there is a core for a second thread, in this process."""
    _helper.is_allowed = allowed


def copy(into: torch.Tensor, value: torch.Tensor, between_chunks: Callable[[], None] | None = None) -> None:
    """`into.copy_(value)`, outside of autograd: into is no tensor that needs a gradient, or the `.data` of one.

    between_chunks: called every 64 MiB; what it raises ends the copy there. Returns, and raises an interrupt, when all
    of the chunk is copied: nothing is written afterwards.
    """
    nbytes = value.numel() * value.element_size()
    if between_chunks is None or nbytes <= CHUNK_BYTES or into.shape != value.shape:
        _copy_chunk(into, value)
        return
    is_first = True
    for into_chunk, value_chunk in _chunks(into, value):
        if not is_first:
            between_chunks()
        is_first = False
        _copy_chunk(into_chunk, value_chunk)


def _chunks(into: torch.Tensor, value: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in parts of at most CHUNK_BYTES, or of one element. They have one shape."""
    nbytes = value.numel() * value.element_size()
    if nbytes <= CHUNK_BYTES or value.dim() == 0:
        yield into, value
    elif _is_transposed(into, value):
        yield from _transposed_chunks(into, value, nbytes)
    else:
        if _are_alike(into, value):
            into, value = into.view(-1), value.view(-1)
        rows = value.shape[0]
        step = max(1, CHUNK_BYTES * rows // nbytes)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            if count == 1:
                yield from _chunks(into[start], value[start])
            else:
                yield into.narrow(0, start, count), value.narrow(0, start, count)


def _is_transposed(into: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch copies this as a transposition, which takes a seventh of the time, and only as a whole."""
    return value.dim() == 2 and into.is_contiguous() and value.stride() == (1, value.shape[0])


def _transposed_chunks(
    into: torch.Tensor, value: torch.Tensor, nbytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A very large one in chunks all the same, each of which is first put together: a whole transposition again."""
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
        # An interrupt, or what the handler of a signal raises, may come between any two steps, while the other thread
        # still writes there. Each can be repeated.
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
    """Whether one's bytes, in their order, are the other's."""
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
