"""Whether a process of the run is still there: `/proc` on one host, a heartbeat through the store elsewhere."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from grafter.core.signal_handlers import is_from_signal_handler

SILENT_AFTER_SECONDS = 60.0


class ProcessIdentity(BaseModel):
    """A process, in terms that another process can check. `host` is equal only where `/proc` and sockets are shared."""

    model_config = ConfigDict(frozen=True)

    host: str
    hostname: str
    uid: int
    pid: int
    start_time: int
    # "" in what was written before there was this field, and where there is no `/proc`.
    user_namespace: str = ""

    @property
    def memory_domain(self) -> tuple[str, int, str]:
        """Equal where two processes can open each other's memory, and see each other's user on a socket.

        Containers that share a pid and a network namespace may still have user namespaces of their own: then each sees
        the other as nobody, and may not look into it.
        """
        return self.host, self.uid, self.user_namespace


def own_identity() -> ProcessIdentity:
    return ProcessIdentity(
        host=host_identity(),
        hostname=socket.gethostname(),
        uid=os.getuid(),
        pid=os.getpid(),
        start_time=process_state(os.getpid())[1],
        user_namespace=_user_namespace(),
    )


def _user_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/user")
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        return ""


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


def how_gone(process: ProcessIdentity) -> str | None:
    """None while a process of this host lives; else a phrase that follows its name."""
    state, start_time = process_state(process.pid)
    if state and state not in "ZX" and start_time == process.start_time:
        return None
    return (
        f"is gone: its process (pid {process.pid} on {process.hostname}) has ended without closing, killed or crashed"
    )


def is_stopped(process: ProcessIdentity) -> bool:
    state, start_time = process_state(process.pid)
    return state in ("T", "t") and start_time == process.start_time


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
