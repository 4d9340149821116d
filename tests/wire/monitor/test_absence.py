"""When it is certain that nobody comes to a one-sided point any more, and who gives way in a mutual wait."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from point_parts import roster
from pydantic import ValidationError

from grafter.config.options import OptionChooser
from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.plan_file import Rule
from grafter.errors import ConfigError, GrafterError
from grafter.wire.monitor.absence import LEFT, Absence, StepEnds, choose_passed_over, explain_passed_over
from grafter.wire.monitor.status_board import BoardLine
from grafter.wire.monitor.waits import GivenUp, Wait, WaitWatch
from grafter.wire.outbox.one_sided import Receivers

STEP = 3


class OneStore:
    """A store in this process. `before_each` runs before every request: other ranks go on meanwhile."""

    run_prefix = "run"

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.before_each: Callable[[], None] = lambda: None
        self.asked = 0

    def set(self, key: str, kind: str, payload: str) -> None:
        self.values[key] = SimpleNamespace(kind=kind, payload=payload)

    def all_exist(self, keys: Sequence[str]) -> bool:
        self.before_each()
        self.asked += 1
        return all(key in self.values for key in keys)

    def get_all(self, keys: Sequence[str]) -> list[Any]:
        self.before_each()
        self.asked += 1
        return [self.values[key] for key in keys]


def say(store: Any, ranks: tuple[int, int], role: str, role_rank: int, step: int) -> None:
    """What a rank says when it begins a step."""
    own = role_rank if role == "baseline" else ranks[0] + role_rank
    StepEnds(roster(*ranks), own).say(store, step)


def absence(store: Any, ranks: tuple[int, int], graft_rank: int, board: Sequence[BoardLine] = ()) -> Absence:
    def read_board(_: Any, wanted: Sequence[int]) -> list[BoardLine]:
        return [line for line in board if line.graft_rank in wanted]

    members = roster(*ranks)
    return Absence(members, graft_rank, StepEnds(members, graft_rank), read_board)


def wait_for(*places: str, participants: tuple[int, ...] = (0,), leader: bool = True, collects: bool = False) -> Wait:
    return Wait(
        "pairing", "p", 100.0, awaits=places, leader=leader, digest="x", participants=participants, one_sided=True,
        step=STEP, collects=collects,
    )  # fmt: skip


@pytest.mark.parametrize("steps", list(itertools.product([None, STEP, STEP + 1, LEFT], repeat=2)))
def test_a_leader_is_alone_once_every_rank_of_the_other_job_has_passed_the_step(
    steps: tuple[int | None, int | None],
) -> None:
    """Not while one has said nothing yet, nor while one is still in the step; those that have left have passed it."""
    store: Any = OneStore()
    for rank, step in enumerate(steps):
        if step is not None:
            say(store, (2, 1), "baseline", rank, step)
    found = absence(store, (2, 1), 2).find(store, wait_for("answer"))
    alone = all(step is not None and step > STEP for step in steps)
    assert found == ("only the target reached this point" if alone else None)


def test_what_was_posted_before_the_step_ended_is_never_passed_over() -> None:
    """In every interleaving of the sender's two deeds with what the waiting rank asks."""
    seen = set()
    for posts, first, second in itertools.product([False, True], range(4), range(4)):
        store: Any = OneStore()
        deeds: list[Callable[[], None]] = [lambda store=store: say(store, (1, 1), "baseline", 0, STEP + 1)]
        if posts:
            deeds.insert(0, lambda store=store: store.set("answer", "posted", ""))
        moments = sorted([first, second])[: len(deeds)]
        asked = itertools.count()

        def go_on(deeds: Any = deeds, moments: Any = moments, asked: Any = asked) -> None:
            now = next(asked)
            while deeds and moments and moments[0] <= now:
                moments.pop(0)
                deeds.pop(0)()

        store.before_each = go_on
        found = absence(store, (1, 1), 1).find(store, wait_for("answer"))
        assert not (posts and found), (first, second)
        seen.add((posts, found is not None))
    assert seen == {(False, False), (False, True), (True, False)}


