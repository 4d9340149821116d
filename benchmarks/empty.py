"""The floor of a call: a function with the arguments of `grafter.dump` that does nothing, called the same way."""

from __future__ import annotations

from typing import Any


def dump(name: str, value: Any, /, **arguments: Any) -> Any:
    return value
