"""The plan file: what it may hold, that every error says where, and the patterns of its rules."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from grafter.config.settings.config import SETTING_FIELDS
from grafter.config.settings.plan_file import MAX_BYTES, PlanFile, Rule, read_plan_file
from grafter.core.patterns import compile_match
from grafter.errors import ConfigError


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "plan.yaml"


def read(plan: Path, text: str | bytes) -> PlanFile:
    plan.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_plan_file(plan, SETTING_FIELDS)


def test_a_plan_file_has_fields_with_their_places_and_rules_in_order(plan: Path) -> None:
    """Fields come as the texts that the environment would hold; rules come in their order."""
    found = read(
        plan,
        "# shared\n"
        "b2t_filter: layer_id == 3  # the third\n"
        "timeout: 60\n"
        "stats: off\n"
        "run_name: 2024-01-01\n"
        "group_name: '7'\n"
        "compare_filter: >-\n  name == 'x'\n  and step > 2\n"
        "key:\n"
        "rules:\n"
        '  - match: "layers.{layer_id}.*"\n'
        "    transform: cook.py:f\n"
        "  - {match: 'raw', transform: , write: return}\n",
    )
    assert {name: value.text for name, value in found.fields.items()} == {
        "b2t_filter": "layer_id == 3",
        "timeout": "60",
        "stats": "off",
        "run_name": "2024-01-01",
        "group_name": "7",
        "compare_filter": "name == 'x' and step > 2",
    }
    assert found.fields["timeout"].place == f"{plan}:3:10"
    assert found.rules == (
        Rule(match="layers.{layer_id}.*", transform="cook.py:f"),
        Rule(match="raw", transform="", write="return"),
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "rules:\n", "\ufeffkey: \n"])
def test_an_empty_plan_file_sets_nothing(plan: Path, text: str) -> None:
    """Comments, an empty document, empty fields and a byte order mark are no errors."""
    found = read(plan, text)
    assert (found.fields, found.rules) == ({}, ())


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("stats: off\n\ntimout: 5", "3:1", "'timout' is no field. Did you mean timeout?"),
        ("zzzzzz: 5", "1:1", "Legal: role, "),
        ("rule: []", "1:1", "Did you mean rules?"),
        ("Timeout: 5", "1:1", "Did you mean timeout?"),
        ("timeout: 1\nstats: off\ntimeout: 2", "3:1", "set twice, first in line 1"),
        ("secret: hush", "1:1", "GRAFTER_SECRET"),
        ("enable: true", "1:1", "GRAFTER_ENABLE=1"),
        ("plan: other.yaml", "1:1", "cannot name another"),
        ("- timeout", "1:1", "`field: value`"),
        ("just text", "1:1", "`field: value`"),
        ("timeout: [1]", "1:10", "one value"),
        ("timeout: {a: 1}", "1:10", "one value"),
        ("[a]: 1", "1:1", "one word"),
        ("timeout: !!python/object/apply:os.system ['true']", "1:10", "one value"),
        ("timeout: !!python/name:os.system x", "1:10", "is not allowed"),
        ("timeout: !mine 3", "1:10", "is not allowed"),
        ("timeout: !!binary aGk=", "1:10", "is not allowed"),
        ("!!python/dict {timeout: 3}", "1:1", "`field: value`"),
        ("<<: *a", "1:5", "not YAML"),
        ("<<: {timeout: 3}", "1:1", "'<<' is no field"),
        ("a: &a [*a]", "1:1", "no field"),
        ("timeout: 'abc", "1:14", "not YAML: while scanning a quoted scalar"),
        ("timeout: 3\n\tstats: off", "2:1", "not YAML"),
        ("timeout: 3\n---\nstats: off", "2:1", "not YAML"),
        ("timeout: 3\nrole: \x01", "2:7", "does not allow this character"),
        (b"timeout: 3\nrole: b\xff", "2:8", "not UTF-8"),
        ("rules: 3", "1:8", "rules is a list"),
        ("rules:\n  match: a", "2:3", "rules is a list"),
        ("rules:\n  - 3", "2:5", "a rule is a list of `field: value`"),
        ("rules:\n  - write: return", "2:5", "needs `match`"),
        ("rules:\n  - match: a\n    wirte: return", "3:5", "'wirte' is no field of a rule. Did you mean write?"),
        (
            "rules:\n  - match: a\n    dimensions: b s h",
            "3:5",
            "'dimensions' is no field of a rule. Legal: match, role",
        ),
        ("rules:\n  - match: a\n    dims: b s h[tp", "3:11", "here must stand `,` or `]`"),
        ("rules:\n  - match: a\n    write: retrn", "3:12", "legal: in_place, return; did you mean return?"),
        ("rules:\n  - match: a\n    write:", "3:11", "write has no value"),
        ("rules:\n  - match: a\n    match: b", "3:5", "set twice"),
        ("rules:\n  - match: 'a.{}'", "2:12", "name one path segment"),
        ("rules:\n  - match: ''", "2:12", "match has no value"),
        ("[" * 5000, "1:1", "not YAML"),
    ],
)
def test_every_error_has_file_line_and_column(plan: Path, text: str | bytes, place: str, words: str) -> None:
    """Each thing that a plan file may not hold is refused at its place, with what to do."""
    with pytest.raises(ConfigError) as raised:
        read(plan, text)
    message = str(raised.value)
    assert message.startswith(f"{plan}:{place}: ")
    assert words in message
    assert "hush" not in message


def test_a_file_that_is_too_large_or_cannot_be_read_says_so(plan: Path) -> None:
    """Size and existence are checked before YAML sees the file."""
    with pytest.raises(ConfigError, match="at most 10 MiB"):
        read(plan, b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_plan_file(plan.with_name("absent.yaml"), SETTING_FIELDS)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_plan_file(plan.parent, SETTING_FIELDS)


@given(text=st.text(st.sampled_from("abc:-[]{}&*!|>'\"#%@`,? \n\t.<timeout"), max_size=30))
def test_any_text_is_a_plan_or_a_config_error_with_a_place(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Whatever the file holds, the outcome is a plan or a ConfigError that starts with a place in it."""
    plan = tmp_path_factory.getbasetemp() / "any.yaml"
    try:
        read(plan, text)
    except ConfigError as error:
        line, column = str(error).removeprefix(f"{plan}:").split(":")[:2]
        assert int(line) >= 1
        assert int(column) >= 1


