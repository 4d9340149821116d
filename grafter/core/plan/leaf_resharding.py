"""What goes where of one leaf, as the layouts of both sides say. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from grafter.core.layout.shares import RoleShares
from grafter.core.messages.manifest import Header
from grafter.core.plan.header_shares import find_shares, whole_tensor
from grafter.core.plan.resharding import Resharding
from grafter.errors import LayoutError


def reshard_leaf(senders: Sequence[Header], receivers: Sequence[Header], leaf: int) -> Resharding | None:
    """None where a side declares no layout of it. Raises LayoutError."""
    sides = []
    for headers in (senders, receivers):
        shares = find_shares(headers, leaf)
        if shares is None and len(headers) == 1:
            # One rank holds all that there is.
            shares = whole_tensor(headers[0], leaf)
        if shares is None:
            return None
        sides.append(shares)
    return reshard_between(sides, senders, receivers, leaf)


def reshard_between(
    sides: Sequence[RoleShares], senders: Sequence[Header], receivers: Sequence[Header], leaf: int
) -> Resharding:
    """From the shares of the senders to those of the receivers. Raises LayoutError where the parts have two dtypes."""
    for header in senders[1:]:
        if header.leaves[leaf].dtype != senders[0].leaves[leaf].dtype:
            raise LayoutError(
                f"the parts have two dtypes: {senders[0].leaves[leaf]} at {senders[0].who}, {header.leaves[leaf]} at "
                f"{header.who}. One tensor has one."
            )
    return Resharding(
        sides[0],
        sides[1],
        check_replicas=any(header.check_replicas for header in (*senders, *receivers)),
        first_summand_gets_all=all(header.partial_target == "first" for header in receivers),
    )


def why_not_resharded(
    senders: Sequence[Header], receivers: Sequence[Header], reshardings: Sequence[Resharding | None], *, asked: bool
) -> str:
    """Some leaves would go by layouts and others by ranks, or a transform asks for what layouts alone can give."""
    leaf = next(number for number, one in enumerate(reshardings) if one is None)
    side = next(side for side in (senders, receivers) if len(side) > 1 and not _declares(side, leaf))
    path = senders[0].leaves[leaf].path
    who = f"the {side[0].role}, of {len(side)} ranks, declares no layout{f' of {path}' if path else ''}"
    if asked:
        return (
            f"the transform asks for the resharded tensor, and {who}. Give dims= (at dump, or in a rule of the plan "
            "file) on both sides."
        )
    return (
        f"{who}, and other leaves of the point have theirs on both sides. Give dims= for every leaf "
        "(`... # tp:replicated` where all ranks have the same), or dump it apart."
    )


def _declares(side: Sequence[Header], leaf: int) -> bool:
    return any(header.layouts and header.layouts[leaf] is not None for header in side)
