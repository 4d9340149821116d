"""How a process ended, in words."""

from __future__ import annotations

import signal


def describe_exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "was lost: its keeper process was killed from outside"
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"exited with code {exit_code}"
