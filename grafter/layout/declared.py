"""What one rank declares of where its tensor lies, as it travels in the header; and `Layout`, by which users say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from grafter.errors import LayoutError
from grafter.layout.dims import Dims, parse_dims
from grafter.layout.dtensor import read_dtensor
from grafter.layout.runs import Run
from grafter.leaves import Leaves
from grafter.tensor_access import is_dtensor

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A rectangle of the global tensor, and where its first value lies in the local one."""

    offset: Numbers
    size: Numbers
    local_offset: Numbers


@dataclass(frozen=True)
class Layout:
    """Where a local tensor lies in the global one, box by box: for what the dims language does not cover.

    global_shape: the shape of the whole tensor.
    boxes: this rank's rectangles, each (offset, size) or (offset, size, local_offset), one number per dim. The local
        offset is where the box begins in the local tensor; a single box may leave it out (it is then 0). The boxes of
        a rank fill its local tensor without overlapping; a rank that holds nothing has none.
    dims: names of the dims, such as "s b h", where the other side has them in another order.

    Raises LayoutError for boxes that lie outside of the global tensor or over each other.
    """

    global_shape: Sequence[int]
    boxes: Sequence[Any]
    dims: str | None = None

    def __post_init__(self) -> None:
        shape = _numbers(self.global_shape, "global_shape")
        boxes = tuple(_box(box, len(shape), len(self.boxes)) for box in self.boxes)
        for box in boxes:
            if any(o + s > g for o, s, g in zip(box.offset, box.size, shape, strict=True)):
                raise LayoutError(f"the box at {list(box.offset)} of size {list(box.size)} leaves {list(shape)}.")
        for number, box in enumerate(boxes):
            for other in boxes[:number]:
                if _overlap(box.local_offset, box.size, other.local_offset, other.size):
                    raise LayoutError(
                        f"two boxes lie over each other in the local tensor: at {list(other.local_offset)} and at "
                        f"{list(box.local_offset)}."
                    )
        if self.dims is not None:
            _names_only(parse_dims(self.dims), len(shape))
        object.__setattr__(self, "global_shape", shape)
        object.__setattr__(self, "boxes", boxes)


def _box(box: Any, ndim: int, count: int) -> Box:
    if isinstance(box, Box):
        return box
    if not isinstance(box, (tuple, list)) or len(box) not in (2, 3):
        raise LayoutError(f"{box!r} is no box; write (offset, size) or (offset, size, local_offset).")
    if len(box) == 2 and count > 1:
        raise LayoutError("where a rank has several boxes, each says where it begins in the local tensor.")
    parts = [_numbers(part, "a box") for part in box]
    if len(box) == 2:
        parts.append((0,) * ndim)
    if any(len(part) != ndim for part in parts):
        raise LayoutError(f"{box!r}: offset, size and local offset have one number for each of {ndim} dims.")
    return Box(*parts)


def _numbers(value: Any, what: str) -> Numbers:
    numbers = tuple(value) if isinstance(value, Iterable) else ()
    if not isinstance(value, Iterable) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise LayoutError(f"{what}: {value!r} must be whole numbers of at least 0, one per dim.")
    return tuple(int(number) for number in numbers)


def _overlap(a_start: Numbers, a_size: Numbers, b_start: Numbers, b_size: Numbers) -> bool:
    return all(max(a, b) < min(a + n, b + m) for a, n, b, m in zip(a_start, a_size, b_start, b_size, strict=True))


class DeclaredLayout(BaseModel):
    """One leaf's layout on one rank. Offsets that only all ranks' sizes give are worked out from all headers.

    dims: the text, which says everything (kind dims) or only names (the other kinds).
    runs, place, mesh, summand: as `DTensorLayout` has them. boxes: as (offset, size, local offset).
    """

    model_config = ConfigDict(frozen=True)

    dims: str | None = None
    seq_lens: Numbers | None = None
    global_shape: Numbers | None = None
    runs: tuple[tuple[Run, ...], ...] | None = None
    place: Numbers | None = None
    mesh: str | None = None
    summand: tuple[str, int, int] | None = None
    boxes: tuple[tuple[Numbers, Numbers, Numbers], ...] | None = None

    def __str__(self) -> str:
        if self.runs is not None or self.boxes is not None:
            kind = "DTensor" if self.runs is not None else "Layout"
            names = f" {self.dims!r}" if self.dims else ""
            return f"{kind}{names} of {list(self.global_shape or ())}"
        return repr(self.dims)


