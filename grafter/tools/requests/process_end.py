"""Writes before a process ends, by an uncaught error, SIGTERM, or the end of the interpreter.

A server that handles SIGTERM itself continues to serve for a while. What is in memory is then written when the signal
arrives, and once more at the end, with what has changed since.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from grafter.store.dumps.termination import Termination


class ProcessEnd:
    """The hooks of a process's end: they call `before` when it is about to end, while installed.

    `before` may be called several times, on any thread, in the middle of any code. It must not raise.
    """

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._termination = Termination(before)
        self._excepthook: Any = None
        self._thread_excepthook: Any = None

    def install(self) -> None:
        self._excepthook, sys.excepthook = sys.excepthook, self._on_exception
        self._thread_excepthook, threading.excepthook = threading.excepthook, self._on_thread_exception
        atexit.register(self._before)
        self._termination.install()

    def uninstall(self) -> None:
        """Restore the earlier handlers. One that was replaced since stays, and only calls the earlier one."""
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._excepthook
        if threading.excepthook == self._on_thread_exception:
            threading.excepthook = self._thread_excepthook
        atexit.unregister(self._before)
        self._termination.uninstall()

    def _on_exception(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        # Write now and not at exit: before that, the interpreter waits for the server's other threads, perhaps forever.
        self._before()
        self._excepthook(kind, error, traceback)

    def _on_thread_exception(self, arguments: Any) -> None:
        self._before()
        self._thread_excepthook(arguments)
