"""The dims language: what the dimensions of a local tensor are, and over which mesh axes they are split.

    b s[cp:zigzag] (heads*d)[tp]  # dp:replicated ep:=moe_ep

    layout   = dim (space dim)* ['#' declaration*]
    dim      = '1' | factor [mods] | '(' factor ('*' factor)* ')' [mods]
    factor   = name ['=' size]
    mods     = '[' axis [':' qualifier ('+' qualifier)*] (',' ...)* ']'      outer to inner
    declaration = axis ':replicated' | axis ':=' axis of the job

The meaning of a text does not depend on the job. `parse_dims` caches its results.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

from grafter.errors import LayoutError

QUALIFIERS = ("sharded", "natural", "zigzag", "partial")
_CONTRADICTIONS = (("zigzag", "partial"), ("zigzag", "natural"), ("sharded", "partial"), ("natural", "partial"))
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SIZE = re.compile(r"[0-9]+")
_LONGEST = 2000
_MOST_DIMS = 64
# Sums of two of them stay within int64, which torch uses for sizes.
LARGEST_SIZE = 2**62


@dataclass(frozen=True)
class Factor:
    """A dimension as the model knows it. size: the global size, if the text declares it."""

    name: str
    size: int | None = None


@dataclass(frozen=True)
class Split:
    """A mesh axis over which a dim is split. zigzag: coordinate k has the k-th and the k-th last of 2n chunks."""

    axis: str
    zigzag: bool = False


@dataclass(frozen=True)
class Dim:
    """A dimension of the local tensor: its factors (none: size 1) and its splits, both from outer to inner."""

    factors: tuple[Factor, ...]
    splits: tuple[Split, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the factors."""
        return tuple(factor.name for factor in self.factors)

    def __str__(self) -> str:
        names = "*".join(self.names)
        return f"({names})" if len(self.factors) > 1 else names or "1"


@dataclass(frozen=True)
class Dims:
    """A parsed text. partial: axes over which the values are summands. renamed: axis in the text -> axis of the job."""

    text: str
    dims: tuple[Dim, ...]
    partial: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def split_axes(self) -> tuple[str, ...]:
        """All axes over which dims are split, as the text names them."""
        return tuple(split.axis for dim in self.dims for split in dim.splits)

    def axis_of_job(self, axis: str) -> str:
        """The job's name for an axis of the text."""
        return self.renamed.get(axis, axis)


@lru_cache(maxsize=4096)
def parse_dims(text: str) -> Dims:
    """Parse a dims text. Raises LayoutError, with a mark under the character at fault."""
    return _Parser(text).layout()


