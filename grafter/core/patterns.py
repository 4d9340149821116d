"""Patterns over names, as users write them, read before there is a model. Without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from grafter.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import torch


# What the model itself is called, whose path is empty.
ROOT = "root"
_WORD = re.compile(r"[^\s,]+")


@dataclass(frozen=True)
class Pattern:
    """One pattern as the user wrote it, without its `!`."""

    path: str
    class_name: str
    excludes: bool

    def matches(self, path: str, module: torch.nn.Module) -> bool:
        if self.path and compile_match(self.path).fullmatch(path or ROOT) is None:
            return False
        if not self.class_name:
            return True
        match = compile_match(self.class_name)
        return any(match.fullmatch(cls.__name__) is not None for cls in type(module).__mro__)


def read_patterns(texts: Iterable[str]) -> tuple[Pattern, ...]:
    """Patterns, several in a text by commas or spaces. Raises UsageError for what is none."""
    patterns = []
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"attach takes patterns over module paths as texts, not {text!r}.")
        patterns += [_read_pattern(word[0], word.start() + 1) for word in _WORD.finditer(text)]
    return tuple(patterns)


def _read_pattern(word: str, position: int) -> Pattern:
    """`position`: the character of the text at which it begins, counted from 1."""
    excludes = word.startswith("!")
    path, _, class_name = word.removeprefix("!").partition(":")
    if not path and not class_name:
        raise UsageError(
            f"{word!r}, at character {position}, is no pattern; write a path, `:Class`, or `path:Class`, with `!` "
            "before it for what is left out."
        )
    for part in filter(None, (path, class_name)):
        try:
            compile_match(part)
        except ConfigError as error:
            raise UsageError(f"the pattern {word!r} of attach, at character {position}: {error}") from None
    return Pattern(path, class_name, excludes)


# Match patterns over names: `layers.{layer_id}.*`, as regular expressions.

_PART = re.compile(r"(?P<star>\*+)|(?P<any>\?)|\{(?P<capture>[^{}]*)\}|(?P<brace>[{}])|(?P<literal>[^*?{}]+)")

# In how many places a pattern may leave a choice that cannot be settled at once: a match takes about the name's length
# to this power.
MOST_CHOICES = 3


@lru_cache(maxsize=4096)
def compile_match(pattern: str) -> re.Pattern[str]:
    """The regular expression of a `match` pattern, for `fullmatch`.

    `*` matches any run of characters, `?` one, `{name}` one path segment (one or more characters without a dot), all
    else itself. The same `{name}` twice must match the same text. Raises ConfigError for braces that are no capture,
    and for a pattern that could be read in so many ways that a match might take years.
    """
    if not pattern:
        raise ConfigError("match is empty; write `*` for all names.")
    stretches = _read_stretches(pattern)
    choices = sum(stretch.choices for stretch in stretches) + sum(not stretch.is_settled for stretch in stretches[1:-1])
    if choices > MOST_CHOICES:
        raise ConfigError(
            f"match {pattern!r} could be read in too many ways: {choices} of its parts may begin or end in several "
            f"places, and at most {MOST_CHOICES} may. Let captures stand between dots, as in `*.{{layer_id}}.*`, or "
            "use fewer of them."
        )
    return re.compile(_joined(stretches), re.DOTALL)


@dataclass
class _Stretch:
    """What a pattern has between two stars."""

    expression: str = ""
    choices: int = 0
    """Captures of which it is not settled, by where they begin, where they end."""
    is_needed_later: bool = False
    """Whether what it captures must come again."""

    @property
    def is_settled(self) -> bool:
        """Whether its earliest place leaves the most room for the rest, so that no other needs to be tried."""
        return not self.choices and not self.is_needed_later


def _read_stretches(pattern: str) -> list[_Stretch]:
    stretches = [_Stretch()]
    captures: set[str] = set()
    for part in _PART.finditer(pattern):
        stretch = stretches[-1]
        if part["star"]:
            stretches.append(_Stretch())
        elif part["any"]:
            stretch.expression += "."
        elif part["literal"]:
            stretch.expression += re.escape(part["literal"])
        elif (name := _capture_name(pattern, part)) in captures:
            stretch.expression += f"(?P={name})"
        else:
            captures.add(name)
            stretch.expression += f"(?P<{name}>[^.]+)"
            # It ends at the next dot or at the end of the name; before anything else it could end in many places.
            stretch.choices += pattern[part.end() : part.end() + 1] not in ("", ".")
            stretch.is_needed_later |= f"{{{name}}}" in pattern[part.end() :]
    return stretches


def _capture_name(pattern: str, part: re.Match[str]) -> str:
    name = part["capture"]
    # Names that start with `_` are kept for the groups of `_joined`.
    if name is None or not (name.isidentifier() and name.isascii()) or name.startswith("_"):
        raise ConfigError(
            f"match {pattern!r}: braces name one path segment, such as {{layer_id}}; "
            f"at character {part.start() + 1} they do not."
        )
    return str(name)


def _joined(stretches: list[_Stretch]) -> str:
    first, *others = stretches
    if not others:
        return first.expression
    *middle, last = others
    joined = first.expression
    for number, stretch in enumerate(middle):
        if stretch.is_settled:
            # `*a*b*c*d` takes linear time instead of a power of the name's length. (Python 3.10 has no atomic groups;
            # a lookahead is one.)
            joined += f"(?=(?P<_stretch{number}>.*?{stretch.expression}))(?P=_stretch{number})"
        else:
            joined += f".*?{stretch.expression}"
    return joined + f".*{last.expression}"
