"""Resharding: which values of one tensor go from which sender to which receiver. Pure; every participant computes it.

    sender's share  x  receiver's share   in each component   ->   pieces: a region there, a region here

A rank asks only for the pieces that touch it. What is common to all (names, sizes, who holds what) is worked out once
for both manifests, in time linear in their ranks; the pieces of one rank in time linear in their number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

from grafter.errors import LayoutError
from grafter.layout.coverage import check_coverage
from grafter.layout.region import Region
from grafter.layout.shares import RoleShares, Share
from grafter.layout.space import Boxes, Component, Numbers, SideDims, Space, SpaceBox, find_space

# (sizes, where it begins in the sender's local dims, where in the receiver's), of one component.
_Shared = tuple[Numbers, Numbers, Numbers]
# For each component, the number of this rank's boxes among the distinct ones.
_Place = tuple[int, ...]
Near = Callable[[int, int], bool]


@dataclass(frozen=True)
class CopyItem:
    """Values that go from a sender to a receiver (role ranks). `layer`: which of the values that the receiver stages,

    where it gets several of the same part: the summands of a partial tensor, or replicas to be compared.
    """

    sender: int
    receiver: int
    layer: int
    source: Region
    place: Region


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
        if receiver.summands > 1 and not first_summand_gets_all:
            raise LayoutError(
                f"{receiver.text!r} at {receiver.who} is partial: its ranks hold summands, and a value has no one way "
                "to be shared out among them. Graft it after its reduction, or set GRAFTER_PARTIAL_TARGET=first: the "
                "first rank gets the value, the others zeros."
            )
        self.sender, self.receiver = sender, receiver
        self.space: Space = find_space(sender, receiver)
        self._tables = [_Table() for _ in self.space.components]
        self._senders = {rank: self._place(share, sender=True) for rank, share in sender.shares.items()}
        self._receivers = {
            rank: self._place(share, sender=False)
            for rank, share in receiver.shares.items()
            if receiver.summands == 1 or share.summand == 0
        }
        self._holders: dict[tuple[_Place, int], list[int]] = {}
        for rank, place in self._senders.items():
            self._holders.setdefault((place, sender.shares[rank].summand), []).append(rank)
        self._check_coverage()
        self._replicas = max(map(len, self._holders.values()), default=1) if check_replicas else 1
        for table in self._tables:
            table.index()

    @property
    def layers(self) -> int:
        """How many values a receiver stages: one, or one per summand, or one per replica that is compared."""
        return self.sender.summands * self._replicas

    @property
    def replicas(self) -> int:
        """How many copies of each part are compared; 1: none are."""
        return self._replicas

    def gets_zeros(self, receiver: int) -> bool:
        """A summand that is not the first: the value is the first's."""
        return receiver not in self._receivers

    def held_sizes(self, receiver: int, shape: Sequence[int]) -> Numbers:
        """The receiver's local shape without padding."""
        return self.space.held_sizes(self.receiver.shares[receiver], shape, sender=False)

    def incoming(self, receiver: int, near: Near) -> Iterator[CopyItem]:
        """What one receiver gets, from whom. `near(sender, receiver)`: whether the two share a host."""
        if receiver not in self._receivers:
            return
        place = self._receivers[receiver]
        touching = [table.senders_at(number) for table, number in zip(self._tables, place, strict=True)]
        for other in product(*touching):
            for summand in range(self.sender.summands):
                holders = self._holders.get((other, summand))
                if holders is not None:
                    for replica, sender in enumerate(self._chosen(other, holders, receiver, near)):
                        yield from self._items(sender, receiver, summand * self._replicas + replica)

    def outgoing(self, sender: int, near: Near) -> Iterator[CopyItem]:
        """What one sender gives, to whom: the same items that the receivers ask for."""
        place, summand = self._senders[sender], self.sender.shares[sender].summand
        holders = self._holders[place, summand]
        for receiver in self._takers(place):
            chosen = self._chosen(place, holders, receiver, near)
            for replica, one in enumerate(chosen):
                if one == sender:
                    yield from self._items(sender, receiver, summand * self._replicas + replica)

    # Who.

    def _chosen(self, place: _Place, holders: Sequence[int], receiver: int, near: Near) -> list[int]:
        """The replicas that serve a receiver: all of them to be compared, else one, near, and in turn."""
        if self._replicas > 1:
            return [holders[number % len(holders)] for number in range(self._replicas)]
        if len(holders) == 1:
            return [holders[0]]
        candidates = [holder for holder in holders if near(holder, receiver)] or holders
        return [candidates[self._turn(place)[receiver] % len(candidates)]]

    def _turn(self, place: _Place) -> dict[int, int]:
        turns = self._turns.get(place)
        if turns is None:
            turns = self._turns[place] = {receiver: turn for turn, receiver in enumerate(self._takers(place))}
        return turns

    @cached_property
    def _turns(self) -> dict[_Place, dict[int, int]]:
        return {}

    def _takers(self, place: _Place) -> list[int]:
        """The receivers that need something of a sender's place, in order."""
        touching = [set(table.receivers_at(number)) for table, number in zip(self._tables, place, strict=True)]
        return [
            rank
            for rank, own in self._receivers.items()
            if all(number in numbers for number, numbers in zip(own, touching, strict=True))
        ]

    # What.

    def _place(self, share: Share, *, sender: bool) -> _Place:
        numbers = []
        for component, table in zip(self.space.components, self._tables, strict=True):
            side = component.sender if sender else component.receiver
            key = share.boxes if share.boxes is not None else tuple(share.runs[dim] for dim in side.dims)
            numbers.append(table.number(key, partial(self.space.boxes, share, component, side), sender=sender))
        return tuple(numbers)

    def _items(self, sender: int, receiver: int, layer: int) -> Iterator[CopyItem]:
        theirs, ours = self._senders[sender], self._receivers[receiver]
        parts = [
            table.shared(component, number, own)
            for component, table, number, own in zip(self.space.components, self._tables, theirs, ours, strict=True)
        ]
        for combination in product(*parts):
            yield CopyItem(
                sender,
                receiver,
                layer,
                self._region(combination, sender=True),
                self._region(combination, sender=False),
            )

    def _region(self, parts: Sequence[_Shared], *, sender: bool) -> Region:
        side = self.sender if sender else self.receiver
        starts = [0] * len(side.global_shape)
        for component, part in zip(self.space.components, parts, strict=True):
            own = component.sender if sender else component.receiver
            for dim, start in zip(own.dims, part[1 if sender else 2], strict=True):
                starts[dim] = start
        sizes = tuple(parts[c][0][f] for c, f in self._order)
        sides = [component.sender if sender else component.receiver for component in self.space.components]
        along = tuple(sides[c].along[f] for c, f in self._order)
        steps = tuple(sides[c].steps[f] for c, f in self._order)
        return Region(tuple(starts), sizes, along, steps)

    @cached_property
    def _order(self) -> list[tuple[int, int]]:
        """All factors, as (component, factor), in the order of the receiver's dims, so that it is written in order."""
        places = [
            (component.receiver.along[f], -component.receiver.steps[f], c, f)
            for c, component in enumerate(self.space.components)
            for f in range(len(component.names))
        ]
        return [(c, f) for _, _, c, f in sorted(places)]

    def _check_coverage(self) -> None:
        holder_of: list[dict[int, int]] = [{} for _ in self._tables]
        for rank, place in self._senders.items():
            for own, number in zip(holder_of, place, strict=True):
                own.setdefault(number, rank)
        who = self.sender.who
        expected = self.sender.summands
        for component, table, own in zip(self.space.components, self._tables, holder_of, strict=True):
            lists = [(table.sender_boxes[number], f"{who} rank {rank}") for number, rank in own.items()]
            check_coverage(component, lists, f"{self.sender.text} at {who}")
            expected *= sum(1 for boxes, _ in lists if boxes)
        holding = sum(
            1
            for place, _ in self._holders
            if all(table.sender_boxes[number] for table, number in zip(self._tables, place, strict=True))
        )
        if holding != expected:
            raise LayoutError(
                f"the parts of {self.sender.text} at {who} leave a hole: its dims are cut into {expected} parts, and "
                f"the ranks of the point hold {holding} of them. All ranks that hold a part take part in the point."
            )


