"""Coverage: whether the senders of a point hold the whole of its tensor, each part once but for replicas."""

from __future__ import annotations

from collections.abc import Sequence

from grafter.core.layout.overlap import find_overlap
from grafter.core.layout.space import Boxes, Component, SpaceBox
from grafter.errors import LayoutError


def check_coverage(component: Component, lists: Sequence[tuple[Boxes, str]], who: str) -> None:
    """Raise LayoutError for a region that no rank covers, or for parts that overlap without being the same.

    `lists`: the distinct shares of one component, each with a rank that holds it.
    """
    boxes = [(box, holder) for own, holder in lists for box in own]
    overlap = find_overlap([box.starts for box, _ in boxes], [box.sizes for box, _ in boxes])
    if overlap is not None:
        (one, first), (other, second) = boxes[overlap[0]], boxes[overlap[1]]
        raise LayoutError(
            f"parts of {who} overlap without being copies: {component.place(one)} at {first} and "
            f"{component.place(other)} at {second}. Each value needs one owner, or equal copies."
        )
    held = sum(box.volume for box, _ in boxes)
    if held != component.volume:
        hole = _first_hole([box for box, _ in boxes], component.sizes)
        where = ", ".join(f"{name} at {at}" for name, at in zip(component.names, hole, strict=True))
        raise LayoutError(
            f"the parts of {who} leave a hole: they hold {held} of {component.volume} places of "
            f"{' x '.join(f'{n}={s}' for n, s in zip(component.names, component.sizes, strict=True))}, and nobody "
            f"holds {where}. All ranks that hold a part take part in the point."
        )


def _first_hole(boxes: Sequence[SpaceBox], sizes: Sequence[int]) -> list[int]:
    """The first place, in row-major order, that is in none of the boxes, which do not overlap."""
    hole: list[int] = []
    for dim in range(len(sizes)):
        inside = 1
        for size in sizes[dim + 1 :]:
            inside *= size
        # Along this dim, what is held of each step changes only where a box begins or ends.
        changes = {0: 0}
        for box in boxes:
            held = box.volume
            for before in range(dim + 1):
                held //= box.sizes[before]
            start = box.starts[dim]
            changes[start] = changes.get(start, 0) + held
            changes[start + box.sizes[dim]] = changes.get(start + box.sizes[dim], 0) - held
        held = 0
        for at in sorted(changes):
            held += changes[at]
            if held < inside:
                break
        hole.append(at)
        boxes = [box for box in boxes if box.starts[dim] <= at < box.starts[dim] + box.sizes[dim]]
    return hole
