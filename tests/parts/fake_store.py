"""A rendezvous store for tests of the launcher: it hosts nothing, imports no torch, and remembers what it was told."""

from __future__ import annotations

import os


class FakeStore:
    """`waiting` is what `waiting_summary` says; FAKE_STORE_WAITING sets it in another process."""

    def __init__(
        self, address: str = "127.0.0.1", port: int = 0, *, group_name: str = "graft", secret: str | None = None
    ) -> None:
        self.address, self.port = address, port or 1
        self.group_name, self.secret = group_name, secret
        self.exits: list[tuple[str, str]] = []
        self.closed = False
        self.waiting: str | None = os.environ.get("FAKE_STORE_WAITING")

    def report_job_exit(self, role: str, text: str) -> None:
        self.exits.append((role, text))

    def waiting_summary(self) -> str | None:
        return self.waiting

    def close(self) -> None:
        self.closed = True


def main() -> None:
    """`grafter` with a FakeStore: a process test that needs no ranks then takes a fifth of a second."""
    from grafter.cli import main as cli
    from grafter.tools.launch import launcher

    launcher.host_store = FakeStore
    cli.main()


if __name__ == "__main__":
    main()
