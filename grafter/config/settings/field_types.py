"""The types of fields: what a setting's text may be, of the configuration and of rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from grafter.config.switch import LEGAL_WORDS, switch_value
from grafter.core.filters.expression import parse_filter
from grafter.core.layout.axes import read_axis_sizes
from grafter.core.points import OPTIONS, is_rank_tag
from grafter.core.sizes import read_size, read_steps
from grafter.errors import FilterError

OnTransformError = Literal["skip", "raise"]
Write = Literal["in_place", "return"]
Gradient = Literal["straight_through", "cut", "strict"]
WaitFor = Literal["both", "job"]
OneSided = Literal["raise", "skip"]
PartialTarget = Literal["refuse", "first"]
DumpLevel = Literal["full", "statistics", "checksum"]


def _to_switch(value: object) -> object:
    if isinstance(value, str):
        word = switch_value(value)
        if word is None:
            raise ValueError(f"legal: {LEGAL_WORDS}")
        return word
    return value


def _to_number(value: object) -> object:
    if isinstance(value, bool):  # a bool is an int to Python, and 1 to pydantic
        raise ValueError("it must be a number")
    return value


def _to_word(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _to_size(value: object) -> object:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str):
        raise ValueError("it must be a number of bytes, such as 4096, 512MiB or 10GiB")
    if not read_size(text):
        raise ValueError("it must be at least one byte")
    return text


def _check_steps(value: str) -> str:
    read_steps(value)
    return value


def _check_axis_sizes(value: str) -> str:
    read_axis_sizes(value)
    return value


def read_model_names(text: str) -> dict[str, str]:
    """`policy=policy,ref_model=ref`, as GRAFTER_BASELINE_MODELS has it: by the variable that holds a model, or its
    class, the name that stands before those of its points; empty for plain names. Raises ValueError."""
    names: dict[str, str] = {}
    for word in text.replace(",", " ").split():
        held, equals, name = word.partition("=")
        if not equals or not re.fullmatch(r"[^\W\d]\w*(\.\w+)*", held) or not re.fullmatch(r"([^\W\d]\w*)?", name):
            raise ValueError(f"{word!r} is not `variable=name`, such as policy=policy; `variable=` gives plain names")
        if held in names:
            raise ValueError(f"{held!r} is there twice")
        if name in names.values():
            raise ValueError(f"two models cannot both be called {name!r}")
        names[held] = name
    return names


def _check_model_names(value: str) -> str:
    read_model_names(value)
    return value


def _check_label(value: str) -> str:
    # They become part of store keys and of a path.
    if not re.fullmatch(r"(?!\.)[\w.+:-]{1,200}", value):
        raise ValueError("it must be a name of letters, digits and the signs - _ . + : that does not start with a dot")
    return value


Switch = Annotated[bool, BeforeValidator(_to_switch)]
Count = Annotated[int, BeforeValidator(_to_number), Field(ge=1)]
Index = Annotated[int, BeforeValidator(_to_number), Field(ge=0)]
Port = Annotated[int, BeforeValidator(_to_number), Field(ge=1, le=65535)]
Seconds = Annotated[float, BeforeValidator(_to_number), Field(gt=0, allow_inf_nan=False)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_to_word)]
Size = Annotated[str, BeforeValidator(_to_size)]
Steps = Annotated[str, AfterValidator(_check_steps)]
AxisSizes = Annotated[str, AfterValidator(_check_axis_sizes)]
ModelNames = Annotated[str, AfterValidator(_check_model_names)]
Label = Annotated[str, AfterValidator(_check_label)]


# The filters among the settings: which field holds which, and which tags each may read.

FilterDirection = Literal["b2t", "t2b", "compare"]
FILTER_FIELDS: dict[FilterDirection, str] = {"b2t": "b2t_filter", "t2b": "t2b_filter", "compare": "compare_filter"}
# Tags that every point has and that identify it, whatever `key` says.
ALWAYS_IDENTIFYING = frozenset({"name", "step", "phase"})


def split_key(key: str) -> list[str]:
    """The tags that the setting `key` lists."""
    return [tag.strip() for tag in key.split(",") if tag.strip()]


def find_filter_problems(values: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """What is wrong with the filters among `values`; `labels` say where each was set."""
    key = values.get("key")
    key_tags = frozenset(split_key(key)) | ALWAYS_IDENTIFYING if isinstance(key, str) else None
    problems = []
    for name in (*FILTER_FIELDS.values(), "dump_filter"):
        source = values.get(name)
        if not isinstance(source, str):
            continue
        try:
            names = parse_filter(source, setting=labels[name]).names
        except FilterError as error:
            problems.append(str(error))
            continue
        why_not = _why_no_tag if name == "dump_filter" else partial(_why_not_identifying, key_tags=key_tags)
        problems += [f"{labels[name]}: {reason}" for tag in sorted(names) if (reason := why_not(tag))]
    return problems


def _why_not_identifying(tag: str, key_tags: frozenset[str] | None) -> str | None:
    """Why a filter may not read this tag: both jobs must come to the same answer on every rank."""
    if is_rank_tag(tag):
        return f"`{tag}` differs between ranks, so the jobs would disagree on which points match; leave it out"
    reason = _why_no_tag(tag)
    if reason is not None:
        return reason
    if key_tags is not None and tag not in key_tags:
        return f"`{tag}` is not among the tags that `key` lists ({', '.join(sorted(key_tags))}); add it there"
    return None


def _why_no_tag(tag: str) -> str | None:
    if tag == "occurrence":
        return "`occurrence` is counted for points that match, so a filter cannot read it; leave it out"
    if tag in OPTIONS:
        return f"`{tag}` is an argument of `grafter.dump` and not a tag; leave it out"
    return None
