r"""The regular expressions of filters, matched by RE2 in time linear in the tag's length.

Python's `re` backtracks: `(a+)+$` takes exponential time on some names, and cannot be stopped. RE2 is imported only
when a filter has a pattern. What RE2 lacks, or reads differently from Python, is an error with an alternative.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

MatchMethod = Literal["search", "match", "fullmatch"]

MAX_REPETITIONS = 1000  # RE2's own limit
# Also bounds the time of one match, which is at most the compiled size of the pattern times the tag's length.
_MAX_MEMORY_BYTES = 1 << 20
# Most programs have far fewer names. In others, each new text costs about a microsecond.
_REMEMBERED_TEXTS = 4096

# An escape, a class, or one character.
_UNIT = re.compile(r"\\.|\[\^?\]?(?:\[:\w+:\]|\\.|[^\]\\])*\]|.", re.DOTALL)
_REPETITION = re.compile(r"\{(?P<least>\d*)(?P<comma>,(?P<most>\d*))?\}")

_TWO_TESTS = "write two tests, such as `search('a', name) and not search('b', name)`"
_LEFT_OUT = "leave it out, since matching takes linear time without it"
# What RE2's message quotes, the name of it, and what to write instead.
_LACKING = {
    "(?=": ("lookaheads", _TWO_TESTS),
    "(?!": ("lookaheads", _TWO_TESTS),
    "(?<=": ("lookbehinds", _TWO_TESTS),
    "(?<!": ("lookbehinds", _TWO_TESTS),
    "(?P=": ("backreferences", "write the alternatives out"),
    "(?(": ("conditions", "write the alternatives out"),
    "(?>": ("atomic groups", _LEFT_OUT),
    "*+": ("possessive repetitions", _LEFT_OUT),
    "++": ("possessive repetitions", _LEFT_OUT),
    "?+": ("possessive repetitions", _LEFT_OUT),
    "(?#": ("comments", "leave it out"),
    r"\Z": ("", r"write `\z`, or use `fullmatch`"),
    r"\u": ("", r"write the character itself, or its number in hexadecimal as `\x{e9}`"),
    r"\U": ("", r"write the character itself, or its number in hexadecimal as `\x{e9}`"),
    r"\N": ("", r"write the character itself, or its number in hexadecimal as `\x{e9}`"),
}
_FLAGS = ("other flags", "they have `(?i)`, `(?m)` and `(?s)`")


class PatternError(Exception):
    """Why a text is not a pattern of filters. at: the index of the fault; None if it is the whole text."""

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.at = at


def compile_pattern(pattern: str, method: MatchMethod) -> Callable[[Any], Literal[True] | None]:
    """A function of a tag's value: True if the pattern is found in it; None if not, or if the value is not a text.

    Raises PatternError for an invalid pattern.
    """
    _check_repetitions(pattern)
    find = getattr(_compile(pattern), method)

    @lru_cache(_REMEMBERED_TEXTS)
    def found(text: str) -> Literal[True] | None:
        # A text may have characters that UTF-8 lacks (a lone surrogate).
        return True if find(text.encode("utf-8", "replace")) is not None else None

    def found_in(subject: Any) -> Literal[True] | None:
        return found(subject) if isinstance(subject, str) else None

    return found_in


def _compile(pattern: str) -> Any:
    try:
        import re2
    except ModuleNotFoundError:
        raise PatternError(
            f"`search`, `match` and `fullmatch` need the package google-re2, which {sys.executable} lacks; install it "
            "there (`pip install google-re2`), or write `in`, `.startswith` and `.endswith`"
        ) from None
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = _MAX_MEMORY_BYTES
    try:
        return re2.compile(pattern, options)
    except UnicodeEncodeError as error:
        raise PatternError("this pattern has a character that cannot be encoded", error.start) from None
    except re2.error as error:
        raise _explained(pattern, _message_of(error)) from None


def _message_of(error: Exception) -> str:
    (message,) = error.args
    return message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)


def _check_repetitions(pattern: str) -> None:
    """Raise PatternError for `{,3}` and `{99999999999}`, which RE2 reads as plain text, and Python as repetitions."""
    for unit in _UNIT.finditer(pattern):
        found = _REPETITION.match(pattern, unit.start()) if unit[0] == "{" else None
        if found is None or found[0] == "{}":
            continue
        if not found["least"]:
            raise PatternError(
                f"a repetition needs its least number; write `{{0,{found['most'] or ''}}}`", found.start()
            )
        if any(
            len(number) > 9 or int(number) > MAX_REPETITIONS for number in (found["least"], found["most"]) if number
        ):
            raise PatternError(
                f"filters repeat at most {MAX_REPETITIONS} times",
                found.start(),
            )
        if found["most"] and int(found["least"]) > int(found["most"]):
            raise PatternError("the least number of a repetition is above its most", found.start())


def _explained(pattern: str, message: str) -> PatternError:
    """An error of RE2 in terms of filters."""
    kind, _, quoted = message.partition(": ")
    if "too large" in message or kind == "invalid repetition size":
        return PatternError(
            f"this pattern is too large: nested repetitions multiply, to at most {MAX_REPETITIONS}; repeat less"
        )
    if quoted == "(?P" and "(?P=" in pattern:
        quoted = "(?P="
    if kind == "invalid escape sequence" and quoted[1:].isdecimal():
        what, instead = "backreferences", "write the alternatives out"
    elif kind == "bad repetition operator" and quoted[-2:] == "}+":
        what, instead = "possessive repetitions", _LEFT_OUT
    elif quoted in _LACKING:
        what, instead = _LACKING[quoted]
    elif kind == "invalid perl operator" and quoted[2:3].isalpha():
        what, instead = _FLAGS
    else:
        return PatternError(f"this is not a regular expression: {message}")
    shown = f"{what} (`{quoted}`)" if what else f"`{quoted}`"
    return PatternError(f"filters match in linear time and have no {shown}; {instead}", _place(pattern, quoted))


def _place(pattern: str, fragment: str) -> int | None:
    """The index of the first `fragment` that is syntax, not an escaped text."""
    places = (unit.start() for unit in _UNIT.finditer(pattern) if pattern.startswith(fragment, unit.start()))
    at = next(places, pattern.find(fragment))
    return at if at >= 0 else None