def test_mail_that_has_come_is_news() -> None:
    """What ends the wait need not be in the store."""
    store: Any = OneStore()
    say(store, (1, 1), "baseline", 0, LEFT)
    wait = wait_for()
    wait.has_news = lambda: True
    assert absence(store, (1, 1), 1).find(store, wait) is None
    wait.has_news = lambda: False
    assert absence(store, (1, 1), 1).find(store, wait) is not None


def waiting(role: str, role_rank: int, ranks: tuple[int, int], digest: str = "x", **fields: Any) -> BoardLine:
    first = 0 if role == "baseline" else ranks[0]
    told = {"participants": (first + role_rank,), "one_sided": True, "point": digest, **fields}
    return BoardLine(
        role=role, role_rank=role_rank, graft_rank=first + role_rank, sequence=1, state="waiting", since=0.0,  # type: ignore[arg-type]
        digest=digest, **told,
    )  # fmt: skip


def test_a_leader_misses_a_rank_of_its_own_only_once_no_header_can_come_any_more() -> None:
    """Each of the others has passed the step, or waits here, having brought its header; one at least has passed."""
    ranks = (3, 1)
    store: Any = OneStore()
    wait = wait_for("header 1", "header 2", participants=(0, 1, 2), collects=True)
    for rank, step in enumerate((STEP, STEP + 1, STEP)):
        say(store, ranks, "baseline", rank, step)
    elsewhere = waiting("baseline", 2, ranks, "y")
    here = waiting("baseline", 2, ranks)
    assert absence(store, ranks, 0, [elsewhere]).find(store, wait) is None
    found = absence(store, ranks, 0, [here]).find(store, wait)
    assert found is not None and "baseline rank 1 has passed the end of the step without it" in found
    store.set("header 1", "header", "")
    assert absence(store, ranks, 0, [here]).find(store, wait) is not None, "that of rank 2 has not come by any way"
    store.set("header 2", "header", "")
    assert absence(store, ranks, 0, [here]).find(store, wait) is None


def test_a_follower_is_alone_once_its_leader_has_passed_the_step() -> None:
    """Whatever the other job does."""
    store: Any = OneStore()
    wait = wait_for("pair", participants=(0, 1), leader=False)
    say(store, (2, 1), "baseline", 1, STEP)
    say(store, (2, 1), "target", 0, LEFT)
    say(store, (2, 1), "baseline", 0, STEP)
    assert absence(store, (2, 1), 1).find(store, wait) is None
    say(store, (2, 1), "baseline", 0, STEP + 1)
    assert absence(store, (2, 1), 1).find(store, wait) is not None


def test_steps_that_are_known_to_be_over_are_not_asked_for_again() -> None:
    """A receiver that finds more one-sided points in a step pays for the first."""
    store: Any = OneStore()
    say(store, (1, 1), "baseline", 0, STEP + 1)
    ends = StepEnds(roster(1, 1), 1)
    assert ends.have_passed(store, "baseline", STEP)
    asked = store.asked
    assert ends.have_passed(store, "baseline", STEP - 1) and store.asked == asked
    assert not ends.have_passed(store, "baseline", STEP + 1) and store.asked > asked


def test_a_rank_says_each_step_once_and_never_goes_back() -> None:
    """The cost of a point is nothing, and of a step one request that nobody waits for."""
    said: list[str] = []
    store: Any = SimpleNamespace(run_prefix="run", set=lambda _, __, payload: said.append(payload))
    ends = StepEnds(roster(1, 1), 0)
    for step in (0, 0, 1, 1, 0, 2):
        ends.say(store, step)
    assert said == ["0", "1", "2"]


# Ranks that wait for each other.


def test_the_two_jobs_give_way_in_turns_and_the_target_first() -> None:
    """Every rank that looks at the same board chooses alike."""
    one, other = waiting("baseline", 0, (1, 1), "k1"), waiting("target", 0, (1, 1), "k2")
    assert choose_passed_over([one, other]) == choose_passed_over([other, one]) == [other]
    tired = other.model_copy(update={"passed_over": 1})
    assert choose_passed_over([one, tired]) == [one]
    assert choose_passed_over([one.model_copy(update={"passed_over": 1}), tired]) == [tired]
    assert "the baseline for k1; the target for k2" in explain_passed_over([one, other])