# ---- match patterns


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        ("attn_out", ["attn_out"], ["attn_out2", "my_attn_out", "", "attn-out"]),
        ("*", ["", "a", "a.b\nc"], []),
        ("layers.*.mlp", ["layers.3.mlp", "layers.3.4.mlp", "layers..mlp"], ["layers.mlp", "layers.3.mlp.x"]),
        ("a?c", ["abc", "a.c"], ["ac", "abbc"]),
        ("layers.{layer_id}.*", ["layers.3.mlp"], ["layers..mlp", "layers.3", "layers.3_4"]),
        ("{a}.{b}", ["x.y"], ["x", "x.y.z", ".y"]),
        ("{a}.{a}", ["x.x"], ["x.y", "xx.x"]),
        ("*{a}_x{a}*", ["1_x1", "..21_x1.."], ["1_x2"]),
        ("{a}*x*{a}", ["1x1", "12xx21"], ["1x2"]),
        ("a.b[0]+(c)^$\\d|", ["a.b[0]+(c)^$\\d|"], ["axb[0]+(c)^$\\d|"]),
        ("*a*b*", ["ab", "xaxbx", "bab"], ["ba", "a", ""]),
        ("**.q?", ["layers.q1"], ["q1"]),
        ("*ab", ["abab", "ab"], ["aba"]),
        ("*?", ["a"], [""]),
    ],
)
def test_a_pattern_matches_whole_names(pattern: str, fitting: list[str], other: list[str]) -> None:
    """`*` any run, `?` one character, `{name}` one segment and the same text each time, all else itself."""
    rule = Rule(match=pattern)
    assert [name for name in fitting + other if rule.matches(name)] == fitting


@pytest.mark.parametrize("pattern", ["{", "}", "a{}b", "{a b}", "{a{b}}", "{1}", "{_a}", "{é}", ""])
def test_braces_that_are_no_capture_are_refused(pattern: str) -> None:
    """A brace stands only around a name; a pattern is never empty."""
    with pytest.raises(ConfigError, match="match"):
        compile_match(pattern)


PIECES = st.lists(st.sampled_from(["a", "b", ".", "*", "?", "{x}", "{y}"]), min_size=1, max_size=7)


@given(pieces=PIECES, name=st.text("ab.", max_size=8))
def test_patterns_agree_with_trying_every_way(pieces: list[str], name: str) -> None:
    """The compiled pattern, which tries few ways, finds a match exactly where a search of all ways does."""
    try:
        rule = Rule(match="".join(pieces))
    except ValidationError as error:
        assert "too many ways" in str(error)
        return
    assert rule.matches(name) is matches_somehow(pieces, name, {})


def matches_somehow(pieces: list[str], name: str, captured: dict[str, str]) -> bool:
    if not pieces:
        return name == ""
    piece, *rest = pieces
    ends = range(len(name) + 1)
    if piece == "*":
        return any(matches_somehow(rest, name[end:], captured) for end in ends)
    if piece.startswith("{"):
        texts = [name[:end] for end in ends if end and "." not in name[:end]]
        return any(
            matches_somehow(rest, name[len(text) :], captured | {piece: text})
            for text in texts
            if captured.get(piece, text) == text
        )
    return name != "" and piece in ("?", name[0]) and matches_somehow(rest, name[1:], captured)


def test_many_stars_take_no_power_of_the_names_length() -> None:
    """Forty stars against a long name that just misses are decided; a naive pattern would take years to."""
    assert Rule(match="*a" * 40 + "b").matches("a" * 2000) is False


@pytest.mark.parametrize(
    "pattern", ["*.{a}.{b}.{c}.{d}.*.{e}.*.{f}.*z", "*{a}.*{b}.*{c}.*{d}.*z", "*.{a}.*.{a}.*.{b}.*.{b}z"]
)
def test_captures_between_dots_take_no_power_of_the_names_length(pattern: str) -> None:
    """Where a capture begins settles where it ends, so that a long name that just misses is decided."""
    assert Rule(match=pattern).matches("aa.bb." * 50) is False


@pytest.mark.parametrize(
    "pattern", ["*{a}*{b}*", "{a}{b}{c}{d}{e}", "*.{a}*.{b}*.{c}*", "*.{a}.*.{b}.*.{c}.*.{d}.*.{a}{b}{c}{d}"]
)
def test_a_pattern_that_could_be_read_in_too_many_ways_is_refused(pattern: str) -> None:
    """Its time would be a power of the name's length that the pattern chooses; the message says what to write."""
    with pytest.raises(ConfigError, match=r"too many ways: [4-9] of its parts .* between dots, as in `\*.\{layer_id\}"):
        compile_match(pattern)
