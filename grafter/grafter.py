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
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grafter.capture.attachment import Attachment
from grafter.capture.naming import Naming
from grafter.capture.parameters import dump_weights
from grafter.capture.selection import read_patterns
from grafter.config import GrafterConfig
from grafter.direction import Direction, DirectionFilters
from grafter.errors import GrafterError, JoinError, PeerLostError, RunError, UsageError
from grafter.layout.axes import axes_from_text, axes_of_job, read_axes
from grafter.layout.declared import DeclaredLayout, declare_layouts
from grafter.leaves import Leaves, NothingToOffer, encode_extras, spec_of, take_apart
from grafter.ledger import LedgerRecord, RankSummary
from grafter.manifest import Header
from grafter.meeting import Meeting
from grafter.names import PointName
from grafter.options import OptionChooser, PointOptions
from grafter.participants import own_participants
from grafter.points import OWN_TAGS, PHASE, PointKey, StepCounter, call_site, check_tags, split_options, surroundings
from grafter.roster import other_role
from grafter.session import Joining, Session, find_place

logger = logging.getLogger("grafter")

_MOST_REMEMBERED = 4096
# The fields of a header besides whose it is, in the order in which `_describe` gathers them.
_DESCRIPTION = (
    "participants", "direction", "call_site", "needs", "generation", "staging", "leaves", "structure", "others",
    "extras", "extras_tensors", "nothing", "failure", "nccl_device", "layouts", "axes", "check_replicas",
    "partial_target",
)  # fmt: skip


@dataclass(frozen=True)
class _Offer:
    """What this rank brings to a point: leaves, or why there are none."""

    value: Any
    leaves: Leaves | None = None
    extras_text: str | None = None
    extras: list[torch.Tensor] = field(default_factory=list)
    layouts: tuple[DeclaredLayout | None, ...] = ()
    axes: tuple[tuple[str, int, int], ...] = ()
    nothing: str | None = None
    failure: Exception | None = None


