"""The story of one tensor begins here: what users call, and which calls are points that a filter matches.

dump        tags, direction  ->  no filter matches: its value is returned
            one that matches (dispatch)  ->  its fate, key and local value  ->  point_exchange
            in a recomputation (repeated_points)  ->  what the forward pass wrote, again
begin       joins, at the first call, on a thread of its own (lifecycle)
step        counts up, and changes the settings that are to change (rank_control)
close       leaves
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from typing import Any

import torch

from grafter.capture.attached_models import AttachedModels
from grafter.capture.attachment import Attachment
from grafter.capture.parameters import dump_weights
from grafter.capture.traced import is_being_traced
from grafter.config.control.in_force import TraceVerdict
from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.announced_models import AnnouncedHooks
from grafter.core.messages.counts import Pending
from grafter.core.messages.roster import PlayedFrom
from grafter.core.points import FORWARD, LOOKED_AT, call_site, point_context, split_options
from grafter.core.sizes import read_size
from grafter.errors import GrafterError, JoinError, RunError
from grafter.rank.peer import Peer, start_peer
from grafter.runtime.deferred_points import DeferredPoints
from grafter.runtime.dispatch import Dispatch
from grafter.runtime.gradients.gradients import GradientPoints
from grafter.runtime.lifecycle import Introduction, JoinAttempt, Lifecycle
from grafter.runtime.point_preparation import PointPreparer, PointTools
from grafter.runtime.point_rules import SettingsChange
from grafter.runtime.rank_context import RankContext
from grafter.runtime.rank_control import RankControl
from grafter.runtime.rank_report import log_summary, set_up_logging
from grafter.runtime.recompute.recompute import Recomputations
from grafter.runtime.recompute.regions import current_recomputation, is_graph_differentiated, scopes
from grafter.runtime.recompute.repeated_points import RepeatedPoints
from grafter.runtime.session import BeforeJoining, Session
from grafter.store.dumps.rank_dumps import RankDumps
from grafter.wire.outbox.snapshots import Memory

logger = logging.getLogger("grafter")

# Bound once: each look-up would take a fiftieth of the time of a call that no filter matches.
_graph_task, _scopes = torch._C._current_graph_task_id, scopes.get
_point_context, _is_plain = point_context.get, LOOKED_AT.isdisjoint
# How long a rank that leaves waits for another thread at a point, before it checks whether it leaves with an error.
_PATIENCE_SECONDS = 2.0


class Grafter:
    """Grafts the points of one rank. The functions of the package use one that is made from the environment.

    Called by every rank that takes part; `dump` may be called from any thread, one point at a time.
    """

    # Whether what the filters choose is saved here.
    saves_points = True
    # What prepares a point's value, and what exchanges it with the other job.
    preparer_class = PointPreparer
    dispatch_class = Dispatch
    # Whether this process has had one.
    is_made = False

    def __init__(self, config: GrafterConfig) -> None:
        Grafter.is_made = True
        # Each part is built from those before it.
        self.context = context = RankContext.of(config, saves_points=self.saves_points)
        self.config, self.steps, self.lock = config, context.steps, context.lock
        self._rules, self._unmatched = context.rules, context.tally.unmatched
        # From the first call on there is a run: joining has begun, or, where points are only saved, its directory is
        # there.
        self.has_begun = False
        self._is_recorded = config.record
        self._peer: Peer | None = None
        self.models = AttachedModels(self, context)
        self.control = RankControl(context)
        before = BeforeJoining(Memory(read_size(config.outbox_bytes)), self.control)
        self.lifecycle = Lifecycle(context, self.models, before)
        preparer = self.preparer_class(config, context.place)
        dumps = RankDumps(config, context.place, preparer.axes, self.lifecycle.run_directory)
        self.recomputations = Recomputations(self.steps)
        self.tools = PointTools(preparer, dumps, self.recomputations)
        deferred = DeferredPoints(context, self.tools, before.outbox)
        self.dispatch = self.dispatch_class(context, self.tools, self.lifecycle, deferred)
        self._repeated = RepeatedPoints(context, self.recomputations)
        self.gradients: GradientPoints | None = None
        if self._rules.has_gradients:
            self.gradients = GradientPoints(context, self.tools, self.dispatch)
            self.dump_point = self._dump_with_gradients  # type: ignore[method-assign]
        if config.warm_up:
            self._begin_warm_up()
        set_up_logging(config.log_level)
        atexit.register(self.close)

    @property
    def is_warming_up(self) -> bool:
        """Whether points are left out, since the models are not warm yet."""
        return self.models.passes.is_warming_up

    # What users call.

    def dump(self, name: str, value: Any, /, **arguments: Any) -> Any:
        """One point. See `grafter.dump`."""
        return self.dump_point(name, value, arguments)

    def dump_point(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        """module: the module whose announcement the point counts as, if a hook has taken it."""
        if not self.has_begun:
            self.begin()
        is_plain = _is_plain(arguments)
        if not is_plain:
            split_options(arguments)
        # Asked here, since a call costs as much as the answer: nearly every `dump` is in a plain forward pass.
        if (_graph_task() != -1 or _scopes()) and (recomputation := current_recomputation()) is not None:
            return self._repeated.take(recomputation, name, value, arguments)
        around = _point_context()
        tags = {**around.tags, **arguments} if around.tags else arguments
        tags["name"] = name
        tags["step"] = self.steps.step
        tags["phase"] = FORWARD
        filters = self._rules.filters
        if filters.unseen_tags:
            filters.unseen_tags -= tags.keys()
        for matches in filters.matchers:
            if matches(tags):
                break
        else:
            if is_plain or not tags.get("save"):
                self._unmatched[name] += 1
                return value
        direction, saves = filters.direction_of(tags), filters.saves(tags)
        if direction is None and not saves:
            self._unmatched[name] += 1
            return value
        if saves or self._is_recorded:
            saves = self.tools.dumps.accepts(direction, self.steps.step, is_chosen=saves)
            if direction is None and not saves:
                return value
        for own in ("name", "step", "phase"):
            del tags[own]
        if is_being_traced():
            return value
        try:
            if os.getpid() != self.context.status.process_id:
                if direction is None:
                    self.tools.dumps.report_fork(name, call_site())
                    return value
                # Before the lock, which may belong to a thread that does not exist here.
                self.context.status.refuse_where_impossible(name, call_site())
            with self.lock:
                return self.dispatch.take(name, value, tags, {**around.options}, direction, saves, module)
        except GrafterError as error:
            # The way through our own files says nothing to the user, unless they debug us.
            if logger.isEnabledFor(logging.DEBUG):
                raise
            if isinstance(error, RunError):
                error.__cause__, error.__context__ = None, None
            raise error.with_traceback(None) from error.__cause__

    def _begin_warm_up(self) -> None:
        """Points are left out until the models are warm. Replaces `dump_point`, which is not to ask at each call."""
        self._dump_when_warm = self.dump_point
        self.dump_point = self._dump_in_warm_up  # type: ignore[method-assign]
        self.models.passes.on_warm = self._end_warm_up

    def _end_warm_up(self) -> None:
        self.dump_point = self._dump_when_warm  # type: ignore[method-assign]

    def _dump_in_warm_up(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        if not self.has_begun:
            self.begin()
        return value

    def _dump_with_gradients(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        """`dump_point` where gradients are points, too. It replaces that one, which is not to ask at each call."""
        given = dict(arguments)
        value = Grafter.dump_point(self, name, value, arguments, module)
        if is_being_traced():
            return value
        differentiated = is_graph_differentiated() if torch.is_grad_enabled() else self.recomputations.lead_to_graph()
        if self.gradients is not None and differentiated:
            self.gradients.watch(name, value, given, module)
        return value

    def step(self) -> None:
        """The end of an iteration: the step counts up, occurrences start at 0 again."""
        if not self.has_begun:
            self.begin()
        if self.context.status.is_forked or self.is_warming_up:
            return
        with self.lock:
            if self.gradients is not None:
                self.gradients.end_step(self.lifecycle.session)
            self.tools.dumps.end_step()
            for change in self.control.end_step():
                self._change_settings(change)
                self.control.has_taken_over(change)
            self.dispatch.end_step()

    def _change_settings(self, change: SettingsChange) -> None:
        """In the first step in which a change of the run is in force. May be done twice."""
        self._rules.change(change)
        dumped = change.in_force.dumped_steps
        self.tools.dumps.take_over(change.config, (dumped.first, dumped.end) if dumped is not None else None)

    def attach(
        self,
        model: torch.nn.Module,
        patterns: tuple[str, ...],
        *,
        inputs: bool = True,
        outputs: bool = True,
        name: str | None = None,
    ) -> Attachment:
        """Hooks on a model's modules. See `grafter.attach`."""
        return self.models.attach(model, patterns, inputs=inputs, outputs=outputs, name=name)

    @property
    def who(self) -> str:
        """This rank, as messages name it."""
        return self.context.place.who

    @property
    def axes(self) -> tuple[tuple[str, int, int], ...]:
        """The place of this rank on its job's mesh: (axis, coordinate, size)."""
        return self.tools.preparer.axes(None)

    def dump_model(self, model: torch.nn.Module) -> int:
        """All weights as points. See `grafter.dump_model`."""
        # Weights are leaves, where `cut` is refused, and a value that is returned would change nothing.
        given = {"write": "in_place", "gradient": "straight_through"}
        # Not `self.dump_point`, which would watch for the weights' gradients: those are points of their own.
        return dump_weights(
            model,
            self.models.naming,
            lambda name, tensor: Grafter.dump_point(self, name.name, tensor, {**given, **name.tags}),
        )

    def trace(self, name: str, arguments: dict[str, Any]) -> TraceVerdict:
        """How a point in code that is being compiled is taken.

        An operator where nothing needs to be written into the value's memory; else the call breaks the graph. Nothing,
        where no filter can ever match.
        """
        verdict = self.control.trace(self._rules.filters, name, arguments)
        if verdict.kind == "nothing":
            self._unmatched.setdefault(name, 0)
        return verdict

    def pending(self) -> Pending:
        """What lies in this rank's outbox. See `grafter.pending`."""
        return self.dispatch.pending

    def close(self) -> None:
        """Leave the run: say so, delete what is ours, write the summary. Later matched points are refused."""
        status = self.context.status
        # Before the lock: in a forked child it may belong to a thread that does not exist there.
        if status.is_forked:
            return
        if not (self.has_begun or status.fault is not None or self.config.only_dumps or status.is_closed):
            # There was no call: the others wait for this rank to join, and must learn that it leaves.
            self.begin()
        if not self.lock.acquire(timeout=_PATIENCE_SECONDS):
            # Another thread is at a point, which waits for other ranks; Ctrl-C must not.
            status.end_where_interrupted(self.lifecycle.session)
            self.lock.acquire()
        try:
            if status.is_closed:
                return
            status.is_closed = True
            atexit.unregister(self.close)
            self.recomputations.close()
            if self.has_begun:
                self._leave()
        finally:
            self.lock.release()

    def _leave(self) -> None:
        """Called once, under the lock: end the step, tell the other ranks, delete what is this rank's, sum up."""
        tally, dumps, filters = self.context.tally, self.tools.dumps, self._rules.filters
        error = self.context.status.last_error()
        # First: whatever keeps this rank from leaving, what it saved is on disk.
        dumps.flush()
        session = self.lifecycle.finish(patient=error is None)
        try:
            if self.gradients is not None and error is None and (session is not None or self.config.only_dumps):
                self.gradients.end_step(session)
        finally:
            if self.gradients is not None:
                self.gradients.close()
            tally.dumps.update(dumps.close())
            tally.left_out.update(dumps.limits.left_out)
        self.dispatch.leave(session, is_orderly=error is None)
        directory = self.lifecycle.leave(session, filters, error)
        if self._peer is not None:
            self._peer.close()
        self.models.warn_of_unused_settings()
        log_summary(self.context, filters, directory)

    # The other job.

    def begin(self) -> None:
        """Join the run, if no point has done it yet: what is attached by now is announced."""
        status = self.context.status
        if self.has_begun or status.is_forked:
            return
        with self.lock:
            if self.has_begun or status.is_closed:
                return
            try:
                self._begin()
            except GrafterError as error:
                status.fault = error
                raise
            self.has_begun = True

    def _begin(self) -> None:
        config, served = self.config, None
        if config.only_dumps:
            self.lifecycle.begin_alone()
            return
        if config.peer is not None:
            self._peer = start_peer(config, self.context.place)
            if self._peer is not None:
                config, served = self._peer.config, self._peer.store
        introduction = Introduction(config, self.announced_hooks(), self.announced_recording(), served)
        attempt = self.lifecycle.begin(introduction)
        threading.Thread(target=self._join, args=(attempt,), name="grafter-join", daemon=True).start()

    def _join(self, attempt: JoinAttempt) -> None:
        """On a thread of its own."""
        error = attempt.run()
        if isinstance(error, JoinError):
            self.context.refuse_all(error)
        attempt.conclude()
        if error is None:
            # This rank may have no further point for long.
            self.dispatch.catch_up_in_background()

    def announced_hooks(self) -> AnnouncedHooks:
        """The modules that this rank has hooks on, and their models."""
        return self.models.announced()

    def announced_recording(self) -> PlayedFrom | None:
        """The recording that this rank is played from; None for a live rank."""
        return None

    @property
    def session(self) -> Session:
        """Waits until both jobs have joined."""
        with self.lock:
            return self.dispatch.joined()
