"""Changes of a run, without processes: what a change leaves in force, how answers become a decision, what is traced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from grafter.cli.control_table import describe_effect
from grafter.cli.main import app
from grafter.config.control.change import Answer, Change, Decision, State
from grafter.config.control.in_force import DumpedSteps, InForce, TracedPoints, Verdict
from grafter.config.direction_filters import DirectionFilters
from grafter.config.settings.config import GrafterConfig
from grafter.errors import ConfigError, FilterError, GrafterError, UsageError
from grafter.store.dumps.limits import Limits
from grafter.store.run_files import HistoryLine, append_history, history_notes
from grafter.wire.control.decision import decide
from grafter.wire.control.run_access import Agreed, RankView, place_of_run
from grafter.wire.monitor.status_board import BoardLine

START = GrafterConfig(enable=True, role="baseline", master_port=1, compare_filter="name == 'a'", key="layer_id")
AT_START = InForce.at_start(START)


def change(action: str, **fields: Any) -> Change:
    return Change.model_validate({"action": action, **fields})


def test_set_changes_what_is_named_and_an_empty_text_unsets() -> None:
    asked = change("set", settings={"compare_filter": "", "b2t_filter": "layer_id == 1", "stats": "light"})
    after = AT_START.after(asked, 5)
    assert (after.b2t_filter, after.compare_filter, after.stats) == ("layer_id == 1", None, "light")
    assert list(after.configured(START).filters) == ["b2t"]
    assert str(asked) == "set --compare '' --b2t 'layer_id == 1' --stats 'light'"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"compare_filter": "name = 'a'"}, "a single `=` assigns"),
        ({"compare_filter": "search('a(?=b)', name)"}, "no lookaheads"),
        ({"compare_filter": "other == 1"}, "`other` is not among the tags that `key` lists"),
        ({"compare_filter": "tp_rank == 1"}, "differs between ranks"),
        ({"dump_filter": "occurrence == 1"}, "a filter cannot read it"),
        ({"compare_filter": ""}, "set at least one of"),
        ({"b2t_filter": " name == 'a'"}, "b2t and compare have the same filter"),
        ({"stats": "much"}, "legal: full, light, off"),
        ({}, "nothing is set"),
    ],
)
def test_what_the_configuration_would_refuse_at_the_start_is_refused(settings: dict[str, str], told: str) -> None:
    with pytest.raises((ConfigError, UsageError), match=told):
        AT_START.after(change("set", settings=settings), 5).check(START)
    # Also while all is off, or it could not be switched on again; and while steps are dumped, or their end would fail.
    for before in (AT_START.after(change("off"), 2), AT_START.after(change("dump-next", steps=9), 2)):
        with pytest.raises((ConfigError, UsageError), match=told):
            before.after(change("set", settings=settings), 5).check(START)


def test_off_matches_nothing_and_on_brings_back_what_was_before_with_what_was_set_since() -> None:
    off = AT_START.after(change("off"), 3)
    filters = off.filters(START, saves=True)
    assert filters.matchers == () and not filters.saves({"name": "a", "step": 3})
    assert filters.direction_of({"name": "a", "step": 3}) is None
    meanwhile = off.after(change("set", settings={"stats": "off"}), 4)
    assert meanwhile.is_off
    on = meanwhile.after(change("on"), 5)
    assert (on.compare_filter, on.stats, on.is_off) == ("name == 'a'", "off", False)
    with pytest.raises(UsageError, match="comes first"):
        off.after(change("dump-next"), 4)


@given(first=st.integers(0, 50), steps=st.integers(1, 5), own=st.sampled_from([None, "name == 'own'"]))
def test_dump_next_saves_those_steps_and_no_other(first: int, steps: int, own: str | None) -> None:
    """Besides what the dump filter saves, and until the steps are over."""
    start = AT_START.model_copy(update={"dump_filter": own})
    after = start.after(change("dump-next", steps=steps, points="name == 'x' or name == 'y'"), first)
    filters = after.filters(START, saves=True)
    saved = [step for step in range(60) if filters.saves({"name": "x", "step": step})]
    assert saved == list(range(first, first + steps))
    assert filters.saves({"name": "own", "step": 59}) is (own is not None)
    assert not filters.saves({"name": "z", "step": first})
    assert after.after(change("set", settings={"stats": "off"}), first + steps).dumped_steps is None
    assert after.after(change("set", settings={"stats": "off"}), first + steps - 1).dumped_steps is not None
    assert after.at_end_of_dump() == start


@pytest.mark.parametrize("points", ["name == 'x') or (True", "name =", ""])
def test_points_to_dump_must_be_a_filter_by_themselves(points: str) -> None:
    with pytest.raises((FilterError, UsageError)):
        AT_START.after(change("dump-next", points=points), 3).configured(START)


def test_the_plan_file_is_not_read_again(tmp_path: Path) -> None:
    """Its rules and names stay as they were at the start, whatever has become of the file."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("rules: [{match: 'a', write: return}]\n")
    start = GrafterConfig(role="target", compare_filter="True", plan=str(plan))
    plan.unlink()
    config = AT_START.configured(start)
    assert config.rules == start.rules
    assert len(config.rules) == 1


