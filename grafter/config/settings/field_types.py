"""The types of fields: what a setting's text may be, of the configuration and of rules."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from grafter.config.switch import LEGAL_WORDS, switch_value
from grafter.core.layout.axes import read_axis_sizes
from grafter.core.sizes import read_size, read_steps

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
