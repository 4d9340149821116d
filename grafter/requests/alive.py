"""The recorders of requests that live in this process: `grafter ctl` looks at them and changes them.

Imports no torch, and no recorder: a process that has none pays nothing for the question.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grafter.requests.recorder import RequestRecorder

_recorders: weakref.WeakSet[RequestRecorder] = weakref.WeakSet()


def add(recorder: RequestRecorder) -> None:
    _recorders.add(recorder)


def discard(recorder: RequestRecorder) -> None:
    _recorders.discard(recorder)


def living_recorders() -> list[RequestRecorder]:
    """Those that were made here and are not closed, in the order of their directories."""
    return sorted(_recorders, key=lambda recorder: (str(recorder.directory), id(recorder)))


def _start_all_afresh() -> None:
    for recorder in living_recorders():
        recorder.start_afresh()


# What a forked child must begin afresh.
os.register_at_fork(after_in_child=_start_all_afresh)
