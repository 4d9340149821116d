"""The layers that one point passes through, in order: `python -m tests.point_path` prints them, for both ends.

One rank of each job; the point is the last of a few, so that nothing is done for the first time. Each call of a
function of grafter, and each return into one, is one sample; consecutive samples of one layer are one visit.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import grafter
from tests.jobs import Rank, two_jobs

_PACKAGE = str(Path(grafter.__file__).parent) + "/"
_WARM_UP_POINTS = 5


def layer_of(frame: FrameType | None) -> str | None:
    """The layer of a frame's file (`_calls` for the functions that users call); None outside of the package."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename[len(_PACKAGE) :].split("/")[0].removesuffix(".py") if frame is not None else None


def visits(call: Any) -> list[str]:
    """The layers through which a call passes, in order."""
    path: list[str] = []

    def sample(frame: FrameType, event: str, _argument: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(_PACKAGE):
            layer = layer_of(frame if event == "call" else frame.f_back)
            if layer is not None and path[-1:] != [layer]:
                path.append(layer)

    sys.setprofile(sample)
    try:
        call()
    finally:
        sys.setprofile(None)
    return path


def visits_of_one_point(rank: Rank) -> list[str]:
    """In each rank of both jobs."""
    tensor = torch.ones(16) * (2 if rank.is_baseline else 1)
    for _ in range(_WARM_UP_POINTS):
        grafter.dump("h", tensor)
    path = visits(lambda: grafter.dump("h", tensor))
    assert tensor[0] == 2
    return path


def main() -> None:
    """Print the visits of one small point, of the rank that sends and of the one that writes."""
    with (
        tempfile.TemporaryDirectory() as directory,
        two_jobs(Path(directory), visits_of_one_point, visits_of_one_point, b2t_filter="name == 'h'") as jobs,
    ):
        results = jobs.wait()
    for end, result in zip(("sender", "receiver"), results, strict=True):
        assert result.error is None, result.error
        upper = [layer for layer in result.value if layer != "core"]
        collapsed = [one for one, before in zip(upper, [None, *upper], strict=False) if one != before]
        print(f"{end}: {len(result.value)} visits, {len(collapsed)} without core: {Counter(collapsed)}")
        print("   ", " ".join(collapsed))


if __name__ == "__main__":
    main()
