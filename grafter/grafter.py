"""The story of one tensor: `Grafter.dump`, one named call per step.

tags, direction, key  ->  pairing  ->  plan  ->  exchange  ->  transform  ->  agreement  ->  write-back  ->  ledger
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from dataclasses import replace
from typing import Any, Literal

import torch

from grafter.backward.kept_writes import unobserved
from grafter.backward.points import BackwardPoints
from grafter.backward.recompute import Recomputations
from grafter.backward.regions import Recomputation, current_recomputation, is_graph_differentiated, scopes
from grafter.capture.adapters import mesh_axes
from grafter.capture.attachment import Attachment
from grafter.capture.module_tree import write_module_trees
from grafter.capture.naming import Naming
from grafter.capture.parameter_gradients import watch_gradients
from grafter.capture.parameters import dump_weights
from grafter.capture.selection import read_patterns
from grafter.direction import Direction, DirectionFilters
from grafter.errors import GrafterError, JoinError, PeerLostError, RunError, UsageError
from grafter.farewell import Tally, last_error, say_goodbye, set_up_logging, summarise
from grafter.layout.axes import axes_of_job, set_axes
from grafter.ledger import LedgerRecord
from grafter.meeting import Meeting
from grafter.names import PointName
from grafter.offer import Offer, OfferMaker
from grafter.options import OptionChooser, PointOptions
from grafter.points import OWN_TAGS, PHASE, PointKey, StepCounter, call_site, check_tags, split_options, surroundings
from grafter.rendezvous.roster import other_role
from grafter.session import Joining, Session, find_place
from grafter.settings.config import GrafterConfig

logger = logging.getLogger("grafter")

_graph_task, _scopes = torch._C._current_graph_task_id, scopes.get


class Grafter:
    """Grafts the points of one rank. The functions of the package use one that is made from the environment.

    Called by every rank that takes part; `dump` may be called from any thread, one point at a time.
    """

    def __init__(self, config: GrafterConfig) -> None:
        self.config = config
        self.filters = DirectionFilters(config.filters)
        self.steps = StepCounter()
        self.lock = threading.RLock()
        self._tally = Tally()
        self._unmatched = self._tally.unmatched
        self._sequence = 0
        self._naming = Naming(config.names, config.role)
        self._attachments: list[Attachment] = []
        wanted = config.gradients or any(rule.gradients for rule in config.own_rules)
        self.gradients = BackwardPoints(self) if wanted else None
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
        self.options = OptionChooser(config)
        self._place = find_place(config)
        self.offers = OfferMaker(config, self._place)
        self.recomputations = Recomputations(self.steps)
        set_up_logging(config.log_level)
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
        tags["step"] = self.steps.step
        tags["phase"] = PHASE
        filters = self.filters
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
        kept = recomputation.next_kept(self.steps, name, own, self.config.key_tags)
        if kept is not None:
            if callable(value) and not isinstance(value, torch.Tensor):
                value = value()
            self.recomputations.keep_entry(kept)
            recomputation.has_cut |= kept.is_cut
            return kept.write_again(value)
        step = recomputation.step_of(self.steps)
        tags = {**surroundings.get().tags, **own, "name": name, "step": step, "phase": PHASE}
        if self._detached is None and self.filters.direction_of(tags) is not None:
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
        if self._joining is None:
            self._start_joining()
        if os.getpid() != self._process_id:
            return
        with self.lock:
            if self.gradients is not None:
                self.gradients.pending.end_step(self._session)
            self.steps.next_step()

    def attach(
        self, model: torch.nn.Module, patterns: tuple[str, ...], *, inputs: bool = True, outputs: bool = True
    ) -> Attachment:
        """Hooks on a model's modules. See `grafter.attach`."""
        selected = read_patterns(patterns or ((self.config.attach,) if self.config.attach else ()))
        attachment = Attachment(model, selected, self._naming, self._offer_hooked, inputs=inputs, outputs=outputs)
        if not attachment.points:
            logger.warning("grafter: %s: no module of %s matches %s", self._place.who, type(model).__name__, patterns)
        if self.gradients is not None:
            paths = [points.path for points in attachment.points]
            attachment.keep(watch_gradients(model, paths, self._naming, self.gradients.pending.parameter_came))
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
        possible = self.filters.could_match({**tags, "name": name, "phase": PHASE})
        options = self.options.options_of(name, given)
        if not possible and not (self.gradients is not None and options.gradients):
            self._unmatched.setdefault(name, 0)
            return "nothing"
        return "break" if options.write == "in_place" and not possible <= {"compare"} else "operator"

    def is_only_compared(self, name: str, arguments: dict[str, Any]) -> bool:
        """Whether no filter can ever graft a point."""
        tags, _ = split_options(arguments)
        return self.filters.could_match({**tags, "name": name, "phase": PHASE}) <= {"compare"}

    @property
    def has_gradients(self) -> bool:
        """Whether gradients of any point are points."""
        return self.gradients is not None

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
            self.recomputations.close()
            if self._joining is None:
                return
            error = last_error(self._fault)
            session = self._session or self._joining.finished(patient=error is None)
            if self.gradients is not None and session is not None and error is None:
                self.gradients.pending.end_step(session)
            if session is not None:
                try:
                    summary = summarise(session, self._tally, self.filters, self._attachments, self._detached, error)
                    session.ledger.write_summary(summary)
                except OSError as failure:
                    logger.error("grafter: the summary of %s cannot be written: %s", self._place.who, failure)
                self._write_module_trees(session)
                session.close(
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" if error else ""
                )
            say_goodbye(self._place, self._tally, self.filters)

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

        self.filters.matchers = (refuse,)

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
        options = self.options.options_of(name, {**around, **given})
        try:
            session = self._joined()
            key = self.steps.next_key({**tags, "name": name}, self.config.key_tags)
            if module is not None:
                options, missing = self.among_holders(session, module, options)
                if missing is not None:
                    self.record_skipped(session, key, direction, tags, site, missing)
                    self.recomputations.keep_nothing(key)
                    return value
            offer = self.offers.take_up(value, options)
            grafted = self.meet(session, key, direction, offer, options, tags, site)
        except RunError as error:
            return self.end_run(error, value)
        except BaseException as error:
            self._fault = error
            raise
        if offer.failure is not None:
            raise offer.failure
        return grafted if offer.leaves is not None else offer.value

    @property
    def session(self) -> Session:
        """Waits until both jobs have joined."""
        return self._joined()

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
    ) -> Any:
        """Meet the other side at one point; what `dump` returns."""
        header = self.offers.describe(session, offer, options, direction, site)
        named = {**tags, "name": key.name, "step": key.step, "phase": key.phase}
        self._sequence += 1
        meeting = Meeting(session, key, direction, header, options, named)
        with unobserved():
            grafted, outcome = meeting.hold(offer.leaves, offer.extras, self.config.stats, self._sequence)
        if key.phase == PHASE:
            self.recomputations.keep(key, options, offer.leaves if outcome == "grafted" else None, grafted)
        self._tally.outcomes[outcome] += 1
        session.housekeeping.board.last_points.append((key, outcome))
        return grafted

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

    def end_run(self, error: RunError, value: Any) -> Any:
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