def test_what_travels_takes_no_field_and_no_size_that_it_does_not_know() -> None:
    for bad in (
        {"action": "format"},
        {"action": "set", "settings": {"dir": "/tmp/x"}},
        {"action": "set", "settings": {"b2t_filter": "x" * 10_001}},
        {"action": "dump-next", "steps": 0},
        {"action": "off", "windows": 3},
    ):
        with pytest.raises(ValueError, match="validation error"):
            Change.model_validate(bad)
    assert len(Answer.refusal("x" * 100_000).refused or "") == 4000


@given(steps=st.lists(st.integers(0, 1 << 50), min_size=1, max_size=8))
def test_the_decided_step_is_ahead_of_all_ranks(steps: list[int]) -> None:
    decision = decide({f"rank {n}": Answer(step=step) for n, step in enumerate(steps)}, [], seconds=1)
    assert decision.step is not None
    assert all(step < decision.step for step in steps)


def test_one_refusal_or_one_silent_rank_refuses_for_all() -> None:
    answers = {"a": Answer(step=3), "b": Answer.refusal("no"), "c": Answer.refusal("no")}
    assert decide(answers, ["d"], seconds=1) == Decision(refused="b, c: no")
    assert "no answer from d within 1 s" in (decide({"a": Answer(step=3)}, ["d"], seconds=1).refused or "")
    assert decide({}, [], seconds=1) == Decision(refused="all ranks have left the run")


KINDS = [
    Verdict("nothing", True), Verdict("operator", True), Verdict("operator", False), Verdict("break", False),
]  # fmt: skip


def test_compiled_code_serves_what_needs_no_more_than_it_was_traced_for() -> None:
    for has, traced in enumerate(KINDS):
        for needs, wanted in enumerate(KINDS):
            assert traced.serves(wanted) is (has >= needs)


def judge(filters: Sequence[DirectionFilters], name: str, arguments: dict[str, Any]) -> Verdict:
    possible = {found for each in filters for found in each.could_match({"name": name, **arguments})}
    return KINDS[0] if not possible else KINDS[1] if possible <= {"compare", "dump"} else KINDS[2]


def filters_of(**settings: str) -> DirectionFilters:
    return DirectionFilters(GrafterConfig(**settings).filters)


def test_a_change_that_compiled_code_was_not_traced_for_is_refused() -> None:
    """What was left out, or is only compared; not what was traced while the change was under way."""
    traced = TracedPoints(judge)
    comparing, grafting = filters_of(compare_filter="name == 'h'"), filters_of(b2t_filter="name == 'h'")
    traced.trace([comparing], "h", {})
    traced.trace([comparing], "other", {})
    assert traced.why_not(filters_of(compare_filter="name == 'h' and name != 'g'")) is None
    assert traced.why_not(DirectionFilters({})) is None
    assert "the points h are" in (traced.why_not(grafting) or "")
    assert "the points h, other are" in (traced.why_not(filters_of(b2t_filter="True")) or "")
    # Traced again with both in view, it could be grafted; the older code of it may still run.
    traced.trace([comparing, grafting], "h", {})
    assert traced.why_not(grafting) is not None
    # Steps to dump leave the points alone that they do not name.
    dumped = AT_START.after(change("dump-next", points="name == 'h'"), 9)
    assert traced.why_not(dumped.filters(START, saves=True, in_any_step=True)) is None
    fresh = TracedPoints(judge)
    fresh.trace([comparing, grafting], "h", {})
    assert fresh.why_not(grafting) is None


