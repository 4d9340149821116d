"""The dims language: one reading for each text, and errors that point at the character."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_parts import dims_texts, written

from grafter.core.layout.dims import Dim, Dims, Factor, Split, parse_dims
from grafter.errors import LayoutError


def dim(*names: str, over: tuple[str, ...] = (), zigzag: tuple[str, ...] = ()) -> Dim:
    factors = tuple(Factor(name, int(size) if size else None) for name, _, size in (n.partition("=") for n in names))
    return Dim(factors, tuple(Split(axis, axis in zigzag) for axis in over))


READINGS: dict[str, Dims] = {
    "b s h[tp] d": Dims("", (dim("b"), dim("s"), dim("h", over=("tp",)), dim("d"))),
    "t h[tp]": Dims("", (dim("t"), dim("h", over=("tp",)))),
    "b s[cp:zigzag] h[tp] d": Dims(
        "", (dim("b"), dim("s", over=("cp",), zigzag=("cp",)), dim("h", over=("tp",)), dim("d"))
    ),
    "t[cp:zigzag,sp] 1 h": Dims("", (dim("t", over=("cp", "sp"), zigzag=("cp",)), dim(), dim("h"))),
    "t (num_heads*head_dim)[tp]": Dims("", (dim("t"), dim("num_heads", "head_dim", over=("tp",)))),
    "h[tp:partial]": Dims("", (dim("h"),), partial=("tp",)),
    "b h[tp:partial,cp] # ep:replicated": Dims(
        "", (dim("b"), dim("h", over=("cp",))), partial=("tp",), replicated=("ep",)
    ),
    "b[dp] h # dp:=moe_dp": Dims("", (dim("b", over=("dp",)), dim("h")), renamed={"dp": "moe_dp"}),
    "b h # dp:=moe_dp ep:replicated": Dims("", (dim("b"), dim("h")), replicated=("ep",), renamed={"dp": "moe_dp"}),
    "b h # dp:replicated, ep:replicated": Dims("", (dim("b"), dim("h")), replicated=("dp", "ep")),
    "(n=8*d)[tp]": Dims("", (dim("n=8", "d", over=("tp",)),)),
    "v=32000[tp] h": Dims("", (dim("v=32000", over=("tp",)), dim("h"))),
    "h[tp:sharded+natural]": Dims("", (dim("h", over=("tp",)),)),
    "h[tp:natural,cp:sharded+zigzag]": Dims("", (dim("h", over=("tp", "cp"), zigzag=("cp",)),)),
    "( n * d )[ tp , cp ]": Dims("", (dim("n", "d", over=("tp", "cp")),)),
    "\tb \n h ": Dims("", (dim("b"), dim("h"))),
    "1 1": Dims("", (dim(), dim())),
    "# dp:replicated": Dims("", (), replicated=("dp",)),
    "#": Dims("", ()),
}


@pytest.mark.parametrize("text", READINGS)
def test_a_text_has_one_reading(text: str) -> None:
    found, expected = parse_dims(text), READINGS[text]
    assert found.text == text
    assert (found.dims, found.partial, found.replicated, found.renamed) == (
        expected.dims, expected.partial, expected.replicated, expected.renamed,
    )  # fmt: skip


FAULTS = {
    "": (1, "there is no dim"),
    "   ": (4, "there is no dim"),
    "b h[tp": (7, "here must stand `,` or `]`"),
    "b h[]": (5, "here must stand the name of a mesh axis"),
    "b h[tp,]": (8, "here must stand the name of a mesh axis"),
    "b h[tp:]": (8, "here must stand a qualifier"),
    "b h[tp:zigzga]": (8, "'zigzga' is no qualifier; legal are sharded, natural, zigzag, partial"),
    "b h[tp:zigzag+]": (15, "here must stand a qualifier"),
    "b h[tp:zigzag+partial]": (5, "`zigzag` and `partial` contradict each other"),
    "b h[cp,tp:natural+zigzag]": (8, "`zigzag` and `natural` contradict each other"),
    "b h[tp:partial+sharded]": (5, "`sharded` and `partial` contradict each other"),
    "b h[tp]d": (8, "a space must stand between two dims"),
    "b h b": (5, "the dim 'b' is there twice"),
    "b (h*d*h)": (8, "the dim 'h' is there twice"),
    "b[tp] h[tp]": (9, "the axis 'tp' is there twice (split before)"),
    "b[tp] h # tp:replicated": (11, "the axis 'tp' is there twice (split before)"),
    "b h # dp:replicated dp:replicated": (21, "the axis 'dp' is there twice (replicated before)"),
    "b h # dp:=x dp:=y": (13, "the axis 'dp' is given another name twice"),
    "b[dp] h[tp] # dp:=tp": (15, "'dp' and 'tp' would both be the axis 'tp' of the job"),
    "b[dp] h[tp] # dp:=x tp:=x": (21, "'dp' and 'tp' would both be the axis 'x' of the job"),
    "b h # dp": (9, "here must stand `:replicated` or `:=`"),
    "b h # dp:": (10, "here must stand `replicated`"),
    "b h # dp:=": (11, "here must stand the name of an axis of the job"),
    "b h # dp:split": (10, "here stands `replicated`, or `:=` and an axis of the job"),
    "b h # dp:replicated;": (20, "a space must stand between two declarations"),
    "2 h": (1, "a number is no dim; only `1` is"),
    "b 11": (3, "a number is no dim; only `1` is"),
    "1[tp]": (2, "a space must stand between two dims"),
    "b (h*)": (6, "here must stand the name of a dim"),
    "b (h d)": (6, "here must stand `*` or `)`"),
    "b (h*d": (7, "here must stand `*` or `)`"),
    "b ()": (4, "here must stand the name of a dim"),
    "n=0": (3, "a size must be a whole number of at least 1"),
    "n=": (3, "a size must be a whole number of at least 1"),
    "n=-1": (3, "a size must be a whole number of at least 1"),
    "n=4611686018427387905": (3, "a size must be a whole number of at least 1 and at most 2**62"),
    "b, h": (2, "a space must stand between two dims"),
    "h-d": (2, "a space must stand between two dims"),
    "é h": (1, "here must stand the name of a dim"),
    "...": (1, "here must stand the name of a dim"),
}


@pytest.mark.parametrize("text", FAULTS)
def test_an_error_points_at_the_character(text: str) -> None:
    character, why = FAULTS[text]
    with pytest.raises(LayoutError) as error:
        parse_dims(text)
    found = repr(text[character - 1]) if character <= len(text) else "the end"
    head, shown, mark = str(error.value).split("\n")
    assert head.startswith(f"dims, character {character} ({found}): {why}")
    assert shown == f"    {text}"
    assert mark == " " * (4 + character - 1) + "^"


def test_the_mark_stands_under_its_character_after_tabs_and_line_ends() -> None:
    with pytest.raises(LayoutError) as error:
        parse_dims("b\t\r\n\x0bh[tp")
    _, shown, mark = str(error.value).split("\n")
    assert shown == "    b    h[tp"
    assert len(mark) == len(shown) + 1


def test_long_texts_are_refused_at_once() -> None:
    with pytest.raises(LayoutError, match="dims has 2001 characters; at most 2000 are read"):
        parse_dims("b" * 2001)
    with pytest.raises(LayoutError, match="a tensor has at most 64 dims"):
        parse_dims(" ".join("1" * 65))
    with pytest.raises(LayoutError, match="at most 64 names are read"):
        parse_dims(f"({'*'.join(f'n{i}' for i in range(65))})")
    assert len(parse_dims(" ".join(f"n{i}" for i in range(64))).dims) == 64


@given(dims_texts())
def test_a_printed_reading_parses_to_the_same(text: str) -> None:
    first = parse_dims(text)
    second = parse_dims(written(first))
    assert (first.dims, first.partial, first.replicated, first.renamed) == (
        second.dims, second.partial, second.replicated, second.renamed,
    )  # fmt: skip


@given(st.text(alphabet="bhst1290 _[](),:*=+#\t\nézigzagpartialreplicated", max_size=40) | st.text(max_size=30))
def test_any_text_parses_or_raises_a_layout_error(text: str) -> None:
    try:
        dims = parse_dims(text)
    except LayoutError as error:
        assert str(error).startswith("dims, character ")
    else:
        assert parse_dims(written(dims)).dims == dims.dims


@given(dims_texts(), st.integers(0, 60), st.sampled_from(string.punctuation + "x1 "))
def test_a_text_with_one_wrong_character_parses_or_raises_a_layout_error(text: str, at: int, wrong: str) -> None:
    changed = text[:at] + wrong + text[at + 1 :]
    try:
        parse_dims(changed)
    except LayoutError as error:
        assert "\n" in str(error)
