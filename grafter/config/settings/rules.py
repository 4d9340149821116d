"""Rules: settings for the points whose name a pattern matches; for each field the first rule that has it wins."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from grafter.config.settings.field_types import (
    DumpLevel,
    Gradient,
    OneSided,
    OnTransformError,
    PartialTarget,
    Switch,
    WaitFor,
    Write,
)
from grafter.core.layout.dims import parse_dims
from grafter.core.match import compile_match


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
