"""Processes: whether one lives, how one ended, what a wait asks, and which exceptions signal handlers raised."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import time
from pathlib import Path
from typing import Protocol

SILENT_AFTER_SECONDS = 60.0


def host_identity() -> str:
    """One boot of one machine, one pid namespace and one network namespace; unique where there is no `/proc`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.readlink('/proc/self/ns/net')}"
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        return f"unknown/{socket.gethostname()}/{os.getpid()}"


def process_state(pid: int) -> tuple[str, int]:
    """(state letter, start time in clock ticks since boot) of a process; ("", 0) where it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        return "", 0
    return fields[0], int(fields[19])


class HeartbeatWatch:
    """Remembers when each heartbeat of another host last changed, by the clock of this process."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[str, float]] = {}

    def silent_seconds(self, graft_rank: int, beat: str) -> float:
        now = time.monotonic()
        last = self._last.get(graft_rank)
        if last is None or last[0] != beat:
            self._last[graft_rank] = (beat, now)
            return 0.0
        return now - last[1]


# What a wait for other ranks asks while it lasts, and how it can end early.


class Watch(Protocol):
    """What a transfer asks, at least four times a second, whether to go on."""

    def check(self) -> None:
        """Raises RunError if the run is over, Abandoned if the other side has given this point up."""


class Abandoned(Exception):
    """The other side has given this point up; the text says why. The run goes on."""


class PeerGone(Exception):
    """The connection to a rank broke in the middle of a transfer."""

    def __init__(self, graft_rank: int, detail: str) -> None:
        super().__init__(detail)
        self.graft_rank = graft_rank


# How a process ended, in words.


def describe_exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "was lost: its keeper process was killed from outside"
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"exited with code {exit_code}"


# Whether an exception was raised by a signal handler of the program, or by the call that it interrupted.


def is_from_signal_handler(error: BaseException) -> bool:
    """Whether a Python signal handler raised this exception, which the calling function has caught.

    A handler may run, and raise, between any two steps of the main thread. Its `TimeoutError` is then an OSError to
    whoever catches those around a socket, and is not theirs. Python calls a handler with the frame that it interrupted,
    which is also the frame that it returns to.
    """
    # Not the frame that caught it. To ask that for its variables would make them live on in a cycle with the exception.
    traceback = error.__traceback__.tb_next if error.__traceback__ is not None else None
    while traceback is not None:
        frame, caller = traceback.tb_frame, traceback.tb_frame.f_back
        if caller is not None:
            arguments = inspect.getargvalues(frame)
            given = [arguments.locals.get(name) for name in arguments.args]
            given += arguments.locals.get(arguments.varargs or "", ())
            if any(value is caller for value in given):
                return True
        traceback = traceback.tb_next
    return False
