"""What becomes of a point: the one rule that values, gradients and played recordings share."""

from __future__ import annotations

from itertools import product

import pytest

from grafter.core.point_fate import PointFate, PointSituation, fate_of
from grafter.core.roles import Direction

DIRECTIONS: list[Direction | None] = [None, "b2t", "t2b", "compare"]
ALL = [PointSituation(direction, *flags) for direction in DIRECTIONS for flags in product((False, True), repeat=5)]


@pytest.mark.parametrize(
    ("situation", "fate"),
    [
        (PointSituation(None, is_saved=False), "ignore"),
        (PointSituation(None, is_saved=True), "save"),
        (PointSituation("b2t", is_saved=False), "exchange"),
        (PointSituation("compare", is_saved=True), "exchange"),
        (PointSituation("t2b", is_saved=False, is_too_early=True), "defer"),
        (PointSituation("t2b", is_saved=True, is_too_early=True), "defer"),
        (PointSituation("b2t", is_saved=True, has_counterpart=False), "skip"),
        (PointSituation("b2t", is_saved=True, records_alone=True), "record"),
        (PointSituation(None, is_saved=True, records_alone=True), "save"),
        (PointSituation("b2t", is_saved=False, is_detached=True), "ignore"),
        (PointSituation("b2t", is_saved=True, is_detached=True), "save"),
        # Nothing is known of the other job's modules before both have joined.
        (PointSituation("b2t", is_saved=False, is_too_early=True, has_counterpart=False), "defer"),
    ],
)
def test_the_fate_of_a_point(situation: PointSituation, fate: PointFate) -> None:
    assert fate_of(situation) == fate


def test_only_a_point_with_a_direction_reaches_the_other_job() -> None:
    """And none of a rank that continues ungrafted, or of a job that is recorded alone."""
    for situation in ALL:
        can_reach = situation.direction is not None and not (situation.is_detached or situation.records_alone)
        assert (fate_of(situation) in ("exchange", "defer", "skip")) == can_reach


def test_what_is_to_be_saved_is_never_ignored() -> None:
    """Every other fate saves the value as well, if it is to be saved."""
    for situation in ALL:
        fate = fate_of(situation)
        assert not (situation.is_saved and fate == "ignore")
        assert situation.is_saved or fate != "save"


def test_the_direction_itself_does_not_matter() -> None:
    for situation in ALL:
        if situation.direction is not None:
            assert fate_of(situation) == fate_of(situation._replace(direction="b2t"))
