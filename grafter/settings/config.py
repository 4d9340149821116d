"""The configuration: GRAFTER_* variables and the plan file become one frozen, validated GrafterConfig.

    environment (GRAFTER_<FIELD>, or DUMPER_GRAFTER_<FIELD>)  >  plan file (GRAFTER_PLAN)  >  default

Problems are told in the order in which a person can act on them: variables that do not exist, then what is missing
and what sets it, then illegal values; all of one kind in one message. This file needs no torch, and importing pydantic
takes 0.1 s: import it only once `grafter.switch.enabled()` says so.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)

from grafter.capture.patterns import read_patterns
from grafter.dumps.limits import read_size, read_steps
from grafter.errors import ConfigError, FilterError, UsageError
from grafter.filters.expression import Filter, parse_filter
from grafter.layout.axes import read_axis_sizes
from grafter.names import NameRule
from grafter.points import OPTIONS, is_rank_tag
from grafter.settings.rules import (
    RULE_CONDITIONS,
    RULE_FIELDS,
    DumpLevel,
    Gradient,
    OnTransformError,
    PartialTarget,
    Rule,
    Switch,
    WaitFor,
    Write,
)
from grafter.settings.setting_errors import explain_validation
from grafter.switch import OLD_PREFIX, PREFIX, read_variable, switch_value

FilterDirection = Literal["b2t", "t2b", "compare"]
FILTER_FIELDS: dict[FilterDirection, str] = {"b2t": "b2t_filter", "t2b": "t2b_filter", "compare": "compare_filter"}
# Tags that every point has and that identify it, whatever `key` says.
_ALWAYS_IDENTIFYING = frozenset({"name", "step", "phase"})
# Where a field of a rule is called otherwise in the configuration.
_RULE_FALLBACK = {"transform": "transform_path"}
_ABSENT = object()
_MAX_CACHED_RULE_VALUES = 100_000


def _to_number(value: object) -> object:
    if isinstance(value, bool):  # a bool is an int to Python, and 1 to pydantic
        raise ValueError("it must be a number")
    return value


def _to_word(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


_Count = Annotated[int, BeforeValidator(_to_number), Field(ge=1)]
_Index = Annotated[int, BeforeValidator(_to_number), Field(ge=0)]
_Port = Annotated[int, BeforeValidator(_to_number), Field(ge=1, le=65535)]
_Seconds = Annotated[float, BeforeValidator(_to_number), Field(gt=0, allow_inf_nan=False)]


class GrafterConfig(BaseModel):
    """Every setting of one rank. `docs/configuration.md` says what each means.

    `GrafterConfig(role="target", ...)` takes the same fields as keyword arguments and reads the plan file too, if
    `plan` is given. Raises ConfigError, or FilterError where only filters are at fault.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    enable: Switch = False
    role: Literal["baseline", "target"] | None = None
    b2t_filter: str | None = None
    t2b_filter: str | None = None
    compare_filter: str | None = None
    master_address: str = "127.0.0.1"
    master_port: _Port | None = None
    baseline_world_size: _Count | None = None
    target_world_size: _Count | None = None
    rank: _Index | None = None
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    group_name: str = "graft"
    timeout: _Seconds = 300.0
    join_timeout: _Seconds = 1800.0
    stats: Literal["full", "light", "off"] = "full"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_to_word)] = "info"
    key: str | None = None
    transform_path: str | None = None
    on_transform_error: OnTransformError = "skip"
    on_peer_loss: Literal["raise", "detach"] = "raise"
    write: Write = "in_place"
    gradient: Gradient = "straight_through"
    wait: WaitFor = "both"
    outbox_bytes: str = "1GiB"
    outbox_seconds: _Seconds = 60.0
    windows: Switch = True
    start: _Index = 0
    new_rows_only: Switch = False
    baseline_axes: str | None = None
    target_axes: str | None = None
    check_replicas: Switch = False
    partial_target: PartialTarget = "refuse"
    dump_filter: str | None = None
    dump_level: DumpLevel = "full"
    dump_steps: str | None = None
    dump_max_bytes: str | None = None
    dump_max_points: _Count | None = None
    dump_queue_bytes: str = "1GiB"
    dump_exclude: str = "routed_experts,hidden_states"
    dir: str = "grafter_out"
    run_name: str | None = None
    plan: str | None = None
    secret: SecretStr | None = None
    record: Switch = False
    peer: str | None = None
    store_host: Literal["rank0", "launcher", "peer"] = "rank0"
    attach: str | None = None
    step: Literal["auto", "optimizer", "forward", "manual"] = "auto"
    gradients: Switch = False
    rules: tuple[Rule, ...] = ()
    names: tuple[NameRule, ...] = ()
    """Both from the plan file; no variable sets them."""

    def __init__(self, **values: Any) -> None:
        self._initialise(values, {name: name for name in values}, lambda name: f"{name}=")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> GrafterConfig:
        """The configuration that the environment, and the plan file that it may name, describe.

        Blank variables are unset. Raises ConfigError, or FilterError where only filters are at fault.
        """
        _refuse_unknown_variables(environ)
        values: dict[str, Any] = {}
        labels: dict[str, str] = {}
        for name in SETTING_FIELDS:
            found = read_variable(environ, name)
            if found is not None:
                labels[name], values[name] = found
        config = cls.__new__(cls)
        config._initialise(values, labels, lambda name: PREFIX + name.upper())
        return config

    def _initialise(self, values: dict[str, Any], labels: dict[str, str], setter_of: Callable[[str], str]) -> None:
        """`labels` say where each value was set; `setter_of` says what sets a field that is missing."""
        _refuse_unknown_fields(values)
        values, labels = _with_plan_file(values, labels)
        _refuse_missing(values, setter_of)
        problems: list[str] = []
        try:
            BaseModel.__init__(self, **values)
        except ValidationError as error:
            for path, reason in explain_validation(error):
                name, _, inside = path.partition(".")
                where = f"rules.{inside}" if inside else f"{labels[name]}{_shown(name, values[name])}"
                problems.append(f"{where}: {reason}")
        else:
            size = getattr(self, f"{self.role}_world_size", None)
            if self.rank is not None and size is not None and self.rank >= size:
                problems.append(f"{labels['rank']}={self.rank}: {self.role} has {size} ranks, which count from 0")
        filter_problems = _filter_problems(values, labels)
        if filter_problems and not problems:
            raise FilterError("\n".join(filter_problems))
        if problems:
            raise ConfigError(_listed("these settings have illegal values:", problems + filter_problems))

    @field_validator("dump_max_bytes", "dump_queue_bytes", "outbox_bytes", mode="before")
    @classmethod
    def _check_size(cls, value: object) -> object:
        if value is None:
            return None
        text = str(value) if type(value) is int else value
        if not isinstance(text, str):
            raise ValueError("it must be a number of bytes, such as 4096, 512MiB or 10GiB")
        if not read_size(text):
            raise ValueError("it must be at least one byte")
        return text

    @field_validator("dump_steps")
    @classmethod
    def _check_steps(cls, value: str | None) -> str | None:
        if value is not None:
            read_steps(value)
        return value

    @field_validator("attach")
    @classmethod
    def _check_attach(cls, value: str | None) -> str | None:
        try:
            read_patterns((value or "",))
        except UsageError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("baseline_axes", "target_axes")
    @classmethod
    def _check_axes(cls, value: str | None) -> str | None:
        if value is not None:
            read_axis_sizes(value)
        return value

    @field_validator("group_name", "run_name")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        # They become part of store keys and of a path.
        if value is not None and not re.fullmatch(r"(?!\.)[\w.+:-]{1,200}", value):
            raise ValueError(
                "it must be a name of letters, digits and the signs - _ . + : that does not start with a dot"
            )
        return value

    @field_validator("key")
    @classmethod
    def _check_key(cls, value: str | None) -> str | None:
        for tag in _split_key(value or ""):
            if not tag.isidentifier():
                raise ValueError(f"{tag!r} is no tag name; write names with commas between, such as layer_id,expert")
            if is_rank_tag(tag):
                raise ValueError(f"{tag} differs between ranks, so it cannot identify a point")
        return value

    @cached_property
    def key_tags(self) -> frozenset[str] | None:
        """The tags that identify a point besides name, step and phase; None: all but rank tags."""
        return None if self.key is None else frozenset(_split_key(self.key)) - _ALWAYS_IDENTIFYING

    @cached_property
    def filters(self) -> dict[FilterDirection, Filter]:
        """The filters that are set, compiled."""
        return {
            direction: parse_filter(source, setting=PREFIX + name.upper())
            for direction, name in FILTER_FIELDS.items()
            if (source := getattr(self, name)) is not None
        }

    @cached_property
    def saved_points(self) -> Filter | None:
        """The dump filter, compiled."""
        if self.dump_filter is None:
            return None
        return parse_filter(self.dump_filter, setting=f"{PREFIX}DUMP_FILTER")

    @property
    def only_dumps(self) -> bool:
        """Whether no point can meet the other job: nothing joins, and there is no store."""
        return not self.filters or self.records_alone

    @property
    def records_alone(self) -> bool:
        """Whether points are recorded for a later graft, and there is no other job now."""
        return self.record and self.master_port is None and self.peer is None

    @property
    def dump_exclude_keys(self) -> frozenset[str]:
        """Keys of metadata that dumps leave out."""
        keys = frozenset(key.strip() for key in self.dump_exclude.split(",") if key.strip())
        return frozenset() if keys == {"none"} else keys

    @cached_property
    def _rule_values(self) -> dict[tuple[str, str], Any]:
        return {}

    def rule_value(self, field: str, name: str, default: Any = None) -> Any:
        """The value of a rule's field for the point `name`: that of the first rule whose `match` fits and which has the
        field, else the configuration's own, else `default` (also where the configuration's own is None).
        """
        value = self._rule_values.get((field, name), _ABSENT)
        if value is _ABSENT:
            value = self._first_rule_value(field, name)
            if len(self._rule_values) >= _MAX_CACHED_RULE_VALUES:  # names that never repeat
                self._rule_values.clear()
            self._rule_values[field, name] = value
        return default if value is None else value

    def _first_rule_value(self, field: str, name: str) -> Any:
        if field not in RULE_FIELDS or field in RULE_CONDITIONS:
            raise KeyError(f"rules have no field {field!r}")
        rule = self.rule_for(field, name)
        if rule is not None:
            return getattr(rule, field) or None
        return getattr(self, _RULE_FALLBACK.get(field, field), None)

    def rule_for(self, field: str, name: str) -> Rule | None:
        """The first rule for the point `name` in this job that has the field."""
        return next((rule for rule in self.own_rules if rule.has(field) and rule.matches(name)), None)

    @cached_property
    def own_rules(self) -> tuple[Rule, ...]:
        """The rules for both jobs and for this one."""
        return tuple(rule for rule in self.rules if rule.role in (None, self.role))

    @property
    def axes(self) -> str | None:
        """The mesh of this job, where a setting says it."""
        return self.baseline_axes if self.role == "baseline" else self.target_axes

    def public_dict(self) -> dict[str, Any]:
        """What run.json may hold: every field as JSON-able data, but not the secret."""
        return self.model_dump(mode="json", exclude={"secret"})