class Grafter:
    """Grafts the points of one rank. The functions of the package use one that is made from the environment.

    Called by every rank that takes part; `dump` may be called from any thread, one point at a time.
    """

    def __init__(self, config: GrafterConfig) -> None:
        self.config = config
        self._filters = DirectionFilters(config.filters)
        self._steps = StepCounter()
        self._lock = threading.RLock()
        # A plain dict: counting in it costs a third of what it costs in a Counter.
        self._unmatched: dict[str, int] = {}
        self._outcomes: Counter[str] = Counter()
        self._sequence = 0
        self._headers: dict[tuple[Any, ...], Header] = {}
        self._naming = Naming(config.names, config.role)
        self._attachments: list[Attachment] = []
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
            self._unmatched[name] = self._unmatched.get(name, 0) + 1
            return value
        direction = filters.direction_of(tags)
        assert direction is not None
        for own in ("name", "step", "phase"):
            del tags[own]
        try:
            if os.getpid() != self._process_id:
                self._refuse_where_impossible(name, call_site())
            with self._lock:
                return self._graft(name, value, tags, {**around.options}, direction, module)
        except GrafterError as error:
            # The way through our own files says nothing to the user, unless they debug us.
            if logger.isEnabledFor(logging.DEBUG):
                raise
            if isinstance(error, RunError):
                error.__cause__, error.__context__ = None, None
            raise error.with_traceback(None) from error.__cause__

    def step(self) -> None:
        """The end of an iteration: the step counts up, occurrences start at 0 again."""
        if self._joining is None:
            self._start_joining()
        if os.getpid() != self._process_id:
            return
        with self._lock:
            self._steps.next_step()

    def attach(
        self, model: torch.nn.Module, patterns: tuple[str, ...], *, inputs: bool = True, outputs: bool = True
    ) -> Attachment:
        """Hooks on a model's modules. See `grafter.attach`."""
        selected = read_patterns(patterns or ((self.config.attach,) if self.config.attach else ()))
        attachment = Attachment(model, selected, self._naming, self._offer_hooked, inputs=inputs, outputs=outputs)
        if not attachment.points:
            logger.warning("grafter: %s: no module of %s matches %s", self._place.who, type(model).__name__, patterns)
        self._attachments.append(attachment)
        if self._joining is None:
            self._start_joining()
        return attachment

    def dump_model(self, model: torch.nn.Module) -> int:
        """All weights as points. See `grafter.dump_model`."""
        return dump_weights(model, self._naming, lambda name, tensor: self.dump_point(name.name, tensor, {**name.tags}))

    def _offer_hooked(self, name: PointName, module: str, tensor: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.dump_point(name.name, tensor, {**self._hook_write, **name.tags}, module)
        return value

    def close(self) -> None:
        """Leave the run: say so, delete what is ours, write the summary. Later matched points are refused."""
        # Before the lock: in a forked child it may belong to a thread that does not exist there.
        if os.getpid() != self._process_id:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            if self._joining is None:
                return
            error = _last_error(self._fault)
            session = self._session or self._joining.finished(patient=error is None)
            if session is not None:
                try:
                    session.ledger.write_summary(self._summary(session, error))
                except OSError as failure:
                    logger.error("grafter: the summary of %s cannot be written: %s", self._place.who, failure)
                session.close(
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" if error else ""
                )
            self._say_goodbye()

    # The steps before the other side is met.

    def _start_joining(self) -> None:
        if os.getpid() != self._process_id:
            return
        with self._lock:
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
                    return value
            offer = self._take_up(value, options)
            header = self._describe(session, offer, options, direction, site)
            tags.update(name=name, step=key.step, phase=key.phase)
            meeting = Meeting(session, key, direction, header, options, tags)
            self._sequence += 1
            grafted, outcome = meeting.hold(offer.leaves, offer.extras, self.config.stats, self._sequence)
        except RunError as error:
            return self._end_run(error, value)
        except BaseException as error:
            self._fault = error
            raise
        self._outcomes[outcome] += 1
        session.housekeeping.board.last_points.append((key, outcome))
        if offer.failure is not None:
            raise offer.failure
        return grafted if offer.leaves is not None else offer.value

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
            only_here = self._session.roster.only_at(self._place.role)
            if only_here:
                logger.warning(
                    "grafter: %s: %d modules with hooks are in this job alone, and their points are skipped: %s%s "
                    "(give "
                    "both jobs' modules one name: `names` in the plan file)",
                    self._place.who, len(only_here), ", ".join(only_here[:5]), ", ..." if len(only_here) > 5 else "",
                )  # fmt: skip
        return self._session

    def _refuse_where_impossible(self, name: str, site: str) -> None:
        if os.getpid() != self._process_id:
            raise UsageError(
                f"the point {name!r} at {site} is in a process that was forked from {self._place.who} (a data loader's "
                f"worker?). Only the process that joined can graft; dump in it, or start the child with spawn."
            )
        if self._closed:
            raise UsageError(f"the point {name!r} at {site} comes after grafter.close().")
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            raise UsageError(
                f"the point {name!r} at {site} is in a recomputation (activation checkpointing runs the forward again "
                "during backward). The other job does not come to it a second time, and this version cannot replay "
                "it: "
                f"dump outside of the checkpointed region, or switch checkpointing off."
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UsageError(
                f"the point {name!r} at {site} is in a CUDA graph capture, where nothing can be read or exchanged: the "
                f"replay would repeat the capture's values. Run this part without CUDA graphs (eager, or "
                f"`mode='default'` for torch.compile) while grafting."
            )

    def _take_up(self, value: Any, options: PointOptions) -> _Offer:
        """The value, made if it is a function, taken apart. A failure is an offer, too: the other side must hear it."""
        try:
            if callable(value) and not isinstance(value, torch.Tensor):
                value = value()
            leaves = take_apart(value)
            extras_text, extras = encode_extras(options.extras) if options.extras is not None else (None, [])
            layouts = declare_layouts(leaves, options.dims, options.layout, options.seq_lens)
            axes = self._axes(options.axes) if layouts else ()
        except NothingToOffer as nothing:
            return _Offer(value, nothing=str(nothing))
        except Exception as error:
            return _Offer(value, failure=error)
        return _Offer(value, leaves, extras_text, extras, layouts, axes)

    def _axes(self, given: Any) -> tuple[tuple[str, int, int], ...]:
        """This rank's place on the mesh: what the call says, else what was set, else the configuration."""
        place = self._place
        settled = axes_from_text(self.config.axes, place.role_rank, place.role_world_size) if self.config.axes else {}
        axes = {**settled, **axes_of_job(), **(read_axes(given) if given is not None else {})}
        return tuple((axis, coordinate, size) for axis, (coordinate, size) in sorted(axes.items()))

    def _describe(
        self, session: Session, offer: _Offer, options: PointOptions, direction: Direction, site: str
    ) -> Header:
        """This rank's part of the point, for the other ranks. The same description gives the same object."""
        leaves, failure = offer.leaves, offer.failure
        description = (
            own_participants(session.place, options.ranks),
            direction,
            site,
            options.transform.receives if options.transform is not None else "identity",
            session.transfer.generation,
            session.transfer.staging.prepare(),
            leaves.specs if leaves is not None else (),
            leaves.structure if leaves is not None else "",
            tuple(sorted(leaves.others.items())) if leaves is not None else (),
            offer.extras_text,
            tuple(spec_of(str(i), tensor) for i, tensor in enumerate(offer.extras)),
            offer.nothing,
            f"{type(failure).__name__}: {failure}" if failure is not None else None,
            self._nccl_device(leaves),
            offer.layouts,
            offer.axes,
            bool(offer.layouts) and self.config.check_replicas,
            options.partial_target,
        )
        header = self._headers.get(description)
        if header is None:
            fields: dict[str, Any] = dict(zip(_DESCRIPTION, description, strict=True))
            header = Header(role=session.place.role, role_rank=session.place.role_rank, **fields)
            if len(self._headers) >= _MOST_REMEMBERED:
                self._headers.clear()
            self._headers[description] = header
        return header

    def _nccl_device(self, leaves: Leaves | None) -> str | None:
        if self.config.backend != "nccl" or leaves is None or not leaves.tensors[0].is_cuda:
            return None
        uuid = torch.cuda.get_device_properties(leaves.tensors[0].device).uuid
        return f"{uuid} {os.environ.get('NCCL_HOSTID', '')}".strip()

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
