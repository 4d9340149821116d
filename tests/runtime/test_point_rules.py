"""The rules for one rank's points, as changes of the run replace them between two steps."""

from __future__ import annotations

from grafter.config.control.change import Change
from grafter.config.control.in_force import InForce
from grafter.config.settings.config import GrafterConfig
from grafter.errors import JoinError
from grafter.runtime.point_rules import PointRules, SettingsChange
from grafter.runtime.rank_context import RankContext

START = GrafterConfig(enable=True, role="baseline", master_port=1, compare_filter="name == 'a'", dump_filter="True")


def change_in(step: int, **settings: str) -> SettingsChange:
    """A change of these settings, in force from this step on."""
    in_force = InForce.at_start(START).after(Change(action="set", settings=settings), step)
    return SettingsChange(step, in_force, in_force.configured(START), in_force.filters(START, saves=True))


def test_a_recomputation_finds_the_filters_of_its_own_step() -> None:
    rules = PointRules(START, saves_points=True)
    first = rules.filters
    change = change_in(3, compare_filter="name == 'b'", stats="off")
    rules.change(change)
    # It may come twice, after an interrupt.
    rules.change(change)
    assert rules.filters is change.filters and rules.stats == "off"
    assert [rules.filters_at(step) is first for step in range(5)] == [True, True, True, False, False]
    assert rules.filters_at(2).direction_of({"name": "a", "step": 2}) == "compare"
    assert rules.filters_at(3).direction_of({"name": "a", "step": 3}) is None


def test_a_rank_that_plays_a_recording_saves_nothing() -> None:
    tags = {"name": "a", "step": 0}
    assert PointRules(START, saves_points=True).filters.saves(tags)
    assert not PointRules(START, saves_points=False).filters.saves(tags)


def test_after_a_refused_join_every_call_raises_and_the_rank_ends_with_that_error() -> None:
    """Also a call that no filter would match: `matchers` are asked of each."""
    context = RankContext.of(START)
    context.refuse_all(JoinError("they do not fit"))
    assert context.status.last_error() is None
    (refuse,) = context.rules.filters.matchers
    try:
        refuse({"name": "any"})
    except JoinError as error:
        assert str(error) == "they do not fit" and context.status.last_error() is error
    else:
        raise AssertionError("the call went on")
