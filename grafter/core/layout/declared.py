"""What one rank declares of where its tensor lies, as its header holds it; and `Layout`, by which users declare it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from grafter.core.layout.dims import LARGEST_SIZE, Dims, parse_dims
from grafter.core.layout.dtensor import REDUCTIONS, read_dtensor
from grafter.core.layout.overlap import find_overlap
from grafter.core.layout.runs import Numbers
from grafter.core.leaves import Leaves
from grafter.core.tensor_access import is_dtensor
from grafter.errors import LayoutError

# Fields of messages: what a peer sends is checked before anything is computed from it.
DimSize = Annotated[int, Field(strict=True, ge=0, le=LARGEST_SIZE)]
DimSizes = tuple[DimSize, ...]


@dataclass(frozen=True)
class Box:
    """A rectangle of the global tensor, and where its first value lies in the local tensor."""

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

    Raises LayoutError for boxes that leave the global tensor or overlap each other.
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
        overlap = find_overlap([box.local_offset for box in boxes], [box.size for box in boxes])
        if overlap is not None:
            one, other = (boxes[number].local_offset for number in overlap)
            raise LayoutError(f"two boxes overlap in the local tensor: at {list(one)} and at {list(other)}.")
        if self.dims is not None:
            names_of_boxes(self.dims, shape)
        object.__setattr__(self, "global_shape", shape)
        object.__setattr__(self, "boxes", boxes)


def _box(box: Any, ndim: int, count: int) -> Box:
    if isinstance(box, Box):
        return box
    if not isinstance(box, (tuple, list)) or len(box) not in (2, 3):
        raise LayoutError(f"{box!r} is not a box; write (offset, size) or (offset, size, local_offset).")
    if len(box) == 2 and count > 1:
        raise LayoutError("if a rank has several boxes, each must say where it begins in the local tensor.")
    parts = [_numbers(part, "a box") for part in box]
    if len(box) == 2:
        parts.append((0,) * ndim)
    if any(len(part) != ndim for part in parts):
        raise LayoutError(f"{box!r}: offset, size and local offset have one number for each of {ndim} dims.")
    return Box(*parts)


def names_of_boxes(text: str, global_shape: Sequence[int]) -> Dims:
    """The names that a Layout's `dims` gives. Raises LayoutError if it says more than names."""
    dims = parse_dims(text)
    _check_count(dims, len(global_shape))
    if dims.split_axes or dims.partial:
        raise LayoutError(
            f"the dims {text!r} of a Layout are names; its boxes say what a rank holds. Leave out the brackets and "
            "what is in them."
        )
    for dim, size in zip(dims.dims, global_shape, strict=True):
        declared = [factor.size for factor in dim.factors if factor.size is not None]
        if not dim.factors and size != 1:
            raise LayoutError(
                f"the dims {text!r} have a dim of size 1, and global_shape {list(global_shape)} has {size} there."
            )
        if len(dim.factors) == 1 and declared not in ([], [size]):
            raise LayoutError(
                f"the dims {text!r} say {declared[0]}, and global_shape {list(global_shape)} says {size}. A Layout has "
                "no padding: give the true global_shape, and dump a view without it."
            )
    return dims


def _numbers(value: Any, what: str) -> Numbers:
    try:
        numbers = tuple(operator.index(number) for number in value)
    except TypeError:
        numbers = (-1,)
    if not all(0 <= number <= LARGEST_SIZE for number in numbers):
        raise LayoutError(f"{what}: {value!r} must be whole numbers of at least 0, one per dim.")
    return numbers


