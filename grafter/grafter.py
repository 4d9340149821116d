"""The story of one tensor: `Grafter.dump`, one named call per step.

tags, direction, key  ->  pairing  ->  plan  ->  exchange  ->  transform  ->  agreement  ->  write-back  ->  ledger
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from grafter.capture.adapters import mesh_axes
from grafter.capture.attachment import Attachment
from grafter.capture.module_tree import write_module_trees
from grafter.capture.naming import Naming
from grafter.capture.parameter_gradients import watch_gradients
from grafter.capture.parameters import dump_weights
from grafter.capture.selection import read_patterns
from grafter.config import GrafterConfig
from grafter.direction import Direction, DirectionFilters
from grafter.errors import GrafterError, JoinError, PeerLostError, RunError, UsageError
from grafter.gradients import PHASE as BACKWARD
from grafter.gradients import GradientPoints, WatchedGradient
from grafter.kept_writes import unobserved
from grafter.layout.axes import axes_of_job, set_axes
from grafter.ledger import LedgerRecord, RankSummary
from grafter.meeting import Meeting
from grafter.names import PointName
from grafter.offer import Offer, OfferMaker
from grafter.options import OptionChooser, PointOptions
from grafter.participants import own_participants
from grafter.points import OWN_TAGS, PHASE, PointKey, StepCounter, call_site, check_tags, split_options, surroundings
from grafter.recompute import Recomputations
from grafter.regions import Recomputation, current_recomputation, is_graph_differentiated, scopes
from grafter.roster import other_role
from grafter.session import Joining, Session, find_place

logger = logging.getLogger("grafter")

_graph_task, _scopes = torch._C._current_graph_task_id, scopes.get


class Grafter:
    """Grafts the points of one rank. The functions of the package use one that is made from the environment.

    Called by every rank that takes part; `dump` may be called from any thread, one point at a time.
    """

    def __init__(self, config: GrafterConfig) -> None:
        self.config = config
        self._filters = DirectionFilters(config.filters)
        self._steps = StepCounter()
        self.lock = threading.RLock()
        # Counting in it costs a third of what it costs in a Counter.
        self._unmatched: defaultdict[str, int] = defaultdict(int)
        self._outcomes: Counter[str] = Counter()
        self._sequence = 0
        self._naming = Naming(config.names, config.role)
        self._attachments: list[Attachment] = []
        wanted = config.gradients or any(rule.gradients for rule in config.own_rules)
        self._gradients = GradientPoints(self) if wanted else None
        if wanted:
            self.dump_point = self._dump_with_gradients  # type: ignore[method-assign]
        # Where a hook can hand on another tensor, nothing needs to be written into the model's memory.
        self._hook_write = {} if "write" in config.model_fields_set else {"write": "return"}
        self._joining: Joining | None = None
        self._session: Session | None = None
        self._detached: str | None = None
        self._closed = False
        self._fault: BaseException | None = None
        self._process_id = os.getpid()
        self._options = OptionChooser(config)
        self._place = find_place(config)
        self._offers = OfferMaker(config, self._place)
        self._recomputations = Recomputations(self._steps)
        _set_up_logging(config.log_level)
        atexit.register(self.close)

    # What users call.

    def dump(self, name: str, value: Any, /, **arguments: Any) -> Any:
        """One point. See `grafter.dump`."""
        return self.dump_point(name, value, arguments)

    def dump_point(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        """`module`: as which module's announcement the point counts, where a hook has taken it."""
        if self._joining is None:
            self._start_joining()
        if not OWN_TAGS.isdisjoint(arguments):
            split_options(arguments)
        # Asked here, since a call costs as much as the answer: nearly every `dump` is in a plain forward pass.
        if (_graph_task() != -1 or _scopes()) and (recomputation := current_recomputation()) is not None:
            return self._dump_again(recomputation, name, value, arguments)
        around = surroundings.get()
        tags = {**around.tags, **arguments} if around.tags else arguments
        tags["name"] = name
        tags["step"] = self._steps.step
        tags["phase"] = PHASE
        filters = self._filters
        if filters.unseen_tags:
            filters.unseen_tags -= tags.keys()
        for matches in filters.matchers:
            if matches(tags):
                break
        else:
            self._unmatched[name] += 1
            return value
        direction = filters.direction_of(tags)
        assert direction is not None
        for own in ("name", "step", "phase"):
            del tags[own]
        try:
            if os.getpid() != self._process_id:
                self._refuse_where_impossible(name, call_site())
            with self.lock:
                return self._graft(name, value, tags, {**around.options}, direction, module)
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
        kept = recomputation.next_kept(self._steps, name, own, self.config.key_tags)
        if kept is not None:
            if callable(value) and not isinstance(value, torch.Tensor):
                value = value()
            self._recomputations.keep_entry(kept)
            recomputation.has_cut |= kept.is_cut
            return kept.write_again(value)
        step = recomputation.step_of(self._steps)
        tags = {**surroundings.get().tags, **own, "name": name, "step": step, "phase": PHASE}
        if self._detached is None and self._filters.direction_of(tags) is not None:
            raise UsageError(recomputation.why_unknown(name, call_site()))
        return value

    def _dump_with_gradients(self, name: str, value: Any, arguments: dict[str, Any], module: str | None = None) -> Any:
        """`dump_point` where gradients are points, too. In its place, so that nobody else pays for the question."""
        given = dict(arguments)
        value = Grafter.dump_point(self, name, value, arguments, module)
        differentiated = is_graph_differentiated() if torch.is_grad_enabled() else self._recomputations.lead_to_graph()
        if self._gradients is not None and differentiated:
            self._watch_gradients(self._gradients, name, value, given, module)
        return value

    def step(self) -> None:
        """The end of an iteration: the step counts up, occurrences start at 0 again."""
        if self._joining is None:
            self._start_joining()
        if os.getpid() != self._process_id:
            return
        with self.lock:
            if self._gradients is not None:
                self._gradients.end_step(self._session)
            self._steps.next_step()

    def attach(
        self, model: torch.nn.Module, patterns: tuple[str, ...], *, inputs: bool = True, outputs: bool = True
    ) -> Attachment:
        """Hooks on a model's modules. See `grafter.attach`."""
        selected = read_patterns(patterns or ((self.config.attach,) if self.config.attach else ()))
        attachment = Attachment(model, selected, self._naming, self._offer_hooked, inputs=inputs, outputs=outputs)
        if not attachment.points:
            logger.warning("grafter: %s: no module of %s matches %s", self._place.who, type(model).__name__, patterns)
        if self._gradients is not None:
            paths = [points.path for points in attachment.points]
            attachment.keep(watch_gradients(model, paths, self._naming, self._gradients.parameter_came))
        if self._joining is not None:
            logger.warning(
                "grafter: %s: this attach comes after the first point, so the names of its modules are not compared",
                self._place.who,
            )
        if self.config.axes is None and not axes_of_job():
            set_axes(**mesh_axes(model))
        # What is attached until the first point is announced together, so that is when joining begins.
        self._attachments.append(attachment)
        return attachment

    def dump_model(self, model: torch.nn.Module) -> int:
        """All weights as points. See `grafter.dump_model`."""
        # Weights are leaves, where `cut` is refused, and a value that is returned would change nothing.
        given = {"write": "in_place", "gradient": "straight_through"}
        # Not `self.dump_point`, which would watch for the weights' gradients: those are points of their own.
        return dump_weights(
            model,
            self._naming,
            lambda name, tensor: Grafter.dump_point(self, name.name, tensor, {**given, **name.tags}),
        )

    def _offer_hooked(self, name: PointName, module: str, tensor: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.dump_point(name.name, tensor, {**self._hook_write, **name.tags}, module)
        return value

    def compiled_verdict(self, name: str, arguments: dict[str, Any]) -> Literal["operator", "break", "nothing"]:
        """How a point in code that is being compiled is taken.

        An operator where nothing needs to be written into the value's memory; else the call breaks the graph. Nothing,
        where no filter can ever match.
        """
        tags, given = split_options(arguments)
        possible = self._filters.could_match({**tags, "name": name, "phase": PHASE})
        options = self._options.options_of(name, given)
        if not possible and not (self.has_gradients and options.gradients):
            self._unmatched.setdefault(name, 0)
            return "nothing"
        return "break" if options.write == "in_place" and not possible <= {"compare"} else "operator"

    def is_only_compared(self, name: str, arguments: dict[str, Any]) -> bool:
        """Whether no filter can ever graft a point."""
        tags, _ = split_options(arguments)
        return self._filters.could_match({**tags, "name": name, "phase": PHASE}) <= {"compare"}

    @property
    def has_gradients(self) -> bool:
        """Whether gradients of any point are points."""
        return self._gradients is not None

    def expect_gradient(self, name: str, arguments: dict[str, Any]) -> WatchedGradient | None:
        """Of a point in compiled code, which tells by itself when its gradient comes."""
        assert self._gradients is not None
        with self.lock:
            watched: WatchedGradient | None = self._gradient_register(name, arguments, None)("")
            if watched is not None:
                self._gradients.watched[watched.key.digest] = watched
            return watched

    def gradient_came(self, watched: WatchedGradient, gradient: torch.Tensor) -> torch.Tensor | None:
        """What takes its place; None: it stays as it is."""
        assert self._gradients is not None
        with self.lock, torch.no_grad():
            return self._gradients.came(watched, gradient)

    def close(self) -> None:
        """Leave the run: say so, delete what is ours, write the summary. Later matched points are refused."""
        # Before the lock: in a forked child it may belong to a thread that does not exist there.
        if os.getpid() != self._process_id:
            return
        if self._joining is None and self._attachments:
            # No call reached a hook: the others wait for this rank to join, and must hear that it leaves.
            self._start_joining()
        with self.lock:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            self._recomputations.close()
            if self._joining is None:
                return
            error = _last_error(self._fault)
            session = self._session or self._joining.finished(patient=error is None)
            if self._gradients is not None and session is not None and error is None:
                self._gradients.end_step(session)
            if session is not None:
                try:
                    session.ledger.write_summary(self._summary(session, error))
                except OSError as failure:
                    logger.error("grafter: the summary of %s cannot be written: %s", self._place.who, failure)
                self._write_module_trees(session)
                session.close(
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" if error else ""
                )
            self._say_goodbye()

    # The steps before the other side is met.

    def _start_joining(self) -> None:
        if os.getpid() != self._process_id:
            return
        with self.lock:
            if self._joining is None and not self._closed:
                modules = tuple(key for attachment in self._attachments for key in attachment.keys)
                self._joining = Joining(self.config, self._refuse_all, modules if self._attachments else None)

    def _refuse_all(self, error: JoinError) -> None:
        """The two jobs do not fit. Ranks whose points match no filter must learn it, too: at their next call."""

        def refuse(tags: Any) -> bool:
            self._fault = error
            raise error.with_traceback(None)

        self._filters.matchers = (refuse,)

    def _graft(
        self,
        name: str,
        value: Any,
        arguments: dict[str, Any],
        around: dict[str, Any],
        direction: Direction,
        module: str | None,
    ) -> Any:
        site = call_site()
        self._refuse_where_impossible(name, site)
        tags, given = split_options(arguments)
        check_tags(tags)
        if self._detached is not None:
            return value
        options = self._options.options_of(name, {**around, **given})
        try:
            session = self._joined()
            key = self._steps.next_key({**tags, "name": name}, self.config.key_tags)
            if module is not None:
                options, missing = self._among_holders(session, module, options)
                if missing is not None:
                    self._skip(session, key, direction, tags, site, missing)
                    self._recomputations.keep_nothing(key)
                    return value
            offer = self._offers.take_up(value, options)
            grafted = self._meet(session, key, direction, offer, options, tags, site)
        except RunError as error:
            return self._end_run(error, value)
        except BaseException as error:
            self._fault = error
            raise
        if offer.failure is not None:
            raise offer.failure
        return grafted if offer.leaves is not None else offer.value

    # Gradients, whose points are settled in the forward pass.

    def _watch_gradients(
        self, gradients: GradientPoints, name: str, value: Any, arguments: dict[str, Any], module: str | None
    ) -> None:
        register = self._gradient_register(name, arguments, module)
        with self.lock:
            if torch.is_grad_enabled():
                gradients.watch(value, register)
            else:
                self._recomputations.keep_gradients(value, register)

    def _gradient_register(
        self, name: str, arguments: dict[str, Any], module: str | None
    ) -> Callable[[str], WatchedGradient | None]:
        """Of the path of a tensor in the point's value: its gradient's point, where a filter matches that."""
        around = surroundings.get()
        own, _ = split_options(arguments)
        tags, given = split_options({**around.tags, **arguments})
        given = {option: told for option, told in {**around.options, **given}.items() if option != "extras"}

        def register(path: str) -> WatchedGradient | None:
            point = name + path
            recomputation = current_recomputation()
            if recomputation is not None:
                # Its place in the order of the program is that of the forward pass.
                known: WatchedGradient | None = recomputation.next_kept(
                    self._steps, point, own, self.config.key_tags, BACKWARD
                )
                return known
            full = {**tags, "name": point, "step": self._steps.step, "phase": BACKWARD}
            direction = self._filters.direction_of(full)
            if direction is None:
                return None
            options = self._options.options_of(point, given)
            if not options.gradients:
                return None
            check_tags(tags)
            key = self._steps.next_key({**tags, "name": point}, self.config.key_tags, BACKWARD)
            options = replace(options, write="return", gradient="straight_through")
            return WatchedGradient(key, direction, dict(tags), options, call_site(), module)

        return register

    @property
    def session(self) -> Session:
        return self._joined()

    def dump_gradient(self, name: PointName, gradient: torch.Tensor) -> None:
        """The gradient of a parameter as a point: both sides come to it in the order of names, and wait."""
        full = {**name.tags, "name": name.name, "step": self._steps.step, "phase": BACKWARD}
        direction = self._filters.direction_of(full)
        options = self._options.options_of(name.name, {})
        if direction is None or not options.gradients:
            return
        key = self._steps.next_key({**name.tags, "name": name.name}, self.config.key_tags, BACKWARD)
        options = replace(options, write="in_place", gradient="straight_through")
        watched = WatchedGradient(key, direction, dict(name.tags), options, f"the parameter {name.name}")
        self.meet_gradient(self.session, watched, gradient)

    def participants_of(self, session: Session, watched: WatchedGradient) -> tuple[int, ...]:
        """Role ranks of this side."""
        options = watched.options
        if watched.module is not None:
            options, _ = self._among_holders(session, watched.module, options)
        return own_participants(session.place, options.ranks)

    def skip(self, session: Session, watched: WatchedGradient, reason: str) -> None:
        """A gradient that meets nobody is in the ledger, too."""
        self._skip(session, watched.key, watched.direction, watched.tags, watched.call_site, reason)

    def meet_gradient(
        self, session: Session, watched: WatchedGradient, gradient: torch.Tensor | None
    ) -> torch.Tensor | None:
        """One point of phase backward; what takes the gradient's place, if something does. None offers nothing."""
        if self._detached is not None:
            return None
        options = watched.options
        try:
            if watched.module is not None:
                options, missing = self._among_holders(session, watched.module, options)
                if missing is not None:
                    self.skip(session, watched, missing)
                    return None
            offer = self._offers.take_up(gradient, options)
            if gradient is None:
                offer = Offer(None, nothing="no gradient came to this point")
            grafted = self._meet(
                session, watched.key, watched.direction, offer, options, watched.tags, watched.call_site
            )
        except RunError as error:
            return self._end_run(error, None)  # type: ignore[no-any-return]
        if offer.failure is not None:
            raise offer.failure
        return grafted if grafted is not None and grafted is not gradient else None

    def _meet(
        self,
        session: Session,
        key: PointKey,
        direction: Direction,
        offer: Offer,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
    ) -> Any:
        """Meet the other side at one point; what `dump` returns."""
        header = self._offers.describe(session, offer, options, direction, site)
        named = {**tags, "name": key.name, "step": key.step, "phase": key.phase}
        self._sequence += 1
        meeting = Meeting(session, key, direction, header, options, named)
        with unobserved():
            grafted, outcome = meeting.hold(offer.leaves, offer.extras, self.config.stats, self._sequence)
        if key.phase == PHASE:
            self._recomputations.keep(key, options, offer.leaves if outcome == "grafted" else None, grafted)
        self._outcomes[outcome] += 1
        session.housekeeping.board.last_points.append((key, outcome))
        return grafted

    def _among_holders(self, session: Session, module: str, options: PointOptions) -> tuple[PointOptions, str | None]:
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

    def _skip(
        self, session: Session, key: PointKey, direction: Direction, tags: dict[str, Any], site: str, reason: str
    ) -> None:
        """A point that cannot meet anybody is in the ledger, too."""
        self._sequence += 1
        self._outcomes["skipped"] += 1
        session.record(
            LedgerRecord(
                sequence=self._sequence, time=time.time(), name=key.name, tags=tags, step=key.step, phase=key.phase,
                occurrence=key.occurrence, direction=direction, role=session.place.role,
                role_rank=session.place.role_rank, outcome="skipped", reason=reason, call_site=site, participants={},
            )
        )  # fmt: skip

    def _joined(self) -> Session:
        if self._session is None:
            assert self._joining is not None
            self._session = self._joining.wait()
            self._write_module_trees(self._session)
            only_here = self._session.roster.only_at(self._place.role)
            if only_here:
                logger.warning(
                    "grafter: %s: %d modules with hooks are in this job alone, and their points are skipped: %s%s "
                    "(give "
                    "both jobs' modules one name: `names` in the plan file)",
                    self._place.who, len(only_here), ", ".join(only_here[:5]), ", ..." if len(only_here) > 5 else "",
                )  # fmt: skip
        return self._session

    def _write_module_trees(self, session: Session) -> None:
        directory = session.run_directory / self._place.role
        try:
            write_module_trees(directory, self._attachments, self._place.role_rank, session.roster)
        except OSError as failure:
            logger.error("grafter: the modules of %s cannot be written: %s", self._place.who, failure)

    def _refuse_where_impossible(self, name: str, site: str) -> None:
        if os.getpid() != self._process_id:
            raise UsageError(
                f"the point {name!r} at {site} is in a process that was forked from {self._place.who} (a data loader's "
                f"worker?). Only the process that joined can graft; dump in it, or start the child with spawn."
            )
        if self._closed:
            raise UsageError(f"the point {name!r} at {site} comes after grafter.close().")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UsageError(
                f"the point {name!r} at {site} is in a CUDA graph capture, where nothing can be read or exchanged: the "
                f"replay would repeat the capture's values. Run this part without CUDA graphs (eager, or "
                f"`mode='default'` for torch.compile) while grafting."
            )

    # The steps after.

    def _end_run(self, error: RunError, value: Any) -> Any:
        """The run is over: every rank of both jobs must hear of it, and raise the same."""
        if self._session is not None:
            housekeeping = self._session.housekeeping
            if isinstance(error, PeerLostError):
                error = housekeeping.fuller_story(error)
            elif housekeeping.aborted is None:
                error = housekeeping.abort(error, self._session.client)
        self._fault = error
        if not isinstance(error, PeerLostError) or self.config.on_peer_loss == "raise":
            raise error
        self._detached = str(error)
        logger.warning("grafter: %s goes on ungrafted from here (on_peer_loss=detach): %s", self._place.who, error)
        return value

    def _summary(self, session: Session, error: BaseException | None) -> RankSummary:
        return RankSummary(
            role=session.place.role,
            role_rank=session.place.role_rank,
            outcomes=dict(self._outcomes),
            unmatched=dict(self._unmatched),
            filters_never_matched=self._filters.never_matched(),
            tags_never_seen=self._filters.tags_never_seen(),
            hooks_never_fired=[path for attachment in self._attachments for path in attachment.never_fired()],
            modules_only_here=session.roster.only_at(session.place.role),
            error=self._detached or (str(error) if error is not None else None),
            error_kind="Detached" if self._detached else (type(error).__name__ if error is not None else None),
        )

    def _say_goodbye(self) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self._outcomes.items())
        unmatched = sum(self._unmatched.values())
        logger.info(
            "grafter: %s closes: %s; %d calls matched no filter", self._place.who, counts or "no point", unmatched
        )
        if not self._outcomes:
            logger.warning("grafter: %s has grafted and compared nothing", self._place.who)
        for filter_text in self._filters.never_matched():
            logger.warning("grafter: %s: the filter %s never matched", self._place.who, filter_text)
        for tag in self._filters.tags_never_seen():
            seen = sorted(self._unmatched)[:8]
            logger.warning(
                "grafter: %s: no point had a tag %r, which a filter reads (points seen: %s)", self._place.who, tag, seen
            )


def _set_up_logging(level: str) -> None:
    """Give our own logger a handler, unless the program has logging of its own."""
    logger.setLevel(level.upper())
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _last_error(fault: BaseException | None) -> BaseException | None:
    """The error with which this process ends: what nobody caught, else what ended the run at a point."""
    unhandled = getattr(sys, "last_value", None)
    if isinstance(unhandled, BaseException) and not isinstance(unhandled, SystemExit):
        return unhandled
    return fault if isinstance(fault, (RunError, GrafterError)) else None
