"""Coverage: whether the senders of a point hold the whole of its tensor, each part once but for replicas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grafter.errors import LayoutError
from grafter.layout.space import Boxes, Component

# Pairs of boxes looked at in one go: bounds the memory of a check that is over all pairs.
_BLOCK = 1 << 20


def check_coverage(component: Component, lists: Sequence[tuple[Boxes, str]], who: str) -> None:
    """Raise LayoutError for a hole, or for parts that overlap without being the same. `lists`: the distinct shares of

    one component, each with a rank that holds it.
    """
    boxes = [(box, holder) for own, holder in lists for box in own]
    held = sum(_volume(box.sizes) for box, _ in boxes)
    overlap = _find_overlap([box.starts for box, _ in boxes], [box.sizes for box, _ in boxes])
    if overlap is not None:
        (one, first), (other, second) = boxes[overlap[0]], boxes[overlap[1]]
        raise LayoutError(
            f"parts of {who} overlap without being copies: {_text(component, one.starts, one.sizes)} at {first} and "
            f"{_text(component, other.starts, other.sizes)} at {second}. Each value needs one owner, or equal copies."
        )
    if held != component.volume:
        raise LayoutError(
            f"the parts of {who} leave a hole: they hold {held} of {component.volume} places of "
            f"{_names(component)}{_first_hole(component, boxes)}. All ranks that hold a part take part in the point."
        )


def _volume(sizes: Sequence[int]) -> int:
    volume = 1
    for size in sizes:
        volume *= size
    return volume


def _names(component: Component) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(component.names, component.sizes, strict=True))


def _text(component: Component, starts: Sequence[int], sizes: Sequence[int]) -> str:
    return ", ".join(
        f"{name} {start}:{start + size}" for name, start, size in zip(component.names, starts, sizes, strict=True)
    )


def _first_hole(component: Component, boxes: Sequence[tuple[object, str]]) -> str:
    """Where it begins, for one dim; a hole among several has no short name."""
    if len(component.names) != 1:
        return ""
    reached = 0
    for box, _ in sorted(boxes, key=lambda item: item[0].starts):  # type: ignore[attr-defined]
        start, size = box.starts[0], box.sizes[0]  # type: ignore[attr-defined]
        if start > reached:
            break
        reached = max(reached, start + size)
    return f" (nobody holds {component.names[0]} at {reached})"


def _find_overlap(starts: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """The numbers of two boxes that share a place, or None."""
    if len(starts) < 2:
        return None
    low = np.array(starts, dtype=np.int64)
    high = low + np.array(sizes, dtype=np.int64)
    order = np.lexsort(low.T[::-1])
    low, high = low[order], high[order]
    if low.shape[1] == 1:
        crossing = np.flatnonzero(low[1:, 0] < np.maximum.accumulate(high[:-1, 0]))
        if not len(crossing):
            return None
        later = int(crossing[0]) + 1
        earlier = int(np.argmax(high[:later, 0]))
        return int(order[earlier]), int(order[later])
    step = max(1, _BLOCK // len(low))
    for begin in range(0, len(low), step):
        rows = slice(begin, begin + step)
        shared = np.logical_and.reduce(
            [
                (low[rows, None, dim] < high[None, :, dim]) & (low[None, :, dim] < high[rows, None, dim])
                for dim in range(low.shape[1])
            ]
        )
        row_numbers = np.arange(begin, begin + shared.shape[0])
        shared[np.arange(shared.shape[0]), row_numbers] = False
        found = np.argwhere(shared)
        if len(found):
            return int(order[begin + found[0][0]]), int(order[found[0][1]])
    return None
