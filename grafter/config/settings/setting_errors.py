"""pydantic's validation errors in the words of somebody who sets a variable."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import ValidationError

_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def explain_validation(error: ValidationError) -> list[tuple[str, str]]:
    """(field, what is legal) of each problem, without the value: it may be a secret.

    A problem inside of a field names the way to it: "rules.0.write".
    """
    return [
        (".".join(str(part) for part in details["loc"]), _explain(dict(details)))
        for details in error.errors(include_url=False)
    ]


def _explain(details: dict[str, Any]) -> str:
    kind: str = details["type"]
    context: dict[str, Any] = details.get("ctx", {})
    if kind == "literal_error":
        legal = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(details["input"]), legal, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"legal: {', '.join(legal)}{hint}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"it must be {words} {context[bound]:g}"
    if kind == "finite_number":
        return "it must be a finite number"
    if kind.startswith("int_"):
        return "it must be a whole number"
    if kind.startswith("float_"):
        return "it must be a number"
    if kind.startswith("string_"):
        return "it must be a text"
    if kind == "missing":
        return "it is required"
    return str(details["msg"])


def list_problems(title: str, problems: list[str]) -> str:
    """All problems of one kind as one message, a line for each."""
    return title + "".join("\n  " + problem.replace("\n", "\n  ") for problem in problems)
