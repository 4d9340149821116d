"""Parses the address of a run's store as it is given to a command."""

from __future__ import annotations

from grafter.errors import UsageError


def parse_master(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 address is in brackets. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--master {text}: write it as HOST:PORT, such as 10.0.0.1:29400.")
    return host.removeprefix("[").removesuffix("]"), int(port)
