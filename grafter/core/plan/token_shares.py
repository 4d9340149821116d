"""Token shares: what each rank of a role holds of a tensor whose rows are tokens.

    dims "b s h[tp]", local [2, 8, 64]   ->   [rows, 64] of the global [tokens that both have, 128]

Which rows a rank holds, its tokens say; the other dims are cut as its layout has it, among the ranks that hold the same
rows. Axes over which the rows are split say nothing that the tokens do not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from grafter.core.layout.declared import DeclaredLayout, Layout
from grafter.core.layout.dims import LARGEST_SIZE, Dim, Dims, Factor, parse_dims
from grafter.core.layout.places import Member
from grafter.core.layout.row_view import RowView
from grafter.core.layout.runs import Runs, whole
from grafter.core.layout.shares import (
    RoleShares,
    Share,
    _checked,
    _of_boxes,
    boxes_of,
    declared_alike,
    dims_of,
    of_dims,
    of_dtensors,
)
from grafter.core.layout.token_rows import RankRows, WindowedTokens
from grafter.core.rows.matching import common_row_ndim, leading_row_dims
from grafter.core.rows.tokens import Tokens
from grafter.errors import LayoutError

if TYPE_CHECKING:
    from grafter.core.messages.manifest import Header


_ROWS = Dim((Factor("t"),))
# Where a rank tells the tokens of all ranks' rows, they are gone through row by row: a peer's claim is bounded.
MOST_TOLD_ROWS = 1 << 24


@dataclass(frozen=True, eq=False)
class OwnTokens:
    """The tokens of each rank's own rows; and of each leaf, for each rank, the dims that make up the rows."""

    tokens: dict[int, WindowedTokens]
    row_dims: list[dict[int, tuple[int, ...]]]


def own_tokens(headers: Sequence[Header], told: Mapping[int, WindowedTokens]) -> OwnTokens:
    """Where a layout cuts the rows, a rank may have told the tokens of all of them.

    Raises LayoutError where a tensor has no rows of tokens, or another number of them than were told.
    """
    found: dict[int, WindowedTokens] = {}
    dims: list[dict[int, tuple[int, ...]]] = []
    cut = _CutTokens(headers)
    for leaf in range(len(headers[0].leaves)):
        dims.append({})
        for header in headers:
            rank, shape = header.role_rank, header.leaves[leaf].shape
            windowed = found.get(rank, told[rank])
            own = dims[leaf][rank] = _row_dims_of(header, leaf, windowed.tokens.rows)
            rows = prod(shape[dim] for dim in own)
            if rows != windowed.tokens.rows and rank not in found:
                windowed = cut.of_rank(rank, leaf, windowed) or windowed
            if rows != windowed.tokens.rows:
                raise LayoutError(_why_other_rows(header, leaf, rows, windowed.tokens.rows) + cut.why_not)
            found[rank] = windowed
    return OwnTokens(found, dims)


def with_rows_alike(sides: Sequence[Sequence[Header]], own: Sequence[OwnTokens]) -> list[OwnTokens]:
    """Where only sizes say which dims count the rows, those by which a row has as many dims on all ranks of both sides.

    What a pass of one token leaves open, the other side's rows decide.
    """
    found = [OwnTokens(side.tokens, [dict(dims) for dims in side.row_dims]) for side in own]
    for leaf in range(len(sides[0][0].leaves)):
        if all(declared_of(header, leaf) is not None for headers in sides for header in headers):
            continue
        possible = [
            (header, side, len(header.leaves[leaf].shape), _possible_row_dims(header, leaf, own[side]))
            for side, headers in enumerate(sides)
            for header in headers
        ]
        row_ndim = common_row_ndim((ndim, counts) for _, _, ndim, counts in possible)
        for header, side, ndim, counts in possible:
            if row_ndim is not None and len(counts) > 1:
                found[side].row_dims[leaf][header.role_rank] = tuple(range(ndim - row_ndim))
    return found


def _possible_row_dims(header: Header, leaf: int, own: OwnTokens) -> list[int]:
    """How many dims may count the rows of one rank's leaf."""
    if _dims(header, leaf) is not None:
        return [len(own.row_dims[leaf][header.role_rank])]
    return leading_row_dims(header.leaves[leaf].shape, own.tokens[header.role_rank].tokens.rows)


