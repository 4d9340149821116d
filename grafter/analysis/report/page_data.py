"""The content of a page: one frozen model for a live run, `grafter locate`, and a comparison of dumps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grafter.analysis.report.pictures import Picture
from grafter.errors import UsageError

Kind = Literal["run", "locate", "comparison"]
FindingLevel = Literal["problem", "note"]
Tone = Literal["bad", "good", "open"]

# The outcomes of the ledger and the verdicts of a comparison that a reader should see first.
TROUBLES = frozenset({"failed", "skipped", "error"})


@dataclass(frozen=True)
class Finding:
    """One sentence that a reader should see before any figure."""

    level: FindingLevel
    text: str


@dataclass(frozen=True)
class PageVerdict:
    """One sentence, and the facts behind it.

    tone: `bad` names a faulty point, `good` clears all points, `open` decides nothing. order: that of the named point,
    if there is one.
    """

    sentence: str
    tone: Tone
    details: tuple[str, ...] = ()
    order: int | None = None


@dataclass(frozen=True)
class PagePoint:
    """One point over all ranks: the worst tensor of the worst receiver, as in `grafter show`.

    label: the point without its step; equal labels in two steps mean the same place in the program.
    difference: `rel`, `max_abs` and others by name, as docs/ledger.md defines them; what was not measured is absent.
    added: `rel` that the point itself adds, if all points before it were grafted. floor: what it adds without the
    fault.
    inputs_rel: for a module's output, the largest `rel` of its inputs, if they are points as well.
    seconds: per stage, on the slowest rank. size_bytes: the bytes that its receivers received.
    """

    order: int
    label: str
    name: str
    tags: dict[str, Any]
    step: int
    phase: str
    outcome: str
    occurrence: int = 0
    layer: int | None = None
    direction: str | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    difference: dict[str, float] = field(default_factory=dict)
    nonfinite: int = 0
    worst_index: tuple[int, ...] | None = None
    worst_values: tuple[float, ...] = ()
    added: float | None = None
    floor: float | None = None
    inputs_rel: float | None = None
    guilty: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    size_bytes: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    leaf: str = ""
    ranks: tuple[str, ...] = ()
    call_site: str = ""

    @property
    def is_trouble(self) -> bool:
        return self.outcome in TROUBLES

    @property
    def badness(self) -> tuple[bool, float]:
        """A sort key; larger is worse: first values that are not finite on one side, then `rel`."""
        return self.nonfinite > 0, self.difference.get("rel", -1.0)


# Facts that always differ between two jobs, and therefore are not marked.
OWN_FACTS = ("dumps", "run", "run_id", "time", "GRAFTER_ROLE", "GRAFTER_RUN_NAME")


@dataclass(frozen=True)
class Environment:
    """The facts of one job from run.json: a title, and facts in order, all as text."""

    title: str
    facts: dict[str, str]


@dataclass(frozen=True)
class PageData:
    """The content of one page. `sides` names the two jobs, in the order of histograms and environments."""

    kind: Kind
    title: str
    source: str
    sides: tuple[str, str]
    points: tuple[PagePoint, ...]
    findings: tuple[Finding, ...] = ()
    verdict: PageVerdict | None = None
    environments: tuple[Environment, ...] = ()
    pictures: tuple[Picture, ...] = ()
    # Why there are no pictures, or not of every point, and how to get them.
    pictures_note: str = ""
    # What the differences of this page mean.
    measured: str = ""
    adds_note: str = ""


# A page's figures as TensorBoard scalars: one curve per measure and point, over steps.

MEASURES = ("rel", "max_abs")


def write_scalars(points: Sequence[PagePoint], directory: Path) -> int:
    """Write `rel/<point>`, `max_abs/<point>` and `adds/<point>` of each step to `directory`. Returns the number of
    values.

    NaN marks points with values that are not finite on one side only. Raises UsageError without tensorboard.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs TensorBoard, which is not installed (pip install tensorboard). Without it, "
            "the HTML page has the same figures."
        ) from error
    written = 0
    with SummaryWriter(str(directory)) as writer:
        for point in points:
            for name, value in _scalars(point):
                writer.add_scalar(f"{name}/{_tag(point)}", value, point.step)
                written += 1
    return written


def _scalars(point: PagePoint) -> list[tuple[str, float]]:
    found = [(name, point.difference[name]) for name in MEASURES if name in point.difference]
    if point.nonfinite:
        found = [(name, math.nan) for name, _ in found] or [("rel", math.nan)]
    if point.added is not None:
        found.append(("adds", math.nan if math.isinf(point.added) else point.added))
    return found


def _tag(point: PagePoint) -> str:
    """The label without slashes: TensorBoard groups tags by the text before the first slash."""
    return point.label.replace("/", "_").replace(" ", ".")
