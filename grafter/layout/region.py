"""A region: part of a tensor as a strided view, in the order of dims in which the receiver has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