class _CutTokens:
    """Tokens of all rows, cut as the dims cut the rows. Ranks of the same rows get the same object."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self._headers = headers
        self._known: dict[tuple[int, tuple[Runs, ...]], WindowedTokens] = {}
        self.why_not = ""

    @cached_property
    def _shares(self) -> RoleShares | None:
        layout = declared_of(self._headers[0], 0)
        if layout is None or layout.dims is None:
            return None
        try:
            return find_shares(self._headers, 0)
        except LayoutError as error:
            self.why_not = f" (They cannot be those of all ranks' rows, either: {error})"
            return None

    def of_rank(self, rank: int, leaf: int, windowed: WindowedTokens) -> WindowedTokens | None:
        """None where the tokens are not those of all rows."""
        shares = self._shares
        if shares is None or shares.dims is None or leaf > 0:
            return None
        dims = row_dims(shares.dims, shares.global_shape, windowed.tokens.rows)
        sizes = [shares.global_shape[dim] for dim in dims or ()]
        if dims is None or prod(sizes) != windowed.tokens.rows:
            return None
        if windowed.tokens.rows > MOST_TOLD_ROWS:
            self.why_not = f" (Those of all ranks' rows may be {MOST_TOLD_ROWS} at most.)"
            return None
        runs = tuple(shares.shares[rank].runs[dim] for dim in dims)
        known = self._known.get((id(windowed), runs))
        if known is None:
            known = WindowedTokens(_tokens_at(windowed.tokens, runs, sizes), windowed.starts)
            self._known[id(windowed), runs] = known
        return known


def row_dims(dims: Sequence[Dim] | None, shape: Sequence[int], rows: int) -> tuple[int, ...] | None:
    """The dims that make up the rows: `t`, or `b` and `s` (either may be alone, or both fused), numbered by `b` first.

    Without names, the first dims that have as many rows together. None where there are none.
    """
    if dims is None:
        return next((tuple(range(count)) for count in leading_row_dims(shape, rows)), None)
    for number, dim in enumerate(dims):
        if len(dim.factors) == 1 and dim.factors[0].name == "t":
            return (number,)
    numbers = {dim.names: number for number, dim in enumerate(dims)}
    for names in ((("b",), ("s",)), (("b", "s"),), (("s",),), (("b",),)):
        if all(own in numbers for own in names):
            return tuple(numbers[own] for own in names)
    return None


def _row_dims_of(header: Header, leaf: int, told: int) -> tuple[int, ...]:
    shape, dims = header.leaves[leaf].shape, _dims(header, leaf)
    found = row_dims(dims.dims if dims is not None else None, shape, told)
    if found is None or (dims is not None and len(dims.dims) != len(shape)):
        path = header.leaves[leaf].path
        named = f"the dims {dims.text!r}" if dims is not None else "no names for its dims"
        raise LayoutError(
            f"{header.who} gives tokens= for {told} rows of {path or 'a tensor'} {list(shape)} with {named}, where "
            f"{'no first dims have so many rows' if dims is None else 'no dim is `t`, nor `b` or `s`'}. Name the dims "
            'of the rows, such as dims="t h[tp]" or dims="b s h", and give tokens for each of them; or leave tokens= '
            "away."
        )
    return found


def _dims(header: Header, leaf: int) -> Dims | None:
    layout = declared_of(header, leaf)
    if layout is not None and layout.boxes is not None:
        raise LayoutError(f"{header.who} gives tokens= and layout=; rows by token take dims=, or a DTensor.")
    return None if layout is None else dims_of(layout)


def _why_other_rows(header: Header, leaf: int, rows: int, told: int) -> str:
    path = header.leaves[leaf].path
    return (
        f"{header.who} announces {told} rows by its tokens=, and {path or 'its tensor'} of "
        f"{list(header.leaves[leaf].shape)} has {rows}. Give tokens for the rows of the tensor, padding included "
        f"(start= keeps rows out). The call: {header.call_site}."
    )


def _tokens_at(tokens: Tokens, runs: Sequence[Runs], sizes: Sequence[int]) -> Tokens:
    """The tokens of one rank's rows, in its order, of those of all rows."""
    rows = np.zeros(1, dtype=np.int64)
    for own, size in zip(runs, sizes, strict=True):
        places = np.concatenate([np.arange(start, start + count) for start, count, _ in own] or [np.arange(0)])
        rows = (rows[:, None] * size + places[None, :]).reshape(-1)
    return tokens.at_rows(rows)


def row_views(
    headers: Sequence[Header], leaf: int, row_dims_of: Mapping[int, tuple[int, ...]], rows: Mapping[int, RankRows]
) -> dict[int, RowView]:
    """How each rank's local tensor becomes [rows that have a partner, ...]."""
    return {
        header.role_rank: RowView(
            header.leaves[leaf].shape, row_dims_of[header.role_rank], rows[header.role_rank].segments
        )
        for header in headers
    }


def key_of_shares(
    headers: Sequence[Header], leaf: int, views: Mapping[int, RowView], rows: Mapping[int, RankRows]
) -> Hashable:
    """All that the shares of a role follow from: the same in the next step, though its rows are others."""
    return tuple(
        (header.role_rank, view.packed_shape, view.row_dims, rows[header.role_rank].runs)
        + (header.axes, header.role, header.leaves[leaf].dtype, _fields_of(declared_of(header, leaf)))
        for header in headers
        for view in (views[header.role_rank],)
    )


def _fields_of(layout: DeclaredLayout | None) -> Hashable:
    """Compared by its fields, since as a model it costs ten times as much."""
    return None if layout is None else tuple(layout.__dict__.values())


