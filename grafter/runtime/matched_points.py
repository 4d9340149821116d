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

from grafter.config.options import OptionChooser, PointOptions
from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.offer import Offer
from grafter.core.points import PointKey, StepCounter, call_site, check_tags, split_options
from grafter.core.roles import Direction
from grafter.errors import GrafterError, RunError
from grafter.runtime.early_points import EarlyPoints
from grafter.runtime.entry import Entry
from grafter.runtime.meetings import Meetings, among_holders
from grafter.runtime.offer import OfferMaker
from grafter.runtime.rank_status import RankStatus
from grafter.runtime.recompute.recompute import Recomputations
from grafter.runtime.session import Session
from grafter.runtime.windows import ends_of
from grafter.store.dumps.pending_record import PendingRecord
from grafter.store.dumps.rank_dumps import RankDumps
from grafter.store.recording import RecordedPart

logger = logging.getLogger("grafter")


class MatchedPoints:
    """Those of one rank. All but `make_up_in_background` is called under their lock."""

    def __init__(
        self,
        config: GrafterConfig,
        lock: contextlib.AbstractContextManager[Any],
        steps: StepCounter,
        options: OptionChooser,
        offers: OfferMaker,
        dumps: RankDumps,
        recomputations: Recomputations,
        entry: Entry,
        early: EarlyPoints,
        meetings: Meetings,
        rank_status: RankStatus,
    ) -> None:
        self._config, self._steps, self._options, self._offers, self._dumps = config, steps, options, offers, dumps
        self._recomputations, self._entry, self._early = recomputations, entry, early
        self._meetings, self._rank_status, self._lock = meetings, rank_status, lock

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
            is_early = options.wait == "job" and self._entry.is_waiting
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
                self._dumps.finish(taken, self._early.add(key, direction, offer, options, tags, site, module))
            else:
                grafted = self._meetings.meet(session, key, direction, offer, options, tags, site, taken)
        except RunError as error:
            self._rank_status.end_run(error, value, self._entry.session)
            self._early.give_up_all()
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
            session = self._entry.session or self._entry.joined()
        except GrafterError:
            self._early.give_up_all()
            raise
        if self._early.points:
            self._meetings.make_up(session, self._early)
        self._meetings.say_step(session, self._steps.step)
        return session

    def make_up_in_background(self) -> None:
        """As soon as both jobs have joined: this rank may have no further point for long."""
        rank_status = self._rank_status
        with self._lock:
            if rank_status.is_closed or not self._early.points:
                return
            try:
                self.joined()
            except BaseException as error:
                # The next point raises it, too; so do those of all other ranks.
                self._early.give_up_all()
                if not isinstance(error, RunError):
                    logger.exception("grafter: %s could not make up for its first points", rank_status.who)
                    error = RunError(f"{rank_status.who} could not make up for its first points: {error}")
                with contextlib.suppress(RunError):
                    rank_status.end_run(error, None, self._entry.session)

    def _save(
        self, name: str, value: Any, tags: dict[str, Any], options: PointOptions, site: str, module: str | None
    ) -> Any:
        """A point that meets nobody. What `dump` returns: the value, made if it is a function."""
        key = self._steps.next_key({**tags, "name": name}, self._config.key_tags)
        if callable(value) and not isinstance(value, torch.Tensor):
            value = value()
        is_early = options.wait == "job" and self._entry.is_waiting
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
        self._meetings.record_skipped(session, key, direction, tags, site, missing)
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
    ) -> PendingRecord | None:
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
