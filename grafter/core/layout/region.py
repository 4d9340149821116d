"""A region: part of a tensor as a strided view, in the order of dims in which the receiver has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from grafter.core.layout.meetings import Shared
    from grafter.core.layout.space import Space


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
