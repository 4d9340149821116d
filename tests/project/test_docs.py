"""The docs are complete: an undocumented setting, legal value, or field of a rule fails here."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from grafter.config.settings.config import SETTING_FIELDS, GrafterConfig
from grafter.config.settings.plan_file import RULE_FIELDS
from grafter.config.switch import FALSE_WORDS, TRUE_WORDS

CONFIGURATION = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def row_of(first_cell: str) -> list[str]:
    """The cells of the one row of a table that starts with `first_cell`."""
    rows = [line for line in CONFIGURATION.splitlines() if line.startswith(f"| `{first_cell}` |")]
    assert len(rows) == 1, f"docs/configuration.md has {len(rows)} rows for {first_cell}; it needs one"
    return [cell.strip() for cell in rows[0].strip("|").split("|")]


def literal_values(annotation: Any) -> Iterator[str]:
    """The values of a Literal, also inside of `... | None` and Annotated."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from literal_values(part)


@pytest.mark.parametrize("field", SETTING_FIELDS)
def test_every_setting_is_documented_with_its_default_and_legal_values(field: str) -> None:
    """Each field has a row under its variable, with its default, every legal word, and a meaning."""
    _, default, legal, meaning = row_of(f"GRAFTER_{field.upper()}")
    info = GrafterConfig.model_fields[field]
    documented = set(re.findall(r"`([^`]+)`", legal))
    literals = set(literal_values(info.annotation))
    if literals:
        assert documented == literals
    if isinstance(info.default, str):
        assert default == f"`{info.default}`"
    elif isinstance(info.default, float):
        assert default == f"{info.default:g}"
    elif info.default is False:
        assert default == "off"
    else:
        assert default
    assert len(meaning.split()) >= 3


def test_no_variable_is_documented_that_does_not_exist() -> None:
    """Every GRAFTER_ variable that the page names is a setting."""
    named = set(re.findall(r"(?<![A-Z_])GRAFTER_([A-Z0-9_]+[A-Z0-9])", CONFIGURATION))
    assert {name.lower() for name in named} == set(SETTING_FIELDS)


@pytest.mark.parametrize("field", RULE_FIELDS)
def test_every_field_of_a_rule_is_documented(field: str) -> None:
    """Each field that a rule may have has a row."""
    assert len(row_of(field)) == 2


def test_the_words_for_on_and_off_are_documented() -> None:
    """All words that switch something on or off are listed."""
    (line,) = [line for line in CONFIGURATION.splitlines() if line.startswith("* On and off:")]
    assert tuple(re.findall(r"`([^`]+)`", line)) == TRUE_WORDS + FALSE_WORDS


def test_the_example_plan_file_works(tmp_path: Path) -> None:
    """The plan file that the page shows is read without an error and does what the page says."""
    (example,) = re.findall(r"```yaml\n(.*?)```", CONFIGURATION, re.DOTALL)
    plan = tmp_path / "plan.yaml"
    plan.write_text(example)
    config = GrafterConfig(plan=str(plan))
    assert config.filters["b2t"]({"layer_id": 3, "name": "attn_out"})
    assert config.rule_value("write", "attn_scores") == "return"
    assert config.rule_value("gradient", "attn_scores") == "cut"
    assert config.rule_value("transform", "layers.3.mlp.up") == "transforms/last_sender.py:transform"