class DeclaredLayout(BaseModel):
    """One leaf's layout on one rank. Offsets that depend on the sizes at other ranks are worked out from all headers.

    dims: the text, which says everything, or only names if there are runs or boxes. seq_lens: the lengths of packed
    sequences. global_shape, runs, place, mesh, summand: of a DTensor, as `DTensorLayout` has them. boxes: of a Layout,
    each (offset, size, local offset).
    """

    model_config = ConfigDict(frozen=True)

    dims: str | None = None
    seq_lens: DimSizes | None = None
    global_shape: DimSizes | None = None
    runs: tuple[tuple[tuple[DimSize, DimSize, DimSize], ...], ...] | None = None
    place: DimSizes | None = None
    mesh: str | None = None
    summand: tuple[str, DimSize, DimSize] | None = None
    boxes: tuple[tuple[DimSizes, DimSizes, DimSizes], ...] | None = None

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> DeclaredLayout:
        if self.runs is not None:
            fits = self.boxes is None and None not in (self.global_shape, self.place, self.mesh)
        elif self.boxes is not None:
            fits = self.global_shape is not None and self.summand is None
        else:
            fits = self.dims is not None and self.global_shape is None and self.summand is None
        if not fits:
            raise ValueError("a layout is dims, or the facts of a DTensor, or boxes")
        if self.summand is not None and not (self.summand[0] in REDUCTIONS and self.summand[1] < self.summand[2]):
            raise ValueError(f"{self.summand} is not a summand")
        return self

    def __str__(self) -> str:
        if self.runs is not None or self.boxes is not None:
            kind = "DTensor" if self.runs is not None else "Layout"
            names = f" {self.dims!r}" if self.dims else ""
            return f"{kind}{names} of {list(self.global_shape or ())}"
        return repr(self.dims)


def declare_layouts(leaves: Leaves, dims: Any, layout: Any, seq_lens: Any) -> tuple[DeclaredLayout | None, ...]:
    """What this rank declares of each leaf; empty if it declares nothing. Raises LayoutError for what does not fit."""
    if dims is None and layout is None and not any(map(is_dtensor, leaves.originals)):
        return ()
    if dims is not None and layout is not None:
        raise LayoutError("dims= and layout= say the same thing; give one of them. (A Layout may name its dims.)")
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
    """What this rank declares of one tensor, whose local shape is `shape`; None if nothing is known.

    Raises LayoutError if what was given does not fit the tensor.
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
            _check_count(parse_dims(dims), len(shape))
        return DeclaredLayout(dims=dims, **vars(found))
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
        held += prod(box.size)
    if held != prod(shape):
        raise LayoutError(
            f"the boxes of layout= hold {held} values, and the local tensor {list(shape)} has {prod(shape)}. Boxes "
            "fill the local tensor; dump a view of it (`x[:n]`) where a part has no place."
        )
    boxes = tuple((box.offset, box.size, box.local_offset) for box in layout.boxes)
    return DeclaredLayout(dims=layout.dims, global_shape=tuple(layout.global_shape), boxes=boxes)


def _check_fits(dims: Dims, shape: Sequence[int]) -> None:
    _check_count(dims, len(shape), f": {list(shape)}")
    for dim, size in zip(dims.dims, shape, strict=True):
        if not dim.factors and size != 1:
            raise LayoutError(f"dims {dims.text!r} has a dim of size 1, and the tensor {list(shape)} has {size} there.")


def _check_count(dims: Dims, ndim: int, shown: str = "") -> None:
    if len(dims.dims) != ndim:
        raise LayoutError(f"dims {dims.text!r} names {len(dims.dims)} dims, and the tensor has {ndim}{shown}.")


def _sequence_lengths(seq_lens: Any) -> Numbers | None:
    if seq_lens is None:
        return None
    if isinstance(seq_lens, torch.Tensor):
        seq_lens = seq_lens.tolist()
    return _numbers(seq_lens, "seq_lens")


def by_path(given: Any, paths: Sequence[str], option: str) -> list[Any]:
    """`dims=` or `layout=` of each leaf. given: one for all leaves, or a dict from a leaf's path or its last key.

    Raises LayoutError for a key that no leaf has.
    """
    if not isinstance(given, Mapping):
        return [given] * len(paths)
    found: dict[str, Any] = {}
    if list(paths) == [""]:
        raise LayoutError(f"{option}= is a dict, and the point is a bare tensor: give the value for it alone.")
    for key, value in given.items():
        matching = [path for path in paths if path in (key, f"[{key!r}]") or path.endswith((f"[{key!r}]", f".{key}"))]
        if not matching:
            raise LayoutError(f"{option}= has {key!r}, and the point has the leaves {', '.join(paths) or 'none'}.")
        found.update(dict.fromkeys(matching, value))
    return [found.get(path) for path in paths]
