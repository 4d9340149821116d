"""Matched points: what becomes of one that a filter has matched.

saved only      it meets nobody
recorded        kept for a later graft, as it would have met the other side
grafted         now: the two sides meet (`Meetings.meet`)
early           kept until both jobs have joined (`EarlyPoints`), and made up for before the next one meets
skipped         no rank of the other job has its module
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch

from grafter.config.options import PointOptions
from grafter.core.direction import Direction
from grafter.core.messages.offer import Offer
from grafter.core.points import PointKey, call_site, check_tags, split_options
from grafter.errors import GrafterError, RunError
from grafter.runtime.early_points import EarlyPoints
from grafter.runtime.lifecycle import Lifecycle
from grafter.runtime.meetings import Meetings, among_holders
from grafter.runtime.offer import PointTools
from grafter.runtime.rank_context import RankContext
from grafter.runtime.session import Session
from grafter.runtime.windows import ends_of
from grafter.store.dumps.taken import Taken
from grafter.store.recordings.recorded_part import RecordedPart
from grafter.wire.monitor.step_ends import LEFT

logger = logging.getLogger("grafter")


class MatchedPoints:
    """The matched points of one rank. All but `make_up_in_background` is called under their lock."""

    def __init__(
        self, context: RankContext, tools: PointTools, lifecycle: Lifecycle, early: EarlyPoints, meetings: Meetings
    ) -> None:
        self._config, self._steps, self._options = context.config, context.steps, context.rules.options
        self._rank_status, self._lock, self._tally = context.status, context.lock, context.tally
        self._offers, self._dumps, self._recomputations = tools.offers, tools.dumps, tools.recomputations
        self.lifecycle, self.early, self.meetings = lifecycle, early, meetings

    def take(
        self,
        name: str,
        value: Any,
        arguments: dict[str, Any],
        around: dict[str, Any],
        direction: Direction | None,
        saves: bool,
        module: str | None,
    ) -> Any:
        """One point; what `dump` returns. around: the options of the surroundings. direction: None where it is only
        saved."""
        site = call_site()
        self._rank_status.refuse_where_impossible(name, site)
        tags, given = split_options(arguments) if arguments else ({}, {})
        check_tags(tags)
        if self._rank_status.detached is not None:
            direction = None
            if not saves:
                return value
        given.pop("save", None)
        options = self._options.options_of(name, {**around, **given})
        try:
            if direction is None:
                return self._save(name, value, tags, options, site, module)
            if self._config.records_alone:
                return self._record(name, value, tags, options, site, direction, module)
            is_early = self.lifecycle.is_too_early(options)
            session = self.joined() if not is_early else None
            key = self._steps.next_key({**tags, "name": name}, self._config.key_tags)
            if module is not None and session is not None:
                options, missing = among_holders(session, module, options)
                if missing is not None:
                    self._skip(session, key, value, tags, options, site, direction, module, saves, missing)
                    return value
            offer = self._offers.take_up(value, options, key)
            taken = self._keep(key, offer, options, tags, site, direction, module) if saves else None
            if session is None:
                grafted = offer.value
                self._dumps.finish(taken, self.early.add(key, direction, offer, options, tags, site, module))
            else:
                grafted = self.meetings.meet(session, key, direction, offer, options, tags, site, taken)
        except RunError as error:
            self._rank_status.end_run(error, self.lifecycle.session)
            self.early.give_up_all()
            return value
        except BaseException as error:
            self._rank_status.fault = error
            raise
        if offer.failure is not None:
            raise offer.failure
        return grafted if offer.leaves is not None else offer.value

    def joined(self) -> Session:
        """Waits until both jobs have joined. Raises what kept them from it, and what ended the run."""
        try:
            session = self.lifecycle.session or self.lifecycle.joined()
        except GrafterError:
            self.early.give_up_all()
            raise
        if self.early.points:
            self.meetings.make_up(session, self.early)
        if self.meetings.says_steps:
            self.meetings.say_step(session, self._steps.step)
        return session

    def make_up_in_background(self) -> None:
        """As soon as both jobs have joined: this rank may have no further point for long."""
        rank_status = self._rank_status
        with self._lock:
            if rank_status.is_closed or not self.early.points:
                return
            try:
                self.joined()
            except BaseException as error:
                # The next point raises it, too; so do those of all other ranks.
                self.early.give_up_all()
                if not isinstance(error, RunError):
                    logger.exception("grafter: %s could not make up for its first points", rank_status.who)
                    error = RunError(f"{rank_status.who} could not make up for its first points: {error}")
                with contextlib.suppress(RunError):
                    rank_status.end_run(error, self.lifecycle.session)

    def leave(self, session: Session | None, *, is_orderly: bool) -> None:
        """This rank reaches no further point. What was deferred until both jobs had joined is exchanged now, or never.

        is_orderly: the program has not ended with an error.
        """
        if session is not None and is_orderly:
            with contextlib.suppress(RunError):
                self.meetings.make_up(session, self.early)
        self.early.give_up_all()
        self._tally.outcomes.update(self.early.forgotten)
        if session is not None and is_orderly:
            with contextlib.suppress(RunError):
                self.meetings.say_step(session, LEFT)

    def _save(
        self, name: str, value: Any, tags: dict[str, Any], options: PointOptions, site: str, module: str | None
    ) -> Any:
        """A point that meets nobody. What `dump` returns: the value, made if it is a function."""
        key = self._steps.next_key({**tags, "name": name}, self._config.key_tags)
        if callable(value) and not isinstance(value, torch.Tensor):
            value = value()
        is_early = self.lifecycle.is_too_early(options)
        if module is not None and not self._config.only_dumps and not is_early:
            options, _ = among_holders(self.joined(), module, options)
        starts: tuple[int, ...] = ()
        if options.has_window:
            announced = self._offers.windows.announce(options, key)
            starts = announced.starts if announced is not None else ()
        self._dumps.finish(self._dumps.take(key, None, value, options, tags, site, starts=starts))
        if options.new_rows_only:
            self._offers.windows.advance(key, ends_of(options.tokens))
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
        key = self._steps.next_key({**tags, "name": name}, self._config.key_tags)
        offer = self._offers.take_up(value, options, key)
        part = self.recorded_part(offer, options, direction, site, module)
        self._dumps.finish(self._dumps.take(key, direction, offer.value, options, tags, site, part))
        self._recomputations.keep_nothing(key)
        if offer.failure is not None:
            raise offer.failure
        return offer.value

    def _skip(
        self,
        session: Session,
        key: PointKey,
        value: Any,
        tags: dict[str, Any],
        options: PointOptions,
        site: str,
        direction: Direction,
        module: str,
        saves: bool,
        missing: str,
    ) -> None:
        """A point that cannot meet anybody. missing: why."""
        self.meetings.record_skipped(session, key, direction, tags, site, missing)
        if saves:
            offer = self._offers.take_up(value, options, key)
            part = self.recorded_part(offer, options, direction, site, module)
            taken = self._dumps.take(key, direction, offer.value, options, tags, site, part)
            self._dumps.finish(taken, "skipped", reason=missing)
        self._recomputations.keep_nothing(key)

    def _keep(
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
        return self._dumps.take(key, direction, offer.value, options, tags, site, part, starts)

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
        if not self._config.record:
            return None
        header = self._offers.describe(None, offer, options, direction, site, recorded=True)
        part = RecordedPart(
            header=header, module=module, is_parameter=is_parameter, new_rows_only=bool(options.new_rows_only)
        )
        return part.model_dump_json(exclude_defaults=True)
