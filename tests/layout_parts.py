"""Layouts for tests: texts of the dims language, headers of a mesh's ranks, and a plain reference of who holds what."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from grafter.layout.dims import Dims

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


