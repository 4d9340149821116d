"""The decision about a point: one pure function of both manifests, which every participant computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from grafter.core.layout.row_view import RowView
from grafter.core.messages.manifest import Header, Pair
from grafter.core.messages.mismatch import find_mismatch, find_shared_gpu, find_structure_mismatch, find_unequal_leaf
from grafter.core.plan.paired_rows import PairedRows, pair_rows, why_no_rows
from grafter.core.plan.resharding import Resharding, reshard_leaf, why_not_resharded
from grafter.core.roles import Direction
from grafter.errors import LayoutError


@dataclass(frozen=True)
class Decision:
    """What happens at one point, the same on every participant.

    `sources` is, for each receiving role rank, the sending role ranks whose whole value it gets, in order. Where
    layouts decide, `reshardings` has for each leaf what goes where, and `sources` whose extras a receiver gets. Where
    rows are addressed by token, `rows` says which, and `reshardings` are of these rows alone, [tokens, ...]. Where
    `outcome` is not None, nothing moves, and `reason` says why; `compared`: the values hold no tensors, and are equal.
    """

    sources: dict[int, tuple[int, ...]]
    outcome: Literal["skipped", "failed", "compared"] | None = None
    reason: str | None = None
    reshardings: tuple[Resharding, ...] | None = None
    rows: PairedRows | None = None

    def rows_of(self, header: Header) -> list[RowView] | None:
        """For each leaf of a rank, the rows that have a partner; None where rows are not addressed by token."""
        if self.rows is None:
            return None
        return [views[header.role, header.role_rank] for views in self.rows.views]


def decide(direction: Direction, pair: Pair) -> Decision:
    """One pure function of both manifests, computed by every participant."""
    senders, receivers = pair.senders(direction), pair.receivers(direction)
    failed = next((h for h in pair.headers if h.failure is not None), None)
    if failed is not None:
        return Decision({}, "failed", f"{failed.who} failed before the exchange: {failed.failure}")
    nothing = [h for h in pair.headers if h.nothing is not None]
    if nothing and direction == "compare" and all(h.nothing is not None and h.others for h in pair.headers):
        return _compare_plain(pair.headers)
    if nothing:
        return Decision({}, "skipped", "; ".join(f"{h.who}: {h.nothing}" for h in nothing[:4]))
    shared_gpu = find_shared_gpu(pair.headers)
    if shared_gpu is not None:
        return Decision({}, "failed", shared_gpu)
    needs = {h.needs for h in receivers}
    if len(needs) != 1:
        return Decision(
            {}, "failed", f"the receivers ask for different things: {sorted(needs)}; give all one transform"
        )
    # Equal is transitive: all are compared with one.
    first = senders[0].others
    others = (h for h in (*receivers, *senders) if h.others != first)
    unequal = next((u for h in others if (u := find_unequal_leaf(senders[0], h))), None)
    if unequal is not None:
        return Decision({}, "failed", unequal)
    if any(h.tokens is not None for h in pair.headers):
        return _by_token(senders, receivers, needs=next(iter(needs)))
    if needs == {"resharded"} or (needs == {"identity"} and any(h.layouts for h in pair.headers)):
        resharded = _by_layout(senders, receivers, asked=needs == {"resharded"})
        if resharded is not None:
            return resharded
    if needs == {"all"}:
        everyone = tuple(h.role_rank for h in senders)
        return Decision({h.role_rank: everyone for h in receivers})
    if needs == {"same_rank"}:
        return _pair_by_position(senders, receivers, same_shape=False)
    return _with_missing_layout(_identity(senders, receivers), senders, receivers)


def _compare_plain(headers: Sequence[Header]) -> Decision:
    """Values that are plain data alone: equal on all ranks or not."""
    unequal = next((u for h in headers[1:] if (u := find_unequal_leaf(headers[0], h)) is not None), None)
    if unequal is not None:
        return Decision({}, "failed", unequal)
    count = len(headers[0].others)
    what = "the value is no tensor, and is" if count == 1 else f"the {count} leaves are no tensors, and are"
    return Decision({}, "compared", f"{what} equal on all ranks")


def _with_missing_layout(decision: Decision, senders: Sequence[Header], receivers: Sequence[Header]) -> Decision:
    """What the rules for whole tensors refuse, layouts might do: say which side has declared none."""
    declared = next((h for h in (*senders, *receivers) if h.layouts), None)
    without = next((side for side in (senders, receivers) if not any(h.layouts for h in side) and len(side) > 1), None)
    if decision.outcome != "failed" or declared is None or without is None:
        return decision
    layout = next(one for one in declared.layouts if one is not None)
    return replace(
        decision,
        reason=f"{decision.reason} (The {declared.role} declares a layout, {layout}, and the {without[0].role}, of "
        f"{len(without)} ranks, none: with dims= there, too, in its call or in a rule of the plan file, each receiver "
        "gets its own part.)",
    )


def _by_layout(senders: Sequence[Header], receivers: Sequence[Header], *, asked: bool) -> Decision | None:
    """What the layouts say. None where a side declares none, so that the rules for whole tensors hold."""
    mismatch = find_structure_mismatch((*senders, *receivers))
    if mismatch is not None:
        return Decision({}, "failed", mismatch)
    try:
        reshardings = [reshard_leaf(senders, receivers, leaf) for leaf in range(len(senders[0].leaves))]
    except LayoutError as error:
        return Decision({}, "failed", str(error))
    known = tuple(one for one in reshardings if one is not None)
    if len(known) == len(reshardings):
        lowest = (min(h.role_rank for h in senders),) if asked else ()
        return Decision({h.role_rank: lowest for h in receivers}, reshardings=known)
    if asked or known:
        return Decision({}, "failed", why_not_resharded(senders, receivers, reshardings, asked=asked))
    return None


def _by_token(senders: Sequence[Header], receivers: Sequence[Header], *, needs: str) -> Decision:
    """Rows meet by the token that each is; all else is as layouts have it."""
    without = next((h for h in (*senders, *receivers) if h.tokens is None), None)
    if without is not None:
        given = next(h for h in (*senders, *receivers) if h.tokens is not None)
        return Decision(
            {},
            "failed",
            f"{given.who} gives tokens= ({given.call_site}), and {without.who} ({without.call_site}) does not, so its "
            "rows have no names. Give tokens= on every rank of both sides, or on none.",
        )
    if needs in ("all", "same_rank"):
        return Decision(
            {},
            "failed",
            'rows are addressed by token, and the transform asks for whole tensors of ranks. Use receives="resharded" '
            "(it gets the rows that have a partner, [rows, ...]), or leave tokens= away.",
        )
    mismatch = find_structure_mismatch((*senders, *receivers))
    if mismatch is not None:
        return Decision({}, "failed", mismatch)
    try:
        rows, reshardings = pair_rows(senders, receivers)
    except LayoutError as error:
        return Decision({}, "failed", str(error))
    if not rows.tokens.count:
        return Decision({}, "skipped", why_no_rows(senders[0], receivers[0], rows.tokens), rows=rows)
    lowest = (min(h.role_rank for h in senders),) if needs == "resharded" else ()
    return Decision({h.role_rank: lowest for h in receivers}, reshardings=reshardings, rows=rows)


def _identity(senders: Sequence[Header], receivers: Sequence[Header]) -> Decision:
    """Without a transform: a single sender serves every receiver of its shape, else the k-th serves the k-th."""
    if len(senders) == 1:
        mismatch = next((m for h in receivers if (m := find_mismatch(senders[0], h))), None)
        if mismatch is not None:
            return Decision({}, "failed", mismatch)
        return Decision({h.role_rank: (senders[0].role_rank,) for h in receivers})
    return _pair_by_position(senders, receivers, same_shape=True)


def _pair_by_position(senders: Sequence[Header], receivers: Sequence[Header], *, same_shape: bool) -> Decision:
    if len(senders) != len(receivers):
        return Decision(
            {},
            "failed",
            f"{len(senders)} ranks send and {len(receivers)} receive, so rank k of one does not belong to rank k "
            "of the other. Give a transform that says what each receiver makes of all the senders' tensors "
            "(transforms/ has one that concatenates).",
        )
    for sender, receiver in zip(senders, receivers, strict=True):
        mismatch = find_mismatch(sender, receiver) if same_shape else None
        if mismatch is not None:
            return Decision({}, "failed", mismatch)
    return Decision({r.role_rank: (s.role_rank,) for s, r in zip(senders, receivers, strict=True)})
