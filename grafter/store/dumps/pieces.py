"""Pieces: which part of the whole tensor each rank's local tensor holds, as boxes. Pure, and remembered.

    all ranks' shapes, layouts, axes  ->  shares (grafter.core.layout)  ->  one receiver that holds it all  ->  pieces

The recording is read as a graft would send it: to a role of one rank that holds the whole tensor without padding. So a
hole, an overlap, or ranks that do not fit together are found here as they are live, and in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.layout.dims import LARGEST_SIZE, Dim, Factor
from grafter.core.layout.runs import whole
from grafter.core.layout.shares import MOST_BOXES, RoleShares, Share
from grafter.core.leaves import TensorSpec
from grafter.core.messages.manifest import Header
from grafter.core.plan.resharding import Resharding
from grafter.core.plan.token_shares import find_shares, whole_tensor
from grafter.core.records import Role
from grafter.errors import LayoutError

_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LocalPart:
    """What one rank says of its part of a tensor. `shape` is the local one, `dtype` without `torch.`."""

    role_rank: int
    shape: tuple[int, ...]
    dtype: str
    device: str
    layout: DeclaredLayout | None
    axes: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Pieces:
    """The whole tensor's boxes.

    Parallel: row i of `starts` and `sizes` (in the whole tensor) and of `local` (where the box begins in the local
    tensor), `ranks[i]`, and `layers[i]`: the number of the summand, times `replicas`, plus the number of the copy.

    whole: a role of one rank that holds the whole tensor, with the names of its dims; for aligning it with another.
    resharding: None where nothing is declared; then each rank has it all, and `replicas` is how many have.
    """

    whole: RoleShares
    resharding: Resharding | None
    summands: int
    replicas: int
    starts: _Numbers
    sizes: _Numbers
    local: _Numbers
    ranks: _Numbers
    layers: _Numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.global_shape

    def within(self, offset: tuple[int, ...], size: tuple[int, ...]) -> _Numbers:
        """The rows of the pieces that share a place with a box."""
        if not self.shape:
            return np.arange(len(self.ranks))
        low = np.array(offset, dtype=np.int64)
        high = low + np.array(size, dtype=np.int64)
        meets = ((self.starts < high) & (low < self.starts + self.sizes)).all(axis=1)
        return np.flatnonzero(meets)


@lru_cache(maxsize=256)
def find_pieces(role: Role, parts: tuple[LocalPart, ...]) -> Pieces:
    """Parts of one tensor, one per rank, in the order of ranks. Raises LayoutError where they make none."""
    headers = [_header(role, part) for part in parts]
    for part in parts[1:]:
        if part.dtype != parts[0].dtype:
            raise LayoutError(
                f"the parts have two dtypes: {parts[0].dtype} at {role} rank {parts[0].role_rank}, {part.dtype} at "
                f"{role} rank {part.role_rank}. One tensor has one."
            )
    shares = find_shares(headers, 0)
    if shares is None:
        return _copies(headers)
    receiver = _whole_of(shares)
    resharding = Resharding(shares, receiver, check_replicas=True)
    found: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]] = []
    for item in resharding.incoming(0, lambda sender, receiver: True):
        if len(found) >= MOST_BOXES:
            raise LayoutError(f"{shares.text!r} at {role}: the tensor is in more than {MOST_BOXES} pieces.")
        # The receiver has the sender's dims, fused alike, so that a piece is a box of both.
        sizes = [1] * len(receiver.global_shape)
        for dim, extent in zip(item.place.along, item.place.sizes, strict=True):
            sizes[dim] = extent
        found.append((item.place.starts, tuple(sizes), item.source.starts, item.sender, item.layer))
    return _pieces(receiver, resharding, shares.summands, resharding.replicas, found)


def _header(role: Role, part: LocalPart) -> Header:
    return Header(
        role=role,
        role_rank=part.role_rank,
        participants=(part.role_rank,),
        direction="compare",
        call_site="",
        leaves=(TensorSpec(path="", shape=part.shape, dtype=part.dtype, device=part.device),),
        layouts=(part.layout,) if part.layout is not None else (),
        axes=part.axes,
    )


def _whole_of(shares: RoleShares) -> RoleShares:
    """One rank that holds it all, without padding."""
    sizes = list(shares.global_shape)
    dims: tuple[Dim, ...] | None = None
    if shares.dims is not None:
        dims = tuple(Dim(dim.factors) for dim in shares.dims)
        for number, dim in enumerate(dims):
            if len(dim.factors) == 1 and dim.factors[0].size is not None:
                sizes[number] = min(sizes[number], dim.factors[0].size)
    shape = tuple(sizes)
    share = Share(tuple(whole(size) for size in shape))
    return RoleShares(shares.who, shares.text, dims, shape, {0: share})


def _copies(headers: list[Header]) -> Pieces:
    """Nothing is declared: each rank has the whole tensor. Whether they have the same one, its values say."""
    shapes = {header.leaves[0].shape for header in headers}
    if len(shapes) > 1:
        first, other = headers[0], next(h for h in headers if h.leaves[0].shape != headers[0].leaves[0].shape)
        raise LayoutError(
            f"nothing says how the parts of {len(headers)} ranks make one tensor: {first.leaves[0]} at {first.who}, "
            f"{other.leaves[0]} at {other.who}. Declare dims= at the dump, or in a rule of the plan file."
        )
    receiver = whole_tensor(headers[0], 0)
    if prod(receiver.global_shape) > LARGEST_SIZE:
        raise LayoutError(f"no tensor is of {list(receiver.global_shape)}.")
    nothing = (0,) * len(receiver.global_shape)
    found = [
        (nothing, receiver.global_shape, nothing, header.role_rank, layer)
        for layer, header in enumerate(headers)
        if all(receiver.global_shape)
    ]
    return _pieces(replace(receiver, shares={0: receiver.shares[headers[0].role_rank]}), None, 1, len(headers), found)


def _pieces(
    receiver: RoleShares,
    resharding: Resharding | None,
    summands: int,
    replicas: int,
    found: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]],
) -> Pieces:
    ndim = len(receiver.global_shape)
    columns = list(zip(*found, strict=True)) or [(), (), (), (), ()]
    boxes = [np.array(column, dtype=np.int64).reshape(len(found), ndim) for column in columns[:3]]
    ranks, layers = (np.array(column, dtype=np.int64) for column in columns[3:])
    return Pieces(receiver, resharding, summands, replicas, boxes[0], boxes[1], boxes[2], ranks, layers)


def named_dims(pieces: Pieces) -> tuple[str, ...] | None:
    """The name of each dim, `(h*d)` for a fused one and `1` for one of size 1 without a name; None without names."""
    return None if pieces.whole.dims is None else tuple(str(Dim(_bare(dim))) for dim in pieces.whole.dims)


def _bare(dim: Dim) -> tuple[Factor, ...]:
    return tuple(Factor(factor.name) for factor in dim.factors)
