"""Thresholds: the language, the first match, what is refused and where. Pure; costs under 1 s."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from grafter.config.settings.config import SETTING_FIELDS
from grafter.config.settings.plan_file import read_plan_file
from grafter.config.thresholds import (
    KL_MEASURES,
    MEASURES,
    NO_DIFFERENCE,
    THRESHOLD_FIELDS,
    Threshold,
    Thresholds,
    parse_threshold,
)
from grafter.errors import ConfigError, FilterError

GOOD = dict.fromkeys(MEASURES, 0.0) | {"cosine": 1.0, "nan": 0, "inf": 0}


def test_the_first_pattern_that_matches_decides() -> None:
    """Patterns are those of the plan's rules; a name that none covers has no rule."""
    rules = Thresholds(map(parse_threshold, ["attn.*: rel <= 1e-2", "layers.{i}.?: rel <= 1e-4", "attn.q: rel <= 1"]))
    for name, pattern in (("attn.q", "attn.*"), ("layers.3.x", "layers.{i}.?"), ("layers.3.xy", None), ("mlp", None)):
        rule = rules.rule_for(name)
        assert (rule.match if rule else None) == pattern
    assert [rule.match for rule in rules.never_matched(["attn.q", "mlp"])] == ["layers.{i}.?", "attn.q"]


def test_without_rules_no_difference_is_allowed() -> None:
    """The rule that then holds for every name is bitwise equality."""
    assert Thresholds([]).rule_for("any") is NO_DIFFERENCE
    assert NO_DIFFERENCE.holds(GOOD)
    assert not NO_DIFFERENCE.holds(GOOD | {"mismatched_fraction": 1e-9})


@pytest.mark.parametrize(
    ("expression", "values", "holds"),
    [
        ("rel <= 0.0085 or max_abs <= 1e-3", {"rel": 0.5, "max_abs": 1e-3}, True),
        ("rel <= 0.0085 or max_abs <= 1e-3", {"rel": 0.5, "max_abs": 0.1}, False),
        ("p99_9 < 2 and max_ulp <= 4", {"p99_9": 1.9, "max_ulp": 4}, True),
        ("cosine >= 0.999", {"cosine": None}, False),
        ("rel <= 1", {"rel": math.nan}, False),
        ("rel_l2 < 5", {"rel_l2": math.inf}, False),
        ("worst_row_rel <= 10 * rel", {"worst_row_rel": 0.09, "rel": 0.01}, True),
        ("kl <= 1e-3", {}, False),
        ("kl_vocab <= 1e-3", {"kl_vocab": 1e-4}, True),
        ("True", {}, True),
    ],
)
def test_what_a_rule_holds_for(expression: str, values: dict[str, float | None], holds: bool) -> None:
    """Measures by name; one that is unknown satisfies nothing."""
    assert Threshold("*", expression).holds({**GOOD, **values}) is holds


@pytest.mark.parametrize("expression", ["True", "rel <= 1", "nan <= 5", "not (rel > 1)"])
def test_unequal_non_finite_values_fail_any_rule(expression: str) -> None:
    """Whatever the rule says; those that come only of rounding to the narrower dtype, where the rule reads that."""
    for name in ("nan", "inf"):
        assert not Threshold("*", expression).holds(GOOD | {name: 1})
    assert Threshold("*", "rel <= 1").holds(GOOD | {"narrow_inf": 1})
    assert not Threshold("*", "narrow_rel <= 1").holds(GOOD | {"narrow_rel": 0.0, "narrow_inf": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn: rell <= 1", r"`rell` is no measure; did you mean `rel`\? \(column 1\)"),
        ("attn: rel <= 1 or narow_rel < 1", r"did you mean `narrow_rel`\? \(column 13\)"),
        ("attn: layer_id == 3", "`layer_id` is no measure; measures are rel, rel_l2"),
        ("attn: rel = 1", "compare with `==`"),
        ("attn: __import__('os')", "filters have no function `__import__`"),
        ("attn: rel <=", "something is missing at the end"),
        ("{: rel <= 1", "braces name one path segment"),
        ("rel <= 1", "write it as 'PATTERN: EXPRESSION'"),
        ("attn:", "write it as 'PATTERN: EXPRESSION'"),
        ("", "write it as 'PATTERN: EXPRESSION'"),
    ],
)
def test_what_is_no_threshold_is_refused_when_it_is_read(text: str, message: str) -> None:
    """With the position, and what was probably meant."""
    with pytest.raises(ConfigError, match=message):
        parse_threshold(text)


def test_a_pattern_may_hold_colons() -> None:
    """The expression begins after the first colon and blank; a colon alone does where there is none."""
    assert (parse_threshold("a:b: rel<1").match, parse_threshold("a:rel<1").match) == ("a:b", "a")


def test_the_dims_of_a_kl() -> None:
    """`kl` asks for the last dim, `kl_v` and `max_kl_v` for the dim v; other rules ask for none."""
    assert Threshold("*", "kl <= 1 and max_kl_v <= 2 and kl_v < 1").kl_dims == {None, "v"}
    assert Threshold("*", "rel <= 1").kl_dims == frozenset()


def plan(directory: Path, text: str) -> Path:
    path = directory / "plan.yaml"
    path.write_text(text)
    return path


def test_thresholds_of_a_plan_file(tmp_path: Path) -> None:
    """They stand beside settings, rules and names, so that one file serves the run and the comparison."""
    found = read_plan_file(
        plan(
            tmp_path,
            "timeout: 60\nrules:\n  - {match: a, write: return}\n"
            "thresholds:\n  - match: attn.*\n    require: rel <= 1e-2\n  - {match: '*', require: rel <= 1e-4}\n",
        ),
        SETTING_FIELDS,
    )
    assert found.thresholds == (Threshold("attn.*", "rel <= 1e-2"), Threshold("*", "rel <= 1e-4"))
    assert len(found.rules) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("thresholds:\n  - {match: a, requir: rel < 1}\n", r"plan.yaml:2:16: 'requir' is no field .* mean require\?"),
        ("thresholds:\n  - {match: a}\n", "plan.yaml:2:5: an entry of thresholds needs `require`"),
        ("thresholds:\n  - {match: '{', require: rel < 1}\n", "plan.yaml:2:13: match"),
        ("thresholds:\n  - {match: a, require: rell < 1}\n", r"plan.yaml:2:25: require: `rell` is no measure"),
        ("thresholds: 3\n", "thresholds is a list"),
        ("threshold:\n", r"did you mean thresholds\?"),
    ],
)
def test_errors_in_a_plan_file_have_their_place(tmp_path: Path, text: str, message: str) -> None:
    """File, line and column."""
    with pytest.raises(ConfigError, match=f"(?i){message}") as caught:
        read_plan_file(plan(tmp_path, text), SETTING_FIELDS)
    assert "rell" not in text or isinstance(caught.value, FilterError)


PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()


@pytest.mark.parametrize("name", [*MEASURES, *KL_MEASURES])
def test_every_measure_is_documented(name: str) -> None:
    """Each name that a rule may read stands at the left of the page's table of measures."""
    rows = [line.split("|")[1] for line in PAGE.partition("## Measures")[2].splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in row for row in rows)


def test_the_example_of_the_page_works(tmp_path: Path) -> None:
    """Its plan file is read without an error."""
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    found = read_plan_file(plan(tmp_path, example), SETTING_FIELDS).thresholds
    assert len(found) == 3 and THRESHOLD_FIELDS == ("match", "require")
    assert found[1].kl_dims == {"v"}
