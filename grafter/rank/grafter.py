"""The story of one tensor begins here: what users call, and which calls are points that meet anybody.

dump        tags, direction  ->  no filter matches: its value is returned
            one that matches (matched_points)  ->  key  ->  offer  ->  meetings  ->  meeting
            in a recomputation (backward.repeated_points)  ->  what the forward pass wrote, again
begin       joining, at the first call  ->  entry; early points are made up for once both jobs are there
step        counts up, and takes over what has been changed meanwhile (control)
close       departure
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
from dataclasses import astuple
from typing import Any

import torch

from grafter.capture.attached_models import AttachedModels
from grafter.capture.attachment import Attachment
from grafter.capture.parameters import dump_weights
from grafter.capture.traced import is_being_traced
from grafter.config.control.in_force import TraceVerdict
from grafter.config.direction_filters import DirectionFilters
from grafter.config.options import OptionChooser
from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.announced_models import AnnouncedHooks
from grafter.core.messages.counts import Pending
from grafter.core.messages.roster import PlayedFrom
from grafter.core.points import LOOKED_AT, PHASE, StepCounter, call_site, split_options, surroundings
from grafter.core.sizes import read_size
from grafter.errors import GrafterError, JoinError, RunError
from grafter.rank.peer import start_peer
from grafter.runtime.departure import Departure
from grafter.runtime.early_points import EarlyPoints
from grafter.runtime.entry import Entry
from grafter.runtime.gradients.points import BackwardPoints
from grafter.runtime.matched_points import MatchedPoints
from grafter.runtime.meetings import Meetings
from grafter.runtime.offer import OfferMaker
from grafter.runtime.rank_control import RankControl, TakingOver
from grafter.runtime.rank_status import RankStatus
from grafter.runtime.rank_summary import Tally, set_up_logging
from grafter.runtime.recompute.recompute import Recomputations
from grafter.runtime.recompute.regions import current_recomputation, is_graph_differentiated, scopes
from grafter.runtime.recompute.repeated_points import RepeatedPoints
from grafter.runtime.session import Begun, Session, find_place
from grafter.runtime.trace_judge import TraceJudge
from grafter.store.dumps.rank_dumps import RankDumps
from grafter.wire.outbox.memory import Memory

logger = logging.getLogger("grafter")

# Bound once: each look-up would be a fiftieth of a call that no filter matches.
_graph_task, _scopes = torch._C._current_graph_task_id, scopes.get
_surroundings, _is_plain = surroundings.get, LOOKED_AT.isdisjoint
# So long another thread may be at a point when this rank leaves, before it is asked whether it leaves with an error.
_PATIENCE_SECONDS = 2.0


class Grafter:
    """Grafts the points of one rank. The functions of the package use one that is made from the environment.

    Called by every rank that takes part; `dump` may be called from any thread, one point at a time.
    """

    entry: Entry
    matched: MatchedPoints
    # Whether what the filters choose is saved here.
    saves_points = True
    # What a point's value is taken up with, and what meets the other side.
    offer_maker = OfferMaker
    meeting_maker = Meetings
    # Whether this process has had one.
    is_made = False

    def __init__(self, config: GrafterConfig) -> None:
        Grafter.is_made = True
        self.config = config
        self.steps = StepCounter()
        self.lock = threading.RLock()
        self._tally = Tally()
        self._unmatched = self._tally.unmatched
        # Whether gradients of any point are points.
        self.has_gradients = config.gradients or any(rule.gradients for rule in config.own_rules)
        self.gradients = BackwardPoints(self) if self.has_gradients else None
        if self.has_gradients:
            self.dump_point = self._dump_with_gradients  # type: ignore[method-assign]
        # From the first call on there is a run: joining has begun, or, where points are only dumped, its directory is
        # there.
        self.has_begun = False
        self.options = OptionChooser(config)
        self._place = find_place(config)
        self.rank_status = RankStatus(config, self._place)
        self.offers = self.offer_maker(config, self._place)
        self.models = AttachedModels(self, self._place)
        if config.warm_up:
            self._begin_warm_up()
        self.dumps = RankDumps(config, self._place, self.offers.axes, lambda: self.entry.run_directory())
        self.filters = DirectionFilters(config.filters, self.dumps.filter)
        judge = TraceJudge(self.options, has_gradients=self.has_gradients).judge
        self.control = RankControl(config, self._place, self.steps, judge, saves=self.saves_points)
        begun = Begun(Memory(read_size(config.outbox_bytes)))
        self.entry = Entry(
            config, self._place, self.models, self.control, self.announced_hooks, self._refuse_all,
            lambda: self.matched.make_up_in_background(), begun, start_peer,
        )  # fmt: skip
        self.recomputations = Recomputations(self.steps)
        self.early = EarlyPoints(self._place, self.offers, self.recomputations, begun.outbox)
        self.meetings = self.meeting_maker(
            self._place, self.offers, self.dumps, self.recomputations, self._tally, config.stats,
            bool(config.one_sided_settings),
        )  # fmt: skip
        self.matched = MatchedPoints(
            config, self.lock, self.steps, self.options, self.offers, self.dumps, self.recomputations, self.entry,
            self.early, self.meetings, self.rank_status,
        )  # fmt: skip
        self._repeated = RepeatedPoints(config, self.steps, self.recomputations, self.rank_status)
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
        """`module`: as which module's announcement the point counts, where a hook has taken it."""
        if not self.has_begun:
            self.begin()
        is_plain = _is_plain(arguments)
        if not is_plain:
            split_options(arguments)
        # Asked here, since a call costs as much as the answer: nearly every `dump` is in a plain forward pass.
        if (_graph_task() != -1 or _scopes()) and (recomputation := current_recomputation()) is not None:
            return self._repeated.take(recomputation, name, value, arguments, self.filters)
        around = _surroundings()
        tags = {**around.tags, **arguments} if around.tags else arguments
        tags["name"] = name
        tags["step"] = self.steps.step
        tags["phase"] = PHASE
        filters = self.filters
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
        is_recorded = self.config.record and direction is not None
        saves = is_recorded or (saves and self.dumps.limits.allows_step(self.steps.step))
        if direction is None and not saves:
            return value
        for own in ("name", "step", "phase"):
            del tags[own]
        if is_being_traced():
            return value
        try:
            if os.getpid() != self.rank_status.process_id:
                if direction is None:
                    self.dumps.report_fork(name, call_site())
                    return value
                self.rank_status.refuse_where_impossible(name, call_site())
            with self.lock:
                return self.matched.take(name, value, tags, {**around.options}, direction, saves, module)
        except GrafterError as error:
            # The way through our own files says nothing to the user, unless they debug us.
            if logger.isEnabledFor(logging.DEBUG):
                raise
            if isinstance(error, RunError):
                error.__cause__, error.__context__ = None, None
            raise error.with_traceback(None) from error.__cause__

    def _begin_warm_up(self) -> None:
        """Points are left out until the models are warm: in place of `dump_point`, so that nobody pays for it later."""
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
        """`dump_point` where gradients are points, too. In its place, so that nobody else pays for the question."""
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
        if os.getpid() != self.rank_status.process_id or self.is_warming_up:
            return
        with self.lock:
            if self.gradients is not None:
                self.gradients.pending.end_step(self.entry.session)
            self.dumps.end_step()
            for taking_over in self.control.end_step():
                self._take_over(taking_over)
                self.control.has_taken_over(taking_over)
            if self.meetings.says_steps:
                self._say_step()

    def _say_step(self) -> None:
        """Also where no point of this rank has met anybody yet: others may wait for it."""
        if self.entry.session is None and self.entry.joining is not None and self.entry.joining.is_over:
            with contextlib.suppress(GrafterError):
                self.matched.joined()
        if self.entry.session is not None:
            self.meetings.say_step(self.entry.session, self.steps.step)

    def _take_over(self, coming: TakingOver) -> None:
        """What a change of the run brings, in the first step in which it is in force. May be done twice."""
        if self.filters is not coming.filters:
            coming.filters.continue_from(self.filters)
            self._repeated.remember(self.filters, coming.step)
            self.filters = coming.filters
        self.meetings.stats = coming.in_force.stats
        self.options.take_over(coming.config)
        dumped = coming.in_force.dumped_steps
        self.dumps.take_over(
            coming.config, coming.dump_filter, (dumped.first, dumped.end) if dumped is not None else None
        )

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
        return self._place.who

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
        verdict = self.control.trace(self.filters, name, arguments)
        if verdict.kind == "nothing":
            self._unmatched.setdefault(name, 0)
        return verdict

    def pending(self) -> Pending:
        """What lies in this rank's outbox. See `grafter.pending`."""
        early, session = self.early.pending, self.entry.session
        posted = session.outbox.pending if session is not None else Pending()
        return Pending(*map(sum, zip(astuple(early), astuple(posted), strict=True)))

    def close(self) -> None:
        """Leave the run: say so, delete what is ours, write the summary. Later matched points are refused."""
        rank_status = self.rank_status
        # Before the lock: in a forked child it may belong to a thread that does not exist there.
        if os.getpid() != rank_status.process_id:
            return
        if (
            not self.has_begun
            and rank_status.fault is None
            and not self.config.only_dumps
            and not rank_status.is_closed
        ):
            # No call came: the others wait for this rank to join, and must hear that it leaves.
            self.begin()
        if not self.lock.acquire(timeout=_PATIENCE_SECONDS):
            # Another thread is at a point, which waits for other ranks; Ctrl-C must not.
            rank_status.end_where_interrupted(self.entry.session)
            self.lock.acquire()
        try:
            if rank_status.is_closed:
                return
            rank_status.is_closed = True
            atexit.unregister(self.close)
            self.recomputations.close()
            if self.has_begun:
                Departure(
                    self.config, self._place, rank_status, self.entry, self.models, self.filters, self.dumps,
                    self.gradients, self.early, self.meetings, self._tally,
                ).leave()  # fmt: skip
        finally:
            self.lock.release()

    # The other job.

    def begin(self) -> None:
        """Join the run, where no point has done it yet: what is attached by now is announced."""
        if self.has_begun or os.getpid() != self.rank_status.process_id:
            return
        with self.lock:
            if self.has_begun or self.rank_status.is_closed:
                return
            try:
                self.entry.begin(self.announced_recording())
            except GrafterError as error:
                self.rank_status.fault = error
                raise
            self.has_begun = True

    def announced_hooks(self) -> AnnouncedHooks:
        """The modules that this rank has hooks on, and their models."""
        return self.models.announced()

    def announced_recording(self) -> PlayedFrom | None:
        """What this rank is played from, where it is no live one."""
        return None

    def _refuse_all(self, error: JoinError) -> None:
        """The two jobs do not fit. Ranks whose points match no filter must learn it, too: at their next call."""

        def refuse(tags: Any) -> bool:
            self.rank_status.fault = error
            raise error.with_traceback(None)

        self.filters.matchers = (refuse,)

    @property
    def session(self) -> Session:
        """Waits until both jobs have joined."""
        with self.lock:
            return self.matched.joined()
