"""The process that hosts the rendezvous store, as one rank watches it: a rank, or `grafter run`."""

from __future__ import annotations

from dataclasses import dataclass

from grafter.core.process_identity import ProcessIdentity, how_gone, is_stopped
from grafter.core.processes import host_identity


@dataclass(frozen=True)
class StoreHost:
    """name: as messages name it. process: None where it is not known. graft_rank: where it is a rank."""

    name: str
    process: ProcessIdentity | None = None
    graft_rank: int | None = None

    def __str__(self) -> str:
        if self.process is None:
            return self.name
        return f"{self.name} (pid {self.process.pid} on {self.process.hostname})"

    @property
    def is_here(self) -> bool:
        """Whether it runs where this process can look it up."""
        return self.process is not None and self.process.host == host_identity()

    @property
    def is_stopped(self) -> bool:
        """False also where it runs on another host."""
        return self.process is not None and self.is_here and is_stopped(self.process)

    @property
    def is_gone(self) -> bool:
        """False also where it runs on another host."""
        return self.process is not None and self.is_here and how_gone(self.process) is not None
