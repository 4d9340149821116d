"""The result of one check: one line, and what the user should do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """`check` names what was checked, `text` says what was found, `advice` what to do; an ok needs no advice.

    A fault means that grafter does not work, or that its numbers do not mean what they seem to mean.
    """

    level: Level
    check: str
    text: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.level == "ok" or self.advice, f"{self.check}: a {self.level} says what to do"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ok(check: str, text: str) -> Finding:
    return Finding("ok", check, text)


def warning(check: str, text: str, advice: str) -> Finding:
    return Finding("warning", check, text, advice)


def fault(check: str, text: str, advice: str) -> Finding:
    return Finding("fault", check, text, advice)


def has_fault(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "fault" for finding in findings)


def listed(names: Iterable[str], limit: int = 4) -> str:
    """`a, b, c, d and 3 more`."""
    everything = list(names)
    shown = ", ".join(everything[:limit])
    return f"{shown} and {len(everything) - limit} more" if len(everything) > limit else shown


def first_line(error: object, limit: int = 200) -> str:
    """The first line of an error's text; its class if it has no text."""
    text = str(error).strip().split("\n", 1)[0][:limit]
    return text or type(error).__name__
