"""Who can never go on: against a simulation that tries every order of events, no rank is called stuck in error."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from grafter.errors import PairingError, PeerLostError
from grafter.wire.monitor.deadlock import explain_stuck, find_stuck
from grafter.wire.monitor.hints import find_hints
from grafter.wire.monitor.status_board import BoardLine, HookFacts

# A rank: "running", "gone", or (point, participants of its own side).
State = Any
POINTS = ("x", "y")


def line(role: Any, rank: int, state: State, baseline: int) -> BoardLine:
    graft_rank = rank if role == "baseline" else baseline + rank
    fields: dict[str, Any] = {"role": role, "role_rank": rank, "graft_rank": graft_rank, "sequence": 1, "since": 0.0}
    if state == "running":
        return BoardLine(state="running", **fields)
    if state == "gone":
        return BoardLine(state="left", **fields)
    point, participants = state
    return BoardLine(state="waiting", digest=point, point=point, participants=participants, **fields)


def groups_with(rank: int, side: tuple[int, ...]) -> list[tuple[int, ...]]:
    others = [other for other in side if other != rank]
    return [
        tuple(sorted((rank, *chosen)))
        for size in range(len(others) + 1)
        for chosen in itertools.combinations(others, size)
    ]


def meet(states: tuple[State, ...], sides: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[State, ...] | None:
    """The states after one meeting that is complete, if there is one."""
    for point in POINTS:
        complete: list[list[tuple[int, ...]]] = [[], []]
        for number, side in enumerate(sides):
            for rank in side:
                state = states[rank]
                if isinstance(state, tuple) and state[0] == point and all(states[r] == state for r in state[1]):
                    complete[number].append(state[1])
        if complete[0] and complete[1]:
            met = {*complete[0][0], *complete[1][0]}
            return tuple("running" if rank in met else state for rank, state in enumerate(states))
    return None


def ever_running(start: tuple[State, ...], sides: tuple[tuple[int, ...], tuple[int, ...]]) -> set[int]:
    """All ranks that run in some state which can be reached: running ranks go to any point with any company."""
    seen: set[tuple[State, ...]] = set()
    todo = [start]
    while todo:
        states = todo.pop()
        met = meet(states, sides)
        if met is not None:
            states = met
        if states in seen:
            continue
        seen.add(states)
        for side in sides:
            for rank in side:
                if states[rank] != "running":
                    continue
                for point in POINTS:
                    declared = {states[r][1] for r in side if isinstance(states[r], tuple) and states[r][0] == point}
                    for group in groups_with(rank, side):
                        # All ranks of a job that come to one point declare the same company: else it is an error.
                        if not declared or group in declared:
                            todo.append((*states[:rank], (point, group), *states[rank + 1 :]))
    return {rank for states in seen for rank, state in enumerate(states) if state == "running"}


@st.composite
def boards(draw: st.DrawFn) -> tuple[tuple[State, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
    baseline, target = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    sides = (tuple(range(baseline)), tuple(range(baseline, baseline + target)))
    states: list[State] = []
    for side in sides:
        company = {point: draw(st.sampled_from(groups_with(side[0], side))) for point in POINTS}
        for rank in side:
            kinds: list[State] = ["running", "gone"]
            kinds += [(point, group) for point, group in company.items() if rank in group]
            states.append(draw(st.sampled_from(kinds)))
    return tuple(states), sides


def lines_of(states: tuple[State, ...], sides: tuple[tuple[int, ...], tuple[int, ...]]) -> list[BoardLine]:
    baseline = len(sides[0])
    roles = [("baseline", rank) for rank in sides[0]] + [("target", rank - baseline) for rank in sides[1]]
    return [line(role, rank, states[number], baseline) for number, (role, rank) in enumerate(roles)]


@settings(max_examples=300, deadline=None)
@given(boards())
def test_a_rank_called_stuck_can_never_be_freed_in_any_order(board: Any) -> None:
    states, sides = board
    stuck = {found.graft_rank for found in find_stuck(lines_of(states, sides))}
    assert not stuck & ever_running(states, sides)


@settings(max_examples=300, deadline=None)
@given(boards())
def test_where_nobody_runs_every_waiting_rank_is_stuck_or_meets_at_once(board: Any) -> None:
    """Complete where it matters most: both jobs wait, and no meeting is complete."""
    states, sides = board
    if "running" in states or meet(states, sides) is not None:
        return
    waiting = {rank for rank, state in enumerate(states) if isinstance(state, tuple)}
    assert {found.graft_rank for found in find_stuck(lines_of(states, sides))} == waiting


def test_a_process_that_is_gone_is_no_hope() -> None:
    lines = [line("baseline", 0, ("x", (0,)), 1), line("target", 0, "running", 1)]
    assert find_stuck(lines) == []
    stuck = find_stuck(lines, gone={1})
    assert [found.graft_rank for found in stuck] == [0]
    assert isinstance(explain_stuck(stuck, {1: "is gone"}, ""), PeerLostError)


def test_a_third_rank_that_runs_may_still_free_two() -> None:
    """Baseline 0 waits for `x` alone, target 0 for `y` with target 1, which runs: it can bring `x`, then `y`."""
    lines = [
        line("baseline", 0, ("x", (0,)), 1),
        line("target", 0, ("y", (1, 2)), 1),
        line("target", 1, "running", 1),
    ]
    assert find_stuck(lines) == []


def test_ranks_of_one_job_with_different_company_are_told_as_such() -> None:
    lines = [line("baseline", 0, ("x", (0, 1)), 2), line("baseline", 1, ("x", (1,)), 2), line("target", 0, "gone", 2)]
    error = explain_stuck(find_stuck(lines), {}, "")
    assert isinstance(error, PairingError)
    assert "different participants" in str(error)


def test_lists_of_points_are_compared_only_where_there_are_any() -> None:
    """Two sides that part at their first point have no list to look at."""
    first = [line("baseline", 0, ("x", (0,)), 1), line("target", 0, ("y", (1,)), 1)]
    later = [rank.model_copy(update={"last_points": ("a grafted",)}) for rank in first]
    for lines, told in ((first, False), (later, True)):
        text = str(explain_stuck(find_stuck(lines), {}, "", lines))
        assert ("Compare the two lists of last points" in text) is told
        assert "Make the two programs dump the same points" in text


# --- hints ---------------------------------------------------------------------------------------------------------


def waiting(role: Any, point: str, call_site: str = "", **facts: Any) -> BoardLine:
    return BoardLine(
        role=role, role_rank=0, sequence=1, state="waiting", since=0.0, point=point, call_site=call_site,
        hooks=HookFacts(**facts),
    )  # fmt: skip


def test_the_error_says_which_modules_were_passed_by() -> None:
    lines = [waiting("baseline", "'a'", bypassed=("layers.0", "root")), waiting("target", "'b'")]
    (hint,) = find_hints(lines)
    assert "modules of the baseline" in hint
    assert "layers.0, root" in hint
    assert "module.forward(...)" in hint
    assert hint in str(explain_stuck(lines, {}, "", lines))


def test_the_error_suggests_a_warm_up_of_the_job_that_has_made_more_passes() -> None:
    """None where one of them has no models."""
    (hint,) = find_hints([waiting("baseline", "'a'", passes=3), waiting("target", "'b'", passes=1)])
    assert "--set baseline_warm_up=N" in hint
    assert find_hints([waiting("baseline", "'a'", passes=3), waiting("target", "'b'")]) == []
    assert find_hints([waiting("baseline", "'a'", passes=2), waiting("target", "'b'", passes=2)]) == []


def test_the_error_suggests_gradients_at_the_optimizers_step() -> None:
    (hint,) = find_hints([waiting("baseline", "'w'", "the parameter w"), waiting("target", "'x'")])
    assert "weight_gradients=optimizer_step" in hint


def test_the_error_says_that_models_are_called_in_another_order() -> None:
    """Only where both jobs have both models, and are in different ones."""
    both = ("", "ref")
    lines = [waiting("baseline", "'layers.out' (step=0)", models=both)]
    lines.append(waiting("target", "'ref.layers.out' (step=0)", models=both))
    (hint,) = find_hints(lines)
    assert "name.startswith('ref.')" in hint
    assert "not name.startswith('ref.')" in hint
    assert find_hints([lines[0], lines[0].model_copy(update={"role": "target"})]) == []
    assert find_hints([lines[0], waiting("target", "'ref.x'", models=("ref",))]) == []