def test_filters_that_take_over_know_what_those_before_have_met() -> None:
    first = filters_of(compare_filter="layer_id == 3", b2t_filter="name == 'never'")
    assert first.direction_of({"name": "h", "layer_id": 3}) == "compare"
    first.unseen_tags -= {"layer_id"}
    off = DirectionFilters({})
    off.continue_from(first)
    assert off.have_directions, "the run was not one that only saves"
    last = filters_of(compare_filter="layer_id == 3 and other == 1")
    last.continue_from(off)
    assert last.never_matched() == ["b2t: name == 'never'", "compare: layer_id == 3 and other == 1"]
    assert last.tags_never_seen() == ["other"]
    back = filters_of(compare_filter="layer_id == 3", b2t_filter="name == 'never'")
    back.continue_from(last)
    back.direction_of({"name": "never"})
    assert back.never_matched() == ["compare: layer_id == 3 and other == 1"]


def test_steps_that_are_dumped_on_request_are_no_matter_of_the_limit_of_steps() -> None:
    limits = Limits("0-1", None, None, "rank 0")
    limits.also_allow(5, 7)
    assert [step for step in range(9) if limits.allows_step(step)] == [0, 1, 5, 6]


def line_of(role: Any, state: Any = "running") -> BoardLine:
    return BoardLine(role=role, role_rank=0, sequence=1, state=state, since=0)


def view(step: int | None, changes: int = 0, state: str = "running") -> RankView:
    told = State(count=1, step=step, changes=changes, to_come=(), in_force=AT_START) if step is not None else None
    return RankView("baseline rank 0", line_of("baseline", state), told)


def test_an_agreed_change_is_only_called_in_force_where_it_is() -> None:
    agreed = Agreed(2, Decision(step=4))
    assert describe_effect(agreed, [view(4, 3), view(9, 3)]) == (
        "change 2 is in force from step 4 on, on all 2 ranks",
        True,
    )
    text, is_done = describe_effect(agreed, [view(3), view(4, 3), view(None)])
    assert (not is_done) and "ranks are in step 3 to 4, and 1 of 3 have come to it" in text
    text, is_done = describe_effect(agreed, [view(3), view(2)])
    assert (not is_done) and "no rank has ended a step since" in text
    assert describe_effect(agreed, [view(None, state="left"), view(4, 3)])[1]
    assert "all ranks have left" in describe_effect(agreed, [view(None, state="left")])[0]


def test_a_reader_of_the_ledger_is_told_what_changed(tmp_path: Path) -> None:
    """One note for both jobs, in the order of steps; and one job's alone is said to be so."""
    dumped = AT_START.model_copy(update={"dumped_steps": DumpedSteps(points="True", first=7, end=9)})
    lines = [
        HistoryLine(time=0, number=1, step=7, asked="dump-next 2", by="me", in_force=dumped),
        HistoryLine(time=0, number=None, step=9, asked=None, by=None, in_force=AT_START),
    ]
    for role in ("baseline", "target"):
        (tmp_path / role).mkdir()
    append_history(tmp_path / "baseline", lines[0])
    append_history(tmp_path / "target", lines[0])
    append_history(tmp_path / "target", lines[1])
    assert history_notes(tmp_path) == [
        "changed while it ran, from step 7 on (grafter ctl dump-next 2): compare: name == 'a'; dump in steps 7-8: "
        "every point; stats: full",
        "changed while it ran, from step 9 on (the steps to dump were over): compare: name == 'a'; stats: full (in the "
        "target's files alone)",
    ]
    (tmp_path / "target" / "control.jsonl").write_bytes(b"{}\n")
    with pytest.raises(GrafterError, match=r"control\.jsonl:1"):
        history_notes(tmp_path)


def test_the_store_of_a_run_is_found_from_its_directory(tmp_path: Path) -> None:
    role = tmp_path / "run" / "target"
    role.mkdir(parents=True)
    configuration = {"master_address": "10.0.0.1", "master_port": 4, "group_name": "g"}
    (role / "run.json").write_text(json.dumps({"configuration": configuration}))
    assert place_of_run(tmp_path) == place_of_run(tmp_path / "run") == ("10.0.0.1", 4, "g")
    (role / "run.json").write_text(json.dumps({"configuration": {**configuration, "master_port": None}}))
    with pytest.raises(UsageError, match="only dumps has no store"):
        place_of_run(tmp_path)
    with pytest.raises(UsageError, match="holds no run"):
        place_of_run(role)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["status"], "say which run"),
        (["--master", "nowhere", "status"], "write it as HOST:PORT"),
        (["--master", "h:1", "--run", ".", "off"], "not both"),
        (["--master", "h:1", "set"], "say what to set"),
        (["--master", "h:1", "set", "--b2t", "x" * 10_001], "at most 10000"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_asked(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["ctl", *arguments])
    assert result.exit_code == 2
    assert told in result.stderr
