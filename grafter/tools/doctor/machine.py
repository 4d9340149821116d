"""Checks this machine, one check after the other; none of them can end the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from grafter.tools.doctor.finding import Finding, fault, first_line


def check_machine(out: Path, master: tuple[str, int] | None = None) -> Iterator[Finding]:
    """All findings, each as soon as it is known. `out`: the directory for ledgers. `master`: another
    machine's store.
    """
    from grafter.tools.doctor.software import check_python, check_torch

    torch_finding = check_torch()
    if torch_finding.level == "fault":
        import sys

        # Everything that follows needs it.
        yield check_python(sys.version_info[:3])
        yield torch_finding
        return
    from grafter.tools.doctor.environment import check_environment
    from grafter.tools.doctor.network import check_network
    from grafter.tools.doctor.sharing import check_sharing
    from grafter.tools.doctor.software import check_software
    from grafter.tools.doctor.system import check_system

    yield from _guarded("software", check_software)
    yield from _guarded("system", lambda: check_system(out))
    yield from _guarded("shared memory", lambda: iter([check_sharing()]))
    yield from _guarded("network", lambda: check_network(master))
    yield from _guarded("environment", lambda: check_environment(os.environ))


def _guarded(subject: str, checks: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Turn an unforeseen error of a check into a finding, so that the other checks still run."""
    try:
        yield from checks()
    except Exception as error:
        text = f"a check failed: {type(error).__name__}: {first_line(error)}"
        yield fault(subject, text, "This is a fault of `grafter doctor`, or a kind of machine that it does not know.")
