"""The recorders of requests that live in this process; `grafter ctl` shows and changes them.

Imports neither torch nor a recorder, so that a process without recorders pays almost nothing.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol


class LivingRecorder(Protocol):
    """A recorder of requests as the rest of its process knows it: `grafter.RequestRecorder`."""

    @property
    def directory(self) -> Path: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def counts(self) -> dict[str, int]: ...

    def configure(
        self, *, exclude: str | None = None, threshold: int | None = None, enabled: bool | None = None
    ) -> None: ...

    def dump_soon(self) -> None: ...

    def start_afresh(self) -> None: ...


# Replaced as a whole, so that any thread, and a forked child, can read it without the lock.
_recorders: tuple[weakref.ref[LivingRecorder], ...] = ()
_lock = threading.Lock()


def add(recorder: LivingRecorder) -> None:
    global _recorders
    with _lock:
        _recorders = (*(known for known in _recorders if known() is not None), weakref.ref(recorder))


def discard(recorder: LivingRecorder) -> None:
    global _recorders
    with _lock:
        _recorders = tuple(known for known in _recorders if known() not in (None, recorder))


def living_recorders() -> list[LivingRecorder]:
    """The recorders that this process made and has not closed, in the order of their directories."""
    alive = [recorder for known in _recorders if (recorder := known()) is not None]
    return sorted(alive, key=lambda recorder: (str(recorder.directory), id(recorder)))


def _start_all_afresh() -> None:
    global _lock
    # The lock may belong to a thread that does not exist in the child.
    _lock = threading.Lock()
    for recorder in living_recorders():
        recorder.start_afresh()


# What a forked child must create again.
os.register_at_fork(after_in_child=_start_all_afresh)
