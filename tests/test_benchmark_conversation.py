"""The benchmark of a growing conversation runs, checks what it moved, and says what it measured. About 3 s."""

from __future__ import annotations

import sys
from pathlib import Path

# It is no part of the installed package, and `pytest` alone does not look in the directory where it starts.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.conversation import GATHERED, WAYS, ConversationResult, lengths_of, measure


def test_a_conversation_ends_with_all_tokens_in_equal_turns_after_its_first() -> None:
    assert lengths_of(32768, 64, None)[:3] == (512, 1024, 1536)
    assert lengths_of(100, 4, 70) == (70, 80, 90, 100)
    assert lengths_of(8, 1, None) == (8,)


def test_every_way_is_measured_in_turns_and_its_values_are_checked() -> None:
    """One value per round; a way that brought something else would raise."""
    result = measure(tokens=64, turns=8, rounds=2, stats="off")
    assert result.lengths == (8, 16, 24, 32, 40, 48, 56, 64)
    for found in (result.seconds_early, result.seconds_late, result.processor_late):
        assert set(found) == set(WAYS) and all(len(rounds) == 2 for rounds in found.values())
    assert result.faster("everything").median == 1.0


def test_ratios_are_of_the_last_turns_within_rounds() -> None:
    seconds = {"everything": [6.0, 8.0], "new rows only": [2.0, 1.0], GATHERED: [20.0, 30.0]}
    result = ConversationResult((1, 2), {"new rows only": [1.0, 1.0]}, seconds, seconds)
    assert (result.faster("new rows only").low, result.faster("new rows only").high) == (3.0, 8.0)
    assert result.faster("new rows only", GATHERED).median == 20.0
    assert result.growth("new rows only").median == 1.5
