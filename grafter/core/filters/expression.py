"""Filters: which points a run grafts or compares, as an expression over their tags.

    parse_filter("layer_id in (3, 4) and step >= 2", setting="GRAFTER_B2T_FILTER")

An expression is parsed once, checked and rewritten (`syntax`), and compiled once, without builtins. What is executed
was made by `syntax`, never copied from the text. `docs/filters.md` describes the language.
"""

from __future__ import annotations

import ast
import re
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grafter.core.filters.operations import OPERATIONS
from grafter.core.filters.syntax import Fault, NameCheck, Rewriter, index_of
from grafter.errors import FilterError

MAX_LENGTH = 10_000
_SHOWN_WIDTH = 100

# Operators of other languages, and what to write instead.
_SLIPS = {
    "&&": "write `and`",
    "||": "write `or`",
    "!": "write `not`",
    "===": "write `==`",
    "!==": "write `!=`",
    "<>": "write `!=`",
    "=>": "write `>=`",
    "=<": "write `<=`",
    ":=": "filters assign nothing; compare with `==`",
    "=": "a single `=` assigns; compare with `==`",
}
_TOKEN = re.compile(
    r"""(?P<text>\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"""|(?P<comment>\#)|(?P<newline>\\?\n)"""
    r"""|(?P<slip>&&|\|\||!==|===|<>|=>|=<|:=|!(?!=)|(?<![=!<>])=(?!=)|\b(?:AND|OR|NOT|IN|IS)\b)""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Filter:
    """One compiled filter. Call it with a point's tags; `matches` does the same at half the cost.

    source: the text as written. names: the tags that it reads. setting: where it was set, for messages.
    """

    source: str
    names: frozenset[str]
    setting: str = field(compare=False)
    matches: Callable[[Mapping[str, Any]], bool] = field(compare=False, repr=False)

    def __call__(self, tags: Mapping[str, Any]) -> bool:
        """Whether a point with these tags matches. An absent tag is None. Never raises."""
        return self.matches(tags)

    def __reduce__(self) -> tuple[Callable[[str], Filter], tuple[str]]:
        # A copy in another process is parsed and checked again, since the compiled function cannot be pickled.
        return partial(parse_filter, setting=self.setting), (self.source,)


def parse_filter(source: str, *, setting: str, check_name: NameCheck | None = None) -> Filter:
    """The filter that `source` describes. setting: where it was set, such as "GRAFTER_B2T_FILTER".

    check_name: if not all names may be read, what is wrong with a name, or None. Raises FilterError, with the position
    of the fault, for anything that filters do not have.
    """
    text = source.strip().replace("\r\n", "\n").replace("\r", "\n")
    try:
        text = _on_one_line(text)
        tree = _parse_expression(text)
        rewriter = Rewriter(text, check_name)
        body = rewriter.rewrite_condition(tree)
    except Fault as fault:
        at = fault.at if isinstance(fault.at, int) else index_of(text, fault.at.lineno, fault.at.col_offset)
        raise FilterError(_message(setting, fault.message, text, at)) from None
    matches = _compile(body, rewriter.functions)
    return Filter(source, frozenset(rewriter.names), setting, matches)


def _on_one_line(text: str) -> str:
    """The text with line breaks outside of quoted texts as blanks: a long filter may be folded. Indices stay."""
    if len(text) > MAX_LENGTH:
        raise Fault(f"the filter has {len(text)} characters; {MAX_LENGTH} are allowed", 0)

    def replaced(token: re.Match[str]) -> str:
        if token["comment"]:
            raise Fault("filters have no comments", token.start())
        return " " * len(token[0]) if token["newline"] else token[0]

    return _TOKEN.sub(replaced, text)


def _parse_expression(text: str) -> ast.expr:
    if not text:
        raise Fault("the filter is empty; write an expression, such as `name == 'x'`, or leave it unset", 0)
    if "\0" in text:
        raise Fault("the filter has a NUL character", text.index("\0"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape such as '\d' means what regex users mean by it
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise _explained(text, error) from None
    except (RecursionError, MemoryError):
        raise Fault("the expression is nested too deep; write `x in (...)`, or simplify", 0) from None
    except ValueError as error:  # a character that has no encoding
        raise Fault(f"the filter cannot be read: {error}", 0) from None


def _explained(text: str, error: SyntaxError) -> Fault:
    """A syntax error of Python in terms of filters."""
    for token in _TOKEN.finditer(text):
        if token["slip"]:
            return Fault(_SLIPS.get(token[0]) or f"write `{token[0].lower()}`", token.start())
    if not error.offset:
        return Fault("something is missing at the end", len(text))
    lines = text.split("\n")
    line = min(error.lineno or 1, len(lines))
    at = sum(len(skipped) + 1 for skipped in lines[: line - 1]) + error.offset - 1
    if at >= len(text):
        return Fault("something is missing at the end", len(text))
    reason = "" if error.msg in (None, "invalid syntax") else f": {error.msg.partition(' (detected')[0]}"
    return Fault(f"this is not an expression{reason}", at)


def _message(setting: str, message: str, text: str, at: int) -> str:
    """The fault, and under it the part of the filter around it, with a caret under the position."""
    at = max(0, min(at, len(text)))
    start = max(0, at - _SHOWN_WIDTH // 2)
    end = start + _SHOWN_WIDTH
    shown = _printable(text[start:end])
    before, after = ("..." if start else ""), ("..." if end < len(text) else "")
    caret = " " * (len(before) + at - start) + "^"
    return f"{setting}: {_printable(message)} (column {at + 1}):\n    {before}{shown}{after}\n    {caret}"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _compile(body: ast.expr, patterns: dict[str, Callable[..., Any]]) -> Callable[[Mapping[str, Any]], bool]:
    """A rewritten expression as a function of the tags. Its only globals are the filter operations and patterns."""
    template = ast.parse("lambda tags: None", mode="eval")
    assert isinstance(template.body, ast.Lambda)
    template.body.body = ast.IfExp(body, ast.Constant(True), ast.Constant(False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of `3 is None`; it is false, and harmless
        module = compile(ast.fix_missing_locations(template), "<filter>", "eval")
    code = next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))
    return types.FunctionType(code, {"__builtins__": {}, **OPERATIONS, **patterns}, "filter")
