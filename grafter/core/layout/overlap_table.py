"""The overlap table: within one component, which boxes of the senders overlap which boxes of the receivers."""

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
from grafter.core.layout.runs import Numbers
from grafter.core.layout.space import Boxes, Component, SideDims, SpaceBox

if TYPE_CHECKING:
    from grafter.core.layout.space import Space


@dataclass(frozen=True)
class Overlap:
    """What two boxes have in common: its sizes, and where it begins in the local dims of each side."""

    sizes: Numbers
    sender_starts: Numbers
    receiver_starts: Numbers


class OverlapTable:
    """The distinct box lists of one component on both sides, and their overlaps, computed when first asked for."""

    def __init__(self, component: Component) -> None:
        self._component = component
        self.senders, self.receivers = BoxLists(), BoxLists()
        self._by_sender: dict[int, dict[int, list[Overlap]]] = {}
        self._by_receiver: dict[int, dict[int, list[Overlap]]] = {}

    @cached_property
    def parts(self) -> list[int]:
        """For each list of the senders, the first one that is the same part of the tensor, wherever in memory."""
        first: dict[object, int] = {}
        return [
            first.setdefault(frozenset(box.part for box in boxes), number)
            for number, boxes in enumerate(self.senders.boxes)
        ]

    def overlaps_of_receiver(self, number: int) -> dict[int, list[Overlap]]:
        """The overlaps of a receiver's list with each of the senders' lists."""
        if number not in self._by_receiver:
            ours = self.receivers.boxes[number]
            self._by_receiver[number] = {
                other: [
                    self._overlap(self.senders.boxes[other][b], ours[a]) for b, a in sorted((b, a) for a, b in pairs)
                ]
                for other, pairs in self.senders.overlapping(ours).items()
            }
        return self._by_receiver[number]

    def overlaps_of_sender(self, number: int) -> dict[int, list[Overlap]]:
        """The overlaps of a sender's list with each of the receivers' lists, in the same order."""
        if number not in self._by_sender:
            theirs = self.senders.boxes[number]
            self._by_sender[number] = {
                other: [self._overlap(theirs[a], self.receivers.boxes[other][b]) for a, b in sorted(pairs)]
                for other, pairs in self.receivers.overlapping(theirs).items()
            }
        return self._by_sender[number]

    def receivers_of(self, number: int) -> npt.NDArray[np.bool_]:
        """For each of the receivers' lists, whether it overlaps a sender's list."""
        taking = np.zeros(len(self.receivers.boxes), dtype=bool)
        taking[list(self.receivers.overlapping(self.senders.boxes[number]))] = True
        return taking

    def _overlap(self, theirs: SpaceBox, ours: SpaceBox) -> Overlap:
        starts = tuple(map(max, theirs.starts, ours.starts))
        sizes = tuple(
            min(a + n, b + m) - start
            for start, a, n, b, m in zip(starts, theirs.starts, theirs.sizes, ours.starts, ours.sizes, strict=True)
        )
        return Overlap(
            sizes, _local(self._component.sender, theirs, starts), _local(self._component.receiver, ours, starts)
        )


def _local(side: SideDims, box: SpaceBox, starts: Numbers) -> Numbers:
    """The index, in the local dims of a side, of a place inside a box."""
    local = dict(zip(side.dims, box.local, strict=True))
    for dim, step, begin, start in zip(side.along, side.steps, box.starts, starts, strict=True):
        local[dim] += (start - begin) * step
    return tuple(local.values())


class BoxLists:
    """The distinct lists of boxes of one side. Those that overlap given boxes are found by bisection."""

    def __init__(self) -> None:
        self.boxes: list[Boxes] = []
        self._numbers: dict[Boxes, int] = {}

    def number(self, boxes: Boxes) -> int:
        """The number of a list, which is added if it is new."""
        number = self._numbers.setdefault(boxes, len(self.boxes))
        if number == len(self.boxes):
            self.boxes.append(boxes)
        return number

    def overlapping(self, boxes: Boxes) -> dict[int, list[tuple[int, int]]]:
        """The lists that overlap `boxes`, in order, each with its pairs of (number in `boxes`, number in the list)."""
        found: dict[int, list[tuple[int, int]]] = {}
        entries, starts, reach, factor = self._index
        for own, box in enumerate(boxes):
            low = box.starts[factor]
            # The boxes that begin before this one ends, from the first one that reaches into it.
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


@dataclass(frozen=True)
class StridedRegion:
    """A part of a tensor as a strided view, with dims in the order of the receiver's memory.

    A fused dim (`h*d`) of the tensor gives two dims of the region: h with steps of the size of d, d with steps of 1.

        starts       where the region begins, per dim of the tensor
        sizes[i]     runs along the tensor's dim `along[i]`, `steps[i]` at a time
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    along: tuple[int, ...]
    steps: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a tensor with any strides."""
        strides = tensor.stride()
        offset = tensor.storage_offset() + sum(
            start * stride for start, stride in zip(self.starts, strides, strict=True)
        )
        return tensor.as_strided(
            self.sizes, [strides[dim] * step for dim, step in zip(self.along, self.steps, strict=True)], offset
        )


class RegionMaker:
    """Makes the regions of one resharding, which share the order of their dims and how these run along the local dims.

    The factors of all components are in the order of the receiver's memory, so that it is written in order.
    """

    def __init__(self, space: Space, sender_ndim: int, receiver_ndim: int) -> None:
        sides = [[c.sender for c in space.components], [c.receiver for c in space.components]]
        along = [[dim for own in side for dim in own.along] for side in sides]
        steps = [[step for own in side for step in own.steps] for side in sides]
        # The factors of all components, renumbered.
        self._order = sorted(range(len(along[1])), key=lambda factor: (along[1][factor], -steps[1][factor]))
        self._along = [tuple(own[factor] for factor in self._order) for own in along]
        self._steps = [tuple(own[factor] for factor in self._order) for own in steps]
        # For each local dim, the number of its start among those of all components' dims; -1, the zero after them, for
        # a dim of size 1 that is in no component.
        self._starts = []
        for side, ndim in zip(sides, (sender_ndim, receiver_ndim), strict=True):
            listed = [dim for own in side for dim in own.dims]
            self._starts.append([listed.index(dim) if dim in listed else -1 for dim in range(ndim)])

    def regions(self, parts: Sequence[Overlap]) -> tuple[StridedRegion, StridedRegion]:
        """The region of the sender's tensor and that of the receiver's. parts: one overlap for each component."""
        sizes = [size for part in parts for size in part.sizes]
        there = [start for part in parts for start in part.sender_starts]
        here = [start for part in parts for start in part.receiver_starts]
        there.append(0)
        here.append(0)
        ordered = tuple([sizes[factor] for factor in self._order])
        return (
            StridedRegion(tuple([there[n] for n in self._starts[0]]), ordered, self._along[0], self._steps[0]),
            StridedRegion(tuple([here[n] for n in self._starts[1]]), ordered, self._along[1], self._steps[1]),
        )
