"""Requests for gradients: which one the receivers ask for next, agreed among the ranks of the sending side.

The lowest participant of a side, its leader, looks what the other side asks for, or declines, and tells the others.

    asked       the receivers wait for this gradient
    declined    no gradient reached the point in the other job
    later       they ask for one that has not arrived here: the rest waits for a later backward pass
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal, cast

from grafter.core.messages.manifest import store_keys
from grafter.errors import PointTimeoutError
from grafter.runtime.gradients.watched import WatchedGradient
from grafter.runtime.session import Session
from grafter.wire.monitor.waits import Wait

Request = Literal["asked", "declined", "later"]

_POLL_SECONDS = 0.0002
_SLOWEST_POLL_SECONDS = 0.005
# A look into the store costs a round trip for each gradient, so messages are read first.
_PATIENCE_SECONDS, _STORE_SECONDS = 0.01, 0.05
# From a receiver's look for a declined gradient to its question.
_GRACE_SECONDS = 0.02


class GradientRequests:
    """The requests of the other job for one rank's gradients. Used under the lock of its points."""

    def __init__(self) -> None:
        self._served = 0
        # Store keys of a leader that it may delete once all of its side have met again.
        self._leader_keys: list[str] = []

    def next_for_leader(
        self,
        session: Session,
        participants: tuple[int, ...],
        known: Mapping[str, WatchedGradient],
        offered: Mapping[str, WatchedGradient],
        *,
        at_end_of_step: bool,
    ) -> tuple[str, Request]:
        """(digest, request) of the next gradient, which the leader waits for and tells the other participants.

        known: what these participants expect or offer. Raises PointTimeoutError, on all ranks.
        """
        digest, request = self._await_request(session, known, offered)
        if request == "asked" and digest not in offered and not at_end_of_step:
            request = "later"
        self.publish(session, participants, digest, request)
        return digest, request

    def _await_request(
        self, session: Session, known: Mapping[str, WatchedGradient], offered: Mapping[str, WatchedGradient]
    ) -> tuple[str, Request]:
        wait = Wait("gradients", f"the other job to ask for one of {len(known)} gradients", session.timeout)
        pause, next_look_in_store = _POLL_SECONDS, time.monotonic() + _PATIENCE_SECONDS
        with session.monitor.waiting(wait):
            while True:
                for digest in known:
                    if session.pairing.is_asked_by_channel(digest):
                        return digest, "asked"
                if time.monotonic() >= next_look_in_store:
                    next_look_in_store = time.monotonic() + _STORE_SECONDS
                    for digest, watched in known.items():
                        if session.pairing.is_asked_in_store(digest):
                            return digest, "asked"
                        if digest in offered and is_declined(session, watched):
                            return digest, "declined"
                session.monitor.check()
                if wait.seconds > session.timeout:
                    raise session.monitor.abort(_too_late(wait, known), session.client)
                time.sleep(pause)
                pause = min(2 * pause, _SLOWEST_POLL_SECONDS)

    def publish(self, session: Session, participants: tuple[int, ...], digest: str, request: Request) -> None:
        """Called by the leader: the other participants read it with `next_for_follower`."""
        self._served += 1
        if len(participants) > 1:
            place = self._place(session, participants)
            session.client.set(place, "next", f"{digest} {request}")
            self._leader_keys.append(place)

    def next_for_follower(self, session: Session, participants: tuple[int, ...]) -> tuple[str, Request]:
        """(digest, request), as the leader has published it. Waits for the leader."""
        self._served += 1
        place = self._place(session, participants)
        what = "this job's first rank to say which gradient is next"
        with session.monitor.waiting(Wait("gradients", what, session.timeout, awaits=(place,))):
            digest, _, request = session.client.get(place).payload.partition(" ")
        return digest, cast(Request, request)

    def all_have_met(self, session: Session) -> None:
        """All ranks of this side have exchanged a gradient, so they have read what was published before."""
        session.monitor.delete_later(self._leader_keys)
        self._leader_keys = []

    def _place(self, session: Session, participants: tuple[int, ...]) -> str:
        return f"{session.client.run_prefix}/serve/{session.place.role}/{min(participants)}/{self._served}"


def is_declined(session: Session, watched: WatchedGradient) -> bool:
    """Whether the other job has said that this gradient does not arrive there in this step."""
    return session.client.exists(_decline_place(session, watched))


def decline(session: Session, watched: WatchedGradient) -> None:
    """Tell the other job that this gradient does not arrive here in this step. Called by the leader."""
    session.client.set(_decline_place(session, watched), "declined", "")


def is_asked(session: Session, watched: WatchedGradient) -> bool:
    """Whether the other job asks for this gradient now."""
    digest = watched.key.digest
    return session.pairing.is_asked_by_channel(digest) or session.pairing.is_asked_in_store(digest)


def await_late_requests() -> None:
    """Receivers that had looked whether a gradient is declined just before it was: their questions arrive by then."""
    time.sleep(_GRACE_SECONDS)


def _decline_place(session: Session, watched: WatchedGradient) -> str:
    return f"{store_keys(session.client.run_prefix, watched.key.digest).base}/declined"


def _too_late(wait: Wait, known: Mapping[str, WatchedGradient]) -> PointTimeoutError:
    names = ", ".join(str(watched.key) for watched in list(known.values())[:4])
    return PointTimeoutError(
        f"the gradients of {names}{', ...' if len(known) > 4 else ''} were offered, and the other job has not asked "
        f"for one of them within {wait.timeout:.0f} s. Its backward pass may not have come to these points, or it may "
        "have no graph there (no_grad, detach). If its program has no step, call grafter.step() at the end of each "
        "iteration in both."
    )
