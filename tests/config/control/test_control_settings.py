"""Windows, dumps and recorders of requests that a change of the run changes, without processes. Under 1 s."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from request_files import lines_in
from typer.testing import CliRunner

from grafter.cli.control_table import recorder_lines
from grafter.cli.main import app
from grafter.config.control.change import OPTION_OF, Answer, Change, Decision, Proposal, State
from grafter.config.control.in_force import InForce
from grafter.config.control.recorders import NONE_HERE, RecorderChange, RecorderState, recorder_states, why_none
from grafter.config.direction_filters import DirectionFilters
from grafter.config.options import OptionChooser
from grafter.config.settings.config import GrafterConfig
from grafter.core.points import PointKey
from grafter.core.rows.tokens import Tokens
from grafter.errors import ConfigError, UsageError
from grafter.runtime.point_rules import SettingsChange
from grafter.runtime.rank_context import RankContext
from grafter.runtime.rank_control import RankControl
from grafter.runtime.windows import Windows
from grafter.store.dumps.limits import Limits
from grafter.tools.requests.recorder import RequestRecorder
from grafter.wire.control.decision import decide
from grafter.wire.control.run_access import RankView

START = GrafterConfig(enable=True, role="baseline", master_port=1, compare_filter="name == 'a'", dump_steps="0-3")
AT_START = InForce.at_start(START)
TOKENS = Tokens.from_lengths(["long", "short"], [8, 3])
KEY = PointKey("h", (), 0, "forward", 0)


def setting(**settings: str) -> Change:
    return Change.model_validate({"action": "set", "settings": settings})


def recording(**fields: Any) -> Change:
    return Change(action="record", recorders=RecorderChange(**fields))


def test_windows_and_dumps_are_set_as_the_environment_sets_them() -> None:
    asked = setting(
        windows="off", start=" 512", new_rows_only="yes", dump_level="checksum", dump_steps="4-", dump_max_bytes="1GiB",
        dump_max_points="9",
    )  # fmt: skip
    config = AT_START.after(asked, 5).configured(START)
    assert (config.windows, config.start, config.new_rows_only) == (False, 512, True)
    assert (config.dump_level, config.dump_steps) == ("checksum", "4-")
    assert (config.dump_max_bytes, config.dump_max_points) == ("1GiB", 9)
    assert config.compare_filter == "name == 'a'"
    assert str(asked).startswith("set --windows 'off' --start ' 512' --new-rows-only 'yes'")


def test_an_empty_text_brings_a_setting_back_to_its_default() -> None:
    """Not to what the run began with: that may be unset, too."""
    changed = AT_START.after(setting(start="5", new_rows_only="on", dump_max_points="9", stats="off"), 2)
    empty = dict.fromkeys(("start", "new_rows_only", "dump_max_points", "dump_steps", "stats"), "")
    assert changed.after(setting(**empty), 3) == InForce(compare_filter="name == 'a'")


def test_every_setting_that_travels_is_one_of_the_configuration_and_has_an_option() -> None:
    fields = InForce.model_fields.keys() - {"is_off", "dumped_steps"}
    assert fields == OPTION_OF.keys() <= GrafterConfig.model_fields.keys()
    for name in fields:
        assert InForce.model_fields[name].default == GrafterConfig.model_fields[name].default
    result = CliRunner().invoke(app, ["ctl", "set", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert all(f"{option} " in result.stdout for option in OPTION_OF.values())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"start": "-1"}, "start='-1': it must be at least 0"),
        ({"start": "1.5"}, "start='1.5': it must be a whole number"),
        ({"windows": "all"}, "windows='all': legal"),
        ({"new_rows_only": "some"}, "new_rows_only='some': legal"),
        ({"dump_level": "ful"}, "did you mean full"),
        ({"dump_steps": "3-1"}, "ends before it begins"),
        ({"dump_max_bytes": "1 GB"}, "10GiB"),
        ({"dump_max_points": "0"}, "at least 1"),
    ],
)
def test_a_value_that_the_configuration_would_refuse_is_refused(settings: dict[str, str], told: str) -> None:
    """Whatever else is in the change; and also while all is off."""
    for before in (AT_START, AT_START.after(Change(action="off"), 2)):
        with pytest.raises(ConfigError, match=told):
            before.after(setting(b2t_filter="name == 'b'", **settings), 5)


def test_what_is_in_force_is_told_where_it_is_not_the_default() -> None:
    changed = AT_START.after(setting(start="5", new_rows_only="on", dump_level="checksum", dump_max_points="9"), 2)
    assert changed.text == (
        "compare: name == 'a'; dump level: checksum; dump limits: steps 0-3, points 9; stats: full; start: 5; "
        "new rows only"
    )
    assert changed.after(setting(windows="off"), 3).text.endswith("stats: full; windows: off")


def starts(given: dict[str, Any], **settings: str) -> tuple[int, ...]:
    """Where the rows of both sequences begin to count, for a call with these arguments under these settings."""
    chooser = OptionChooser(START)
    chooser.options_of("h", {})
    chooser.take_over(AT_START.after(setting(**settings), 5).configured(START) if settings else START)
    announced = windows_after_two_rows().announce(chooser.options_of("h", {"tokens": TOKENS, **given}), KEY)
    assert announced is not None
    return announced.starts


def windows_after_two_rows() -> Windows:
    windows = Windows()
    windows.advance(KEY, {"long": 2, "short": 2})
    return windows


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        ({}, {}, ()),
        ({}, {"start": "5"}, (5, 3)),
        ({}, {"start": "5", "new_rows_only": "on"}, (5, 3)),
        ({}, {"start": "1", "new_rows_only": "on"}, (2, 2)),
        ({"start": 1}, {"start": "5"}, (1, 1)),
        ({"start": 0}, {"start": "5"}, ()),
        ({"new_rows_only": False}, {"new_rows_only": "on"}, ()),
        ({"new_rows_only": True}, {"new_rows_only": "off"}, (2, 2)),
        ({"new_rows_only": True, "start": 3}, {"windows": "off", "start": "5"}, ()),
        ({"new_rows_only": True, "start": 3}, {"windows": "on"}, (3, 3)),
    ],
)
def test_windows_of_the_run_are_for_calls_that_say_nothing(
    given: dict[str, Any], settings: dict[str, str], expected: tuple[int, ...]
) -> None:
    """A sequence that ends before the run's start has no rows; a call's own words hold, unless windows are off."""
    assert starts(given, **settings) == expected


def test_points_without_tokens_have_no_window_of_the_run() -> None:
    """They would be refused, for nothing says their positions; a call that asks for it still is."""
    chooser = OptionChooser(START)
    chooser.take_over(AT_START.after(setting(start="5", new_rows_only="on"), 5).configured(START))
    assert not chooser.options_of("h", {}).has_window
    assert Windows().announce(chooser.options_of("h", {}), KEY) is None
    with pytest.raises(UsageError, match="give tokens="):
        Windows().announce(chooser.options_of("h", {"start": 1}), KEY)


def test_a_level_of_dumps_is_taken_over_where_no_rule_says_it() -> None:
    start = GrafterConfig(role="target", compare_filter="True", rules=({"match": "w*", "dump_level": "checksum"},))
    chooser = OptionChooser(start)
    assert chooser.options_of("h", {}).dump_level == "full"
    changed = InForce.at_start(start).after(setting(dump_level="statistics"), 5).configured(start)
    chooser.take_over(changed)
    assert chooser.options_of("h", {}).dump_level == "statistics"
    assert chooser.options_of("w1", {}).dump_level == "checksum"


def test_a_limit_that_is_raised_lets_a_rank_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """With what was saved before counted. One that stays as it is stays reached, whatever else changes."""
    limits = Limits(None, "100", None, "baseline rank 0")
    with caplog.at_level(logging.WARNING):
        assert [limits.take(n) for n in (60, 50, 1)] == [True, False, False]
        limits.change("0-9", "100", None)
        limits.also_allow(20, 22)
        assert not limits.take(1)
        assert [step for step in (9, 10, 21, 22) if limits.allows_step(step)] == [9, 21]
        limits.change("0-9", "150", 3)
        assert [limits.take(n) for n in (50, 1, 1)] == [True, True, False]
        assert not limits.allows_step(21), "the steps that were allowed besides belonged to another change"
    assert limits.left_out == {"bytes": 3, "points": 1, "steps": 3}
    assert sum("MAX_BYTES" in record.getMessage() for record in caplog.records) == 2


# Recorders of requests.


def test_a_change_of_recorders_reaches_all_that_live_here_and_leaves_the_settings(tmp_path: Path) -> None:
    """At once, for requests that come from now on; `dump-now` is written in the background."""
    with RequestRecorder(tmp_path / "a") as first, RequestRecorder(tmp_path / "b", threshold=0) as second:
        assert why_none() is None
        RecorderChange(enabled=True, threshold=7, exclude="logits, x").apply()
        assert first.settings == second.settings == {"exclude": ["logits", "x"], "threshold": 7, "enabled": True}
        second.record("one", {"x": 1, "y": 2})
        RecorderChange(enabled=False, dump=True).apply()
        second.record("two", {})
        second.dump_now()
        states = recorder_states()
        assert [state.directory for state in states] == [str(tmp_path / "a"), str(tmp_path / "b")]
        assert states[1].text == (
            f"off, 7 to a batch, without logits, x, into {tmp_path / 'b'}: 1 recorded, 1 open, 0 finished, 1 written"
        )
    assert [line["request"] for line in lines_in(tmp_path / "b")] == [{"y": 2}]
    assert recorder_states() == ()
    asked = recording(enabled=False, threshold=3, exclude="a b")
    assert str(asked) == "record off --threshold 3 --exclude 'a b'"
    dumped = AT_START.after(Change(action="dump-next", steps=9), 2)
    assert dumped.after(asked, 5) == dumped
    assert dumped.after(asked, 11) == AT_START


def test_a_dump_that_nobody_waits_for_comes_to_its_end(tmp_path: Path) -> None:
    """Also where nothing was recorded, and where another follows at once."""
    recorder = RequestRecorder(tmp_path)
    recorder.dump_soon()
    recorder.record("a", 1)
    recorder.dump_soon()
    recorder.dump_soon()
    recorder.dump_now()
    assert [line["id"] for line in lines_in(tmp_path)] == ["a"]
    recorder.close()


@pytest.mark.parametrize(
    "given",
    [
        {"threshold": -1}, {"threshold": True}, {"threshold": 1.5}, {"limit_bytes": 5}, {"enabled": 3},
        {"exclude": "x" * 20_001},
    ],
)  # fmt: skip
def test_what_no_recorder_takes_does_not_travel(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Change.model_validate({"action": "record", "recorders": given})


@pytest.mark.parametrize("given", [{}, {"exclude": ",".join("abc" * 40)}, {"exclude": "x" * 201}])
def test_a_change_of_recorders_that_says_nothing_or_too_much_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"nothing is said|at most 100 keys"):
        AT_START.after(recording(**given), 3)


@given(idle=st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_change_is_refused_where_it_would_change_nothing_anywhere(idle: list[bool]) -> None:
    """One rank with a recorder is enough; a rank that refuses is told first."""
    answers = {f"rank {n}": Answer(step=n, idle=NONE_HERE if one else None) for n, one in enumerate(idle)}
    decision = decide(answers, [], seconds=1)
    if all(idle):
        assert (decision.refused or "").startswith("it would change nothing on any rank: no grafter.RequestRecorder")
    else:
        assert decision == Decision(step=len(idle))
    assert decide({**answers, "last": Answer.refusal("no")}, [], seconds=1) == Decision(refused="last: no")


def test_a_recorder_is_told_in_short_whatever_its_server_gave_it(tmp_path: Path) -> None:
    """What a rank says of itself must never be what ends it: long keys, many, a directory that is no text."""
    odd = tmp_path / "no\udcfftext"
    with RequestRecorder(odd, 1 << 70, exclude=[f"{n}" + "\udcff" * 500 for n in range(200)]):
        (state,) = recorder_states()
    assert RecorderState.model_validate_json(state.model_dump_json()) == state
    assert len(state.exclude) == 100 and state.directory.endswith("no?text")


def test_status_names_recorders_and_the_ranks_that_have_none(tmp_path: Path) -> None:
    with RequestRecorder(tmp_path, threshold=0, exclude=""):
        told = recorder_states()
    bare = State(count=1, step=3, changes=0, to_come=(), in_force=AT_START)
    has = bare.model_copy(update={"recorders": told})
    views = [RankView("baseline rank 0", None, bare), RankView("target rank 0", None, has)]
    assert recorder_lines(views) == [
        f"recorder of target rank 0: on, the last five minutes, into {tmp_path}: 0 recorded, 0 open, 0 finished, "
        "0 written",
        "no recorder of requests lives in the process of baseline rank 0",
    ]
    assert recorder_lines(views[:1]) == ["no recorder of requests lives in a rank's process"]
    assert recorder_lines([dataclasses.replace(views[0], state=None)]) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["record"], "nothing is said of the recorders"),
        (["record", "--exclude", "x" * 201], "at most 100 keys"),
        (["record", "sometimes"], "is not one of"),
        (["set", "--start", "5"], "say which run"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_asked(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["ctl", *arguments])
    assert result.exit_code == 2
    assert told in result.stderr


def make_control(*, saves: bool = True) -> RankControl:
    return RankControl(RankContext.of(START, saves_points=saves))


def test_what_an_interrupt_keeps_from_being_taken_over_comes_again() -> None:
    """Until the points of this rank go by it, it is not in force."""
    control = make_control()
    coming = SettingsChange(1, AT_START.after(setting(stats="off"), 1), START, DirectionFilters({}), number=0)
    control._to_come.append(coming)
    assert list(control.end_step()) == [coming] == list(control.end_step())
    assert control._in_force == AT_START
    control.has_taken_over(coming)
    assert control._in_force == coming.in_force and not control.end_step()


def test_a_recorder_that_fails_does_not_fail_the_step(caplog: pytest.LogCaptureFixture) -> None:
    """The change is in force all the same, and the fault is told."""
    control = make_control()

    class Broken(RecorderChange):
        def apply(self) -> None:
            raise OSError(28, "No space left on device")

    change = Change(action="record", recorders=RecorderChange(enabled=True))
    object.__setattr__(change, "recorders", Broken(enabled=True))
    proposal = Proposal.model_construct(change=change, seconds=1.0, by="a test", time=0.0)
    coming = SettingsChange(1, AT_START, START, DirectionFilters({}), number=4, proposal=proposal)
    control._to_come.append(coming)
    control.end_step()
    with caplog.at_level(logging.WARNING):
        control.has_taken_over(coming)
    assert "No space left" in caplog.text and not control._to_come


def test_windows_of_a_played_job_are_those_of_its_recording() -> None:
    played = make_control(saves=False)
    for asked, refused in ((setting(start="5"), True), (setting(windows="off"), True), (setting(stats="off"), False)):
        answer = played._judge(0, Proposal(change=asked, seconds=1.0, by="a test", time=0.0)).answer
        assert ("played from a recording" in (answer.refused or "")) == refused
