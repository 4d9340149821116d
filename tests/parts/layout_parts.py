"""Layouts for tests: texts of the dims language, headers of a mesh's ranks, and a plain reference of who holds what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from point_parts import header, spec
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from grafter.core.layout.declared import DeclaredLayout, Layout, declare
from grafter.core.layout.dims import Dims
from grafter.core.layout.dtensor import read_dtensor
from grafter.core.messages.manifest import Header

NAMES = ["b", "s", "t", "h", "d", "n", "v", "num_heads", "head_dim", "e", "_x1"]
AXES = ["dp", "tp", "cp", "sp", "ep", "pp", "etp", "moe_dp"]


def written(dims: Dims) -> str:
    """A reading as a text. Which dim a partial axis stands at says nothing, so it is put at the first."""
    words = []
    partial = [f"{axis}:partial" for axis in dims.partial]
    for dim in dims.dims:
        factors = [f.name if f.size is None else f"{f.name}={f.size}" for f in dim.factors]
        mods = [split.axis + (":zigzag" if split.zigzag else "") for split in dim.splits]
        if factors:
            mods, partial = mods + partial, []
        word = f"({'*'.join(factors)})" if len(factors) > 1 else "".join(factors) or "1"
        words.append(word + (f"[{','.join(mods)}]" if mods else ""))
    declared = [f"{axis}:replicated" for axis in dims.replicated]
    declared += [f"{axis}:={name}" for axis, name in dims.renamed.items()]
    return " ".join([*words, "#", *declared])


@st.composite
def dims_texts(draw: st.DrawFn) -> str:
    """Any text of the language."""
    names = draw(st.permutations(NAMES))
    axes = draw(st.permutations(AXES))
    words = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.sampled_from([0, 1, 1, 1, 2, 3]))
        if not count or len(names) < count:
            words.append("1")
            continue
        factors = [names.pop() + draw(st.sampled_from(["", "", "=8", "=32000"])) for _ in range(count)]
        mods = []
        for _ in range(min(draw(st.integers(0, 2)), len(axes))):
            qualifier = draw(st.sampled_from(["", ":sharded", ":zigzag", ":natural", ":partial", ":sharded+zigzag"]))
            mods.append(axes.pop() + qualifier)
        star = draw(st.sampled_from(["*", " * "]))
        word = f"({star.join(factors)})" if count > 1 else factors[0]
        words.append(word + (f"[{','.join(mods)}]" if mods else ""))
    declared = [axes.pop() + ":replicated" for _ in range(min(draw(st.integers(0, 2)), len(axes)))]
    declared += [f"{axes.pop()}:=job_{number}" for number in range(min(draw(st.integers(0, 1)), len(axes)))]
    return draw(st.sampled_from([" ", "  ", "\n"])).join(words) + (f" # {' '.join(declared)}" if declared else "")


# --- two sides of one tensor, and who holds what of it by plain index arithmetic


@dataclass(frozen=True)
class Held:
    """One rank: what it declares, and for each place of its local tensor the flat index in the global one (-1: pad)."""

    index: np.ndarray
    layout: DeclaredLayout | None
    axes: tuple[tuple[str, int, int], ...] = ()
    summand: int = 0


@dataclass(frozen=True)
class HeldSide:
    ranks: tuple[Held, ...]
    text: str
    summands: int = 1

    def headers(self, role: Any) -> list[Header]:
        everyone = tuple(range(len(self.ranks)))
        return [
            header(
                role,
                number,
                participants=everyone,
                leaves=(spec(*held.index.shape, dtype=torch.int64),),
                layouts=(held.layout,),
                axes=held.axes,
            )
            for number, held in enumerate(self.ranks)
        ]


@dataclass(frozen=True)
class Named:
    """The dims of one side: the names of each dim's factors (none: size 1), and the flat index of each place."""

    dims: tuple[tuple[str, ...], ...]
    index: np.ndarray


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[HeldSide, HeldSide]:
    """A sender and a receiver of one tensor, each in a layout of any kind."""
    names = ["b", "s", "h", "d"][: draw(st.integers(1, 4))]
    sizes = {name: draw(st.sampled_from([1, 2, 3, 4, 4, 5, 6, 8, 8] + [0] * (name == "s"))) for name in names}
    sides = [draw(_named(sizes)), draw(_named(sizes))]
    if draw(st.integers(0, 3)) == 0:
        sides[1] = sides[0]
    alone = {dim[0] for side in sides for dim in side.dims if len(dim) == 1}
    kinds = [draw(st.sampled_from([_of_dims, _of_dims, _of_dtensor, _of_boxes])) for _ in sides]
    built = []
    for number, (kind, side) in enumerate(zip(kinds, sides, strict=True)):
        told = {n: size for n, size in sizes.items() if size and (n not in alone or draw(st.booleans()))}
        told = {n: size for dim in side.dims if len(dim) > 1 for n, size in told.items() if n in dim}
        other_names = kinds[1 - number] is not _of_dims and number == 1
        unnamed = kind is not _of_dims and not other_names and sides[0].dims == sides[1].dims and draw(st.booleans())
        built.append(draw(kind(side, sizes, told, unnamed, number == 0)))
    return built[0], built[1]


