"""Common dims: what both sides call their dims, and the global sizes of these. LayoutError where they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from grafter.core.layout.dims import Dim, Factor
from grafter.core.layout.shares import RoleShares
from grafter.errors import LayoutError


def named_alike(sender: RoleShares, receiver: RoleShares) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """The dims of both sides, all of them with names. Raises LayoutError where the names differ."""
    if sender.dims is not None and receiver.dims is not None:
        sent = {name for dim in sender.dims for name in dim.names}
        there = {name for dim in receiver.dims for name in dim.names}
        if sent != there:
            raise LayoutError(
                f"the dims have different names: {_list(sent - there)} only at {sender.who} ({sender.text!r}), "
                f"{_list(there - sent)} only at {receiver.who} ({receiver.text!r}). Name them alike on both sides; a "
                "dim of size 1 that one side lacks is written `1`."
            )
        return sender.dims, receiver.dims
    if sender.dims is None and receiver.dims is None:
        return _by_position(sender, receiver)
    if sender.dims is not None:
        return sender.dims, _borrowed(receiver, sender)
    assert receiver.dims is not None
    return _borrowed(sender, receiver), receiver.dims


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _by_position(sender: RoleShares, receiver: RoleShares) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    ours, theirs = list(sender.global_shape), list(receiver.global_shape)
    if len(ours) != len(theirs) and [n for n in ours if n != 1] != [n for n in theirs if n != 1]:
        raise LayoutError(
            f"the global shapes are {ours} at {sender.who} and {theirs} at {receiver.who}, and their dims have no "
            "names. Name the dims with dims= on both sides."
        )
    same = len(ours) == len(theirs)

    def named(shape: list[int]) -> tuple[Dim, ...]:
        dims, number = [], 0
        for size in shape:
            if size == 1 and not same:
                dims.append(Dim(()))
                continue
            dims.append(Dim((Factor(f"dim {number}"),)))
            number += 1
        return tuple(dims)

    return named(ours), named(theirs)


def _borrowed(unnamed: RoleShares, named: RoleShares) -> tuple[Dim, ...]:
    """The dims of a side that has no names for them, with the names of the other side, in its order."""
    assert named.dims is not None
    real = [Dim(_without_sizes(dim)) for dim in named.dims if dim.factors]
    shape = unnamed.global_shape
    if len(shape) == len(named.dims):
        lent = [Dim(_without_sizes(dim)) for dim in named.dims]
    elif len(shape) == len(real):
        lent = real
    else:
        raise LayoutError(
            f"{named.who} has the dims {named.text!r}, and {unnamed.who} ({unnamed.text}) has {len(shape)} dims "
            f"without names: {list(shape)}. Name them with dims=, too."
        )
    for dim, size in zip(lent, shape, strict=True):
        if not dim.factors and size != 1:
            raise LayoutError(
                f"{named.who} has the dims {named.text!r}, and {unnamed.who} has {list(shape)}: size {size} where the "
                "other has 1. Name its dims with dims=."
            )
    return tuple(lent)


def fused_alike(sending: Sequence[Dim], receiving: Sequence[Dim]) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """The dims of both sides, where those that both fuse alike become one factor of the name `(h*d)`."""
    both = {dim.names for dim in sending} & {dim.names for dim in receiving}

    def as_one(dim: Dim) -> Dim:
        return Dim((Factor(str(dim)),)) if len(dim.factors) > 1 and dim.names in both else dim

    return tuple(map(as_one, sending)), tuple(map(as_one, receiving))


def _without_sizes(dim: Dim) -> tuple[Factor, ...]:
    return tuple(Factor(factor.name) for factor in dim.factors)


class GlobalSizes:
    """The known global sizes of factors, and which side said each."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, str]] = {}

    def learn(self, side: RoleShares, dims: Sequence[Dim]) -> None:
        """Add the sizes that a side declares, or holds. Raises LayoutError for a contradiction."""
        for dim, size in zip(dims, side.global_shape, strict=True):
            for factor in dim.factors:
                if factor.size is not None:
                    self._set(factor.name, factor.size, f"{side.text!r} at {side.who}")
            if len(dim.factors) == 1:
                factor = dim.factors[0]
                if factor.size is not None and factor.size > size:
                    raise LayoutError(
                        f"{side.text!r} says that {factor.name} is {factor.size}, and the ranks of {side.who} hold "
                        f"only {size} of it together."
                    )
                self._set(factor.name, factor.size or size, f"the shards at {side.who}")
            elif not dim.factors and size != 1:
                raise LayoutError(f"{side.text!r} says that a dim is 1, and it is {size} at {side.who}.")

    def _set(self, name: str, size: int, who: str) -> None:
        known, before = self.known.setdefault(name, (size, who))
        if known != size:
            larger, smaller = max(known, size), min(known, size)
            padded = (
                f" If {name} is split over the ranks there, mark it: `{name}[tp]`. If {larger} is padded, declare the "
                f"true size there: `{name}={smaller}`."
            )
            raise LayoutError(
                f"the sizes of {name} disagree: {known} ({before}) and {size} ({who})."
                f"{padded if name.isidentifier() and smaller else ''}"
            )

    def solve(self, sides: Sequence[tuple[RoleShares, Sequence[Dim]]]) -> None:
        """Work out sizes from fused dims of which all factors but one are known, until none is new.

        Raises LayoutError for a contradiction.
        """
        every = [(side, dim, size) for side, dims in sides for dim, size in zip(dims, side.global_shape, strict=True)]
        fused = [(side, dim, size) for side, dim, size in every if len(dim.factors) > 1]
        while sum(self._solve_one(*one) for one in fused):
            pass

    def _solve_one(self, side: RoleShares, dim: Dim, size: int) -> bool:
        """Whether a fused dim gave the size of a factor that was unknown before."""
        unknown = [name for name in dim.names if name not in self.known]
        if len(unknown) > 1:
            return False
        inside = prod(self.known[name][0] for name in dim.names if name not in unknown)
        if (inside == 0 or size % inside) if unknown else size != inside:
            known = ", ".join(f"{n}={self.known[n][0]} ({self.known[n][1]})" for n in dim.names if n in self.known)
            raise LayoutError(f"{dim} is {size} at {side.who}, which does not fit {known}.")
        if unknown:
            self._set(unknown[0], size // inside, f"{dim} at {side.who}")
        return bool(unknown)
