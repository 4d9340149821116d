"""Recorders of requests in a rank's process: what a change of the run changes of them, and what a rank tells of it."""

from __future__ import annotations

import os
import shlex
import threading
import weakref
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from grafter.errors import UsageError

_MOST_TOLD = 16
_MOST_KEYS = 100
_LONGEST_KEY = 200
NONE_HERE = (
    "no grafter.RequestRecorder lives in its process. The proxy `grafter record` is a process of its own, which no run "
    "knows: SIGUSR1 has it write what is in memory, and the rest is said when it is started"
)

_Count = Annotated[int, Field(strict=True, ge=0, le=1 << 60)]
_Key = Annotated[str, Field(max_length=_LONGEST_KEY)]


class RecorderChange(BaseModel):
    """What becomes of all recorders of a process; None: stays. exclude: keys with commas between, empty for none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool | None = None
    threshold: Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)] | None = None
    exclude: Annotated[str, Field(max_length=_MOST_KEYS * _LONGEST_KEY)] | None = None
    dump: bool = False

    def check(self) -> None:
        """Raises UsageError where it changes nothing, or leaves out more than is told again."""
        if self == RecorderChange():
            raise UsageError("nothing is said of the recorders: on, off, dump-now, --threshold or --exclude")
        keys = self.exclude.split(",") if self.exclude is not None else []
        if len(keys) > _MOST_KEYS or any(len(key.strip()) > _LONGEST_KEY for key in keys):
            raise UsageError(f"exclude: at most {_MOST_KEYS} keys of at most {_LONGEST_KEY} characters")

    def __str__(self) -> str:
        """As one would type it after `grafter ctl record`."""
        words = [] if self.enabled is None else ["on" if self.enabled else "off"]
        words += ["dump-now"] if self.dump else []
        words += [f"--threshold {self.threshold}"] if self.threshold is not None else []
        words += [f"--exclude {shlex.quote(self.exclude)}"] if self.exclude is not None else []
        return " ".join(words)

    def apply(self) -> None:
        """To all recorders of this process, for the requests that come from now on. Waits for no disk."""
        for recorder in living_recorders():
            recorder.configure(exclude=self.exclude, threshold=self.threshold, enabled=self.enabled)
            if self.dump:
                recorder.dump_soon()


class RecorderState(BaseModel):
    """One recorder. counts: as `RequestRecorder.counts`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Annotated[str, Field(max_length=1000)]
    enabled: bool
    threshold: _Count
    exclude: Annotated[tuple[_Key, ...], Field(max_length=_MOST_KEYS)]
    counts: Annotated[dict[_Key, _Count], Field(max_length=_MOST_KEYS)]

    @property
    def text(self) -> str:
        batches = f"{self.threshold} to a batch" if self.threshold else "the last five minutes"
        without = f", without {', '.join(self.exclude)}" if self.exclude else ""
        counts = {name: self.counts.get(name, 0) for name in ("recorded", "open", "finished", "written")}
        counts |= {name: count for name, count in sorted(self.counts.items()) if name not in counts}
        counted = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"{'on' if self.enabled else 'off'}, {batches}{without}, into {self.directory}: {counted}"


def recorder_states() -> tuple[RecorderState, ...]:
    """The recorders of this process, as they are now; at most 16."""
    return tuple(_state_of(recorder) for recorder in living_recorders()[:_MOST_TOLD])


def _state_of(recorder: LivingRecorder) -> RecorderState:
    # A server may have given what no change of a run may: it is told in short.
    settings = recorder.settings
    return RecorderState(
        directory=_sayable(str(recorder.directory))[-1000:],
        enabled=settings["enabled"],
        threshold=min(settings["threshold"], 1 << 60),
        exclude=tuple(_sayable(key)[:_LONGEST_KEY] for key in settings["exclude"][:_MOST_KEYS]),
        counts=recorder.counts,
    )


def _sayable(text: str) -> str:
    """A name of a file may be no text."""
    return text.encode("utf-8", "replace").decode()


def why_none() -> str | None:
    """Why a change of the recorders would change nothing in this process; None where it would."""
    return None if living_recorders() else NONE_HERE


# The recorders of requests that live in this process; `grafter ctl` shows and changes them.
#
# Imports neither torch nor a recorder, so that a process without recorders pays almost nothing.


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


def register_recorder(recorder: LivingRecorder) -> None:
    global _recorders
    with _lock:
        _recorders = (*(known for known in _recorders if known() is not None), weakref.ref(recorder))


def forget_recorder(recorder: LivingRecorder) -> None:
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