# What a variable or the command line can set.
SETTING_FIELDS: tuple[str, ...] = tuple(name for name in GrafterConfig.model_fields if name not in ("rules", "names"))


def _split_key(key: str) -> list[str]:
    return [tag.strip() for tag in key.split(",") if tag.strip()]


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = [name.upper() for name in SETTING_FIELDS]
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
        raise ConfigError(_listed("these variables are no settings of grafter; correct or unset them:", problems))


def _refuse_unknown_fields(values: Mapping[str, Any]) -> None:
    legal = tuple(GrafterConfig.model_fields)
    problems = []
    for name in values:
        if name not in legal:
            near = difflib.get_close_matches(name.lower(), legal, n=1)
            problems.append(f"{name}: did you mean {near[0]}?" if near else f"{name}: no field is called like it")
    if problems:
        raise ConfigError(_listed("these are no fields of GrafterConfig:", problems))


def _with_plan_file(values: dict[str, Any], labels: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and labels of the plan file, and over them those that were given."""
    given = {
        name: value
        for name, value in values.items()
        if value is not None and not (isinstance(value, str) and not value.strip())
    }
    if "plan" not in given:
        return given, labels
    from grafter.settings.plan_file import read_plan_file

    plan = read_plan_file(given["plan"], SETTING_FIELDS)
    merged: dict[str, Any] = {name: value.text for name, value in plan.fields.items()}
    # A copy made from a whole model has the rules already.
    merged["rules"], merged["names"] = plan.rules, plan.names
    places = {name: f"{value.place}: {name}" for name, value in plan.fields.items()}
    return {**merged, **given}, {"rules": "rules", "names": "names", **places, **labels}


def _refuse_missing(values: Mapping[str, Any], setter_of: Callable[[str], str]) -> None:
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
        raise ConfigError(_listed("grafting is on, but something that it needs is missing:", problems))


def _is_on(value: object) -> bool:
    return bool(switch_value(value) if isinstance(value, str) else value)


def _has_saving_rule(values: Mapping[str, Any]) -> bool:
    rules = values.get("rules", ())
    return any(rule.get("save") if isinstance(rule, dict) else getattr(rule, "save", None) for rule in rules)


def _filter_problems(values: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    key = values.get("key")
    key_tags = frozenset(_split_key(key)) | _ALWAYS_IDENTIFYING if isinstance(key, str) else None
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


def _shown(name: str, value: Any) -> str:
    return "=***" if name == "secret" else f"={value!r}"


def _listed(title: str, problems: list[str]) -> str:
    return title + "".join("\n  " + problem.replace("\n", "\n  ") for problem in problems)