def token_shares(
    headers: Sequence[Header], leaf: int, views: Mapping[int, RowView], rows: Mapping[int, RankRows], count: int
) -> RoleShares:
    """The shares of the tensor [tokens, ...].

    rows: for each rank, the rows that have a partner. count: the number of tokens. Raises LayoutError if the layouts of
    the ranks do not fit together.
    """
    groups: dict[Runs, list[Header]] = {}
    shares: dict[int, Share] = {}
    for header in headers:
        rank = header.role_rank
        if views[rank].count:
            groups.setdefault(rows[rank].runs, []).append(header)
        else:
            # Ranks without rows may be alike, and are none that hold the same.
            shares[rank] = Share(((),) * len(views[rank].packed_shape))
    first: RoleShares | None = None
    for runs, group in groups.items():
        own = _of_one_group(group, leaf, views)
        first = first or own
        if (own.global_shape, own.reduction, own.summands) != (first.global_shape, first.reduction, first.summands):
            raise LayoutError(
                f"a row of {own.text!r} is {list(own.global_shape[1:])} at {group[0].who}, and "
                f"{list(first.global_shape[1:])} at {headers[0].who}; the rows of one point are alike."
            )
        shares.update((rank, share._replace(runs=(runs, *share.runs[1:]))) for rank, share in own.shares.items())
    assert first is not None
    dims = None if first.dims is None else (_ROWS, *first.dims[1:])
    return replace(first, dims=dims, global_shape=(count, *first.global_shape[1:]), shares=shares)


def _of_one_group(headers: Sequence[Header], leaf: int, views: Mapping[int, RowView]) -> RoleShares:
    """Ranks that hold the same rows: their shares of a tensor of one row, [1, ...]."""
    members: list[Member] = []
    layouts: list[DeclaredLayout | None] = []
    for header in headers:
        view = views[header.role_rank]
        members.append(member_of(header, leaf)._replace(shape=(1, *view.packed_shape[1:])))
        layouts.append(_of_one_row(declared_of(header, leaf), view))
    present = declared_alike(members, layouts)
    if not present and len(headers) > 1:
        raise LayoutError(
            f"{headers[0].who} and {headers[1].who} give the same tokens, and nothing says what each holds of their "
            'rows. Give dims=, such as "t h[tp]", or "t h # tp:replicated" where all hold the same.'
        )
    if not present:
        share = Share(tuple(whole(size) for size in members[0].shape))
        return RoleShares(headers[0].role, "the whole rows", None, members[0].shape, {headers[0].role_rank: share})
    dims = dims_of(present[0])
    if dims is not None:
        dims = replace(dims, dims=(_ROWS, *(dims.dims[dim] for dim in views[headers[0].role_rank].rest)))
    if present[0].runs is not None:
        return of_dtensors(members, present, dims)
    assert dims is not None
    return of_dims(members, present[0], dims)


def _of_one_row(layout: DeclaredLayout | None, view: RowView) -> DeclaredLayout | None:
    """What a DTensor says, without its rows. What a dims text says is looked at without them."""
    if layout is None or layout.runs is None or layout.global_shape is None:
        return layout
    runs, shape = layout.runs, layout.global_shape
    return layout.model_copy(
        update={
            "runs": (whole(1), *(runs[dim] for dim in view.rest)),
            "global_shape": (1, *(shape[dim] for dim in view.rest)),
        }
    )


# The shares of a tensor that the headers of one role declare.


def find_shares(headers: Sequence[Header], leaf: int) -> RoleShares | None:
    """None where this role declares nothing. Raises LayoutError where what its ranks declare does not fit together."""
    members = [member_of(header, leaf) for header in headers]
    present = declared_alike(members, [declared_of(header, leaf) for header in headers])
    if not present:
        return None
    if present[0].runs is not None:
        return _checked(of_dtensors(members, present, dims_of(present[0])))
    if present[0].boxes is not None:
        return _checked(_of_boxes(members, present))
    return _checked(of_dims(members, present[0], parse_dims(present[0].dims or "")))


def whole_tensor(header: Header, leaf: int) -> RoleShares:
    """A role of one rank that declares nothing: its tensor is the whole one."""
    shape = member_of(header, leaf).shape
    share = Share(tuple(whole(size) for size in shape))
    return _checked(RoleShares(header.role, "the whole tensor", None, shape, {header.role_rank: share}))


def member_of(header: Header, leaf: int) -> Member:
    shape = header.leaves[leaf].shape
    for size in shape:
        if not 0 <= size <= LARGEST_SIZE:
            raise LayoutError(f"{header.who} says that its tensor is {list(shape)}.")
    return Member(header.role, header.role_rank, header.axes, shape)


def declared_of(header: Header, leaf: int) -> DeclaredLayout | None:
    if header.layouts and len(header.layouts) != len(header.leaves):
        raise LayoutError(f"{header.who} has {len(header.leaves)} tensors and {len(header.layouts)} layouts.")
    return header.layouts[leaf] if header.layouts else None


def layouts_of(headers: Sequence[Header], leaf: int) -> dict[int, Layout] | None:
    """Every rank's layout as boxes, for a transform that wants to know; None where there is none that fits."""
    try:
        found = find_shares(headers, leaf)
        if found is None:
            return None
        return {rank: Layout(found.global_shape, boxes_of(share)) for rank, share in found.shares.items()}
    except LayoutError:
        return None