def declare_layouts(leaves: Leaves, dims: Any, layout: Any, seq_lens: Any) -> tuple[DeclaredLayout | None, ...]:
    """What this rank says of each leaf; empty where it says nothing. Raises LayoutError where it does not fit."""
    if dims is None and layout is None and not any(map(is_dtensor, leaves.originals)):
        return ()
    if dims is not None and layout is not None:
        raise LayoutError("dims= and layout= are two ways to say one thing; give one. (A Layout may name its dims.)")
    paths = [spec.path for spec in leaves.specs]
    layouts = tuple(
        declare(original, spec.shape, own_dims, own_layout, seq_lens)
        for original, spec, own_dims, own_layout in zip(
            leaves.originals,
            leaves.specs,
            by_path(dims, paths, "dims"),
            by_path(layout, paths, "layout"),
            strict=True,
        )
    )
    return layouts if any(one is not None for one in layouts) else ()


def declare(
    tensor: torch.Tensor, shape: Sequence[int], dims: str | None, layout: Layout | None, seq_lens: Any
) -> DeclaredLayout | None:
    """What this rank says of one tensor (`shape` is its local one); None where nothing is known.

    Raises LayoutError where what was given does not fit the tensor.
    """
    if layout is not None:
        if not isinstance(layout, Layout):
            raise LayoutError(f"layout= is a grafter.Layout, not {layout!r}.")
        return _of_boxes(layout, shape)
    if dims is not None and not isinstance(dims, str):
        raise LayoutError(f"dims= is a text such as 'b s h[tp] d', not {dims!r}.")
    if is_dtensor(tensor):
        found = read_dtensor(tensor)
        if dims is not None:
            _names_only(parse_dims(dims), len(shape))
        return DeclaredLayout(
            dims=dims,
            global_shape=found.global_shape,
            runs=found.runs,
            place=found.place,
            mesh=found.mesh,
            summand=found.summand,
        )
    if dims is None:
        return None
    _check_fits(parse_dims(dims), shape)
    return DeclaredLayout(dims=dims, seq_lens=_sequence_lengths(seq_lens))


def _of_boxes(layout: Layout, shape: Sequence[int]) -> DeclaredLayout:
    if len(layout.global_shape) != len(shape):
        raise LayoutError(
            f"layout= is of {len(layout.global_shape)} dims, and the tensor has {len(shape)}: {list(shape)}."
        )
    held = 0
    for box in layout.boxes:
        if any(o + s > n for o, s, n in zip(box.local_offset, box.size, shape, strict=True)):
            raise LayoutError(
                f"the box at local offset {list(box.local_offset)} of size {list(box.size)} leaves the local tensor, "
                f"which is {list(shape)}."
            )
        held += _volume(box.size)
    if held != _volume(shape):
        raise LayoutError(
            f"the boxes of layout= hold {held} values, and the local tensor {list(shape)} has {_volume(shape)}. Boxes "
            "fill the local tensor; dump a view of it (`x[:n]`) where a part has no place."
        )
    boxes = tuple((box.offset, box.size, box.local_offset) for box in layout.boxes)
    return DeclaredLayout(dims=layout.dims, global_shape=tuple(layout.global_shape), boxes=boxes)


def _volume(size: Iterable[int]) -> int:
    product = 1
    for number in size:
        product *= number
    return product


def _check_fits(dims: Dims, shape: Sequence[int]) -> None:
    if len(dims.dims) != len(shape):
        raise LayoutError(
            f"dims {dims.text!r} names {len(dims.dims)} dims, and the tensor has {len(shape)}: {list(shape)}."
        )
    for dim, size in zip(dims.dims, shape, strict=True):
        if not dim.factors and size != 1:
            raise LayoutError(f"dims {dims.text!r} has a dim of size 1, and the tensor {list(shape)} has {size} there.")


def _names_only(dims: Dims, ndim: int) -> None:
    if len(dims.dims) != ndim:
        raise LayoutError(f"dims {dims.text!r} names {len(dims.dims)} dims, and the tensor has {ndim}.")


def _sequence_lengths(seq_lens: Any) -> Numbers | None:
    if seq_lens is None:
        return None
    if isinstance(seq_lens, torch.Tensor):
        seq_lens = seq_lens.tolist()
    return _numbers(seq_lens, "seq_lens")


def by_path(given: Any, paths: Sequence[str], option: str) -> list[Any]:
    """`dims=` or `layout=` for each leaf: one for all, or a dict from a leaf's path or its last key.

    Raises LayoutError for a key that no leaf has.
    """
    if not isinstance(given, Mapping):
        return [given] * len(paths)
    found: dict[str, Any] = {}
    for key, value in given.items():
        matching = [path for path in paths if path in (key, f"[{key!r}]") or path.endswith((f"[{key!r}]", f".{key}"))]
        if not matching:
            raise LayoutError(f"{option}= has {key!r}, and the point has the leaves {', '.join(paths) or 'none'}.")
        found.update(dict.fromkeys(matching, value))
    return [found.get(path) for path in paths]
