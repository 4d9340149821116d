"""SIGTERM: the dumps are written first, then the process ends as it would have without grafter.

Python runs signal handlers on the main thread, between two of its instructions, and therefore not while that thread
waits in the store or in a collective, perhaps for minutes. If only the system's default handled the signal before, a
thread is notified at once (through Python's wakeup descriptor), writes the dumps, and then lets the process end.
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

# How long the main thread has to run its own handler before the process ends without it.
_PATIENCE_SECONDS = 0.5
_CREDENTIALS = struct.Struct("3i")
_SIGTERM = frozenset({signal.SIGTERM})


class Termination:
    """A SIGTERM handler that calls `before` once, and then what handled the signal before. Forked children do not
    inherit it.
    """

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._process_id = os.getpid()
        self._previous: Any = None
        self._is_installed = False
        self._is_handled = threading.Event()
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._previous_fd = -1

    def install(self) -> None:
        """Install the handler. Does nothing on another thread than the main one, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            logger.debug("grafter: the first dump is not on the main thread: SIGTERM is left to the system")
            return
        self._previous = signal.getsignal(signal.SIGTERM)
        if self._previous is None or self._previous == signal.SIG_IGN:
            return  # a handler in C, or SIGTERM is ignored
        signal.signal(signal.SIGTERM, self._handle)
        self._is_installed = True
        _fork_guard.guard(self)
        if self._previous == signal.SIG_DFL and hasattr(socket, "SO_PASSCRED"):
            self._listen()

    def uninstall(self) -> None:
        """Restore the earlier handler, unless the program has replaced ours."""
        if not self._is_installed or threading.current_thread() is not threading.main_thread():
            return
        self._restore()
        if self._sockets is not None:
            # An empty message ends the thread.
            self._sockets[1].send(b"")

    def _restore(self) -> None:
        self._is_installed = False
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._previous)
        if self._sockets is not None:
            ours, current = self._sockets[1].fileno(), signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(self._previous_fd if current == ours else current)

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
        """Restore the state before `install` in a process that was just forked."""
        if self._is_installed:
            self._restore()

    def _listen(self) -> None:
        receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.setblocking(False)
        # A forked child shares this descriptor until it runs another program. Its signals do not concern us; the system
        # attaches the sender to each message.
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sockets = receiver, sender
        self._previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(receiver, sender), name="grafter-dump-sigterm", daemon=True).start()

    def _hear(self, receiver: socket.socket, sender: socket.socket) -> None:
        with receiver, sender:
            while True:
                message, credentials, _, _ = receiver.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
                if not message:
                    return
                if _sender(credentials) != self._process_id:
                    continue
                if self._previous_fd != -1:
                    with contextlib.suppress(OSError):
                        os.write(self._previous_fd, message)
                if signal.SIGTERM in message and not self._is_handled.wait(_PATIENCE_SECONDS):
                    if signal.getsignal(signal.SIGTERM) != self._handle:
                        # A handler that replaced ours (a server's, say) decides when and how the process ends.
                        self._before()
                        continue
                    self._is_handled.set()
                    self._before()
                    # Python allows this only on the main thread, which is blocked.
                    ctypes.CDLL(None).signal(int(signal.SIGTERM), 0)
                    os.kill(self._process_id, signal.SIGTERM)


class _ForkGuard:
    """Blocks SIGTERM while a process is forked.

    With a handler in Python, a signal that reaches the child before it has begun would be lost; without the handler, it
    would have ended the child.
    """

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
