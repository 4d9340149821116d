"""Waits of the dump thread: what it waits for, and what the monitor thread must know to look after that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from grafter.core.processes import Abandoned, Watch


@dataclass
class Wait:
    """One wait of the dump thread, in one stage: join, pairing, sending, exchange, agreement, gradients, control,
    outbox, or store, which is a wait for nothing but an answer of the store. Times are on `time.monotonic`'s clock."""

    stage: str
    # What messages say that the rank waits for; converted to text only then.
    what: object
    # In seconds.
    timeout: float
    # The store keys that end it. If messages of channels end it, `has_news` says whether one has arrived.
    awaits: tuple[str, ...] = ()
    has_news: Callable[[], bool] | None = None
    # Whether this rank polls those keys, so that no call of the store blocks.
    is_polled: bool = False
    # In agreement: whether the vote log has grown. The outcome may be in it before the message that announces it.
    has_grown: Callable[[], bool] | None = None
    # In pairing: the point, and the participants of this side (role ranks).
    leader: bool = False
    digest: str = ""
    participants: tuple[int, ...] = ()
    call_site: str = ""
    # Whether it needs only its own side.
    own_side: bool = False
    # Whether the point is skipped if the other ranks do not reach it in this step; and whether this wait collects the
    # headers of this side.
    one_sided: bool = False
    step: int = 0
    collects: bool = False
    # In exchange and agreement: the graft ranks without which the stage cannot end.
    needs: frozenset[int] = frozenset()
    # The store key at which receivers give the point up.
    outcome_key: str | None = None
    since: float = field(default_factory=time.monotonic)
    # The fields below are set by the monitor thread. Why the receivers have given the point up.
    abandoned: str | None = field(default=None, init=False)
    # Why the ranks that a one-sided point waits for will not reach it.
    given_up: str | None = field(default=None, init=False)
    next_look: float = field(default=0.0, init=False)
    # Set by the dump thread when the wait has ended for any reason.
    over: bool = field(default=False, init=False)

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.since


# The kind of the value that ends the wait of a one-sided point which the other ranks will not reach.
ABSENT = "absent"


class GivenUp(Exception):
    """The ranks that a one-sided point waits for will not reach it; the text says why. The run continues."""


class WaitKeeper(Protocol):
    """What looks after the waits of the dump thread: `MonitorThread`, and stand-ins of it in tests."""

    def begin(self, wait: Wait) -> None:
        """The dump thread waits from here on. Raises what ended the run."""

    def end(self, wait: Wait) -> None:
        """The wait is over."""

    def check(self) -> None:
        """Raises what ended the run."""


class WaitWatch:
    """The check of a waiting loop: it ends the loop with the run, or once the other ranks will not reach the point."""

    def __init__(self, keeper: WaitKeeper, wait: Wait) -> None:
        self._keeper, self._wait = keeper, wait

    def check(self) -> None:
        """Raises what ended the run, or GivenUp."""
        self._keeper.check()
        if self._wait.given_up is not None:
            raise GivenUp(self._wait.given_up)


class WatchedWait:
    """A context manager that begins and ends a wait. Every point uses it, and a generator would take four times as
    long."""

    __slots__ = ("_keeper", "_wait")

    def __init__(self, keeper: WaitKeeper, wait: Wait) -> None:
        self._keeper, self._wait = keeper, wait

    def __enter__(self) -> None:
        self._keeper.begin(self._wait)

    def __exit__(self, *_: object) -> None:
        self._keeper.end(self._wait)


class LastingWait:
    """A context manager whose wait begins with the first `check`, and so only if it lasts: most small ones do not."""

    __slots__ = ("_keeper", "_make_wait", "_wait")

    def __init__(self, keeper: WaitKeeper, make_wait: Callable[[], Wait]) -> None:
        self._keeper, self._make_wait = keeper, make_wait
        self._wait: Wait | None = None

    def check(self) -> None:
        """Begins the wait at the first call. Raises what ended the run, or Abandoned if the receivers have given the
        point up."""
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
