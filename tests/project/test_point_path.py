"""The layers that one point passes through, in order. `pytest -s` prints them, for both ends.

One rank of each job; the point is the last of a few, so that nothing is done for the first time. Each call of a
function of grafter, and each return into one, is one sample; consecutive samples of one layer are one visit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jobs import Rank, succeed, two_jobs

import grafter

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


def without_core(path: list[str]) -> list[str]:
    """The visits of the layers above `core`, whose pure functions every layer calls."""
    upper = [layer for layer in path if layer != "core"]
    return [layer for layer, before in zip(upper, [None, *upper], strict=False) if layer != before]


def test_a_point_goes_down_through_the_layers_and_comes_back_once(tmp_path: Path) -> None:
    """On both ends. The counts are those of today: a change that raises one should say why."""
    with two_jobs(tmp_path, visits_of_one_point, visits_of_one_point, b2t_filter="name == 'h'") as jobs:
        paths = succeed(jobs.wait())
    for end, path, most in zip(("sender", "receiver"), paths, (33, 47), strict=True):
        upper = without_core(path)
        print(f"{end}: {len(path)} visits, {len(upper)} without core: {' '.join(upper)}")
        assert upper[:2] == ["_calls", "rank"] and upper[-3:] == ["runtime", "rank", "_calls"]
        first, last = upper.index("runtime"), len(upper) - 3
        assert set(upper[first:last]) <= {"runtime", "wire", "store", "config"}, upper
        assert len(upper) <= most, upper
