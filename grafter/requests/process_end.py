"""How a process ends, and what is written before: an error that nobody caught, SIGTERM, the end of the interpreter.

A server that handles SIGTERM itself goes on serving for a while. What is in memory is then written when the signal
comes, and once more at the end, for what has changed since.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from grafter.dumps.termination import Termination


class ProcessEnd:
    """While it is installed, `before` is called when the process is about to end: perhaps several times, on any thread,
    in the middle of anything. It must not raise."""

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
        """Give back what was there, unless somebody else has come since: then ours stays, and only passes on."""
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._excepthook
        if threading.excepthook == self._on_thread_exception:
            threading.excepthook = self._thread_excepthook
        atexit.unregister(self._before)
        self._termination.uninstall()

    def _on_exception(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        # Now and not at exit, before which the interpreter waits for the server's other threads, perhaps for ever.
        self._before()
        self._excepthook(kind, error, traceback)

    def _on_thread_exception(self, arguments: Any) -> None:
        self._before()
        self._thread_excepthook(arguments)
