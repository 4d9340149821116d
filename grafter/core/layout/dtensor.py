"""The layout of a DTensor, read from its mesh and placements, without an annotation by the user.

`compute_local_shape_and_global_offset` is not enough, since a strided shard (FSDP2 over tensor parallel) has several
runs. Each placement, in mesh order, splits the index range instead, as torch splits the values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from grafter.core.layout.runs import Runs, cut, from_parts, total, whole
from grafter.errors import LayoutError

REDUCTIONS = ("sum", "avg", "max", "min", "product")


@dataclass(frozen=True)
class DTensorLayout:
    """The facts that a DTensor gives about itself.

    runs: for each dim. place: this rank's coordinate on the mesh. mesh: a digest of its shape and ranks. summand:
    (reduction, which of the summands this rank holds, how many there are), if it is partial.
    """

    global_shape: tuple[int, ...]
    runs: tuple[Runs, ...]
    place: tuple[int, ...]
    mesh: str
    summand: tuple[str, int, int] | None


def read_dtensor(tensor: Any) -> DTensorLayout:
    """The layout of a DTensor. Raises LayoutError for one that grafter cannot interpret. Nothing is communicated."""
    spec, local = tensor._spec, tensor._local_tensor
    mesh = spec.mesh
    place = mesh.get_coordinate()
    if place is None:
        raise LayoutError(
            "this rank is not in the mesh of its DTensor, so it holds nothing of it. Leave it out: ranks=."
        )
    from torch.distributed.tensor import Replicate

    _check_order(spec)
    runs = [whole(size) for size in spec.shape]
    summand: tuple[str, int, int] | None = None
    for number, placement in enumerate(spec.placements):
        coordinate, size = place[number], mesh.size(number)
        reduction = _reduction(placement)
        if reduction is not None:
            summand = _join_summands(summand, reduction, coordinate, size)
        elif type(placement) is not Replicate:
            dim, factor = _shard_of(placement, len(runs))
            runs[dim] = _split(runs[dim], factor, size)[coordinate]
    held = [total(own) for own in runs]
    if held != list(local.shape):
        raise LayoutError(
            f"a DTensor of global shape {list(spec.shape)} with {_text(spec.placements)} has {held} on this rank, but "
            f"its local tensor has {list(local.shape)}. It was made by `from_local` of uneven shards, probably: give "
            "`from_local` the true shape= and stride=."
        )
    ranks = ",".join(map(str, mesh.mesh.flatten().tolist()))
    digest = hashlib.blake2b(f"{tuple(mesh.mesh.shape)}:{ranks}".encode(), digest_size=8).hexdigest()
    return DTensorLayout(tuple(spec.shape), tuple(runs), tuple(place), digest, summand)


def _split(runs: Runs, factor: int, count: int) -> list[Runs]:
    """The runs at each coordinate: `factor` chunks (1 unless strided), each cut into `count`, of which coordinate k has
    the k-th."""
    parts: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for begin, end in _chunks(0, total(runs), factor):
        for coordinate, (low, high) in enumerate(_chunks(begin, end, count)):
            parts[coordinate] += cut(runs, low, high)
    return [from_parts(own) for own in parts]


def _chunks(begin: int, end: int, count: int) -> list[tuple[int, int]]:
    """The ranges of `torch.chunk`, followed by empty ones if it gives fewer than `count`."""
    step = -(-(end - begin) // count)
    return [(min(begin + number * step, end), min(begin + (number + 1) * step, end)) for number in range(count)]


def _shard_of(placement: Any, ndim: int) -> tuple[int, int]:
    """(dim, split factor). Exact types are compared: before torch 2.13, a strided shard is a subclass of Shard."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if type(placement) is _StridedShard:
        return placement.dim % ndim, int(placement.split_factor)
    if type(placement) is Shard:
        return placement.dim % ndim, 1
    raise LayoutError(
        f"a DTensor has the placement {placement!r} of the class {type(placement).__name__}, which grafter does not "
        "know. Redistribute it to Shard or Replicate before this point, or dump its local tensor with dims=."
    )


def _reduction(placement: Any) -> str | None:
    from torch.distributed.tensor import Partial

    if not isinstance(placement, Partial):
        return None
    if type(placement) is not Partial or placement.reduce_op not in REDUCTIONS:
        raise LayoutError(
            f"a DTensor has the placement {placement!r}, whose reduction grafter does not know. Redistribute it to "
            "Shard or Replicate before this point."
        )
    return str(placement.reduce_op)


def _join_summands(
    summand: tuple[str, int, int] | None, reduction: str, coordinate: int, size: int
) -> tuple[str, int, int]:
    if summand is None:
        return reduction, coordinate, size
    if summand[0] != reduction:
        raise LayoutError(f"a DTensor is partial by {summand[0]} and by {reduction} at once; redistribute it before.")
    return reduction, summand[1] * size + coordinate, summand[2] * size


def _check_order(spec: Any) -> None:
    order = getattr(spec, "shard_order", None)
    is_default = getattr(type(spec), "is_default_device_order", None)
    if order is not None and is_default is not None and not is_default(order):
        raise LayoutError(
            f"a DTensor ({_text(spec.placements)}) is sharded in another order than that of its mesh ({order}). "
            "Redistribute it to the default order before this point."
        )


def _text(placements: Any) -> str:
    return f"[{', '.join(map(repr, placements))}]"
