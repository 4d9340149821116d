"""Processes: the state of one, how one ended, heartbeats, and exceptions of waits and of signal handlers."""

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
    """A text for one boot of a machine, one pid namespace and one network namespace; unique if there is no `/proc`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.readlink('/proc/self/ns/net')}"
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        return f"unknown/{socket.gethostname()}/{os.getpid()}"


def process_state(pid: int) -> tuple[str, int]:
    """(state letter, start time in clock ticks since boot) of a process; ("", 0) if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        return "", 0
    return fields[0], int(fields[19])


class HeartbeatWatch:
    """The times at which the heartbeats of ranks on other hosts last changed, by the clock of this process."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[str, float]] = {}

    def silent_seconds(self, graft_rank: int, beat: str) -> float:
        """For how many seconds a rank's heartbeat has been `beat`."""
        now = time.monotonic()
        last = self._last.get(graft_rank)
        if last is None or last[0] != beat:
            self._last[graft_rank] = (beat, now)
            return 0.0
        return now - last[1]


class Watch(Protocol):
    """The check that a transfer makes, at least four times a second, whether to continue."""

    def check(self) -> None:
        """Raise RunError if the run is over, Abandoned if the other side has given this point up."""


class Abandoned(Exception):
    """The other side has given this point up. The text says why. The run continues."""


class PeerGone(Exception):
    """The connection to a rank broke in the middle of a transfer."""

    def __init__(self, graft_rank: int, detail: str) -> None:
        super().__init__(detail)
        self.graft_rank = graft_rank


def describe_exit(exit_code: int | None) -> str:
    """How a process ended, as a phrase that follows its name. exit_code: negative for a signal; None: unknown."""
    if exit_code is None:
        return "was lost: its keeper process was killed from outside"
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"exited with code {exit_code}"


def is_from_signal_handler(error: BaseException) -> bool:
    """Whether a Python signal handler raised this exception, which the calling function has caught.

    A handler may run, and raise, between any two steps of the main thread. Code that catches OSError around a socket
    then also catches the handler's `TimeoutError`, which it must pass on. A handler is recognised by its arguments:
    Python calls it with the frame that it interrupted, which is also its caller.
    """
    # Not from the frame that caught it: reading its variables would keep them alive in a cycle with the exception.
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
