"""The identity of a process of the run, which another process can check: whether it is still there, or stopped."""

from __future__ import annotations

import os
import socket

from pydantic import BaseModel, ConfigDict

from grafter.core.processes import host_identity, is_from_signal_handler, process_state


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
