"""Findings of `grafter doctor`: one line each, and what the user should do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """The result of one check: `check` names it, `text` says what was found, `advice` what to do (not for an ok).

    A fault means that grafter does not work, or that its numbers do not mean what they seem to mean.
    """

    level: Level
    check: str
    text: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.level == "ok" or self.advice, f"{self.check}: a {self.level} says what to do"


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
