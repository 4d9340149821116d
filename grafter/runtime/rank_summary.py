"""What a rank says when it leaves: the summary beside its ledger, and what it did in a few lines of log."""

from __future__ import annotations

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grafter.config.direction_filters import DirectionFilters
from grafter.core.messages.roster import Roster
from grafter.core.records import RankSummary
from grafter.core.roles import RankIdentity
from grafter.errors import GrafterError, RunError
from grafter.runtime.hooked_models import HookedModel

logger = logging.getLogger("grafter")

_NAMES_SHOWN = 8


@dataclass
class Tally:
    """What became of one rank's points: matched ones by outcome, the others by name."""

    outcomes: Counter[str] = field(default_factory=Counter)
    # Counting in it costs a third of what it costs in a Counter.
    unmatched: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    # Points saved and lost, and those that a limit left out, by limit.
    dumps: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    # Gradients of weights that were gone when they were to be taken, by name.
    gradients_lost: Counter[str] = field(default_factory=Counter)
    # Gradients that came when their step was over, by name.
    gradients_late: Counter[str] = field(default_factory=Counter)

    def replace_posted(self, settled: Counter[str]) -> None:
        """Points that were posted, by what became of them."""
        self.outcomes.update(settled)
        self.outcomes["posted"] -= sum(settled.values())
        # Without those that are none.
        self.outcomes = +self.outcomes


def summarise(
    place: RankIdentity,
    roster: Roster | None,
    tally: Tally,
    filters: DirectionFilters,
    attachments: Sequence[HookedModel],
    detached: str | None,
    error: BaseException | None,
    *,
    only_dumps: bool = False,
) -> RankSummary:
    """roster: None in a run that only dumps. detached: why this rank went on ungrafted, if it did. error: that with
    which it ends."""
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
        only_dumps=only_dumps or not filters.have_directions,
        dumped=tally.dumps["saved"],
        dumps_lost=tally.dumps["lost"],
        dumps_left_out=dict(tally.left_out),
        gradients_lost=dict(tally.gradients_lost),
        gradients_late=dict(tally.gradients_late),
        error=detached or (str(error) if error is not None else None),
        error_kind="Detached" if detached else (type(error).__name__ if error is not None else None),
    )


def say_goodbye(
    place: RankIdentity, tally: Tally, filters: DirectionFilters, directory: Path | None, *, only_dumps: bool = False
) -> None:
    """directory: that of this rank's role, where the rank has written into one."""
    only_dumps = only_dumps or not filters.have_directions
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
    """The names of points that no filter matched, to be compared with what a filter asks for."""
    names = sorted(tally.unmatched)
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f" (points seen: {', '.join(names[:_NAMES_SHOWN])}{more})" if names else ""


def last_error(fault: BaseException | None) -> BaseException | None:
    """The error with which this process ends: what nobody caught, else what ended the run at a point."""
    unhandled = getattr(sys, "last_value", None)
    if isinstance(unhandled, BaseException) and not isinstance(unhandled, SystemExit):
        return unhandled
    return fault if isinstance(fault, (RunError, GrafterError)) else None


def set_up_logging(level: str) -> None:
    """Give our own logger a handler, unless the program has logging of its own."""
    logger.setLevel(level.upper())
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
