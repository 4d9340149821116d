"""The switch: whether grafting is on, read before anything else is imported."""

from __future__ import annotations

import pytest

from grafter.config.settings.config import GrafterConfig
from grafter.config.switch import enabled
from grafter.errors import ConfigError


@pytest.mark.parametrize("name", ["GRAFTER_ENABLE", "DUMPER_GRAFTER_ENABLE"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("TRUE", True),
        (" yes ", True),
        ("on", True),
        ("0", False),
        ("off", False),
        ("No", False),
        ("", False),
    ],
)
def test_the_switch_reads_on_and_off(name: str, text: str, value: bool) -> None:
    """Both names and all words, in any case; blank is off; and the configuration agrees."""
    assert enabled({name: text}) is value
    if not value:
        assert GrafterConfig.from_environment({name: text}).enable is False


def test_the_switch_is_off_when_unset_and_ignores_other_variables() -> None:
    """Off means off: other variables do not matter then."""
    assert enabled({"GRAFTER_ROEL": "1", "GRAFTER_ROLE": "nonsense"}) is False


@pytest.mark.parametrize("variable", ["GRAFTER_ENABEL", "GRAFTER_ENABLED", "GRAFTER_enable", "DUMPER_GRAFTER_ENALBE"])
def test_a_misspelt_switch_is_an_error_and_not_off(variable: str) -> None:
    """A run that was meant to graft must not silently graft nothing."""
    with pytest.raises(ConfigError, match=r"Did you mean (DUMPER_)?GRAFTER_ENABLE\?"):
        enabled({variable: "1"})


def test_the_switch_refuses_what_is_neither() -> None:
    """An illegal word, or two names that differ, are errors rather than off."""
    with pytest.raises(ConfigError, match=r"GRAFTER_ENABLE='maybe'.*Legal: 1, true"):
        enabled({"GRAFTER_ENABLE": "maybe"})
    with pytest.raises(ConfigError, match="differ"):
        enabled({"GRAFTER_ENABLE": "1", "DUMPER_GRAFTER_ENABLE": "0"})