class _Table:
    """The distinct box lists of one component on both sides, and which of them share places."""

    def __init__(self) -> None:
        self.sender_boxes: list[Boxes] = []
        self.receiver_boxes: list[Boxes] = []
        self._numbers: tuple[dict[object, int], dict[object, int]] = ({}, {})
        self._shared: dict[tuple[int, int], list[_Shared]] = {}
        self._index: tuple[_Index, _Index] | None = None

    def number(self, key: object, make: Callable[[], Boxes], *, sender: bool) -> int:
        numbers, lists = self._numbers[sender], self.sender_boxes if sender else self.receiver_boxes
        number = numbers.get(key)
        if number is None:
            number = numbers[key] = len(lists)
            lists.append(make())
        return number

    def index(self) -> None:
        self._index = (_Index(self.sender_boxes), _Index(self.receiver_boxes))

    def senders_at(self, receiver: int) -> list[int]:
        assert self._index is not None
        return self._index[0].touching(self.receiver_boxes[receiver])

    def receivers_at(self, sender: int) -> list[int]:
        assert self._index is not None
        return self._index[1].touching(self.sender_boxes[sender])

    def shared(self, component: Component, sender: int, receiver: int) -> list[_Shared]:
        found = self._shared.get((sender, receiver))
        if found is None:
            found = self._shared[sender, receiver] = [
                part
                for theirs in self.sender_boxes[sender]
                for ours in self.receiver_boxes[receiver]
                if (part := _intersect(component, theirs, ours)) is not None
            ]
        return found


