"""Meetings: within one component, which boxes of the senders share places with which boxes of the receivers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from grafter.core.layout.overlap import share_a_place
from grafter.core.layout.space import Boxes, Component, Numbers, SideDims, SpaceBox

if TYPE_CHECKING:
    from grafter.core.layout.space import Space


@dataclass(frozen=True)
class Shared:
    """What two boxes have in common: its sizes, and where it begins in the local dims of either side."""

    sizes: Numbers
    sender_starts: Numbers
    receiver_starts: Numbers


class Table:
    """The distinct box lists of one component on both sides, and what they share."""

    def __init__(self, component: Component) -> None:
        self._component = component
        self.senders, self.receivers = BoxLists(), BoxLists()
        self._by_sender: dict[int, dict[int, list[Shared]]] = {}
        self._by_receiver: dict[int, dict[int, list[Shared]]] = {}

    @cached_property
    def parts(self) -> list[int]:
        """For each list of the senders, the first that is the same part of the tensor, wherever it lies in memory."""
        first: dict[object, int] = {}
        return [
            first.setdefault(frozenset(box.part for box in boxes), number)
            for number, boxes in enumerate(self.senders.boxes)
        ]

    def met_by_receiver(self, number: int) -> dict[int, list[Shared]]:
        """What a receiver's list shares with each of the senders'."""
        if number not in self._by_receiver:
            ours = self.receivers.boxes[number]
            self._by_receiver[number] = {
                other: [self._share(self.senders.boxes[other][b], ours[a]) for b, a in sorted((b, a) for a, b in pairs)]
                for other, pairs in self.senders.meeting(ours).items()
            }
        return self._by_receiver[number]

    def met_by_sender(self, number: int) -> dict[int, list[Shared]]:
        """What a sender's list shares with each of the receivers', in the same order."""
        if number not in self._by_sender:
            theirs = self.senders.boxes[number]
            self._by_sender[number] = {
                other: [self._share(theirs[a], self.receivers.boxes[other][b]) for a, b in sorted(pairs)]
                for other, pairs in self.receivers.meeting(theirs).items()
            }
        return self._by_sender[number]

    def takes(self, number: int) -> npt.NDArray[np.bool_]:
        """For each of the receivers' lists, whether it needs something of a sender's."""
        taking = np.zeros(len(self.receivers.boxes), dtype=bool)
        taking[list(self.receivers.meeting(self.senders.boxes[number]))] = True
        return taking

    def _share(self, theirs: SpaceBox, ours: SpaceBox) -> Shared:
        starts = tuple(map(max, theirs.starts, ours.starts))
        sizes = tuple(
            min(a + n, b + m) - start
            for start, a, n, b, m in zip(starts, theirs.starts, theirs.sizes, ours.starts, ours.sizes, strict=True)
        )
        return Shared(
            sizes, _local(self._component.sender, theirs, starts), _local(self._component.receiver, ours, starts)
        )


def _local(side: SideDims, box: SpaceBox, starts: Numbers) -> Numbers:
    """Where a place inside of a box lies in the local dims of a side."""
    local = dict(zip(side.dims, box.local, strict=True))
    for dim, step, begin, start in zip(side.along, side.steps, box.starts, starts, strict=True):
        local[dim] += (start - begin) * step
    return tuple(local.values())


class BoxLists:
    """The distinct lists of boxes of one side. Finds those that meet given boxes by bisection along one factor."""

    def __init__(self) -> None:
        self.boxes: list[Boxes] = []
        self._numbers: dict[Boxes, int] = {}

    def number(self, boxes: Boxes) -> int:
        """The number of a list; of a new one, if it is new."""
        number = self._numbers.setdefault(boxes, len(self.boxes))
        if number == len(self.boxes):
            self.boxes.append(boxes)
        return number

    def meeting(self, boxes: Boxes) -> dict[int, list[tuple[int, int]]]:
        """The lists that share a place with `boxes`, in order; and of each, the pairs of (box of these, its box)."""
        found: dict[int, list[tuple[int, int]]] = {}
        entries, starts, reach, factor = self._index
        for own, box in enumerate(boxes):
            low = box.starts[factor]
            # What begins before the box ends, from the first on that reaches into it.
            for _, number, other in entries[
                bisect_right(reach, low) : bisect_right(starts, low + box.sizes[factor] - 1)
            ]:
                there = self.boxes[number][other]
                if share_a_place(box.starts, box.sizes, there.starts, there.sizes):
                    found.setdefault(number, []).append((own, other))
        return dict(sorted(found.items()))

    @cached_property
    def _index(self) -> tuple[list[tuple[int, int, int]], list[int], list[int], int]:
        """Boxes sorted by their start along the factor that has the most distinct starts.

        Returns the boxes as (start, number of the list, number of the box in it), their starts, the furthest end of all
        boxes up to each of them, and the factor.
        """
        every = [box for own in self.boxes for box in own]
        factors = range(len(every[0].starts)) if every else range(1)
        factor = max(factors, key=lambda number: len({box.starts[number] for box in every}))
        entries = sorted(
            (box.starts[factor], number, other)
            for number, own in enumerate(self.boxes)
            for other, box in enumerate(own)
        )
        reach: list[int] = []
        for start, number, other in entries:
            end = start + self.boxes[number][other].sizes[factor]
            reach.append(max(end, reach[-1]) if reach else end)
        return entries, [entry[0] for entry in entries], reach, factor


# A region: part of a tensor as a strided view, in the order of dims in which the receiver has it.


@dataclass(frozen=True)
class Region:
    """`sizes` of the region's dims; for each, the tensor's dim it runs along and how many steps of it one step takes.

    A fused dim (`h*d`) of the tensor serves two dims of a region: h with a step of the size of d, d with a step of 1.

        starts       where the region begins, per dim of the tensor
        sizes[i]     runs along the tensor's dim `along[i]`, `steps[i]` at a time
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    along: tuple[int, ...]
    steps: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of it; `tensor` has any strides."""
        strides = tensor.stride()
        offset = tensor.storage_offset() + sum(
            start * stride for start, stride in zip(self.starts, strides, strict=True)
        )
        return tensor.as_strided(
            self.sizes, [strides[dim] * step for dim, step in zip(self.along, self.steps, strict=True)], offset
        )


class Frame:
    """What all regions of one resharding have alike: the order of their dims, and how these run along the local ones.

    The factors of all components come in the order of the receiver's memory, so that it is written in order.
    """

    def __init__(self, space: Space, sender_ndim: int, receiver_ndim: int) -> None:
        sides = [[c.sender for c in space.components], [c.receiver for c in space.components]]
        along = [[dim for own in side for dim in own.along] for side in sides]
        steps = [[step for own in side for step in own.steps] for side in sides]
        # Factors, of one component after the other.
        self._order = sorted(range(len(along[1])), key=lambda factor: (along[1][factor], -steps[1][factor]))
        self._along = [tuple(own[factor] for factor in self._order) for own in along]
        self._steps = [tuple(own[factor] for factor in self._order) for own in steps]
        # For each local dim, the number of its start among those of all components' dims; -1, which is the zero after
        # them, for a dim of size 1 that is in none.
        self._starts = []
        for side, ndim in zip(sides, (sender_ndim, receiver_ndim), strict=True):
            listed = [dim for own in side for dim in own.dims]
            self._starts.append([listed.index(dim) if dim in listed else -1 for dim in range(ndim)])

    def regions(self, parts: Sequence[Shared]) -> tuple[Region, Region]:
        """Where what is shared in each component lies in the sender's tensor, and where in the receiver's."""
        sizes = [size for part in parts for size in part.sizes]
        there = [start for part in parts for start in part.sender_starts]
        here = [start for part in parts for start in part.receiver_starts]
        there.append(0)
        here.append(0)
        ordered = tuple([sizes[factor] for factor in self._order])
        return (
            Region(tuple([there[n] for n in self._starts[0]]), ordered, self._along[0], self._steps[0]),
            Region(tuple([here[n] for n in self._starts[1]]), ordered, self._along[1], self._steps[1]),
        )
