"""Batches of tokens for tests: one role's ranks, with rows in any batch, layout and order, and who holds which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from point_parts import header, spec

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.messages.announced_tokens import announce
from grafter.core.messages.manifest import Header
from grafter.core.rows.tokens import Tokens

Token = tuple[Any, int]
Row = Token | None
WIDTH = 6
UNTOUCHED = -7


@dataclass
class HeldRows:
    """One rank. rows, columns: which token and which of WIDTH columns each place of the tensor [rows, columns] is.

    tensor: the local tensor of any shape; `by_rows` is it as [rows, columns], a view.
    """

    rows: list[Row]
    columns: list[int]
    tensor: torch.Tensor
    by_rows: torch.Tensor
    told: Tokens
    starts: tuple[int, ...]
    dims: str | None
    axes: tuple[tuple[str, int, int], ...]
    seq_lens: tuple[int, ...] | None = None


@dataclass
class Batch:
    ranks: list[HeldRows]
    text: str

    def headers(self, role: Any, **fields: Any) -> list[Header]:
        everyone = tuple(range(len(self.ranks)))
        return [
            header(
                role,
                number,
                participants=everyone,
                leaves=(spec(*held.tensor.shape, dtype=torch.int64),),
                layouts=(DeclaredLayout(dims=held.dims, seq_lens=held.seq_lens),) if held.dims else (),
                axes=held.axes,
                tokens=announce(held.told, held.starts),
                **fields,
            )
            for number, held in enumerate(self.ranks)
        ]


def code(token: Token, column: int) -> int:
    """Every place of the whole tensor has a value of its own."""
    names = {name: number for number, name in enumerate(IDS)}
    return (names[token[0]] * 100 + token[1]) * WIDTH + column


IDS: list[Any] = [0, 1, "a"]


def tokens_of(rows: Sequence[Row]) -> Tokens:
    return Tokens.from_positions([row[0] if row else None for row in rows], [row[1] if row else 0 for row in rows])


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    rows: list[Row] = []
    for name in draw(st.permutations(IDS)):
        positions = range(draw(st.integers(0, 4)), draw(st.integers(0, 9)))
        rows += [(name, position) for position in positions]
    return list(draw(st.permutations(rows))) if draw(st.integers(0, 2)) == 0 else rows


@st.composite
def batches(draw: st.DrawFn, *, windows: bool, rows: list[Row] | None = None) -> Batch:
    """Any tokens of three sequences, in stretches or scattered, in a batch and layout of any kind. rows: these."""
    rows = list(draw(any_rows()) if rows is None else rows)
    starts = {name: draw(st.integers(0, 9)) if windows else 0 for name in IDS}
    tp = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["alike", "own", "cut", "zigzag"]))
    groups = 1 if kind == "alike" else draw(st.integers(1, 3))
    if kind == "zigzag":
        rows += [None] * (-len(rows) % (2 * groups))
    if kind == "own":
        owner = [draw(st.integers(0, groups - 1)) for _ in rows]
        parts = [[row for row, own in zip(rows, owner, strict=True) if own == group] for group in range(groups)]
    elif kind == "zigzag":
        chunks = np.array_split(np.arange(len(rows)), 2 * groups)
        parts = [[rows[n] for n in np.concatenate([chunks[k], chunks[2 * groups - 1 - k]])] for k in range(groups)]
    else:
        parts = [[rows[n] for n in part] for part in np.array_split(np.arange(len(rows)), groups)]
    form = draw(st.sampled_from(["t", "b s", "s b", "h first"])) if kind in ("alike", "own") else "t"
    replicas = draw(st.integers(1, 2)) if kind == "alike" else 1
    undeclared = kind == "own" and form == "t" and tp == 1 and draw(st.booleans())
    split = {"alike": "", "own": draw(st.sampled_from(["", "[sp]"])), "cut": "[sp]", "zigzag": "[sp:zigzag]"}[kind]
    dims = _dims_text(form, split) + (" # dp:replicated" if replicas > 1 else "")
    ranks = []
    for group, own in enumerate(parts):
        own = _padded(draw, own, form) if form in ("b s", "s b") else own
        for column in range(tp):
            for replica in range(replicas):
                axes = (("dp", replica, replicas), ("sp", group, groups), ("tp", column, tp))
                columns = list(range(WIDTH * column // tp, WIDTH * (column + 1) // tp))
                tensor, by_rows = _laid_out(len(own), len(columns), form)
                # Cut by the layout, the rows of all ranks may be told.
                told = tokens_of(rows if kind in ("cut", "zigzag") and draw(st.booleans()) else own)
                given = tuple(starts[name] for name in told.sequences) if windows else ()
                lengths = (len(rows),) if kind == "zigzag" else None
                text = None if undeclared else dims
                ranks.append(HeldRows(own, columns, tensor, by_rows, told, given, text, axes, lengths))
    for held in ranks:
        held.by_rows.fill_(UNTOUCHED)
    return Batch(ranks, f"{kind} {form} {dims!r} of {parts}")


def _dims_text(form: str, split: str) -> str:
    return f"h[tp] t{split}" if form == "h first" else f"{form}{split} h[tp]"


def _padded(draw: st.DrawFn, rows: list[Row], form: str) -> list[Row]:
    """A number of rows that is a product of two, with padding anywhere."""
    padded = list(rows)
    for _ in range(len(rows) % 2):
        padded.insert(draw(st.integers(0, len(padded))), None)
    return padded


def _laid_out(rows: int, columns: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    if form == "t":
        tensor = torch.empty(rows, columns, dtype=torch.int64)
        return tensor, tensor
    if form == "h first":
        tensor = torch.empty(columns, rows, dtype=torch.int64)
        return tensor, tensor.t()
    b, s = (2, rows // 2)
    if form == "b s":
        tensor = torch.empty(b, s, columns, dtype=torch.int64)
        return tensor, tensor.view(rows, columns)
    # Rows are numbered by sequence of the batch first, whatever lies first in memory.
    tensor = torch.empty(s, b, columns, dtype=torch.int64)
    return tensor, _RowsOf(tensor)  # type: ignore[return-value]


class _RowsOf:
    """[rows, columns] of a tensor [s, b, columns], which no view is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def fill_(self, value: int) -> None:
        self._tensor.fill_(value)

    def __setitem__(self, place: tuple[int, int], value: int) -> None:
        s = self._tensor.shape[0]
        self._tensor[place[0] % s, place[0] // s, place[1]] = value

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        s = self._tensor.shape[0]
        return self._tensor[place[0] % s, place[0] // s, place[1]]
