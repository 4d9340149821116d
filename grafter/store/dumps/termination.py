"""SIGTERM: what was dumped is written first, then happens what would have happened without us.

Python runs a signal's handler on the main thread, between two of its instructions: not while that waits in the store or
in a collective, perhaps for minutes. Where nothing but the system's default was there to handle the signal, a thread
hears of it at once (through Python's wakeup descriptor), writes, and lets the process end as it would have.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

logger = logging.getLogger("grafter")

# How long the main thread has for its own handler before the process ends without it.
_PATIENCE_SECONDS = 0.5
_CREDENTIALS = struct.Struct("3i")
_SIGTERM = frozenset({signal.SIGTERM})


class Termination:
    """While it is installed, `before` is called once when SIGTERM comes. Of one process: a forked child is left as if
    there was nothing."""

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._process_id = os.getpid()
        self._previous: Any = None
        self._is_installed = False
        self._is_handled = threading.Event()
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._previous_fd = -1

    def install(self) -> None:
        """Called from the main thread; from another one, where Python allows no handler, it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            logger.debug("grafter: the first dump is not on the main thread: SIGTERM is left to the system")
            return
        self._previous = signal.getsignal(signal.SIGTERM)
        if self._previous is None or self._previous == signal.SIG_IGN:
            return  # set by other than Python code; or SIGTERM ends nothing
        signal.signal(signal.SIGTERM, self._handle)
        self._is_installed = True
        _fork_guard.guard(self)
        if self._previous == signal.SIG_DFL and hasattr(socket, "SO_PASSCRED"):
            self._listen()

    def uninstall(self) -> None:
        """Give back what was there, unless somebody else has come since."""
        if not self._is_installed or threading.current_thread() is not threading.main_thread():
            return
        self._is_installed = False
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._previous)
        if self._sockets is not None:
            ours = self._sockets[1].fileno()
            current = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(self._previous_fd if current == ours else current)
            # An empty message ends the thread.
            self._sockets[1].send(b"")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process_id and not self._is_handled.is_set():
            self._is_handled.set()
            self._before()
        if callable(self._previous):
            self._previous(number, frame)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def leave_child(self) -> None:
        """In a process that was just forked: everything as it was before `install`."""
        if self._is_installed:
            self._is_installed = False
            if signal.getsignal(signal.SIGTERM) == self._handle:
                signal.signal(signal.SIGTERM, self._previous)
            if self._sockets is not None:
                current = signal.set_wakeup_fd(-1)
                signal.set_wakeup_fd(self._previous_fd if current == self._sockets[1].fileno() else current)

    # Where the main thread cannot hear.

    def _listen(self) -> None:
        heard, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        told.setblocking(False)
        # A forked child shares this descriptor until it runs another program: its signals are none of ours, and the
        # system says of each message whose it is.
        heard.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sockets = heard, told
        self._previous_fd = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(heard, told), name="grafter-dump-sigterm", daemon=True).start()

    def _hear(self, heard: socket.socket, told: socket.socket) -> None:
        with heard, told:
            while True:
                message, credentials, _, _ = heard.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
                if not message:
                    return
                if _sender(credentials) != self._process_id:
                    continue
                if self._previous_fd != -1:
                    with contextlib.suppress(OSError):
                        os.write(self._previous_fd, message)
                if signal.SIGTERM in message and not self._is_handled.wait(_PATIENCE_SECONDS):
                    if signal.getsignal(signal.SIGTERM) != self._handle:
                        # A handler that came after ours (a server's, say) decides when and how the process ends.
                        self._before()
                        continue
                    self._is_handled.set()
                    self._before()
                    # Only the main thread may do this in Python, and it does not come to it.
                    ctypes.CDLL(None).signal(int(signal.SIGTERM), 0)
                    os.kill(self._process_id, signal.SIGTERM)


class _ForkGuard:
    """Keeps SIGTERM waiting while a process is forked. Python forgets a signal that a child gets before it has begun,
    where a handler of Python's is there for it: without us, such a child would have died of it."""

    def __init__(self) -> None:
        self._guarded: weakref.WeakSet[Termination] = weakref.WeakSet()
        self._is_registered = False
        self._masks = threading.local()

    def guard(self, termination: Termination) -> None:
        self._guarded.add(termination)
        if not self._is_registered:
            self._is_registered = True
            os.register_at_fork(
                before=self._block, after_in_parent=self._unblock, after_in_child=self._unblock_in_child
            )

    def _block(self) -> None:
        self._masks.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGTERM)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.mask)

    def _unblock_in_child(self) -> None:
        for termination in list(self._guarded):
            termination.leave_child()
        self._unblock()


_fork_guard = _ForkGuard()


def _sender(credentials: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in credentials:
        if level == socket.SOL_SOCKET and kind == getattr(socket, "SCM_CREDENTIALS", 2):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    return None
