"""The configuration: GRAFTER_* variables and the plan file become one frozen, validated GrafterConfig.

    environment (GRAFTER_<FIELD>, or DUMPER_GRAFTER_<FIELD>)  >  plan file (GRAFTER_PLAN)  >  default

Problems are told in the order in which a person can act on them: variables that do not exist, then what is missing
and what sets it, then illegal values; all of one kind in one message. This file needs no torch, and importing pydantic
takes 0.1 s: import it only once `grafter.config.switch.enabled()` says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, field_validator

from grafter.config.names import NameRule
from grafter.config.settings.field_types import (
    ALWAYS_IDENTIFYING,
    FILTER_FIELDS,
    AxisSizes,
    Count,
    DumpLevel,
    FilterDirection,
    Gradient,
    Index,
    Label,
    LogLevel,
    ModelNames,
    OneSided,
    OnTransformError,
    PartialTarget,
    Port,
    Seconds,
    Size,
    Steps,
    Switch,
    WaitFor,
    Write,
    find_filter_problems,
    read_model_names,
    split_key,
)
from grafter.config.settings.given_settings import (
    add_plan_file,
    explain_validation,
    list_problems,
    refuse_missing,
    refuse_unknown_fields,
    refuse_unknown_variables,
)
from grafter.config.settings.plan_file import RULE_CONDITIONS, RULE_FIELDS, Rule
from grafter.config.switch import PREFIX, read_variable
from grafter.core.filters.expression import Filter, parse_filter
from grafter.core.patterns import read_patterns
from grafter.core.points import is_rank_tag
from grafter.errors import ConfigError, FilterError, UsageError

# Where a field of a rule is called otherwise in the configuration.
_RULE_FALLBACK = {"transform": "transform_path"}
_ABSENT = object()
_MAX_CACHED_RULE_VALUES = 100_000


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
    master_port: Port | None = None
    baseline_world_size: Count | None = None
    target_world_size: Count | None = None
    rank: Index | None = None
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    group_name: Label = "graft"
    timeout: Seconds = 300.0
    join_timeout: Seconds = 1800.0
    stats: Literal["full", "light", "off"] = "full"
    log_level: LogLevel = "info"
    key: str | None = None
    transform_path: str | None = None
    on_transform_error: OnTransformError = "skip"
    on_peer_loss: Literal["raise", "detach"] = "raise"
    write: Write = "in_place"
    gradient: Gradient = "straight_through"
    wait: WaitFor = "both"
    one_sided: OneSided = "raise"
    outbox_bytes: Size = "1GiB"
    outbox_seconds: Seconds = 60.0
    windows: Switch = True
    start: Index = 0
    new_rows_only: Switch = False
    baseline_axes: AxisSizes | None = None
    target_axes: AxisSizes | None = None
    check_replicas: Switch = False
    partial_target: PartialTarget = "refuse"
    dump_filter: str | None = None
    dump_level: DumpLevel = "full"
    dump_steps: Steps | None = None
    dump_max_bytes: Size | None = None
    dump_max_points: Count | None = None
    dump_queue_bytes: Size = "1GiB"
    dump_exclude: str = "routed_experts,hidden_states"
    dir: str = "grafter_out"
    run_name: Label | None = None
    plan: str | None = None
    secret: SecretStr | None = None
    record: Switch = False
    peer: str | None = None
    store_host: Literal["rank0", "launcher", "peer"] = "rank0"
    attach: str | None = None
    baseline_models: ModelNames | None = None
    target_models: ModelNames | None = None
    baseline_warm_up: Index = 0
    target_warm_up: Index = 0
    step: Literal["auto", "optimizer", "forward", "manual"] = "auto"
    gradients: Switch = False
    weight_gradients: Literal["backward", "optimizer_step"] = "backward"
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
        refuse_unknown_variables(environ, SETTING_FIELDS)
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
        refuse_unknown_fields(values, tuple(GrafterConfig.model_fields))
        values, labels = add_plan_file(values, labels, SETTING_FIELDS)
        refuse_missing(values, setter_of)
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
        filter_problems = find_filter_problems(values, labels)
        if filter_problems and not problems:
            raise FilterError("\n".join(filter_problems))
        if problems:
            raise ConfigError(list_problems("these settings have illegal values:", problems + filter_problems))

    @field_validator("attach")
    @classmethod
    def _check_attach(cls, value: str | None) -> str | None:
        try:
            read_patterns((value or "",))
        except UsageError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("key")
    @classmethod
    def _check_key(cls, value: str | None) -> str | None:
        for tag in split_key(value or ""):
            if not tag.isidentifier():
                raise ValueError(f"{tag!r} is no tag name; write names with commas between, such as layer_id,expert")
            if is_rank_tag(tag):
                raise ValueError(f"{tag} differs between ranks, so it cannot identify a point")
        return value

    @cached_property
    def key_tags(self) -> frozenset[str] | None:
        """The tags that identify a point besides name, step and phase; None: all but rank tags."""
        return None if self.key is None else frozenset(split_key(self.key)) - ALWAYS_IDENTIFYING

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

    @property
    def one_sided_settings(self) -> dict[str, str]:
        """What both jobs must have alike of `one_sided`, as text; empty where every point is to raise."""
        rules = [f"{rule.match}={rule.one_sided}" for rule in self.rules if rule.one_sided is not None]
        if self.one_sided == "raise" and not any(rule.one_sided == "skip" for rule in self.rules):
            return {}
        return {"one_sided": "; ".join([self.one_sided, *rules])}

    @cached_property
    def own_rules(self) -> tuple[Rule, ...]:
        """The rules for both jobs and for this one."""
        return tuple(rule for rule in self.rules if rule.role in (None, self.role))

    @property
    def axes(self) -> str | None:
        """The mesh of this job, where a setting says it."""
        return self.baseline_axes if self.role == "baseline" else self.target_axes

    @cached_property
    def model_names(self) -> dict[str, str]:
        """What stands before the names of a model's points in this job, by the variable that holds it, or its class."""
        return read_model_names((self.baseline_models if self.role == "baseline" else self.target_models) or "")

    @property
    def warm_up(self) -> int:
        """How many first forward passes of this job have no points."""
        return self.baseline_warm_up if self.role == "baseline" else self.target_warm_up

    def public_dict(self) -> dict[str, Any]:
        """What run.json may hold: every field as JSON-able data, but not the secret."""
        return self.model_dump(mode="json", exclude={"secret"})


# What a variable or the command line can set.
SETTING_FIELDS: tuple[str, ...] = tuple(name for name in GrafterConfig.model_fields if name not in ("rules", "names"))


def _shown(name: str, value: Any) -> str:
    return "=***" if name == "secret" else f"={value!r}"
