"""The story of one tensor: `Grafter.dump`, one named call per step.

tags, direction, key  ->  pairing  ->  plan  ->  exchange  ->  transform  ->  agreement  ->  write-back  ->  ledger
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from grafter.backward.kept_writes import unobserved
from grafter.backward.points import BackwardPoints
from grafter.backward.recompute import Recomputations
from grafter.backward.regions import Recomputation, current_recomputation, is_graph_differentiated, scopes
from grafter.capture.attached_models import AttachedModels
from grafter.capture.attachment import Attachment
from grafter.capture.parameters import dump_weights
from grafter.control.rank_control import RankControl, TakingOver
from grafter.control.traced import Verdict
from grafter.direction import Direction, DirectionFilters, sender_role
from grafter.dumps.limits import read_size
from grafter.dumps.rank_dumps import RankDumps
from grafter.dumps.taken import Taken
from grafter.early_points import EarlyPoints
from grafter.entry import Entry
from grafter.errors import GrafterError, JoinError, PeerLostError, RunError, UsageError
from grafter.farewell import Tally, last_error, say_goodbye, set_up_logging, summarise
from grafter.ledger import LedgerRecord, Outcome
from grafter.meeting import Meeting
from grafter.offer import Offer, OfferMaker
from grafter.offline.recorded_part import RecordedPart
from grafter.options import OptionChooser, PointOptions
from grafter.outbox.counts import Pending
from grafter.outbox.memory import Memory
from grafter.outbox.posting import Posting
from grafter.outbox.states import OutboxPlace
from grafter.pairing.manifest import Header
from grafter.pairing.participants import own_participants
from grafter.points import LOOKED_AT, PHASE, PointKey, StepCounter, call_site, check_tags, split_options, surroundings
from grafter.rendezvous.roster import PlayedFrom, other_role
from grafter.rows.windows import ends_of
from grafter.session import Begun, Session, find_place
from grafter.settings.config import GrafterConfig

logger = logging.getLogger("grafter")

# Bound once: each look-up would be a fiftieth of a call that no filter matches.
_graph_task, _scopes = torch._C._current_graph_task_id, scopes.get
_surroundings, _is_plain = surroundings.get, LOOKED_AT.isdisjoint


class Grafter:
    """Grafts the points of one rank. The functions of the package use one that is made from the environment.

    Called by every rank that takes part; `dump` may be called from any thread, one point at a time.
    """

    # Whether what the filters choose is saved here.
    saves_points = True

    def __init__(self, config: GrafterConfig) -> None:
        self.config = config
        self.steps = StepCounter()
        self.lock = threading.RLock()
        self._tally = Tally()
        self._unmatched = self._tally.unmatched
        self._sequence = 0
        wanted = config.gradients or any(rule.gradients for rule in config.own_rules)
        self.gradients = BackwardPoints(self) if wanted else None
        if wanted:
            self.dump_point = self._dump_with_gradients  # type: ignore[method-assign]
        # From the first call on there is a run: joining has begun, or, where points are only dumped, its directory is
        # there.
        self._has_begun = False
        self._detached: str | None = None
        self._closed = False
        self._fault: BaseException | None = None
        self._process_id = os.getpid()
        self.options = OptionChooser(config)
        self._place = find_place(config)
        self.offers = OfferMaker(config, self._place)
        self.models = AttachedModels(self, self._place)
        self.dumps = RankDumps(config, self._place, self.offers.axes, lambda: self.entry.run_directory())
        self.filters = DirectionFilters(config.filters, self.dumps.choice)
        self.stats = config.stats
        # Filters of earlier steps, with the step before which each was in force: a recomputation may ask for them.
        self._past_filters: deque[tuple[int, DirectionFilters]] = deque(maxlen=8)
        self.control = RankControl(config, self._place, self.steps, self._judge_traced, saves=self.saves_points)
        begun = Begun(Memory(read_size(config.outbox_bytes)))
        self.early = EarlyPoints(self._place, self.offers, begun.outbox)
        self.entry = Entry(
            config, self._place, self.models, self.control, self.announced_modules, self._refuse_all,
            self._make_up_in_background, begun,
        )  # fmt: skip
        self.recomputations = Recomputations(self.steps)
        set_up_logging(config.log_level)
        atexit.register(self.close)

    # What users call.

    def dump(self, name: str, value: Any, /, **arguments: Any) -> Any:
        """One point. See `grafter.dump`."""
        return self.dump_point(name, value, arguments)

    def dump_point(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        """`module`: as which module's announcement the point counts, where a hook has taken it."""
        if not self._has_begun:
            self._start_joining()
        is_plain = _is_plain(arguments)
        if not is_plain:
            split_options(arguments)
        # Asked here, since a call costs as much as the answer: nearly every `dump` is in a plain forward pass.
        if (_graph_task() != -1 or _scopes()) and (recomputation := current_recomputation()) is not None:
            return self._dump_again(recomputation, name, value, arguments)
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
        try:
            if os.getpid() != self._process_id:
                if direction is None:
                    self.dumps.tell_fork(name, call_site())
                    return value
                self._refuse_where_impossible(name, call_site())
            with self.lock:
                return self._graft(name, value, tags, {**around.options}, direction, saves, module)
        except GrafterError as error:
            # The way through our own files says nothing to the user, unless they debug us.
            if logger.isEnabledFor(logging.DEBUG):
                raise
            if isinstance(error, RunError):
                error.__cause__, error.__context__ = None, None
            raise error.with_traceback(None) from error.__cause__

    def _dump_again(self, recomputation: Recomputation, name: str, value: Any, arguments: dict[str, Any]) -> Any:
        """A point that fires again: it meets nobody, and writes what it wrote in the forward pass."""
        own, _ = split_options(arguments)
        check_tags(own)
        kept = recomputation.next_kept(self.steps, name, own, self.config.key_tags)
        if kept is not None:
            if callable(value) and not isinstance(value, torch.Tensor):
                value = value()
            self.recomputations.keep_entry(kept)
            recomputation.has_cut |= kept.is_cut
            return kept.write_again(value)
        step = recomputation.step_of(self.steps)
        tags = {**surroundings.get().tags, **own, "name": name, "step": step, "phase": PHASE}
        if self._detached is None and self._filters_of(step).direction_of(tags) is not None:
            raise UsageError(recomputation.why_unknown(name, call_site()))
        return value

    def _dump_with_gradients(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        """`dump_point` where gradients are points, too. In its place, so that nobody else pays for the question."""
        given = dict(arguments)
        value = Grafter.dump_point(self, name, value, arguments, module)
        differentiated = is_graph_differentiated() if torch.is_grad_enabled() else self.recomputations.lead_to_graph()
        if self.gradients is not None and differentiated:
            self.gradients.watch(name, value, given, module)
        return value

    def step(self) -> None:
        """The end of an iteration: the step counts up, occurrences start at 0 again."""
        if not self._has_begun:
            self._start_joining()
        if os.getpid() != self._process_id:
            return
        with self.lock:
            if self.gradients is not None:
                self.gradients.pending.end_step(self.entry.session)
            self.dumps.end_step()
            for taking_over in self.control.end_step():
                self._take_over(taking_over)
                self.control.has_taken_over(taking_over)

    def _take_over(self, coming: TakingOver) -> None:
        """What a change of the run brings, in the first step in which it is in force. May be done twice."""
        if self.filters is not coming.filters:
            coming.filters.continue_from(self.filters)
            self._past_filters.append((coming.step, self.filters))
            self.filters = coming.filters
        self.stats = coming.in_force.stats
        self.options.take_over(coming.config)
        dumped = coming.in_force.dumped_steps
        self.dumps.take_over(coming.config, coming.choice, (dumped.first, dumped.end) if dumped is not None else None)

    def _filters_of(self, step: int) -> DirectionFilters:
        for before, filters in self._past_filters:
            if step < before:
                return filters
        return self.filters

    def attach(
        self,
        model: torch.nn.Module,
        patterns: tuple[str, ...],
        *,
        inputs: bool = True,
        outputs: bool = True,
    ) -> Attachment:
        """Hooks on a model's modules. See `grafter.attach`."""
        return self.models.attach(model, patterns, inputs=inputs, outputs=outputs)

    def begin(self) -> None:
        """Join the run, where no point has done it yet: what is attached by now is announced."""
        if not self._has_begun:
            self._start_joining()

    @property
    def has_begun(self) -> bool:
        """Whether there is a run: joining has begun, or points are only dumped."""
        return self._has_begun

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

    def compiled_verdict(self, name: str, arguments: dict[str, Any]) -> Literal["operator", "break", "nothing"]:
        """How a point in code that is being compiled is taken.

        An operator where nothing needs to be written into the value's memory; else the call breaks the graph. Nothing,
        where no filter can ever match.
        """
        verdict = self.control.trace(self.filters, name, arguments)
        if verdict.kind == "nothing":
            self._unmatched.setdefault(name, 0)
        return verdict.kind

    def is_only_compared(self, name: str, arguments: dict[str, Any]) -> bool:
        """Whether no filter can ever graft a point."""
        return self.control.trace(self.filters, name, arguments).only_compares

    def _judge_traced(self, filters: Sequence[DirectionFilters], name: str, arguments: dict[str, Any]) -> Verdict:
        """The verdict where any of these filters may match; also called on the housekeeping thread."""
        tags, given = split_options(arguments)
        named = {**tags, "save": given.pop("save", None), "name": name, "phase": PHASE}
        possible = {found for each in filters for found in each.could_match(named)}
        options = self.options.options_of(name, given)
        if not possible and not (self.gradients is not None and options.gradients):
            return Verdict("nothing", only_compares=True)
        if possible <= {"compare", "dump"}:
            return Verdict("operator", only_compares=True)
        # Whether a gradient is cut off depends on what matches, which is settled at each call.
        breaks = options.write == "in_place" or options.gradient == "cut"
        return Verdict("break" if breaks else "operator", only_compares=False)

    @property
    def has_gradients(self) -> bool:
        """Whether gradients of any point are points."""
        return self.gradients is not None

    def close(self) -> None:
        """Leave the run: say so, delete what is ours, write the summary. Later matched points are refused."""
        # Before the lock: in a forked child it may belong to a thread that does not exist there.
        if os.getpid() != self._process_id:
            return
        if not self._has_begun and self.models.attachments and self._fault is None:
            # No call reached a hook: the others wait for this rank to join, and must hear that it leaves.
            self._start_joining()
        with self.lock:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            self.recomputations.close()
            if not self._has_begun:
                return
            error = last_error(self._fault)
            # First: whatever keeps this rank from leaving, what it dumped is on disk.
            self.dumps.flush()
            session = self.entry.finished(patient=error is None)
            try:
                if self.gradients is not None and error is None and (session is not None or self.config.only_dumps):
                    self.gradients.pending.end_step(session)
            finally:
                self._tally.dumps.update(self.dumps.close())
                self._tally.left_out.update(self.dumps.limits.left_out)
            self._end_early(session, is_orderly=error is None)
            if session is not None:
                session.outbox.close(session.client)
                self._tally.replace_posted(session.outbox.settled)
            summary = summarise(
                self._place, session.roster if session is not None else None, self._tally, self.filters,
                self.models.attachments, self._detached, error, only_dumps=self.config.only_dumps,
            )  # fmt: skip
            role_directory = self.entry.write_last(session, summary)
            if session is not None:
                session.close(
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" if error else ""
                )
            self.entry.close()
            say_goodbye(self._place, self._tally, self.filters, role_directory, only_dumps=self.config.only_dumps)

    # The steps before the other side is met.

    def _start_joining(self) -> None:
        if os.getpid() != self._process_id:
            return
        with self.lock:
            if self._has_begun or self._closed:
                return
            try:
                self.entry.begin(self.announced_recording())
            except GrafterError as error:
                self._fault = error
                raise
            self._has_begun = True

    def announced_modules(self) -> tuple[str, ...] | None:
        """The modules that this rank has hooks on; None where it has none attached."""
        return self.models.announced()

    def announced_recording(self) -> PlayedFrom | None:
        """What this rank is played from, where it is no live one."""
        return None

    def _refuse_all(self, error: JoinError) -> None:
        """The two jobs do not fit. Ranks whose points match no filter must learn it, too: at their next call."""

        def refuse(tags: Any) -> bool:
            self._fault = error
            raise error.with_traceback(None)

        self.filters.matchers = (refuse,)

    def _graft(
        self,
        name: str,
        value: Any,
        arguments: dict[str, Any],
        around: dict[str, Any],
        direction: Direction | None,
        saves: bool,
        module: str | None,
    ) -> Any:
        site = call_site()
        self._refuse_where_impossible(name, site)
        tags, given = split_options(arguments)
        check_tags(tags)
        if self._detached is not None:
            direction = None
            if not saves:
                return value
        given.pop("save", None)
        options = self.options.options_of(name, {**around, **given})
        try:
            if direction is None:
                return self._save(name, value, tags, options, site, module)
            if self.config.records_alone:
                return self._record(name, value, tags, options, site, direction, module)
            is_early = options.wait == "job" and self.entry.is_waiting
            session = self.joined() if not is_early else None
            key = self.steps.next_key({**tags, "name": name}, self.config.key_tags)
            if module is not None and session is not None:
                options, missing = self.among_holders(session, module, options)
                if missing is not None:
                    self.record_skipped(session, key, direction, tags, site, missing)
                    if saves:
                        offer = self.offers.take_up(value, options, key)
                        part = self.recorded_part(offer, options, direction, site, module)
                        taken = self.dumps.take(key, direction, offer.value, options, tags, site, part)
                        self.dumps.finish(taken, "skipped", reason=missing)
                    self.recomputations.keep_nothing(key)
                    return value
            offer = self.offers.take_up(value, options, key)
            taken = self._take(key, offer, options, tags, site, direction, module) if saves else None
            if session is None:
                grafted = offer.value
                self.dumps.finish(taken, self.defer(key, direction, offer, options, tags, site, module))
            else:
                grafted = self.meet(session, key, direction, offer, options, tags, site, taken)
        except RunError as error:
            return self.end_run(error, value)
        except BaseException as error:
            self._fault = error
            raise
        if offer.failure is not None:
            raise offer.failure
        return grafted if offer.leaves is not None else offer.value

    def _take(
        self,
        key: PointKey,
        offer: Offer,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
        direction: Direction,
        module: str | None,
    ) -> Taken | None:
        """What is saved of a point that is grafted or compared, as it is now."""
        part = self.recorded_part(offer, options, direction, site, module)
        starts = offer.tokens.starts if offer.tokens is not None else ()
        return self.dumps.take(key, direction, offer.value, options, tags, site, part, starts)

    def defer(
        self,
        key: PointKey,
        direction: Direction,
        offer: Offer,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
        module: str | None,
    ) -> Outcome:
        """Keep a point until both jobs have joined: `posted` or `missed`."""
        own_participants(self._place, options.ranks)
        with unobserved():
            outcome = self.early.add(key, direction, offer, options, tags, site, module)
        if key.phase == PHASE:
            self.recomputations.keep(key, options, None, None)
        return outcome

    def _make_up(self, session: Session) -> None:
        """The points that came before both jobs had joined, in their order."""
        while (point := self.early.next()) is not None:
            options, missing = point.options, None
            if point.module is not None:
                options, missing = self.among_holders(session, point.module, options)
            if missing is not None:
                self.early.give_up(point)
                self.record_skipped(session, point.key, point.direction, point.tags, point.header.call_site, missing)
                continue
            self._sequence += 1
            with unobserved():
                outcome = point.hold(session, own_participants(self._place, options.ranks), self._sequence)
            self._tally.outcomes[outcome] += 1
            session.housekeeping.board.last_points.append((point.key, outcome))

    def _make_up_in_background(self) -> None:
        """As soon as both jobs have joined: this rank may have no further point for long."""
        with self.lock:
            if self._closed or not self.early.points:
                return
            try:
                self.joined()
            except RunError as error:
                # The next point raises it, too.
                with contextlib.suppress(RunError):
                    self.end_run(error, None)
            except BaseException as error:
                self._fault = error
                logger.exception("grafter: %s could not make up for its first points", self._place.who)

    def _end_early(self, session: Session | None, *, is_orderly: bool) -> None:
        """This rank leaves: what came before both jobs had joined is made up for now, or never."""
        if session is not None and is_orderly:
            with contextlib.suppress(RunError):
                self._make_up(session)
        self.early.give_up_all()
        self._tally.outcomes.update(self.early.forgotten)
        if session is None:
            self.early.memory.release()

    def joined(self) -> Session:
        """Waits until both jobs have joined. Raises what kept them from it, and what ended the run."""
        session = self.entry.session or self.entry.joined()
        if self.early.points:
            self._make_up(session)
        return session

    def _save(
        self, name: str, value: Any, tags: dict[str, Any], options: PointOptions, site: str, module: str | None
    ) -> Any:
        """A point that meets nobody. What `dump` returns: the value, made if it is a function."""
        key = self.steps.next_key({**tags, "name": name}, self.config.key_tags)
        if callable(value) and not isinstance(value, torch.Tensor):
            value = value()
        if module is not None and not self.config.only_dumps:
            options, _ = self.among_holders(self.joined(), module, options)
        starts: tuple[int, ...] = ()
        if options.has_window:
            announced = self.offers.windows.announce(options, key)
            starts = announced.starts if announced is not None else ()
        self.dumps.finish(self.dumps.take(key, None, value, options, tags, site, starts=starts))
        if options.new_rows_only:
            self.offers.windows.advance(key, ends_of(options.tokens))
        return value

    def _record(
        self,
        name: str,
        value: Any,
        tags: dict[str, Any],
        options: PointOptions,
        site: str,
        direction: Direction,
        module: str | None,
    ) -> Any:
        """A point that is kept for a later graft, as it would have met the other side. What `dump` returns."""
        key = self.steps.next_key({**tags, "name": name}, self.config.key_tags)
        offer = self.offers.take_up(value, options, key)
        part = self.recorded_part(offer, options, direction, site, module)
        self.dumps.finish(self.dumps.take(key, direction, offer.value, options, tags, site, part))
        self.recomputations.keep_nothing(key)
        if offer.failure is not None:
            raise offer.failure
        return offer.value

    def recorded_part(
        self,
        offer: Offer,
        options: PointOptions,
        direction: Direction,
        site: str,
        module: str | None,
        is_parameter: bool = False,
    ) -> str | None:
        """What a recording keeps of this rank's part of a point besides its values; None where nothing is recorded."""
        if not self.config.record:
            return None
        header = self.offers.describe(None, offer, options, direction, site, recorded=True)
        part = RecordedPart(
            header=header, module=module, is_parameter=is_parameter, new_rows_only=bool(options.new_rows_only)
        )
        return part.model_dump_json(exclude_defaults=True)

    @property
    def session(self) -> Session:
        """Waits until both jobs have joined."""
        return self.joined()

    @property
    def is_waiting(self) -> bool:
        """Whether the other job has not joined yet."""
        return self.entry.is_waiting

    @property
    def is_detached(self) -> bool:
        """Whether the other job was lost and this one goes on ungrafted."""
        return self._detached is not None

    def meet(
        self,
        session: Session,
        key: PointKey,
        direction: Direction,
        offer: Offer,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
        taken: Taken | None = None,
    ) -> Any:
        """Meet the other side at one point; what `dump` returns. taken: the point as it is saved, where it is."""
        named = {**tags, "name": key.name, "step": key.step, "phase": key.phase}
        self._sequence += 1
        if options.wait == "job" and session.place.role == sender_role(direction):
            return self._post(Posting(session, key, direction, named), offer, options, site, taken)
        header = self.offers.describe(session, offer, options, direction, site)
        meeting = Meeting(session, key, direction, header, options, named)
        try:
            with unobserved():
                grafted, outcome = meeting.hold(offer.leaves, offer.extras, self.stats, self._sequence)
        except BaseException as error:
            self.dumps.finish_failed(taken, error)
            raise
        self.dumps.finish(taken, outcome, grafted)
        if options.new_rows_only and meeting.rows is not None and outcome in ("grafted", "compared", "sent"):
            self.offers.windows.advance(key, meeting.rows.reached(header))
        if key.phase == PHASE:
            self.recomputations.keep(key, options, offer.leaves if outcome == "grafted" else None, grafted)
        self._tally.outcomes[outcome] += 1
        session.housekeeping.board.last_points.append((key, outcome))
        return grafted

    def _post(self, posting: Posting, offer: Offer, options: PointOptions, site: str, taken: Taken | None) -> Any:
        """The part of a sender that does not wait; what `dump` returns: the value."""

        def describe(told: Offer, place: OutboxPlace | None) -> Header:
            return self.offers.describe(posting.session, told, options, posting.direction, site, place)

        try:
            with unobserved():
                outcome = posting.hold(offer, describe, self._sequence)
        except BaseException as error:
            self.dumps.finish_failed(taken, error)
            raise
        self.dumps.finish(taken, outcome)
        if posting.key.phase == PHASE:
            self.recomputations.keep(posting.key, options, None, None)
        self._tally.outcomes[outcome] += 1
        posting.session.housekeeping.board.last_points.append((posting.key, outcome))
        return offer.value

    def pending(self) -> Pending:
        """What lies in this rank's outbox. See `grafter.pending`."""
        if self.entry.session is None or self.early.points:
            return self.early.pending
        return self.entry.session.outbox.pending

    def among_holders(self, session: Session, module: str, options: PointOptions) -> tuple[PointOptions, str | None]:
        """The participants are the ranks that have the module; and why the point is skipped, if that is so."""
        place, roster = session.place, session.roster
        own = roster.ranks_with(place.role, module)
        other = roster.ranks_with(other_role(place.role), module)
        if not own or other is None:
            return options, None
        if not other:
            return options, f"no rank of the {other_role(place.role)} has a module of this name"
        if options.ranks is None and len(own) < place.role_world_size:
            options = replace(options, ranks=own)
        return options, None

    def record_skipped(
        self, session: Session, key: PointKey, direction: Direction, tags: dict[str, Any], site: str, reason: str
    ) -> None:
        """A point that cannot meet anybody is in the ledger, too."""
        self._sequence += 1
        self._tally.outcomes["skipped"] += 1
        session.write_line(
            LedgerRecord(
                sequence=self._sequence, time=time.time(), name=key.name, tags=tags, step=key.step, phase=key.phase,
                occurrence=key.occurrence, direction=direction, role=session.place.role,
                role_rank=session.place.role_rank, outcome="skipped", reason=reason, call_site=site, participants={},
            )
        )  # fmt: skip

    def _refuse_where_impossible(self, name: str, site: str) -> None:
        if os.getpid() != self._process_id:
            raise UsageError(
                f"the point {name!r} at {site} is in a process that was forked from {self._place.who} (a data loader's "
                f"worker?). Only the process that joined can graft; dump in it, or start the child with spawn."
            )
        if self._closed:
            raise UsageError(f"the point {name!r} at {site} comes after grafter.close().")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise UsageError(
                f"the point {name!r} at {site} is in a CUDA graph capture, where nothing can be read or exchanged: the "
                f"replay would repeat the capture's values. Run this part without CUDA graphs (eager, or "
                f"`mode='default'` for torch.compile) while grafting."
            )

    # The steps after.

    def end_run(self, error: RunError, value: Any) -> Any:
        """The run is over: every rank of both jobs must hear of it, and raise the same."""
        if self.entry.session is not None:
            housekeeping = self.entry.session.housekeeping
            if isinstance(error, PeerLostError):
                error = housekeeping.fuller_story(error)
            elif housekeeping.aborted is None:
                error = housekeeping.abort(error, self.entry.session.client)
        self._fault = error
        if not isinstance(error, PeerLostError) or self.config.on_peer_loss == "raise":
            raise error
        self._detached = str(error)
        logger.warning("grafter: %s goes on ungrafted from here (on_peer_loss=detach): %s", self._place.who, error)
        return value