def lost_in(programs: tuple[list[tuple[int, str]], list[tuple[int, str]]]) -> int:
    """How many points that both jobs have do not meet, where senders never wait and receivers do, to the end."""
    sent: tuple[set[int], set[int]] = (set(), set())
    passed_over: tuple[set[int], set[int]] = (set(), set())
    place, met = [0, 0], set()
    while any(place[job] < len(programs[job]) for job in (0, 1)):
        before = tuple(place)
        for job in (0, 1):
            while place[job] < len(programs[job]):
                key, direction = programs[job][place[job]]
                if direction == ("b2t", "t2b")[job]:
                    sent[job].update({key} - passed_over[1 - job])
                elif key in sent[1 - job]:
                    met.add(key)
                elif place[1 - job] < len(programs[1 - job]):
                    break
                place[job] += 1
        if tuple(place) == before:
            lines = [
                waiting(role, 0, (1, 1), str(programs[job][place[job]][0]), passed_over=len(passed_over[job]))
                for job, role in enumerate(("baseline", "target"))
            ]
            (gives_way,) = choose_passed_over(lines)
            job = gives_way.graft_rank
            passed_over[job].add(programs[job][place[job]][0])
            place[job] += 1
    return len({key for key, _ in programs[0]} & {key for key, _ in programs[1]} - met)


@pytest.mark.parametrize("seed", range(300))
def test_no_more_points_of_both_jobs_are_lost_than_there_are_points_of_one(seed: int) -> None:
    """Points of both directions in one order, and up to three more in each job, anywhere: the jobs end, soon together
    again after each."""
    chance = random.Random(seed)
    common = [(number, chance.choice(["b2t", "t2b"])) for number in range(chance.randint(2, 20))]
    programs, extra = (list(common), list(common)), itertools.count(1000)
    for program in programs:
        for _ in range(chance.randint(0, 3)):
            program.insert(chance.randint(0, len(program)), (next(extra), chance.choice(["b2t", "t2b"])))
    assert lost_in(programs) <= next(extra) - 1000


def test_points_that_are_to_raise_are_never_passed_over() -> None:
    """Where all of them are, the jobs do not fit, as ever."""
    one = waiting("baseline", 0, (1, 1), "k1")
    other = waiting("target", 0, (1, 1), "k2", one_sided=False)
    assert choose_passed_over([one, other]) == [one]
    assert choose_passed_over([one.model_copy(update={"one_sided": False}), other]) == []


def test_followers_obey_their_leader_and_give_way_by_themselves_only_where_it_waits_elsewhere() -> None:
    """So all ranks of a point decide alike."""
    ranks = (2, 1)
    both = {"participants": (0, 1)}
    leader, follower = (waiting("baseline", rank, ranks, "k1", **both) for rank in (0, 1))
    target = waiting("target", 0, ranks, "k2", passed_over=1)
    assert choose_passed_over([leader, follower, target]) == [leader]
    astray = follower.model_copy(update={"digest": "k3"})
    assert choose_passed_over([leader, astray, target]) == [astray]
    assert choose_passed_over([leader, astray.model_copy(update={"passed_over": 1}), target]) == [leader], "its turn"


def test_a_wait_in_python_ends_with_the_reason_or_with_what_ended_the_run() -> None:
    """The end of the run comes first."""
    wait, problem = wait_for(), [GrafterError("the run is over")]

    def check() -> None:
        if problem:
            raise problem[0]

    watch = WaitWatch(SimpleNamespace(check=check), wait)  # type: ignore[arg-type]
    wait.given_up = "nobody comes"
    with pytest.raises(GrafterError, match="the run is over"):
        watch.check()
    problem.clear()
    with pytest.raises(GivenUp, match="nobody comes"):
        watch.check()


# A sender's patience.


