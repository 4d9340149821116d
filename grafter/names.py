"""Names: how the plan file maps a job's own module paths to names that both jobs share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from grafter.rules import compile_match

_CAPTURE = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class PointName:
    """What a point is called, and the tags that its path gave."""

    name: str
    tags: dict[str, Any]

    def with_suffix(self, suffix: str) -> PointName:
        return PointName(self.name + suffix, self.tags)

    @property
    def key(self) -> str:
        """As a rank announces which modules it has."""
        return f"{self.name} {sorted(self.tags.items())!r}"


class NameRule(BaseModel):
    """An entry of the plan file's `names`. path: a pattern over a module's path, or over that of one of its tensors

    (`...self_attn.out.0`). name: the common name; it may use the captures of `path`, and those that it does not use are
    tags. role: the job whose paths these are; both where it is left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    path: str
    name: str
    role: Literal["baseline", "target"] | None = None

    @field_validator("path")
    @classmethod
    def _check_path(cls, pattern: str) -> str:
        compile_match(pattern)
        return pattern

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name:
            raise ValueError("it must not be empty")
        return name

    @model_validator(mode="after")
    def _check_captures(self) -> NameRule:
        unknown = set(_CAPTURE.findall(self.name)) - set(_CAPTURE.findall(self.path))
        if unknown:
            raise ValueError(f"{self.name!r} uses {{{min(unknown)}}}, which {self.path!r} does not capture")
        return self

    def apply(self, path: str) -> PointName | None:
        """The common name and tags; None where the pattern does not match."""
        match = compile_match(self.path).fullmatch(path)
        if match is None:
            return None
        captures = {name: text for name, text in match.groupdict().items() if not name.startswith("_")}
        used = set(_CAPTURE.findall(self.name))
        name = _CAPTURE.sub(lambda found: captures[found[1]], self.name)
        return PointName(name, {tag: _tag(text) for tag, text in captures.items() if tag not in used})


NAME_FIELDS = tuple(NameRule.model_fields)


def _tag(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
