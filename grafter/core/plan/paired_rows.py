"""Rows that meet by the token that each is: which of them pair, and what goes where of each leaf. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafter.core.bounded_memory import Remembered
from grafter.core.layout.row_view import RowView
from grafter.core.layout.token_rows import TokenRows, WindowedTokens, number_rows
from grafter.core.messages.announced_tokens import resolved
from grafter.core.messages.manifest import Header
from grafter.core.plan.resharding import Resharding, reshard_between
from grafter.core.plan.token_shares import (
    OwnTokens,
    key_of_shares,
    own_tokens,
    row_views,
    token_shares,
    with_rows_alike,
)
from grafter.core.records import TokenCounts
from grafter.core.roles import RoleName
from grafter.core.rows.tokens import SequenceId
from grafter.errors import LayoutError


@dataclass(frozen=True, eq=False)
class PairedRows:
    """Rows that are addressed by token: how they pair; and for each leaf, by role and role rank, those that do.

    own: the tokens of each rank's rows. sender: the role that sends.
    """

    tokens: TokenRows
    sender: RoleName
    own: dict[tuple[RoleName, int], WindowedTokens]
    views: tuple[dict[tuple[RoleName, int], RowView], ...] = ()

    def counts(self, header: Header) -> TokenCounts:
        """What one rank's ledger says of it."""
        here = self._side(header)
        rows = self.tokens.ranks[here][header.role_rank]
        return TokenCounts(
            matched=rows.count,
            only_here=rows.only_here,
            only_there=self.tokens.only_at[1 - here],
            kept_out=rows.kept_out,
            only_here_tokens=self.tokens.examples(here) if rows.only_here else [],
            only_there_tokens=self.tokens.examples(1 - here),
        )

    def name(self, header: Header, leaf: int, place: int) -> str:
        """`sequence:position` of row `place` among those of a rank that have a partner."""
        row = self.views[leaf][header.role, header.role_rank].row_at(place)
        sequence, position = self.own[header.role, header.role_rank].tokens.token_at(row)
        return f"{sequence}:{position}"

    def reached(self, header: Header) -> dict[SequenceId, int]:
        """For each sequence, as this side calls it, the position after its last token that has a partner."""
        return self.tokens.reached(self._side(header))

    def _side(self, header: Header) -> int:
        return 0 if header.role == self.sender else 1


def pair_rows(senders: Sequence[Header], receivers: Sequence[Header]) -> tuple[PairedRows, tuple[Resharding, ...]]:
    """How the rows of all these pair; and for each leaf, what goes where of those that do. Raises LayoutError.

    All give tokens, and their values are built alike. Where no token is in both sides' rows, there are no reshardings.
    """
    sides = (senders, receivers)
    own = with_rows_alike(sides, [own_tokens(side, _told_tokens(side)) for side in sides])
    tokens = number_rows(own[0].tokens, own[1].tokens)
    if not tokens.count:
        return PairedRows(tokens, senders[0].role, {}), ()
    found = [_reshard_rows(senders, receivers, leaf, own, tokens) for leaf in range(len(senders[0].leaves))]
    of_ranks = {
        (headers[0].role, rank): windowed
        for headers, side in zip((senders, receivers), own, strict=True)
        for rank, windowed in side.tokens.items()
    }
    paired = PairedRows(tokens, senders[0].role, of_ranks, tuple(views for _, views in found))
    return paired, tuple(resharding for resharding, _ in found)


def _told_tokens(headers: Sequence[Header]) -> dict[int, WindowedTokens]:
    try:
        return resolved([(header.role_rank, header.tokens) for header in headers if header.tokens is not None])
    except LayoutError as error:
        raise LayoutError(f"at the {headers[0].role}: {error}") from None


def _reshard_rows(
    senders: Sequence[Header], receivers: Sequence[Header], leaf: int, own: Sequence[OwnTokens], tokens: TokenRows
) -> tuple[Resharding, dict[tuple[RoleName, int], RowView]]:
    sides = (senders, receivers)
    views = [
        row_views(headers, leaf, own[side].row_dims[leaf], tokens.ranks[side]) for side, headers in enumerate(sides)
    ]
    options = [(header.check_replicas, header.partial_target) for headers in sides for header in headers]
    key = (
        tokens.count,
        tuple(options),
        *(key_of_shares(headers, leaf, views[n], tokens.ranks[n]) for n, headers in enumerate(sides)),
    )

    def work_out() -> Resharding:
        shares = [token_shares(h, leaf, views[n], tokens.ranks[n], tokens.count) for n, h in enumerate(sides)]
        return reshard_between(shares, senders, receivers, leaf)

    by_rank = {(h[0].role, rank): view for n, h in enumerate(sides) for rank, view in views[n].items()}
    return _reshardings.answer(key, work_out), by_rank


# The rows of the next step are others, and most often as many.
_reshardings: Remembered[Resharding] = Remembered(64)


def why_no_rows(sender: Header, receiver: Header, tokens: TokenRows) -> str:
    """Why no token is in both sides' rows, and what to do."""
    only = [
        f"{count} are only at the {header.role}{f' ({names[0]}, say)' if (names := tokens.examples(side)) else ''}"
        for side, (header, count) in enumerate(zip((sender, receiver), tokens.only_at, strict=True))
        if count
    ]
    return (
        f"no token is in both sides' rows that count{': ' if only else ''}{', '.join(only)}. Give equal sequence ids, "
        f"or token_ids= on both sides."
    )