def receivers_with(board: list[BoardLine], timeout: float = 100.0) -> tuple[Receivers, Any]:
    class Waiting:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    store: Any = OneStore()
    monitor: Any = SimpleNamespace(
        check=lambda: None,
        waiting=lambda _: Waiting(),
        read_board=lambda *_: board,
        step_ends=StepEnds(roster(1, 1), 0),
    )
    return Receivers(monitor, roster(1, 1), "baseline", timeout), store


def is_over_by(receiver_wait: Any, store: Any, monkeypatch: pytest.MonkeyPatch, seconds: Sequence[float]) -> list[bool]:
    """What it says so many seconds after it began; nothing is waited for."""
    from grafter.wire.outbox import one_sided

    begun = receiver_wait._since
    found = []
    for after in seconds:
        clock = SimpleNamespace(monotonic=lambda after=after: begun + after, sleep=lambda _: None)
        monkeypatch.setattr(one_sided, "time", clock)
        found.append(receiver_wait.is_over(store))
    return found


def test_a_sender_without_room_waits_for_receivers_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to GRAFTER_TIMEOUT; after that it waits no more until something has been taken."""
    running = waiting("target", 0, (1, 1)).model_copy(update={"state": "running"})
    receivers, store = receivers_with([running])
    with receivers.waited_for(posts_more=True) as receiver_wait:
        assert is_over_by(receiver_wait, store, monkeypatch, [0, 1, 50, 99, 101]) == [False] * 4 + [True]
        assert "GRAFTER_TIMEOUT" in receiver_wait.story
    monkeypatch.undo()
    with receivers.waited_for(posts_more=True) as receiver_wait:
        assert is_over_by(receiver_wait, store, monkeypatch, [0]) == [True]


def test_it_gives_up_soon_on_receivers_that_all_wait_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take nothing before it posts more. A line that changes shows that they go on."""
    board = [waiting("target", 0, (1, 1))]
    receivers, store = receivers_with(board)
    with receivers.waited_for(posts_more=True) as receiver_wait:
        assert is_over_by(receiver_wait, store, monkeypatch, [0, 1, 2]) == [False] * 3
        board[0] = board[0].model_copy(update={"sequence": 2})
        assert is_over_by(receiver_wait, store, monkeypatch, [2.6, 3.5, 4.7]) == [False, False, True]


def test_at_its_end_it_waits_for_them_as_long_as_none_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers that wait find by themselves that nothing comes; one that has left with an error takes nothing."""
    board = [waiting("target", 0, (1, 1))]
    receivers, store = receivers_with(board)
    with receivers.waited_for(posts_more=False) as receiver_wait:
        assert is_over_by(receiver_wait, store, monkeypatch, [1, 10, 90]) == [False] * 3
        board[0] = board[0].model_copy(update={"state": "left", "note": "ValueError: no"})
        assert is_over_by(receiver_wait, store, monkeypatch, [91]) == [True]
        assert receiver_wait.story == "target rank 0 has left with ValueError: no" and receiver_wait.has_failed


# The setting.


def config(**settings: Any) -> GrafterConfig:
    return GrafterConfig(enable=True, role="target", master_port=1, b2t_filter="True", **settings)


def test_the_plan_file_says_it_for_some_names_and_both_jobs_compare_all_of_it() -> None:
    """A rule comes before the setting. What is compared at the join is nothing where every point raises."""
    rules = (Rule(match="experts.*", one_sided="skip"), Rule(match="*.last", one_sided="raise"))
    assert [OptionChooser(config(rules=rules)).options_of(n, {}).one_sided for n in ("experts.0", "h")] == [
        "skip", "raise",
    ]  # fmt: skip
    assert config().one_sided_settings == config(rules=rules[1:]).one_sided_settings == {}
    assert config(rules=rules).one_sided_settings == {"one_sided": "raise; experts.*=skip; *.last=raise"}
    assert config(one_sided="skip").one_sided_settings == {"one_sided": "skip"}


def test_a_rule_for_one_job_alone_is_refused() -> None:
    """Each job must know what the other does at a point."""
    with pytest.raises(ValidationError, match="one_sided holds for both jobs"):
        Rule(match="*", role="target", one_sided="skip")
    with pytest.raises(ConfigError, match="one_sided"):
        config(one_sided="ignore")
