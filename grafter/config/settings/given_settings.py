"""What was given, before it becomes a configuration: names that do not exist, the plan file, what is missing."""

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
    """A misspelt GRAFTER_* would otherwise be a setting that silently does nothing."""
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
        hint = f"did you mean {prefix}{near[0]}?" if near else "no setting is called like it"
        if name == "RULES":
            hint = "rules stand in the plan file, which GRAFTER_PLAN names"
        problems.append(f"{variable}: {hint}")
    if problems:
        raise ConfigError(list_problems("these variables are no settings of grafter; correct or unset them:", problems))


def refuse_unknown_fields(values: Iterable[str], legal: Sequence[str]) -> None:
    problems = []
    for name in values:
        if name not in legal:
            near = difflib.get_close_matches(name.lower(), legal, n=1)
            problems.append(f"{name}: did you mean {near[0]}?" if near else f"{name}: no field is called like it")
    if problems:
        raise ConfigError(list_problems("these are no fields of GrafterConfig:", problems))


def add_plan_file(
    values: dict[str, Any], labels: dict[str, str], fields: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and labels of the plan file, which may set `fields`, and over them those that were given."""
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
    # A copy made from a whole model has the rules already.
    merged["rules"], merged["names"] = plan.rules, plan.names
    places = {name: f"{value.place}: {name}" for name, value in plan.fields.items()}
    return {**merged, **given}, {"rules": "rules", "names": "names", **places, **labels}


def refuse_missing(values: Mapping[str, Any], setter_of: Callable[[str], str]) -> None:
    """What a run cannot do without; only asked for once grafting is on."""
    enable = values.get("enable", False)
    # What is no word for on or off is told later, as an illegal value.
    if not _is_on(enable):
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


# pydantic's validation errors in the words of somebody who sets a variable.

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
