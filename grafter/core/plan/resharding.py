"""Resharding: which values of one tensor go from which sender to which receiver. Pure; every participant computes it.

    sender's share  x  receiver's share   in each component   ->   pieces: a region there, a region here

A rank asks only for the pieces that touch it. What is common to all (names, sizes, who holds what) is worked out once
for both manifests, in time linear in their ranks; the pieces of one rank in time linear in their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt

from grafter.core.layout.coverage import Place, check_coverage, places, places_by_box
from grafter.core.layout.overlap_table import Frame, Region, Shared, Table
from grafter.core.layout.shares import RoleShares, Share
from grafter.core.layout.space import Numbers, Space, find_space
from grafter.core.messages.manifest import Header
from grafter.core.plan.token_shares import find_shares, whole_tensor
from grafter.errors import LayoutError

# A part of the tensor, whichever ranks hold it: as a place, the lowest of the numbers that are the same part.
_Part = tuple[int, ...]
Near = Callable[[int, int], bool]


@dataclass(frozen=True)
class CopyItem:
    """Values that go from a sender to a receiver (role ranks).

    `layer`: which of the values that the receiver stages, if it gets several of the same part: the summands of a
    partial tensor, or replicas to be compared.
    """

    sender: int
    receiver: int
    layer: int
    source: Region
    place: Region


@dataclass(frozen=True)
class _Holder:
    """A rank that has a part, and where among its boxes."""

    rank: int
    place: Place


class Resharding:
    """One tensor between two roles. Role ranks everywhere; raises LayoutError where the two do not fit."""

    def __init__(
        self,
        sender: RoleShares,
        receiver: RoleShares,
        *,
        check_replicas: bool = False,
        first_summand_gets_all: bool = False,
    ) -> None:
        _check_receiver(receiver, first_summand_gets_all=first_summand_gets_all)
        self.sender, self.receiver = sender, receiver
        self.space: Space = find_space(sender, receiver)
        self._tables = [Table(component) for component in self.space.components]
        self._senders: dict[int, list[Place]] = {}
        if self._tables and any(share.boxes is not None for share in sender.shares.values()):
            self._senders.update(places_by_box(sender, self.space, self._tables[0]))
        else:
            self._senders.update(
                (rank, [place]) for rank, place in places(sender, self.space, self._tables, sender=True)
            )
        self._receivers = {
            rank: place
            for rank, place in places(receiver, self.space, self._tables, sender=False)
            if not self.gets_zeros(rank)
        }
        self._holders: dict[tuple[_Part, int], list[_Holder]] = {}
        for rank, held in self._senders.items():
            for place in held:
                key = self._part(place), sender.shares[rank].summand
                self._holders.setdefault(key, []).append(_Holder(rank, place))
        self._check_coverage()
        for share in receiver.shares.values() if self.space.padded else ():
            self.space.held_sizes(share, receiver.global_shape)
        self._replicas = max(map(len, self._holders.values()), default=1) if check_replicas else 1
        self._check_replicas = check_replicas

    @property
    def layers(self) -> int:
        """How many values a receiver stages: one, or one per summand, or one per replica that is compared."""
        return self.sender.summands * self._replicas

    @property
    def replicas(self) -> int:
        """How many copies of each part are compared; 1: none are."""
        return self._replicas

    def copies_with(self, receiver: int) -> tuple[int, ...]:
        """The receivers, this one among them, that hold the same part and are to be compared; empty where none are."""
        return self._copies_of.get(receiver, ())

    @cached_property
    def _copies_of(self) -> dict[int, tuple[int, ...]]:
        alike: dict[Share, list[int]] = {}
        for rank in self._receivers if self._check_replicas else ():
            alike.setdefault(self.receiver.shares[rank], []).append(rank)
        return {rank: tuple(ranks) for ranks in alike.values() if len(ranks) > 1 for rank in ranks}

    def gets_zeros(self, receiver: int) -> bool:
        """A summand that is not the first: the value is the first's."""
        return self.receiver.shares[receiver].summand > 0

    def held_sizes(self, receiver: int, shape: Sequence[int]) -> Numbers:
        """The receiver's local shape without padding."""
        return self.space.held_sizes(self.receiver.shares[receiver], shape)

    def incoming(self, receiver: int, near: Near) -> Iterator[CopyItem]:
        """What one receiver gets, from whom. `near(sender, receiver)`: whether the two share a host."""
        if receiver not in self._receivers:
            return
        numbers = self._receivers[receiver]
        met = [table.met_by_receiver(number) for table, number in zip(self._tables, numbers, strict=True)]
        parts = [sorted({table.parts[number] for number in own}) for table, own in zip(self._tables, met, strict=True)]
        for part in product(*parts):
            for summand in range(self.sender.summands):
                holders = self._holders.get((part, summand), ())
                for replica, holder in enumerate(self._serving(part, holders, receiver, near) if holders else ()):
                    shared = [own[number] for own, number in zip(met, holder.place, strict=True)]
                    layer = summand * self._replicas + replica
                    yield from self._items(holder.rank, receiver, layer, shared)

    def outgoing(self, sender: int, near: Near) -> Iterator[CopyItem]:
        """What one sender gives, to whom: the same items that the receivers ask for, in their order for each."""
        summand = self.sender.shares[sender].summand
        for place in sorted(self._senders.get(sender, ()), key=self._part):
            met = [table.met_by_sender(number) for table, number in zip(self._tables, place, strict=True)]
            for receiver, replica in self._served(sender, self._part(place), summand, near):
                numbers = self._receivers[receiver]
                shared = [own[number] for own, number in zip(met, numbers, strict=True)]
                yield from self._items(sender, receiver, summand * self._replicas + replica, shared)

    # Who.

    def _serving(self, part: _Part, holders: Sequence[_Holder], receiver: int, near: Near) -> list[_Holder]:
        """The replicas that serve a receiver: all of them to be compared, else one, near, and in turn."""
        if self._replicas > 1:
            return [holders[number % len(holders)] for number in range(self._replicas)]
        if len(holders) == 1:
            return [holders[0]]
        candidates = [holder for holder in holders if near(holder.rank, receiver)] or holders
        turn = int(np.searchsorted(self._takers(part), self._rows[receiver]))
        return [candidates[turn % len(candidates)]]

    def _served(self, sender: int, part: _Part, summand: int, near: Near) -> Iterator[tuple[int, int]]:
        """The receivers that a sender serves with a part, and as which of its replicas; as `_serving` has it."""
        holders = [holder.rank for holder in self._holders[part, summand]]
        near_holders: list[int] = []
        for turn, row in enumerate(self._takers(part)):
            receiver = self._receiver_ranks[row]
            if self._replicas > 1:
                yield from (
                    (receiver, replica)
                    for replica in range(self._replicas)
                    if holders[replica % len(holders)] == sender
                )
            elif len(holders) == 1:
                yield receiver, 0
            elif near(sender, receiver):
                # The same for all receivers on this host.
                near_holders = near_holders or [holder for holder in holders if near(holder, receiver)]
                if near_holders[turn % len(near_holders)] == sender:
                    yield receiver, 0
            elif holders[turn % len(holders)] == sender and not any(near(holder, receiver) for holder in holders):
                yield receiver, 0

    def _takers(self, part: _Part) -> npt.NDArray[np.int64]:
        """The receivers that need something of a part, in order, as rows of `_receiver_ranks`."""
        taking = self._takers_of.get(part)
        if taking is None:
            mask = np.ones(len(self._receiver_ranks), dtype=bool)
            for table, number, column in zip(self._tables, part, self._receiver_numbers, strict=True):
                mask &= table.takes(number)[column]
            taking = self._takers_of[part] = np.flatnonzero(mask)
        return taking

    @cached_property
    def _takers_of(self) -> dict[_Part, npt.NDArray[np.int64]]:
        return {}

    @cached_property
    def _receiver_ranks(self) -> list[int]:
        return list(self._receivers)

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {rank: row for row, rank in enumerate(self._receiver_ranks)}

    @cached_property
    def _receiver_numbers(self) -> list[npt.NDArray[np.int64]]:
        """Per component, the number of each receiver's boxes."""
        return [np.array(column, dtype=np.int64) for column in zip(*self._receivers.values(), strict=True)]

    # What.

    def _part(self, place: Place) -> _Part:
        return tuple([table.parts[number] for table, number in zip(self._tables, place, strict=True)])

    def _items(self, sender: int, receiver: int, layer: int, shared: Sequence[Sequence[Shared]]) -> Iterator[CopyItem]:
        for combination in product(*shared):
            yield CopyItem(sender, receiver, layer, *self._frame.regions(combination))

    @cached_property
    def _frame(self) -> Frame:
        return Frame(self.space, len(self.sender.global_shape), len(self.receiver.global_shape))

    def _check_coverage(self) -> None:
        if not all(component.volume for component in self.space.components):
            # A tensor without values, of which nobody holds anything.
            return
        holder_of: list[dict[int, int]] = [{} for _ in self._tables]
        for (part, _), holders in self._holders.items():
            for own, number in zip(holder_of, part, strict=True):
                own.setdefault(number, holders[0].rank)
        who, expected = self.sender.who, self.sender.summands
        for component, table, own in zip(self.space.components, self._tables, holder_of, strict=True):
            lists = [(table.senders.boxes[number], f"{who} rank {rank}") for number, rank in own.items()]
            check_coverage(component, lists, f"{self.sender.text} at {who}")
            expected *= len(own)
        if len(self._holders) != expected:
            missing = next(
                (part, summand)
                for part in product(*holder_of)
                for summand in range(self.sender.summands)
                if (part, summand) not in self._holders
            )
            raise LayoutError(
                f"the parts of {self.sender.text} at {who} leave a hole: it is cut into {expected} parts, the ranks of "
                f"the point hold {len(self._holders)} of them, and nobody holds {self._named(*missing)}. All ranks "
                "that hold a part take part in the point."
            )

    def _named(self, part: _Part, summand: int) -> str:
        boxes = [
            component.place(table.senders.boxes[number][0])
            for component, table, number in zip(self.space.components, self._tables, part, strict=True)
        ]
        return ", ".join([*boxes, *([f"summand {summand}"] if self.sender.summands > 1 else [])]) or "the value"


def _check_receiver(receiver: RoleShares, *, first_summand_gets_all: bool) -> None:
    if receiver.summands == 1:
        return
    if not first_summand_gets_all:
        raise LayoutError(
            f"{receiver.text!r} at {receiver.who} is partial: its ranks hold summands, and a value has no one way "
            "to be shared out among them. Graft it after its reduction, or set GRAFTER_PARTIAL_TARGET=first: the "
            "first rank gets the value, the others zeros."
        )
    if receiver.reduction != "sum":
        raise LayoutError(
            f"{receiver.text!r} at {receiver.who} is partial by {receiver.reduction}, and a value and zeros have it "
            "only as their sum. Graft it after its reduction."
        )


# What goes where of one leaf, as the layouts of both sides say. Pure.


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
