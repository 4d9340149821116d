"""How many points ended how, in words."""

from __future__ import annotations

import os
from collections import Counter

from grafter.analysis.run.run_notes import ONLY_IN
from grafter.analysis.run.run_summary import RunSummary

_OUTCOMES = ("grafted", "compared", "sent", "posted", "missed", "expired", "displaced", "skipped", "failed")


def describe_counts(summary: RunSummary) -> str:
    """`5 grafted, 1 failed`; of a run that met nobody, what it saved."""
    unmeasured = sum(row.unmeasured is not None for row in summary.rows)
    counts = Counter(row.outcome for row in summary.rows if row.only_in is None)
    counts["compared"] -= unmeasured
    parts = [f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome]]
    if unmeasured:
        parts.append(f"{unmeasured} met without figures")
    counted = {where: sum(row.only_in == role for row in summary.rows) for role, where in ONLY_IN.items()}
    one_sided = ", ".join(f"{count} {where}" for where, count in counted.items() if count)
    if one_sided:
        return f"{', '.join(parts) or 'nothing grafted or compared'}; {one_sided}: not judged"
    if parts or not summary.saved:
        return ", ".join(parts) or "no points"
    points = "1 point" if summary.saved == 1 else f"{summary.saved} points"
    if not summary.is_recording:
        return f"{points} saved"
    near = os.path.relpath(summary.run_directory)
    directory = str(summary.run_directory) if near.startswith("..") else near
    return f"{points} recorded; graft from it with --peer {directory}"
