"""Two receivers vote without a leader: whatever the order of their steps, both write or neither does."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafter.errors import RunError
from grafter.pairing import mutual_vote
from grafter.pairing.manifest import StoreKeys
from grafter.pairing.mutual_vote import MutualVote
from grafter.rendezvous.wire import Sealed

KEYS = StoreKeys("hall", "point")
Ballot = str | None


class Turns:
    """Lets one of two threads do its next step at a time: which, says a list of choices, and when that is used up, the
    one whose turn is longest ago."""

    def __init__(self, choices: list[int]) -> None:
        self._choices = iter(itertools.chain(choices, itertools.cycle([0, 1])))
        self._changed = threading.Condition()
        self._ready: set[int] = set()
        self._running = {0, 1}
        self._now: int | None = None

    def step(self, rank: int) -> None:
        """Returns when it is this rank's turn."""
        with self._changed:
            self._ready.add(rank)
            self._hand_on()
            assert self._changed.wait_for(lambda: self._now == rank, 20), "the other one hangs"
            self._now = None
            self._ready.discard(rank)

    def leave(self, rank: int) -> None:
        with self._changed:
            self._running.discard(rank)
            self._hand_on()

    def _hand_on(self) -> None:
        if self._ready == self._running and self._running:
            self._now = next(rank for rank in self._choices if rank in self._ready)
            self._changed.notify_all()


class Post:
    """Letters of both: what is sent has arrived, and lies in its order until it is fetched."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.boxes: list[deque[tuple[str, Sealed]]] = [deque(), deque()]


class Courier:
    """As one rank sees it. Each call is one step."""

    def __init__(self, post: Post, rank: int) -> None:
        self._post, self._rank = post, rank
        self._box = post.boxes[rank]
        self._unread: dict[str, Sealed] = {}

    def bring(self, receivers: list[int], place: str, kind: str, payload: str, *, by_mail: bool) -> None:
        self._post.turns.step(self._rank)
        for receiver in receivers:
            self._post.boxes[receiver].append((place, Sealed(kind, str(self._rank), payload)))

    def look(self, place: str) -> Sealed | None:
        self._post.turns.step(self._rank)
        self._unread.update(self._box)
        self._box.clear()
        return self._unread.pop(place, None)

    def take_one(self, place: str) -> Sealed | None:
        """As a wait does, which leaves what lies behind the letter that ends it."""
        self._post.turns.step(self._rank)
        while place not in self._unread and self._box:
            self._unread.update([self._box.popleft()])
        return self._unread.pop(place, None)

    def discard(self, place: str) -> None:
        self._unread.pop(place, None)


def decide(post: Post, rank: int, refusal: Ballot, patience: int | None, found: list[Any]) -> None:
    """patience: after so many looks for the other's vote in vain this rank has to leave; None: never."""
    courier = Courier(post, rank)
    mutual = MutualVote(courier)  # type: ignore[arg-type]
    looks = itertools.count() if patience is None else iter(range(patience))

    def fetch(place: str) -> Sealed:
        for _ in looks:
            if (letter := courier.take_one(place)) is not None:
                return letter
        raise RunError("the run is over")

    try:
        mutual.vote(KEYS, rank, 1 - rank, refusal)
        found[rank] = mutual.outcome(KEYS, rank, 1 - rank, 1 - rank, refusal, fetch)
    except RunError:
        found[rank] = "left"
    finally:
        post.turns.leave(rank)


def decide_both(choices: list[int], refusals: tuple[Ballot, Ballot], patiences: tuple[int | None, int | None]) -> Any:
    post, found = Post(Turns(choices)), ["hangs", "hangs"]
    threads = [
        threading.Thread(target=decide, args=(post, rank, refusals[rank], patiences[rank], found), daemon=True)
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    return found


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mutual_vote, "_POLL_SECONDS", 0.0)
    yield


BALLOTS = st.sampled_from([None, None, "its own reason"])
PATIENCES = st.one_of(st.none(), st.integers(0, 4))


@given(st.lists(st.integers(0, 1), max_size=24), st.tuples(BALLOTS, BALLOTS), st.tuples(PATIENCES, PATIENCES))
def test_both_write_or_neither_does(
    choices: list[int], refusals: tuple[Ballot, Ballot], patiences: tuple[int | None, int | None]
) -> None:
    """In any order of steps, and whoever has to leave while it waits; nobody waits for ever."""
    first, second = decide_both(choices, refusals, patiences)
    assert "hangs" not in (first, second)
    assert (first is None) == (second is None)
    if any(refusals):
        assert first is not None
    elif patiences == (None, None):
        assert first is None


@pytest.mark.parametrize("patiences", [(0, None), (None, 0), (0, 0), (1, 1), (0, 1), (1, 0)])
def test_each_short_order_of_steps_is_tried_where_one_leaves(patiences: tuple[int | None, int | None]) -> None:
    """All orders of the first seven steps, of two that would write."""
    both = set()
    for choices in itertools.product([0, 1], repeat=7):
        first, second = decide_both(list(choices), (None, None), patiences)
        assert (first is None) == (second is None), choices
        assert "hangs" not in (first, second), choices
        both.add(first is None)
    assert both == {True, False}


def test_one_reason_is_told_on_both() -> None:
    """The lower rank's, where both refuse."""
    for choices in itertools.product([0, 1], repeat=4):
        assert decide_both(list(choices), ("low", "high"), (None, None)) == ["low", "low"]
        assert decide_both(list(choices), (None, "high"), (None, None)) == ["high", "high"]


class InterruptedCourier(Courier):
    """Ctrl-C comes in its first look."""

    was_interrupted = False

    def look(self, place: str) -> Sealed | None:
        if not self.was_interrupted:
            self.was_interrupted = True
            raise KeyboardInterrupt
        return super().look(place)


@pytest.mark.parametrize("who", [0, 1])
def test_an_interrupt_behind_the_other_ones_yes_comes_after_the_point(who: int) -> None:
    """The other may have written by then."""
    for choices in itertools.product([0, 1], repeat=5):
        post, found, interrupted = Post(Turns(list(choices))), ["hangs", "hangs"], [False, False]

        def vote(rank: int, post: Post = post, found: list[Any] = found, interrupted: list[bool] = interrupted) -> None:
            courier = (InterruptedCourier if rank == who else Courier)(post, rank)
            mutual = MutualVote(courier)  # type: ignore[arg-type]

            def fetch(place: str) -> Sealed:
                while (letter := courier.take_one(place)) is None:
                    pass
                return letter

            try:
                mutual.vote(KEYS, rank, 1 - rank, None)
                found[rank] = mutual.outcome(KEYS, rank, 1 - rank, 1 - rank, None, fetch)
                interrupted[rank] = mutual.interrupted_by is not None
            finally:
                post.turns.leave(rank)

        threads = [threading.Thread(target=vote, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(250)
        assert found == [None, None], choices
        assert interrupted == [who == 0, who == 1]