class _Index:
    """Finds the box lists that share a place with given boxes: by bisection along the first factor."""

    def __init__(self, lists: Sequence[Boxes]) -> None:
        entries = [(box.starts[0], box.starts[0] + box.sizes[0], n, box) for n, own in enumerate(lists) for box in own]
        entries.sort(key=lambda entry: entry[:3])
        self._entries = entries
        self._starts = [entry[0] for entry in entries]
        # The highest end so far: beyond it to the left, nothing reaches a place.
        self._reach: list[int] = []
        for entry in entries:
            self._reach.append(max(entry[1], self._reach[-1] if self._reach else 0))

    def touching(self, boxes: Boxes) -> list[int]:
        found: dict[int, None] = {}
        for box in boxes:
            low, high = box.starts[0], box.starts[0] + box.sizes[0]
            # Reach rises, so it can be searched, too.
            for entry in self._entries[bisect_right(self._reach, low) : bisect_right(self._starts, high - 1)]:
                if entry[1] > low and entry[2] not in found and _touch(box, entry[3]):
                    found[entry[2]] = None
        return sorted(found)


def _touch(one: SpaceBox, other: SpaceBox) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.starts, one.sizes, other.starts, other.sizes, strict=True)
    )


def _intersect(component: Component, theirs: SpaceBox, ours: SpaceBox) -> _Shared | None:
    starts = tuple(map(max, theirs.starts, ours.starts))
    sizes = tuple(
        min(a + n, b + m) - start
        for start, a, n, b, m in zip(starts, theirs.starts, theirs.sizes, ours.starts, ours.sizes, strict=True)
    )
    if any(size <= 0 for size in sizes):
        return None
    return sizes, _local(component.sender, theirs, starts), _local(component.receiver, ours, starts)


def _local(side: SideDims, box: SpaceBox, starts: Numbers) -> Numbers:
    """Where a place inside of a box lies in the local dims of a side."""
    local = dict(zip(side.dims, box.local, strict=True))
    for dim, step, begin, start in zip(side.along, side.steps, box.starts, starts, strict=True):
        local[dim] += (start - begin) * step
    return tuple(local[dim] for dim in side.dims)
