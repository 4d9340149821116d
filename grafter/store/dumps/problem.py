"""What is wrong with a directory of dumps, where the rest of it can be read: said, and never passed over in silence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """`file`, relative to the role's directory, or with a line as `rank0.dumps.jsonl:3`; and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"
