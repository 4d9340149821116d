"""A page's figures as TensorBoard scalars: one curve per measure and point, over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from grafter.analysis.report.page_data import PagePoint
from grafter.errors import UsageError

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
