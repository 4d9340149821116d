"""Gradients: the gradient of a point is a point, too, of phase backward, with the tags of its forward point.

Which points come is settled in the forward pass, in the order of the program; autograd's own order may differ between
the two jobs (eager and compiled code differ). So senders never wait inside of the backward pass: they keep a copy of
each gradient, and serve the receivers at its end, in the order in which those ask. Receivers wait where the gradient
is, and hand the grafted one on.

    sender      hook: keep a copy          end of backward: serve what is asked for, until nothing is left
    receiver    hook: ask, wait, hand on   end of the step: decline what never came
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from grafter.config.names import PointName
from grafter.config.options import PointOptions
from grafter.core.messages.manifest import store_keys
from grafter.core.points import PointKey
from grafter.core.roles import Direction, sender_role
from grafter.core.untraced import untraced
from grafter.errors import PointTimeoutError, UsageError
from grafter.runtime.session import Session
from grafter.wire.monitor.waits import Wait

if TYPE_CHECKING:
    from grafter.runtime.gradients.points import BackwardPoints
    from grafter.store.dumps.pending_record import PendingRecord

logger = logging.getLogger("grafter")

PHASE = "backward"
_POLL_SECONDS = 0.0002
_SLOWEST_POLL_SECONDS = 0.005
# Asking the store costs a round trip for each gradient, so mail comes first.
_PATIENCE_SECONDS, _STORE_SECONDS = 0.01, 0.05
# From a look for a word of the other side to the question.
_GRACE_SECONDS = 0.02
# What a leader tells its followers of a point.
_ASKED, _DECLINED, _LATER = "asked", "declined", "later"


@dataclass
class WatchedGradient:
    """A gradient that is to come. taken: as it came, where it is saved; that is over when it has met."""

    key: PointKey
    direction: Direction
    tags: dict[str, Any]
    options: PointOptions
    call_site: str
    module: str | None = None
    saves: bool = False
    is_parameter: bool = False
    gradient: torch.Tensor | None = None
    met: bool = False
    # Its step is over, and it had not come by then.
    ended: bool = False
    taken: PendingRecord | None = None


@dataclass
class SavedGradient:
    """A gradient that meets nobody, and is saved when it comes. direction: where it is recorded for a later graft."""

    key: PointKey
    tags: dict[str, Any]
    options: PointOptions
    call_site: str
    module: str | None = None
    direction: Direction | None = None
    is_parameter: bool = False
    came: bool = False


@dataclass
class PendingGradients:
    """One rank's gradients that are still to come, or still to be served. Used under the lock of its points."""

    points: BackwardPoints
    watched: dict[str, WatchedGradient] = field(default_factory=dict)
    # Where there is no other job: what is to be recorded in this step.
    recorded: list[SavedGradient] = field(default_factory=list)
    _offered: dict[str, WatchedGradient] = field(default_factory=dict)
    _parameters: dict[str, tuple[PointName, torch.Tensor]] = field(default_factory=dict)
    _end_is_queued: bool = False
    _parameters_are_queued: bool = False
    # What ends the watch over optimizers, where there is one.
    _optimizers: Any = None
    # What an optimizer used within the backward pass: the program may clear or change it before that ends.
    _used: dict[str, torch.Tensor] = field(default_factory=dict)
    # Gradients of weights that came, and were gone when they were to be taken: name -> how many.
    lost: Counter[str] = field(default_factory=Counter)
    # Gradients that came when their step was over: name -> how many.
    late: Counter[str] = field(default_factory=Counter)
    _served: int = 0
    # Words of a leader to its followers that can go once all of them have met after it.
    _told: list[str] = field(default_factory=list)

    # In the forward pass.

    def watch(self, value: Any, register: Callable[[str], WatchedGradient | SavedGradient | None]) -> None:
        """Hooks on the tensors of a point's value. `register` gives the point of a leaf's path, if one matches."""
        for path, tensor in _tensors_in(value):
            if tensor.requires_grad and tensor.dtype.is_floating_point | tensor.dtype.is_complex:
                watched = register(path)
                if isinstance(watched, WatchedGradient):
                    self.watched[watched.key.digest] = watched
                elif watched is not None and watched.direction is not None:
                    self.recorded.append(watched)
                if watched is not None:
                    tensor.register_hook(_Hook(self, watched))  # type: ignore[no-untyped-call]

    # In the backward pass.

    def came(self, watched: WatchedGradient, gradient: torch.Tensor) -> torch.Tensor | None:
        """What takes the gradient's place; None: it stays as it is."""
        if watched.ended:
            self._note_late(watched)
            return None
        if watched.met:
            raise UsageError(
                f"the gradient of {watched.key} came twice (backward through one graph twice, with retain_graph). The "
                "other job does not come to it a second time; call grafter.step() between the two, and dump again."
            )
        if self.points.is_early(watched.options):
            watched.met = True
            self.watched.pop(watched.key.digest, None)
            self.points.defer(watched, gradient)
            return None
        session = self.points.session
        if session.place.role == sender_role(watched.direction):
            if watched.options.is_posted(session.place.role, watched.direction):
                # It lies in the outbox from here on, and nobody has to ask for it.
                watched.met = True
                self.watched.pop(watched.key.digest, None)
                self.points.meet(session, watched, gradient)
                return None
            # A copy: what comes after may add to this memory.
            self.offer(watched, gradient.detach().clone())
            self._queue_end()
            return None
        if self._offered:
            raise UsageError(
                f"the gradient of {watched.key} comes from the other job, and "
                f"{next(iter(self._offered.values())).key} goes "
                "to it, in one backward pass: each side would wait for the end of the other's. Let the filters of "
                "phase "
                "backward go one way."
            )
        watched.met = True
        if self._is_declined(session, watched):
            self.points.skip(session, watched, "the other job has no gradient for it in this step")
            return None
        self.watched.pop(watched.key.digest, None)
        return self.points.meet(session, watched, gradient)

    def _note_late(self, watched: WatchedGradient) -> None:
        """It has its line in the ledger since its step ended, and the other job expects nothing more of it."""
        if not self.late:
            logger.warning(
                "grafter: the gradient of %s came after its step had ended, so it was neither grafted nor compared; "
                "call grafter.step() after backward, in both jobs (said once; the run's problems count all of them)",
                watched.key,
            )
        self.late[watched.key.name] += 1

    def offer(self, watched: WatchedGradient, gradient: torch.Tensor) -> None:
        """Keep a gradient, which nobody changes any more, until `serve`."""
        watched.gradient = gradient
        self._offered[watched.key.digest] = watched

    def parameter_came(self, name: PointName, parameter: torch.Tensor) -> None:
        """Gradients of parameters are taken once: at the end of the backward pass, when all of them are there, or when
        an optimizer is about to step."""
        if self.points.is_warming_up:
            return
        self._parameters[name.key] = (name, parameter)
        if not self.points.waits_for_optimizer:
            self._queue_end()
        if self._optimizers is None:
            self._optimizers = register_optimizer_step_pre_hook(untraced(self._before_optimizer))

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """All that has come since the last time, whoever's it is: an optimizer may have copies of the weights instead
        of the weights, and where one job has two optimizers, the other may have one."""
        if self.points.waits_for_optimizer:
            self._take_parameters()
        elif self._parameters:
            self._keep_used(optimizer)

    def _keep_used(self, optimizer: Any) -> None:
        """An optimizer steps within the backward pass. To meet the other job here could mean that each waits for the
        other, so copies are kept until the pass ends."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        with self.points.lock, torch.no_grad():
            for key, (name, parameter) in self._parameters.items():
                gradient = _gradient_of(parameter)
                if id(parameter) in stepped and gradient is not None and self.points.wants_parameter(name):
                    self._used[key] = gradient.detach().clone()

    def _queue_end(self) -> None:
        if not self._end_is_queued:
            self._end_is_queued = True
            _call_after_backward(self._end_of_backward)

    def _end_of_backward(self) -> None:
        self._end_is_queued = False
        with self.points.lock, torch.no_grad():
            self.serve()
        if self._parameters and not self._parameters_are_queued and not self.points.waits_for_optimizer:
            # FSDP2 and DDP end their reductions in callbacks of their own, which may stand behind this one, but before
            # one that is queued now.
            self._parameters_are_queued = True
            _call_after_backward(self._take_parameters)

    def _take_parameters(self) -> None:
        self._parameters_are_queued = False
        with self.points.lock, torch.no_grad():
            parameters, self._parameters = self._parameters, {}
            used, self._used = self._used, {}
            for key, (name, parameter) in sorted(parameters.items()):
                gradient = used.get(key, _gradient_of(parameter))
                if gradient is not None:
                    self.points.dump_parameter(name, gradient, is_used=key in used)
                elif self.points.wants_parameter(name):
                    self.lost[name.name] += 1

    def serve(self, *, at_end_of_step: bool = False) -> None:
        """Give the receivers what is left to give, in the order in which they ask. Senders only.

        Where they ask for a gradient that has not come here, it may come in a later backward pass: the rest waits until
        then. At the end of the step it will not, and they are told.
        """
        while self._offered:
            session = self.points.session
            participants = self.points.participants_of(session, next(iter(self._offered.values())))
            if session.place.role_rank == min(participants):
                digest, word = self._next_asked(session, participants)
                if word == _ASKED and digest not in self._offered and not at_end_of_step:
                    word = _LATER
                self._tell(session, participants, digest, word)
            else:
                digest, word = self._told_by_leader(session, participants)
            if word == _LATER:
                return
            self._settle(session, digest, word)

    def _settle(self, session: Session, digest: str, word: str) -> None:
        watched = self._offered.pop(digest, None) or self.watched.get(digest)
        if watched is None:
            raise UsageError(
                "the ranks of this job have different gradients: another one serves a point that this rank never "
                "dumped in the forward pass. Give ranks= of those that share it."
            )
        self.watched.pop(digest, None)
        watched.met = True
        gradient, watched.gradient = watched.gradient, None
        if word == _ASKED:
            self.points.meet(session, watched, gradient)
            # All of this side's ranks have met, so all have read what they were told before.
            session.housekeeping.delete_later(self._told)
            self._told = []
        else:
            self.points.skip(session, watched, "no gradient reached this point in the other job")

    # Who asks.

    def _next_asked(self, session: Session, participants: tuple[int, ...]) -> tuple[str, str]:
        """A point that the other side has asked for, or one that it declined."""
        known = {
            digest: watched
            for digest, watched in {**self._offered, **self.watched}.items()
            if not watched.met and self.points.participants_of(session, watched) == participants
        }
        wait = Wait("gradients", f"the other job to ask for one of {len(known)} gradients", session.timeout)
        pause, next_look_in_store = _POLL_SECONDS, time.monotonic() + _PATIENCE_SECONDS
        with session.housekeeping.waiting(wait):
            while True:
                for digest in known:
                    if session.pairing.is_asked_by_mail(digest):
                        return digest, _ASKED
                if time.monotonic() >= next_look_in_store:
                    next_look_in_store = time.monotonic() + _STORE_SECONDS
                    for digest, watched in known.items():
                        if session.pairing.is_asked_in_store(digest):
                            return digest, _ASKED
                        if digest in self._offered and self._is_declined(session, watched):
                            return digest, _DECLINED
                session.housekeeping.check()
                if wait.seconds > session.timeout:
                    raise session.housekeeping.abort(_too_late(wait, known), session.client)
                time.sleep(pause)
                pause = min(2 * pause, _SLOWEST_POLL_SECONDS)

    def _tell(self, session: Session, participants: tuple[int, ...], digest: str, word: str) -> None:
        self._served += 1
        if len(participants) > 1:
            place = self._place(session, participants)
            session.client.set(place, "next", f"{digest} {word}")
            self._told.append(place)

    def _told_by_leader(self, session: Session, participants: tuple[int, ...]) -> tuple[str, str]:
        self._served += 1
        place = self._place(session, participants)
        what = "this job's first rank to say which gradient is next"
        with session.housekeeping.waiting(Wait("gradients", what, session.timeout, awaits=(place,))):
            digest, _, word = session.client.get(place).payload.partition(" ")
        return digest, word

    def _place(self, session: Session, participants: tuple[int, ...]) -> str:
        return f"{session.client.run_prefix}/serve/{session.place.role}/{min(participants)}/{self._served}"

    # At the end of a step.

    def end_step(self, session: Session | None) -> None:
        """Nothing of this step comes any more: say so to whoever might wait for it."""
        # A backward pass that failed never called back.
        self._end_is_queued = self._parameters_are_queued = False
        if not self.points.waits_for_optimizer:
            self._parameters.clear()
            self._used.clear()
        for saved in self.recorded:
            if not saved.came:
                self.points.record_missing(saved)
        self.recorded.clear()
        if session is None:
            unmet = [watched for watched in self.watched.values() if not watched.met]
            if all(self.points.is_early(watched.options) for watched in unmet):
                for watched in unmet:
                    watched.ended = True
                    self.points.defer(watched, None)
                self.watched.clear()
                return
            # No point has asked for it yet, and the other job may wait for these.
            session = self.points.session
        self.serve(at_end_of_step=True)
        unmet = [watched for watched in self.watched.values() if not watched.met]
        leads = [w for w in unmet if session.place.role_rank == min(self.points.participants_of(session, w))]
        for watched in leads:
            session.client.set(_decline_place(session, watched), "declined", "")
        if any(session.place.role == sender_role(watched.direction) for watched in unmet):
            self._answer_late_askers(session, unmet)
        for watched in unmet:
            watched.ended = True
            if not watched.met:
                self.points.skip(session, watched, "no gradient came to it in this step")
        self.watched.clear()

    def close(self) -> None:
        """The run is over: of gradients that still wait for an optimizer, or that were lost, say so."""
        if self.lost:
            counts = ", ".join(f"{name}: {count}" for name, count in self.lost.most_common(3))
            logger.warning(
                "grafter: %d gradients of weights (%s%s) came, and were gone when they were to be taken, so they are "
                "no points: the program clears .grad within the backward pass. Clear it after backward, or call "
                "grafter.dump where it is used (an optimizer of torch's that steps there is seen)",
                self.lost.total(), counts, ", ..." if len(self.lost) > 3 else "",
            )  # fmt: skip
        if self._optimizers is not None:
            self._optimizers.remove()
            self._optimizers = None
        if self._parameters:
            names = ", ".join(name.name for name, _ in list(self._parameters.values())[:3])
            logger.warning(
                "grafter: %d gradients of weights (%s%s) were to be taken when an optimizer steps, and none has "
                "stepped since they came, so they are no points. Of an optimizer that is none of torch's, call "
                "grafter.dump yourself, or take them at each backward pass (GRAFTER_WEIGHT_GRADIENTS=backward)",
                len(self._parameters), names, ", ..." if len(self._parameters) > 3 else "",
            )  # fmt: skip
            self._parameters.clear()

    def _answer_late_askers(self, session: Session, unmet: Sequence[WatchedGradient]) -> None:
        """Receivers that had looked for a word of ours just before we left it: they wait for an answer now."""
        time.sleep(_GRACE_SECONDS)
        for watched in unmet:
            participants = self.points.participants_of(session, watched)
            digest = watched.key.digest
            if session.place.role_rank == min(participants):
                asked = session.pairing.is_asked_by_mail(digest) or session.pairing.is_asked_in_store(digest)
                self._tell(session, participants, digest, _ASKED if asked else _DECLINED)
            else:
                asked = self._told_by_leader(session, participants)[1] == _ASKED
            if asked:
                watched.met = True
                self.points.meet(session, watched, None)

    def _is_declined(self, session: Session, watched: WatchedGradient) -> bool:
        return session.client.exists(_decline_place(session, watched))


def _decline_place(session: Session, watched: WatchedGradient) -> str:
    return f"{store_keys(session.client.run_prefix, watched.key.digest).base}/declined"


def _too_late(wait: Wait, known: dict[str, WatchedGradient]) -> PointTimeoutError:
    names = ", ".join(str(watched.key) for watched in list(known.values())[:4])
    return PointTimeoutError(
        f"the gradients of {names}{', ...' if len(known) > 4 else ''} were offered, and the other job has not asked "
        f"for one of "
        f"them within {wait.timeout:.0f} s. Its backward pass may not have come to these points, or it may have no "
        f"graph "
        "there (no_grad, detach). If its program has no step, call grafter.step() at the end of each iteration in both."
    )


class _Hook:
    """The tensor's hook. A class, so that a graph that is kept shows what it keeps."""

    def __init__(self, pending: PendingGradients, watched: WatchedGradient | SavedGradient) -> None:
        self._pending, self._watched = pending, watched

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        return self._pending.points.came(self._watched, gradient)


def _call_after_backward(function: Callable[[], None]) -> None:
    """Autograd calls it once the backward pass that runs now is over, after what was queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """Megatron adds to a buffer of its own."""
    return parameter.grad if parameter.grad is not None else getattr(parameter, "main_grad", None)


def _tensors_in(value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [("", value)]
    flat, _ = pytree.tree_flatten_with_path(value)
    return [(pytree.keystr(path), leaf) for path, leaf in flat if isinstance(leaf, torch.Tensor)]