@st.composite
def _named(draw: st.DrawFn, sizes: dict[str, int]) -> Named:
    """The factors in any order, some of them fused, dims of size 1 between them."""
    order = list(draw(st.permutations(list(sizes))))
    index = np.arange(prod(sizes.values())).reshape(tuple(sizes.values()))
    index = index.transpose([list(sizes).index(name) for name in order])
    dims: list[tuple[str, ...]] = []
    while order:
        count = draw(st.sampled_from([1, 1, 1, 2, 3]))
        dims.append(tuple(order[:count]))
        order = order[count:]
        if draw(st.integers(0, 7)) == 0:
            dims.append(())
    return Named(tuple(dims), index.reshape([prod(sizes[n] for n in dim) for dim in dims]))


def _words(side: Named, told: dict[str, int]) -> list[str]:
    """The dims as a text, without axes; `told`: sizes that it says."""
    words = []
    for dim in side.dims:
        factors = [f"{name}={told[name]}" if name in told else name for name in dim]
        words.append(f"({'*'.join(factors)})" if len(factors) > 1 else "".join(factors) or "1")
    return words


@st.composite
def _of_dims(
    draw: st.DrawFn, side: Named, sizes: dict[str, int], told: dict[str, int], unnamed: bool, sender: bool
) -> HeldSide:
    mesh = {f"a{number}": draw(st.sampled_from([1, 2, 2, 3, 4])) for number in range(draw(st.integers(0, 3)))}
    splits: list[list[str]] = [[] for _ in side.dims]
    partial, replicated = [], []
    for axis in mesh:
        use = draw(st.integers(0, 5))
        dims = [number for number, dim in enumerate(side.dims) if dim]
        if use <= 3:
            splits[draw(st.sampled_from(dims))].append(axis)
        elif use == 4 and sender:
            partial.append(axis)
        else:
            replicated.append(axis)
    words, tables = _words(side, told), []
    for number, dim in enumerate(side.dims):
        along = np.arange(side.index.shape[number])
        if len(dim) == 1 and draw(st.integers(0, 5)) == 0 and len(along):
            words[number] = f"{dim[0]}={len(along)}"
            along = np.concatenate([along, np.full(draw(st.integers(0, 3)), -1)])
        mods, table = draw(_cut_dim(along, [(axis, mesh[axis]) for axis in splits[number]]))
        if number == dims_with_factors(side)[0]:
            mods += [f"{axis}:partial" for axis in partial]
        words[number] += f"[{','.join(mods)}]" if mods else ""
        tables.append(table)
    text = " ".join(words) + (" # " + " ".join(f"{axis}:replicated" for axis in replicated) if replicated else "")
    ranks = []
    # An axis of size 1 need not exist in the job.
    known = [axis for axis, size in mesh.items() if size > 1 or draw(st.booleans())]
    for place in draw(st.permutations(list(product(*(range(size) for size in mesh.values()))))):
        at = dict(zip(mesh, place, strict=True))
        along = [table[tuple(at[axis] for axis in splits[n])] for n, table in enumerate(tables)]
        summand = 0
        for axis in partial:
            summand = summand * mesh[axis] + at[axis]
        axes = tuple((axis, at[axis], mesh[axis]) for axis in known)
        ranks.append(Held(_pick(side.index, along), DeclaredLayout(dims=text), axes, summand))
    return HeldSide(tuple(ranks), text, prod(mesh[axis] for axis in partial))


