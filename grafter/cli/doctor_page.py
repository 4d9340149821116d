"""Prints findings: one line each, followed by what to do; or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from grafter.cli.console import print_line, printable
from grafter.tools.doctor.finding import Finding, has_fault

_STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}
_LEVEL_WIDTH = max(map(len, _STYLES))
_CHECK_WIDTH = 22


class Page:
    """Prints findings as they arrive. In a pipe, a finding is one line, and its advice is another."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def heading(self, text: str) -> None:
        print_line(self._console, text, "bold")

    def progress(self, text: str) -> None:
        print_line(self._console, text, "cyan")

    def show(self, finding: Finding) -> None:
        head = Text(finding.level.ljust(_LEVEL_WIDTH), style=_STYLES[finding.level])
        head.append(f"  {finding.check.ljust(_CHECK_WIDTH)}  ", style="bold")
        self._print(head, finding.text, "")
        if finding.advice:
            self._print(Text(" " * (_LEVEL_WIDTH + _CHECK_WIDTH + 4)), finding.advice, "-> ")

    def verdict(self, findings: Sequence[Finding]) -> None:
        print_line(self._console, describe(findings), "bold")

    def _print(self, head: Text, text: str, mark: str) -> None:
        body = Text(mark + printable(text))
        if not self._console.is_terminal or self._console.width < len(head) + 20:
            # Whole lines, so that a program that reads a pipe finds them.
            self._console.print(Text.assemble(head, body), soft_wrap=True)
            return
        lines = body.wrap(self._console, self._console.width - len(head))
        for number, line in enumerate(lines):
            self._console.print(Text.assemble(head if number == 0 else Text(" " * len(head)), line))


def describe(findings: Iterable[Finding]) -> str:
    """The sentence at the end."""
    counts = Counter(finding.level for finding in findings)
    if counts["fault"]:
        return f"{_counted(counts['fault'], 'fault')}, {_counted(counts['warning'], 'warning')}: see what to do above."
    if counts["warning"]:
        return f"No fault; {_counted(counts['warning'], 'warning')}."
    return "No fault and no warning."


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps(
        {"fault": has_fault(findings), "findings": [asdict(finding) for finding in findings]},
        indent=1,
        ensure_ascii=False,
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