class _Parser:
    """A recursive-descent parser of one dims text."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._names: set[str] = set()
        self._axes: dict[str, str] = {}
        self._partial: list[str] = []
        self._renamed_at: dict[str, int] = {}
        if len(text) > _LONGEST:
            raise LayoutError(f"dims has {len(text)} characters; at most {_LONGEST} are read.")

    def layout(self) -> Dims:
        dims: list[Dim] = []
        self._skip_spaces()
        while self._next() not in ("", "#"):
            if len(dims) == _MOST_DIMS:
                self._fail(f"a tensor has at most {_MOST_DIMS} dims")
            dims.append(self._dim())
            if self._next() not in ("", "#") and not self._next().isspace():
                self._fail("a space must stand between two dims")
            self._skip_spaces()
        if not dims and self._next() == "":
            self._fail(
                "there is no dim; a tensor without dimensions is written `# axis:replicated`, or left undeclared"
            )
        replicated, renamed = self._declarations()
        self._check_apart(renamed)
        return Dims(self._text, tuple(dims), tuple(self._partial), replicated, renamed)

    def _dim(self) -> Dim:
        if self._accept("("):
            factors = [self._spaced_factor()]
            while self._accept("*"):
                factors.append(self._spaced_factor())
            self._take(")", "`*` or `)`")
        elif _SIZE.match(self._text, self._at):
            start = self._at
            if self._match(_SIZE) != "1":
                self._fail(
                    "a number is not a dim, except `1`, for a dim of size 1. A size is declared as `name=8`", start
                )
            return Dim(())
        else:
            factors = [self._factor()]
        return Dim(tuple(factors), self._mods())

    def _spaced_factor(self) -> Factor:
        self._skip_spaces()
        factor = self._factor()
        self._skip_spaces()
        return factor

    def _factor(self) -> Factor:
        start = self._at
        name = self._word("the name of a dim")
        if name in self._names:
            self._fail(f"the dim {name!r} is there twice", start)
        if len(self._names) == _MOST_DIMS:
            self._fail(f"at most {_MOST_DIMS} names are read", start)
        self._names.add(name)
        if not self._accept("="):
            return Factor(name)
        start = self._at
        size = self._match(_SIZE)
        if size is None or not 1 <= int(size) <= LARGEST_SIZE:
            self._fail(f"a size must be a whole number of at least 1{' and at most 2**62' if size else ''}", start)
        return Factor(name, int(size))

    def _mods(self) -> tuple[Split, ...]:
        if not self._accept("["):
            return ()
        mods = [self._spaced_mod()]
        while self._accept(","):
            mods.append(self._spaced_mod())
        self._take("]", "`,` or `]`")
        return tuple(split for split in mods if split is not None)

    def _spaced_mod(self) -> Split | None:
        self._skip_spaces()
        split = self._mod()
        self._skip_spaces()
        return split

    def _mod(self) -> Split | None:
        start = self._at
        axis = self._word("the name of a mesh axis, as in `h[tp]`; a dim that is not divided has no brackets")
        self._claim(axis, start, "split")
        qualifiers: list[str] = []
        if self._accept(":"):
            qualifiers.append(self._qualifier())
            while self._accept("+"):
                qualifiers.append(self._qualifier())
        for one, other in _CONTRADICTIONS:
            if one in qualifiers and other in qualifiers:
                self._fail(f"`{one}` and `{other}` contradict each other", start)
        if "partial" in qualifiers:
            self._partial.append(axis)
            return None
        return Split(axis, "zigzag" in qualifiers)

    def _qualifier(self) -> str:
        start = self._at
        word = self._word("a qualifier")
        if word not in QUALIFIERS:
            self._fail(f"{word!r} is not a qualifier; legal are {', '.join(QUALIFIERS)}", start)
        return word

    def _declarations(self) -> tuple[tuple[str, ...], dict[str, str]]:
        replicated: list[str] = []
        renamed: dict[str, str] = {}
        if not self._accept("#"):
            return (), {}
        self._skip_spaces()
        while self._next():
            start = self._at
            axis = self._word("the name of a mesh axis")
            self._take(":", "`:replicated` or `:=`")
            if self._accept("="):
                if axis in renamed:
                    self._fail(f"the axis {axis!r} is given another name twice", start)
                renamed[axis] = self._word("the name of an axis of the job")
                self._renamed_at[axis] = start
            else:
                word_at = self._at
                if self._word("`replicated`") != "replicated":
                    self._fail("here stands `replicated`, or `:=` and an axis of the job", word_at)
                self._claim(axis, start, "replicated")
                replicated.append(axis)
            if self._next() not in ("", ",") and not self._next().isspace():
                self._fail("a space must stand between two declarations")
            while self._accept(",") or self._skip_spaces():
                pass
        return tuple(replicated), renamed

    def _check_apart(self, renamed: dict[str, str]) -> None:
        """Two axes of the text must be two axes of the job."""
        users: dict[str, str] = {}
        for axis in self._axes:
            other = users.setdefault(renamed.get(axis, axis), axis)
            if other != axis:
                one = axis if axis in renamed else other
                self._fail(
                    f"{other!r} and {axis!r} would both be the axis {renamed.get(axis, axis)!r} of the job",
                    self._renamed_at[one],
                )

    def _claim(self, axis: str, start: int, use: str) -> None:
        if axis in self._axes:
            self._fail(f"the axis {axis!r} is there twice ({self._axes[axis]} before)", start)
        self._axes[axis] = use

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def _word(self, what: str) -> str:
        word = self._match(_NAME)
        if word is None:
            self._fail(f"here must stand {what}")
        return word

    def _accept(self, character: str) -> bool:
        """Whether the next character is this one, which is then read."""
        found = self._next() == character
        self._at += found
        return found

    def _take(self, character: str, what: str) -> None:
        if not self._accept(character):
            self._fail(f"here must stand {what}")

    def _skip_spaces(self) -> bool:
        start = self._at
        while self._next().isspace():
            self._at += 1
        return self._at > start

    def _fail(self, why: str, at: int | None = None) -> NoReturn:
        place = self._at if at is None else at
        # One column for each character, so that the mark stands under the right one.
        shown = "".join(character if character.isprintable() else " " for character in self._text)
        found = "the end" if place >= len(self._text) else repr(self._text[place])
        raise LayoutError(f"dims, character {place + 1} ({found}): {why}.\n    {shown}\n    {' ' * place}^")