def dims_with_factors(side: Named) -> list[int]:
    return [number for number, dim in enumerate(side.dims) if dim]


@st.composite
def _cut_dim(
    draw: st.DrawFn, along: np.ndarray, axes: list[tuple[str, int]]
) -> tuple[list[str], dict[tuple[int, ...], np.ndarray]]:
    """Modifiers, and what lies at each place: zigzag where it divides, else stretches of any sizes."""
    if not axes:
        return [], {(): along}
    (axis, count), rest = axes[0], axes[1:]
    whole = not (along < 0).any()
    if whole and len(along) % (2 * count) == 0 and draw(st.booleans()):
        chunks = np.split(along, 2 * count)
        mod = f"{axis}:zigzag"
        parts = [np.concatenate([chunks[k], chunks[2 * count - 1 - k]]) for k in range(count)]
    else:
        mod = axis
        if draw(st.booleans()):
            parts = np.array_split(along, count)
        else:
            cuts = sorted(draw(st.lists(st.integers(0, len(along)), min_size=count - 1, max_size=count - 1)))
            parts = np.split(along, cuts)
    table = {}
    for coordinate, part in enumerate(parts):
        # All coordinates must be cut by the same modifiers, so inner cuts are plain ones of any sizes.
        inner = draw(_cut_plainly(part, [size for _, size in rest]))
        table.update({(coordinate, *place): values for place, values in inner.items()})
    return [mod, *(name for name, _ in rest)], table


@st.composite
def _cut_plainly(draw: st.DrawFn, along: np.ndarray, counts: list[int]) -> dict[tuple[int, ...], np.ndarray]:
    if not counts:
        return {(): along}
    cuts = sorted(draw(st.lists(st.integers(0, len(along)), min_size=counts[0] - 1, max_size=counts[0] - 1)))
    table = {}
    for coordinate, part in enumerate(np.split(along, cuts)):
        inner = draw(_cut_plainly(part, counts[1:]))
        table.update({(coordinate, *place): values for place, values in inner.items()})
    return table


def _pick(index: np.ndarray, along: list[np.ndarray]) -> np.ndarray:
    """index[along[0]][:, along[1]]..., with -1 wherever one of them is."""
    picked = index
    for dim, own in enumerate(along):
        if not picked.shape[dim]:
            picked = np.full([len(own) if d == dim else n for d, n in enumerate(picked.shape)], -1)
            continue
        picked = np.take(picked, np.maximum(own, 0), axis=dim)
        picked = np.where((own < 0).reshape([-1 if d == dim else 1 for d in range(picked.ndim)]), -1, picked)
    return picked


@st.composite
def _of_dtensor(
    draw: st.DrawFn, side: Named, sizes: dict[str, int], told: dict[str, int], unnamed: bool, sender: bool
) -> HeldSide:
    """As torch's own placements split the index."""
    mesh = tuple(draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=3)))
    ndim = side.index.ndim
    placements: list[Any] = []
    for _ in mesh:
        use, dim = draw(st.integers(0, 6)), draw(st.integers(0, ndim - 1))
        if use == 0:
            placements.append(Replicate())
        elif use == 1 and sender:
            placements.append(Partial())
        elif use == 2:
            placements.append(_StridedShard(dim, split_factor=draw(st.integers(1, 3))))
        else:
            placements.append(Shard(dim))
    text = None if unnamed else " ".join(_words(side, told))
    ranks, summands = [], 1
    for place in product(*map(range, mesh)):
        local, summand, summands = torch.from_numpy(side.index.copy()), 0, 1
        for placement, coordinate, size in zip(placements, place, mesh, strict=True):
            if isinstance(placement, Partial):
                summand, summands = summand * size + coordinate, summands * size
            elif not isinstance(placement, Replicate):
                local = placement._split_tensor(local, size, with_padding=False, contiguous=True)[0][coordinate]
        found = read_dtensor(StandIn(side.index.shape, local, mesh, place, placements))
        layout = DeclaredLayout(
            dims=text, global_shape=found.global_shape, runs=found.runs, place=found.place, mesh=found.mesh,
            summand=found.summand,
        )  # fmt: skip
        ranks.append(Held(local.numpy(), layout, (), summand))
    return HeldSide(tuple(ranks), f"{placements} on {mesh} named {text}", summands)


