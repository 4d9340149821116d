"""Rules: settings for the points whose name a pattern matches; for each field the first rule that has it wins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from grafter.errors import ConfigError
from grafter.layout.dims import parse_dims
from grafter.settings.field_types import (
    DumpLevel,
    Gradient,
    OneSided,
    OnTransformError,
    PartialTarget,
    Switch,
    WaitFor,
    Write,
)


class Rule(BaseModel):
    """One rule. A field that is None is one that the rule does not have; `transform=""` is: no transform for these
    names, though `transform_path` or a later rule has one; `dims=""` in the same way. With `role`, the rule is for that
    job alone: both may have the same name in another layout."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    match: str
    role: Literal["baseline", "target"] | None = None
    transform: str | None = None
    on_transform_error: OnTransformError | None = None
    write: Write | None = None
    gradient: Gradient | None = None
    dims: str | None = None
    partial_target: PartialTarget | None = None
    gradients: Switch | None = None
    save: Switch | None = None
    dump_level: DumpLevel | None = None
    wait: WaitFor | None = None
    one_sided: OneSided | None = None

    @field_validator("dims")
    @classmethod
    def _check_dims(cls, dims: str | None) -> str | None:
        if dims:
            parse_dims(dims)
        return dims

    @model_validator(mode="after")
    def _check_one_sided(self) -> Rule:
        if self.one_sided is not None and self.role is not None:
            raise ValueError(
                "one_sided holds for both jobs, since each of them must know what the other does; leave role out, or "
                "put one_sided into a rule of its own"
            )
        return self

    @field_validator("match")
    @classmethod
    def _check_match(cls, pattern: str) -> str:
        compile_match(pattern)
        return pattern

    def has(self, field: str) -> bool:
        return getattr(self, field) is not None

    def matches(self, name: str) -> bool:
        return compile_match(self.match).fullmatch(name) is not None


RULE_FIELDS = tuple(Rule.model_fields)
# What a rule is for, not what it sets; and fields whose empty text means "none for these names".
RULE_CONDITIONS = ("match", "role")
RULE_FIELDS_THAT_MAY_BE_EMPTY = ("transform", "dims")

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
