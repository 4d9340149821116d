"""Rules: settings for the points whose name a pattern matches; for each field the first rule that has it wins."""

from __future__ import annotations

import re
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


@lru_cache(maxsize=4096)
def compile_match(pattern: str) -> re.Pattern[str]:
    """The regular expression of a `match` pattern, for `fullmatch`.

    `*` matches any run of characters, `?` one, `{name}` one path segment (one or more characters without a dot), all
    else itself. The same `{name}` twice must match the same text. Raises ConfigError for braces that are no capture.
    """
    if not pattern:
        raise ConfigError("match is empty; write `*` for all names.")
    stretches: list[str] = [""]  # what lies between the stars
    captures: set[str] = set()
    for part in _PART.finditer(pattern):
        if part["star"]:
            stretches.append("")
        elif part["any"]:
            stretches[-1] += "."
        elif part["literal"]:
            stretches[-1] += re.escape(part["literal"])
        else:
            stretches[-1] += _capture(pattern, part, captures)
    return re.compile(_joined(stretches), re.DOTALL)


def _capture(pattern: str, part: re.Match[str], captures: set[str]) -> str:
    name = part["capture"]
    # Names that start with `_` are kept for the groups of `_joined`.
    if name is None or not (name.isidentifier() and name.isascii()) or name.startswith("_"):
        raise ConfigError(
            f"match {pattern!r}: braces name one path segment, such as {{layer_id}}; "
            f"at character {part.start() + 1} they do not."
        )
    if name in captures:
        return f"(?P={name})"
    captures.add(name)
    return f"(?P<{name}>[^.]+)"


def _joined(stretches: list[str]) -> str:
    first, *others = stretches
    if not others:
        return first
    *middle, last = others
    joined = first
    for number, stretch in enumerate(middle):
        if "(?P" in stretch:
            joined += f".*?{stretch}"
        else:
            # The earliest place for a stretch leaves the most room for the rest, so no other needs to be tried:
            # `*a*b*c*d` takes linear time instead of a power of the name's length. (Python 3.10 has no atomic groups;
            # a lookahead is one.)
            joined += f"(?=(?P<_stretch{number}>.*?{stretch}))(?P=_stretch{number})"
    return joined + f".*{last}"
