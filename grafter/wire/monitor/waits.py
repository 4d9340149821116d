"""A wait of the dump thread: what it waits for, and what the monitor thread needs to know to look after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from grafter.core.processes.watch import Abandoned, Watch


@dataclass
class Wait:
    """What the dump thread waits for, in one stage: join, pairing, exchange, agreement, gradients, control, outbox, or
    store where it is no more than an answer of the store."""

    stage: str
    # What a message says it waits for: text, or what gives it.
    what: object
    timeout: float
    # The store keys that end it, unless mail does; then `has_news` says whether there is any.
    awaits: tuple[str, ...] = ()
    has_news: Callable[[], bool] | None = None
    # Whether this rank asks for those keys again and again, so that no call of the store blocks.
    is_polled: bool = False
    # In agreement: whether the vote log has grown, so that the outcome may be there before the letter that says so.
    has_grown: Callable[[], bool] | None = None
    # In pairing: the point, and who of the own side it needs (role ranks).
    leader: bool = False
    digest: str = ""
    participants: tuple[int, ...] = ()
    call_site: str = ""
    # Whether it needs its own side alone.
    own_side: bool = False
    # Whether the point is skipped where the others do not come to it in this step; and whether this wait is for the
    # headers of the own side.
    one_sided: bool = False
    step: int = 0
    collects: bool = False
    # In exchange and agreement: the graft ranks without which the stage can't end.
    needs: frozenset[int] = frozenset()
    # Where the receivers say that they have given the point up, and what they said.
    outcome_key: str | None = None
    since: float = field(default_factory=time.monotonic)
    # What follows is not given, and so costs nothing to make.
    abandoned: str | None = field(default=None, init=False)
    # Why the ranks that a one-sided point waits for will not come.
    given_up: str | None = field(default=None, init=False)
    next_look: float = field(default=0.0, init=False)
    # Set when it has ended, however.
    over: bool = field(default=False, init=False)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


# What lies under an awaited key where a one-sided point waits in vain.
ABSENT = "absent"


class GivenUp(Exception):
    """The ranks that a one-sided point waits for will not come to it; the text says why. The run goes on."""


class Keeper(Protocol):
    """Who looks after waits: the monitor thread."""

    def begin(self, wait: Wait) -> None: ...

    def end(self, wait: Wait) -> None: ...

    def check(self) -> None: ...


class WaitWatch:
    """For a wait in Python: whether to go on. Also ends it where the others will not come."""

    def __init__(self, keeper: Keeper, wait: Wait) -> None:
        self._keeper, self._wait = keeper, wait

    def check(self) -> None:
        """Raises what ended the run, or GivenUp."""
        self._keeper.check()
        if self._wait.given_up is not None:
            raise GivenUp(self._wait.given_up)


class Watched:
    """Begins and ends a wait. A class, since this stands in every point and a generator costs four times as much."""

    __slots__ = ("_keeper", "_wait")

    def __init__(self, keeper: Keeper, wait: Wait) -> None:
        self._keeper, self._wait = keeper, wait

    def __enter__(self) -> None:
        self._keeper.begin(self._wait)

    def __exit__(self, *_: object) -> None:
        self._keeper.end(self._wait)


class LastingWait:
    """A wait that begins only once it lasts, as most small ones never do: with the first `check`.

    Put around what may have to wait for another rank.
    """

    __slots__ = ("_keeper", "_make_wait", "_wait")

    def __init__(self, keeper: Keeper, make_wait: Callable[[], Wait]) -> None:
        self._keeper, self._make_wait = keeper, make_wait
        self._wait: Wait | None = None

    def check(self) -> None:
        """Raises what ended the run, or Abandoned if the other side has given the point up."""
        self._keeper.check()
        if self._wait is None:
            wait = self._make_wait()
            self._keeper.begin(wait)
            self._wait = wait
        elif self._wait.abandoned is not None:
            raise Abandoned(self._wait.abandoned)

    def __enter__(self) -> Watch:
        self._keeper.check()
        return self

    def __exit__(self, *_: object) -> None:
        if self._wait is not None:
            self._keeper.end(self._wait)
