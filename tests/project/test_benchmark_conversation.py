"""The benchmark of a growing conversation runs, checks what it moved, and says what it measured. About 3 s."""

from __future__ import annotations

from benchmarks.conversation import (
    EVERYTHING,
    GATHERED,
    NEW_ROWS,
    START,
    WAYS,
    ConversationResult,
    conversation_of,
    lengths_of,
    measure_conversation,
    shown,
)
from benchmarks.targets import conversation_targets


def test_a_conversation_ends_with_all_tokens_in_equal_turns_after_its_first() -> None:
    assert lengths_of(32768, 64, None)[:3] == (512, 1024, 1536)
    assert lengths_of(100, 4, 70) == (70, 80, 90, 100)
    assert lengths_of(8, 1, None) == (8,)


def test_the_dear_ways_take_the_turns_that_are_judged() -> None:
    """Everything: two turns, the first eighth after them, and the last; gathering: the last three; others: all."""
    lengths = lengths_of(6400, 64, None)
    everything = conversation_of(EVERYTHING, 0, lengths)
    assert everything.lengths == (*range(100, 1100, 100), *range(5700, 6500, 100))
    assert conversation_of(GATHERED, 0, lengths).lengths == (6200, 6300, 6400)
    start = conversation_of(START, 0, lengths)
    assert start.lengths == lengths and start.before == (0, *lengths[:-1])


def test_every_way_is_measured_in_turns_and_its_values_are_checked() -> None:
    """One value per round; a way that brought something else would raise."""
    result = measure_conversation("off", 2, tokens=64, turns=8)
    assert result.lengths == (8, 16, 24, 32, 40, 48, 56, 64)
    for found in (result.seconds_early, result.seconds_late, result.processor_early, result.processor_late):
        assert set(found) == set(WAYS) and all(len(rounds) == 2 for rounds in found.values())
    assert len(result.seconds_by_turn[NEW_ROWS]) == 8
    assert result.faster(EVERYTHING).median == 1.0
    assert "turn 2:" in shown(result)[-1] and len(shown(result)) == 3 + len(WAYS)


def a_result(tokens: int, everything: list[float], new_rows: list[float], gathered: list[float]) -> ConversationResult:
    late = {EVERYTHING: everything, NEW_ROWS: new_rows, GATHERED: gathered}
    early = {way: [1.0] * len(rounds) for way, rounds in late.items()}
    return ConversationResult("off", (1, tokens), early, late, early, late, {})


def test_ratios_are_of_the_last_turns_within_rounds() -> None:
    result = a_result(2, [6.0, 8.0], [2.0, 1.0], [20.0, 30.0])
    assert (result.faster(NEW_ROWS).low, result.faster(NEW_ROWS).high) == (3.0, 8.0)
    assert result.faster(NEW_ROWS, GATHERED).median == 20.0
    assert result.growth(NEW_ROWS).median == result.processor_growth(NEW_ROWS).median == 1.5


def test_the_conversation_that_was_asked_for_is_judged() -> None:
    """64 times as fast at 32,768 tokens, and a last turn that costs what a first one does; other lengths have none."""
    assert [t.met for t in conversation_targets([a_result(32768, [64.0], [1.0], [63.0])])] == [True, False, True]
    assert [t.met for t in conversation_targets([a_result(32768, [64.0], [1.3], [90.0])])] == [False, True, False]
    assert conversation_targets([a_result(2, [64.0], [1.0], [63.0])]) == []
