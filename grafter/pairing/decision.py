"""The decision about a point: one pure function of both manifests, which every participant computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from grafter.direction import Direction, RoleName
from grafter.errors import LayoutError
from grafter.layout.remembered import Remembered
from grafter.layout.resharding import Resharding
from grafter.layout.row_view import RowView
from grafter.layout.shares import RoleShares, find_shares, whole_tensor
from grafter.layout.token_rows import TokenRows, WindowedTokens, number_rows
from grafter.layout.token_shares import OwnTokens, key_of_shares, own_tokens, row_views, token_shares
from grafter.ledger import TokenCounts
from grafter.pairing.announced_tokens import resolved
from grafter.pairing.manifest import Header, Pair
from grafter.rows.tokens import SequenceId


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


@dataclass(frozen=True)
class Decision:
    """What happens at one point, the same on every participant.

    `sources` is, for each receiving role rank, the sending role ranks whose whole value it gets, in order. Where
    layouts decide, `reshardings` has for each leaf what goes where, and `sources` whose extras a receiver gets. Where
    rows are addressed by token, `rows` says which, and `reshardings` are of these rows alone, [tokens, ...]. Where
    `outcome` is not None, nothing moves, and `reason` says why.
    """

    sources: dict[int, tuple[int, ...]]
    outcome: Literal["skipped", "failed"] | None = None
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
    if nothing:
        return Decision({}, "skipped", "; ".join(f"{h.who}: {h.nothing}" for h in nothing[:4]))
    shared_gpu = _find_shared_gpu(pair.headers)
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
    unequal = next((u for h in others if (u := _find_unequal_leaf(senders[0], h))), None)
    if unequal is not None:
        return Decision({}, "failed", unequal)
    if any(h.tokens is not None for h in pair.headers):
        return _by_token(senders, receivers, needs=next(iter(needs)))
    if needs == {"resharded"} or (needs == {"identity"} and any(h.layouts for h in pair.headers)):
        resharded = _reshard(senders, receivers, asked=needs == {"resharded"})
        if resharded is not None:
            return resharded
    if needs == {"all"}:
        everyone = tuple(h.role_rank for h in senders)
        return Decision({h.role_rank: everyone for h in receivers})
    if needs == {"same_rank"}:
        return _pair_by_position(senders, receivers, same_shape=False)
    return _with_missing_layout(_identity(senders, receivers), senders, receivers)


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


def _reshard(senders: Sequence[Header], receivers: Sequence[Header], *, asked: bool) -> Decision | None:
    """What the layouts say. None where a side declares none, so that the rules for whole tensors hold."""
    structure, count = senders[0].structure, len(senders[0].leaves)
    for header in (*senders[1:], *receivers):
        if header.structure != structure or len(header.leaves) != count:
            return Decision({}, "failed", _differently_built(senders[0], header))
    try:
        reshardings = [_reshard_leaf(senders, receivers, leaf) for leaf in range(len(senders[0].leaves))]
    except LayoutError as error:
        return Decision({}, "failed", str(error))
    known = tuple(one for one in reshardings if one is not None)
    if len(known) == len(reshardings):
        lowest = (min(h.role_rank for h in senders),) if asked else ()
        return Decision({h.role_rank: lowest for h in receivers}, reshardings=known)
    if asked or known:
        return Decision({}, "failed", _why_not_resharded(senders, receivers, reshardings, asked=asked))
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
    structure, count = senders[0].structure, len(senders[0].leaves)
    for header in (*senders[1:], *receivers):
        if header.structure != structure or len(header.leaves) != count:
            return Decision({}, "failed", _differently_built(senders[0], header))
    try:
        own = [own_tokens(side, _told_tokens(side)) for side in (senders, receivers)]
        tokens = number_rows(own[0].tokens, own[1].tokens)
        if not tokens.count:
            nothing = PairedRows(tokens, senders[0].role, {})
            return Decision({}, "skipped", _why_no_rows(senders[0], receivers[0], tokens), rows=nothing)
        found = [_reshard_rows(senders, receivers, leaf, own, tokens) for leaf in range(count)]
    except LayoutError as error:
        return Decision({}, "failed", str(error))
    lowest = (min(h.role_rank for h in senders),) if needs == "resharded" else ()
    of_ranks = {
        (headers[0].role, rank): windowed
        for headers, side in zip((senders, receivers), own, strict=True)
        for rank, windowed in side.tokens.items()
    }
    return Decision(
        {h.role_rank: lowest for h in receivers},
        reshardings=tuple(resharding for resharding, _ in found),
        rows=PairedRows(tokens, senders[0].role, of_ranks, tuple(views for _, views in found)),
    )


def _told_tokens(headers: Sequence[Header]) -> dict[int, WindowedTokens]:
    try:
        return resolved([(header.role_rank, header.tokens) for header in headers if header.tokens is not None])
    except LayoutError as error:
        raise LayoutError(f"at the {headers[0].role}: {error}") from None


def _why_no_rows(sender: Header, receiver: Header, tokens: TokenRows) -> str:
    only = [
        f"{count} are only at the {header.role}{f' ({names[0]}, say)' if (names := tokens.examples(side)) else ''}"
        for side, (header, count) in enumerate(zip((sender, receiver), tokens.only_at, strict=True))
        if count
    ]
    return (
        f"no token is in both sides' rows that count{': ' if only else ''}{', '.join(only)}. Give equal sequence ids, "
        f"or token_ids= on both sides."
    )


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
        return _between(shares, senders, receivers, leaf)

    by_rank = {(h[0].role, rank): view for n, h in enumerate(sides) for rank, view in views[n].items()}
    return _reshardings.answer(key, work_out), by_rank


# The rows of the next step are others, and most often as many.
_reshardings: Remembered[Resharding] = Remembered(64)


def _why_not_resharded(
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


def _reshard_leaf(senders: Sequence[Header], receivers: Sequence[Header], leaf: int) -> Resharding | None:
    sides = []
    for headers in (senders, receivers):
        shares = find_shares(headers, leaf)
        if shares is None and len(headers) == 1:
            # One rank holds all that there is.
            shares = whole_tensor(headers[0], leaf)
        if shares is None:
            return None
        sides.append(shares)
    return _between(sides, senders, receivers, leaf)


def _between(
    sides: Sequence[RoleShares], senders: Sequence[Header], receivers: Sequence[Header], leaf: int
) -> Resharding:
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


def _find_shared_gpu(headers: Sequence[Header]) -> str | None:
    owners: dict[str, Header] = {}
    for header in headers:
        if header.nccl_device is not None:
            other = owners.setdefault(header.nccl_device, header)
            if other is not header:
                return (
                    f"{other.who} and {header.who} use one GPU ({header.nccl_device}), and NCCL refuses two ranks on "
                    "one "
                    f"device. Use GRAFTER_BACKEND=auto, or give each job GPUs of its own."
                )
    return None


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
            "of the "
            f"other. Give a transform that says what each receiver makes of all the senders' tensors "
            f"(transforms/ has one that concatenates).",
        )
    for sender, receiver in zip(senders, receivers, strict=True):
        mismatch = find_mismatch(sender, receiver) if same_shape else None
        if mismatch is not None:
            return Decision({}, "failed", mismatch)
    return Decision({r.role_rank: (s.role_rank,) for s, r in zip(senders, receivers, strict=True)})


def find_mismatch(sender: Header, receiver: Header) -> str | None:
    """Why one sender's value cannot be this receiver's as it is; None if it can."""
    if sender.structure != receiver.structure:
        return _differently_built(sender, receiver)
    unequal = _find_unequal_leaf(sender, receiver)
    if unequal is not None:
        return unequal
    for ours, theirs in zip(sender.leaves, receiver.leaves, strict=True):
        if ours.shape != theirs.shape:
            leaf = f" of {ours.path}" if ours.path else ""
            return (
                f"the shapes{leaf} differ: {ours} at {sender.who} ({sender.call_site}), {theirs} at {receiver.who} "
                f"({receiver.call_site}). A transform can turn one into the other (transforms/ has examples)"
            )
    return None


def _differently_built(one: Header, other: Header) -> str:
    return f"the values are built differently: {_structure(one)} at {one.who}, {_structure(other)} at {other.who}"


def _find_unequal_leaf(sender: Header, receiver: Header) -> str | None:
    """Leaves that are no tensors must be equal, where both sides have them."""
    if sender.others == receiver.others:
        return None
    sent, there = dict(sender.others), dict(receiver.others)
    for path in sorted(sent | there):
        if sent.get(path) != there.get(path):
            return (
                f"the leaf {path} is {_value(sent.get(path))} at {sender.who} and {_value(there.get(path))} at "
                f"{receiver.who}; leaves that are no tensors must be equal"
            )
    return None


def _value(encoded: str | None) -> str:
    return "a tensor" if encoded is None else repr(json.loads(encoded)[1])


def _structure(header: Header) -> str:
    paths = json.loads(header.structure) if header.structure != "tensor" else None
    return "a tensor" if paths is None else f"leaves {', '.join(paths[:6])}{', ...' if len(paths) > 6 else ''}"


def find_conflict(headers: Sequence[Header]) -> str | None:
    """Whether ranks of one role describe one point differently; the sentence says how. Pure."""
    first = headers[0]
    for header in headers[1:]:
        if header.participants != first.participants:
            return two_leaders(first, header)
        if header.wait != first.wait:
            return (
                f"{first.who} takes it with wait={first.wait} ({first.call_site}), {header.who} with "
                f"wait={header.wait} ({header.call_site}). Ranks of one job must decide alike: give all the same "
                "(GRAFTER_WAIT, a rule of the plan file, or the call)."
            )
        if header.direction != first.direction:
            return (
                f"{first.who} takes it as {first.direction}, {header.who} as {header.direction}; their filters differ."
            )
    return None


def two_leaders(first: Header, second: Header) -> str:
    return (
        f"ranks of one job declare different participants: {first.who} says {list(first.participants)} "
        f"(at {first.call_site}), {second.who} says {list(second.participants)} (at {second.call_site}). All "
        "ranks that "
        f"share a point must give the same `ranks=`; ranks that do not share it need another tag (such as "
        f"`pp_stage=...`) so that their points differ."
    )
