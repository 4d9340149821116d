"""Pending gradients: those that are expected, and those that the other job has not asked for yet.

sender      a gradient arrives: keep a copy     end of the backward pass: serve what is asked for
receiver    a gradient arrives: ask, wait       end of the step: decline what never arrived
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from grafter.core.roles import sender_role
from grafter.errors import UsageError
from grafter.runtime.gradients.outcomes import GradientOutcomes
from grafter.runtime.gradients.requests import GradientRequests, await_late_requests, decline, is_asked, is_declined
from grafter.runtime.gradients.watched import SavedGradient, WatchedGradient
from grafter.runtime.session import Session

logger = logging.getLogger("grafter")


@dataclass
class PendingGradients:
    """The gradients of one rank that are to arrive, or to be served. Used under the lock of its points."""

    outcomes: GradientOutcomes
    requests: GradientRequests = field(default_factory=GradientRequests)
    watched: dict[str, WatchedGradient] = field(default_factory=dict)
    # Where there is no other job: what is to be recorded in this step.
    recorded: list[SavedGradient] = field(default_factory=list)
    # Senders: what has arrived here, until a receiver asks for it.
    offered: dict[str, WatchedGradient] = field(default_factory=dict)
    # Gradients that arrived after the end of their step: name -> how many.
    late: Counter[str] = field(default_factory=Counter)

    def add(self, point: WatchedGradient | SavedGradient | None) -> None:
        """A gradient is to arrive in this step."""
        if isinstance(point, WatchedGradient):
            self.watched[point.key.digest] = point
        elif point is not None and point.point.direction is not None:
            self.recorded.append(point)

    # In the backward pass.

    def came(self, watched: WatchedGradient, gradient: torch.Tensor) -> torch.Tensor | None:
        """A gradient has arrived; what replaces it, or None if it stays as it is."""
        if watched.ended:
            self._note_late(watched)
            return None
        if watched.met:
            raise UsageError(
                f"the gradient of {watched.key} came twice (backward through one graph twice, with retain_graph). The "
                "other job does not reach it a second time; call grafter.step() between the two, and dump again."
            )
        if self.outcomes.fate_of(watched) == "defer":
            self._settle(watched)
            self.outcomes.defer(watched, gradient)
            return None
        session = self.outcomes.session
        if session.place.role == sender_role(watched.direction):
            if watched.point.options.is_posted(session.place.role, watched.direction):
                # It lies in the outbox from here on, and no receiver has to ask for it.
                self._settle(watched)
                self.outcomes.exchange(session, watched, gradient)
                return None
            # A copy: what follows may add to this memory.
            self.offer(watched, gradient.detach().clone())
            return None
        if self.offered:
            raise UsageError(
                f"the gradient of {watched.key} comes from the other job, and {next(iter(self.offered.values())).key} "
                "goes to it, in one backward pass: each side would wait for the end of the other's. Let the filters of "
                "phase backward go one way."
            )
        watched.met = True
        if is_declined(session, watched):
            self.outcomes.skip(session, watched, "the other job has no gradient for it in this step")
            return None
        self.watched.pop(watched.key.digest, None)
        return self.outcomes.exchange(session, watched, gradient)

    def _settle(self, watched: WatchedGradient) -> None:
        watched.met = True
        self.watched.pop(watched.key.digest, None)

    def _note_late(self, watched: WatchedGradient) -> None:
        """Its ledger line was written when its step ended, and the other job expects no more of it."""
        if not self.late:
            logger.warning(
                "grafter: the gradient of %s came after its step had ended, so it was neither grafted nor compared; "
                "call grafter.step() after backward, in both jobs (said once; the run's problems count all of them)",
                watched.key,
            )
        self.late[watched.key.name] += 1

    def offer(self, watched: WatchedGradient, gradient: torch.Tensor) -> None:
        """Keep a gradient, whose memory does not change any more, until `serve`."""
        watched.gradient = gradient
        self.offered[watched.key.digest] = watched

    def serve(self, *, at_end_of_step: bool = False) -> None:
        """Give the receivers what is offered, in the order in which they ask. Called by senders only.

        Where they ask for a gradient that has not arrived here, it may arrive in a later backward pass: the rest waits
        until then. At the end of the step it cannot, and they learn that.
        """
        while self.offered:
            session = self.outcomes.session
            participants = self.outcomes.participants_of(session, next(iter(self.offered.values())))
            if session.place.role_rank == min(participants):
                digest, request = self.requests.next_for_leader(
                    session, participants, self._known(session, participants), self.offered,
                    at_end_of_step=at_end_of_step,
                )  # fmt: skip
            else:
                digest, request = self.requests.next_for_follower(session, participants)
            if request == "later":
                return
            self._answer(session, digest, request)

    def _known(self, session: Session, participants: tuple[int, ...]) -> dict[str, WatchedGradient]:
        return {
            digest: watched
            for digest, watched in {**self.offered, **self.watched}.items()
            if not watched.met and self.outcomes.participants_of(session, watched) == participants
        }

    def _answer(self, session: Session, digest: str, request: str) -> None:
        watched = self.offered.pop(digest, None) or self.watched.get(digest)
        if watched is None:
            raise UsageError(
                "the ranks of this job have different gradients: another one serves a point that this rank never "
                "dumped in the forward pass. Give ranks= of those that share it."
            )
        self._settle(watched)
        gradient, watched.gradient = watched.gradient, None
        if request == "asked":
            self.outcomes.exchange(session, watched, gradient)
            self.requests.all_have_met(session)
        else:
            self.outcomes.skip(session, watched, "no gradient reached this point in the other job")

    # At the end of a step.

    def end_step(self, session: Session | None) -> None:
        """Nothing of this step arrives any more: tell the ranks that might wait for it.

        session: None before the first point that needs one.
        """
        for saved in self.recorded:
            if not saved.came:
                self.outcomes.record_missing(saved)
        self.recorded.clear()
        if session is None:
            if self._defer_unmet():
                return
            # No point has asked for it yet, and the other job may wait for these.
            session = self.outcomes.session
        self.serve(at_end_of_step=True)
        unmet = self._unmet()
        for watched in unmet:
            if session.place.role_rank == min(self.outcomes.participants_of(session, watched)):
                decline(session, watched)
        if any(session.place.role == sender_role(watched.direction) for watched in unmet):
            self._answer_late_requests(session, unmet)
        for watched in unmet:
            watched.ended = True
            if not watched.met:
                self.outcomes.skip(session, watched, "no gradient arrived in this step")
        self.watched.clear()

    def _unmet(self) -> list[WatchedGradient]:
        return [watched for watched in self.watched.values() if not watched.met]

    def _defer_unmet(self) -> bool:
        """Defer what has not arrived, if all of it can be; whether that was so."""
        unmet = self._unmet()
        if any(self.outcomes.fate_of(watched) != "defer" for watched in unmet):
            return False
        for watched in unmet:
            watched.ended = True
            self.outcomes.defer(watched, None)
        self.watched.clear()
        return True

    def _answer_late_requests(self, session: Session, unmet: Sequence[WatchedGradient]) -> None:
        """Receivers that had looked whether a gradient is declined just before it was wait for an answer now."""
        await_late_requests()
        for watched in unmet:
            participants = self.outcomes.participants_of(session, watched)
            if session.place.role_rank == min(participants):
                asked = is_asked(session, watched)
                digest = watched.key.digest
                self.requests.publish(session, participants, digest, "asked" if asked else "declined")
            else:
                asked = self.requests.next_for_follower(session, participants)[1] == "asked"
            if asked:
                watched.met = True
                self.outcomes.exchange(session, watched, None)