class StandIn:
    """What `read_dtensor` reads of a DTensor, for any place of a mesh and without process groups."""

    def __init__(
        self, shape: Sequence[int], local: torch.Tensor, mesh: Sequence[int], place: Sequence[int], placements: Any
    ) -> None:
        ranks = torch.arange(prod(mesh)).view(*mesh)
        own = SimpleNamespace(mesh=ranks, get_coordinate=lambda: list(place), size=lambda number: mesh[number])
        self._spec = SimpleNamespace(mesh=own, placements=tuple(placements), shape=torch.Size(shape))
        self._local_tensor = local


@st.composite
def _of_boxes(
    draw: st.DrawFn, side: Named, sizes: dict[str, int], told: dict[str, int], unnamed: bool, sender: bool
) -> HeldSide:
    """A grid of cells. Across one dim, ranks hold several cells each, in any order; some are held twice."""
    shape = side.index.shape
    edges = []
    for size in shape:
        cuts = {0, size} | set(draw(st.lists(st.integers(0, size), max_size=2)))
        edges.append(list(pairwise(sorted(cuts))) or [(0, 0)])
    stacked = draw(st.integers(0, len(shape) - 1))
    held: list[list[tuple[tuple[int, int], ...]]] = []
    for cell in product(*(own for dim, own in enumerate(edges) if dim != stacked)):
        column = list(draw(st.permutations(edges[stacked])))
        cut = draw(st.integers(0, len(column)))
        for part in (column[:cut], column[cut:]):
            held.append([(*cell[:stacked], segment, *cell[stacked:]) for segment in part])
    for _ in range(draw(st.integers(0, 2))):
        # A copy of some cells of another rank, which lie in another order in its memory.
        cells = draw(st.sampled_from(held))
        held.append(list(draw(st.permutations(cells)))[: draw(st.integers(0, len(cells)))])
    text = None if unnamed else " ".join(_words(side, told))
    ranks = []
    for cells in draw(st.permutations(held)):
        boxes, parts, at = [], [], 0
        for cell in cells:
            local = tuple(at if dim == stacked else 0 for dim in range(len(shape)))
            boxes.append((tuple(a for a, _ in cell), tuple(b - a for a, b in cell), local))
            parts.append(side.index[tuple(slice(a, b) for a, b in cell)])
            at += cell[stacked][1] - cell[stacked][0]
        index = np.concatenate(parts, axis=stacked) if parts else np.empty([0] * len(shape), dtype=np.int64)
        layout = declare(torch.empty(0), index.shape, None, Layout(shape, boxes, text), None)
        ranks.append(Held(index, layout))
    return HeldSide(tuple(ranks), f"boxes named {text}: {[h.layout.boxes for h in ranks if h.layout]}")


def role_headers(
    role: Any,
    dims: str | None,
    shapes: Sequence[Sequence[int]],
    places: Sequence[dict[str, tuple[int, int]]] | None = None,
    *,
    seq_lens: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    layouts: Sequence[DeclaredLayout | None] | None = None,
) -> list[Header]:
    """The headers of ranks that hold tensors of these shapes, at these places of the mesh."""
    numbers = list(range(len(shapes)) if ranks is None else ranks)
    places = places if places is not None else [{}] * len(shapes)
    said = DeclaredLayout(dims=dims, seq_lens=None if seq_lens is None else tuple(seq_lens)) if dims else None
    return [
        header(
            role,
            number,
            participants=tuple(numbers),
            leaves=(spec(*shape),),
            layouts=((said if layouts is None else layouts[at]),),
            axes=tuple((axis, *place) for axis, place in places[at].items()),
        )
        for at, (number, shape) in enumerate(zip(numbers, shapes, strict=True))
    ]


def on_axis(axis: str, count: int) -> list[dict[str, tuple[int, int]]]:
    """The places of `count` ranks along one axis."""
    return [{axis: (number, count)} for number in range(count)]
