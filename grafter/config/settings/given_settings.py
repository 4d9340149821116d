"""Given settings before they become a configuration: unknown names, the plan file, missing settings, and messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from grafter.config.settings.field_types import FILTER_FIELDS
from grafter.config.switch import OLD_PREFIX, PREFIX, switch_value
from grafter.errors import ConfigError


def refuse_unknown_variables(environ: Mapping[str, str], fields: Iterable[str]) -> None:
    """Raise ConfigError for GRAFTER_* variables that are not settings; a misspelt one would silently do nothing."""
    known = [name.upper() for name in fields]
    problems = []
    for variable in sorted(environ):
        prefix = next((prefix for prefix in (PREFIX, OLD_PREFIX) if variable.startswith(prefix)), None)
        if prefix is None or not environ[variable].strip():
            continue
        name = variable.removeprefix(prefix)
        if name in known:
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {prefix}{near[0]}?" if near else "there is no setting with a similar name"
        if name == "RULES":
            hint = "write rules into the plan file, which GRAFTER_PLAN names"
        problems.append(f"{variable}: {hint}")
    if problems:
        raise ConfigError(
            list_problems("these variables are not settings of grafter; correct or unset them:", problems)
        )


def refuse_unknown_fields(values: Iterable[str], legal: Sequence[str]) -> None:
    """Raise ConfigError for names that are not fields."""
    problems = []
    for name in values:
        if name not in legal:
            near = difflib.get_close_matches(name.lower(), legal, n=1)
            problems.append(f"{name}: did you mean {near[0]}?" if near else f"{name}: there is no field like it")
    if problems:
        raise ConfigError(list_problems("these are not fields of GrafterConfig:", problems))


def add_plan_file(
    values: dict[str, Any], labels: dict[str, str], fields: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values and labels of the plan file, which may set `fields`, overridden by those that were given."""
    given = {
        name: value
        for name, value in values.items()
        if value is not None and not (isinstance(value, str) and not value.strip())
    }
    if "plan" not in given:
        return given, labels
    from grafter.config.settings.plan_file import read_plan_file

    plan = read_plan_file(given["plan"], fields)
    merged: dict[str, Any] = {name: value.text for name, value in plan.fields.items()}
    # Given rules win: a copy of a whole configuration has them already.
    merged["rules"], merged["names"] = plan.rules, plan.names
    places = {name: f"{value.place}: {name}" for name, value in plan.fields.items()}
    return {**merged, **given}, {"rules": "rules", "names": "names", **places, **labels}


def refuse_missing(values: Mapping[str, Any], setter_of: Callable[[str], str]) -> None:
    """Raise ConfigError if grafting is on and a setting that a run needs is missing.

    setter_of: what sets a field, for the message.
    """
    # A text that means neither on nor off is reported later, as an illegal value.
    if not _is_on(values.get("enable", False)):
        return
    problems = []
    if "role" not in values:
        problems.append(f"role: set {setter_of('role')} to baseline in one job and to target in the other")
    grafts = any(name in values for name in FILTER_FIELDS.values())
    records = _is_on(values.get("record", False))
    saves = "dump_filter" in values or _has_saving_rule(values)
    is_offline = records or "peer" in values
    setters = ", ".join(setter_of(name) for name in FILTER_FIELDS.values())
    if not grafts and is_offline:
        setting = setter_of("record" if records else "peer")
        problems.append(f"a filter for {setting}: it is for the points that one of {setters} matches")
    elif not grafts and not saves:
        problems.append(
            f"a filter: set at least one of {setters} to an expression over tags, such as \"name == 'attn_out'\"; or "
            f"{setter_of('dump_filter')}, which saves points and needs no other job"
        )
    if (grafts or not saves) and not is_offline and "master_port" not in values:
        setter = setter_of("master_port")
        problems.append(f"master_port: set {setter} to one free port, the same in both jobs (`grafter run` does)")
    if problems:
        raise ConfigError(list_problems("grafting is on, but something that it needs is missing:", problems))


def _is_on(value: object) -> bool:
    return bool(switch_value(value) if isinstance(value, str) else value)


def _has_saving_rule(values: Mapping[str, Any]) -> bool:
    rules = values.get("rules", ())
    return any(rule.get("save") if isinstance(rule, dict) else getattr(rule, "save", None) for rule in rules)


_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
# By the beginning of the kind of fault.
_EXPLANATIONS = {
    "finite_number": "it must be a finite number",
    "int_": "it must be a whole number",
    "float_": "it must be a number",
    "string_": "it must be a text",
    "missing": "it is required",
}


def explain_validation(error: ValidationError) -> list[tuple[str, str]]:
    """(field, what is legal) of each problem of a validation error, in words for a person who sets a variable.

    A problem inside a field names the path to it: "rules.0.write". The value is left out: it may be a secret.
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
    for beginning, text in _EXPLANATIONS.items():
        if kind.startswith(beginning):
            return text
    return str(details["msg"])


def list_problems(title: str, problems: list[str]) -> str:
    """A message with a title and one line for each problem."""
    return title + "".join("\n  " + problem.replace("\n", "\n  ") for problem in problems)
