"""The report of a rank that leaves: the summary beside its ledger, and what it did, in a few lines of log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from grafter.config.direction_filters import DirectionFilters
from grafter.core.messages.roster import Roster
from grafter.core.records import RankSummary
from grafter.runtime.point_host import HookedModel
from grafter.runtime.rank_context import RankContext, Tally

logger = logging.getLogger("grafter")

_NAMES_SHOWN = 8


def summarise(
    context: RankContext,
    roster: Roster | None,
    filters: DirectionFilters,
    attachments: Sequence[HookedModel],
    error: BaseException | None,
) -> RankSummary:
    """The summary of one rank. roster: None in a run that only saves points. filters: those in force at the end.

    error: the one with which the rank ends.
    """
    place, tally, detached = context.place, context.tally, context.status.detached
    return RankSummary(
        role=place.role,
        role_rank=place.role_rank,
        outcomes=dict(tally.outcomes),
        unmatched=dict(tally.unmatched),
        filters_never_matched=filters.never_matched(),
        tags_never_seen=filters.tags_never_seen(),
        hooks_never_fired=[path for attachment in attachments for path in attachment.never_fired()],
        modules_bypassed=[path for attachment in attachments for path in attachment.bypassed()],
        modules_only_here=roster.only_at(place.role) if roster is not None else [],
        only_dumps=context.config.only_dumps or not filters.have_directions,
        dumped=tally.dumps["saved"],
        dumps_lost=tally.dumps["lost"],
        dumps_left_out=dict(tally.left_out),
        gradients_lost=dict(tally.gradients_lost),
        gradients_late=dict(tally.gradients_late),
        error=detached or (str(error) if error is not None else None),
        error_kind="Detached" if detached else (type(error).__name__ if error is not None else None),
    )


def log_summary(context: RankContext, filters: DirectionFilters, directory: Path | None) -> None:
    """Log the results of this rank's points. directory: that of its role, where the rank has written into one."""
    place, tally = context.place, context.tally
    only_dumps = context.config.only_dumps or not filters.have_directions
    counts = ", ".join(f"{count} {outcome}" for outcome, count in (tally.outcomes + tally.dumps).items())
    unmatched = sum(tally.unmatched.values())
    where = f", in {directory}" if directory is not None else ""
    logger.info(
        "grafter: %s closes: %s%s; %d calls matched no filter", place.who, counts or "no point", where, unmatched
    )
    if only_dumps and not tally.dumps:
        logger.warning("grafter: %s has saved nothing", place.who)
    elif not only_dumps and not tally.outcomes:
        logger.warning("grafter: %s has grafted and compared nothing", place.who)
    if tally.left_out:
        listed = ", ".join(f"{count} by {limit}" for limit, count in tally.left_out.items())
        logger.warning("grafter: %s: points that limits kept from being saved: %s", place.who, listed)
    for filter_text in filters.never_matched():
        logger.warning("grafter: %s: the filter %s never matched%s", place.who, filter_text, _seen(tally))
    for tag in filters.tags_never_seen():
        logger.warning("grafter: %s: no point had a tag %r, which a filter reads%s", place.who, tag, _seen(tally))


def _seen(tally: Tally) -> str:
    """The names of points that no filter matched, which a reader compares with those in a filter."""
    names = sorted(tally.unmatched)
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f" (points seen: {', '.join(names[:_NAMES_SHOWN])}{more})" if names else ""


def set_up_logging(level: str) -> None:
    """Give our own logger a handler, unless the program has logging of its own."""
    logger.setLevel(level.upper())
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
