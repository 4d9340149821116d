"""What lies in an outbox, in numbers. Imported where grafting is off, too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pending:
    """The entries of this rank's outbox, as it last heard of them (its states are looked up once a second).

    entries: `open` + `claimed`. bytes: their payload. open: posted, and not taken up. claimed: being pulled.
    """

    entries: int = 0
    bytes: int = 0
    open: int = 0
    claimed: int = 0
