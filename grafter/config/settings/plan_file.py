"""The plan file: YAML that both jobs can share, with the fields of GrafterConfig and rules per name.

    b2t_filter: layer_id == 3
    rules:
      - match: "layers.{layer_id}.*"
        write: return

A value means in the file what it means in the environment, so `timeout: 60` and GRAFTER_TIMEOUT=60 are read by the same
code. Every error says `file:line:column`. Tags (`!!python/...`) and anchors build no objects: the file is read as plain
nodes, and only texts are taken from them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from grafter.config.names import NAME_FIELDS, NameRule
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
from grafter.config.settings.given_settings import explain_validation
from grafter.config.thresholds import THRESHOLD_FIELDS, Threshold
from grafter.core.layout.dims import parse_dims
from grafter.core.patterns import compile_match
from grafter.errors import ConfigError

if TYPE_CHECKING:
    from ruamel.yaml.nodes import MappingNode, Node


MAX_BYTES = 10 * 1024 * 1024
_YAML_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_YAML_TAG + kind for kind in ("str", "int", "float", "bool", "timestamp")}
# Fields that a file cannot set, and why.
_REFUSED = {
    "secret": "a secret appears in no file. Set the variable GRAFTER_SECRET in both jobs instead",
    "enable": "a plan file is read only once grafting is on, so `enable` has no effect in it. Set GRAFTER_ENABLE=1",
    "plan": "a plan file cannot name another one. Put everything into one file",
}


@dataclass(frozen=True)
class PlanValue:
    """One field's text, and the `file:line:column` at which it stands."""

    text: str
    place: str


@dataclass(frozen=True)
class PlanFile:
    """What one plan file says; fields without a value are left out."""

    path: str
    fields: dict[str, PlanValue]
    rules: tuple[Rule, ...]
    names: tuple[NameRule, ...] = ()
    thresholds: tuple[Threshold, ...] = ()


def read_plan_file(path: str | os.PathLike[str], field_names: Iterable[str]) -> PlanFile:
    """Read a plan file; `field_names` are the fields that a configuration has.

    Raises ConfigError with file, line and column for what is not YAML, an unknown or repeated field, or an illegal
    rule. The values of the other fields are checked by GrafterConfig, together with those of the environment.
    """
    return _PlanReader(os.fspath(path), tuple(field_names)).read()


class _PlanReader:
    def __init__(self, path: str, field_names: tuple[str, ...]) -> None:
        self._path = path
        self._field_names = field_names

    def read(self) -> PlanFile:
        root = self._compose(self._read_text())
        fields: dict[str, PlanValue] = {}
        rules: tuple[Rule, ...] = ()
        names: tuple[NameRule, ...] = ()
        thresholds: tuple[Threshold, ...] = ()
        legal = tuple(name for name in self._field_names if name not in _REFUSED)
        for name, key_node, node in self._items(root, "the plan file"):
            if name == "rules":
                rules = tuple(self._rule(item) for item in self._list(node, "rules", "match"))
            elif name == "names":
                names = tuple(self._name_rule(item) for item in self._list(node, "names", "path"))
            elif name == "thresholds":
                thresholds = tuple(self._threshold(item) for item in self._list(node, "thresholds", "match"))
            elif name in _REFUSED and name in self._field_names:
                raise self._error(key_node, f"{name}: {_REFUSED[name]}.")
            elif name not in legal:
                raise self._unknown(key_node, name, (*legal, "rules", "names", "thresholds"), "field")
            else:
                text = self._text_of(node, name)
                if text:
                    fields[name] = PlanValue(text, self._place(node))
        return PlanFile(self._path, fields, rules, names, thresholds)

    def _read_text(self) -> str:
        try:
            with open(self._path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"the plan file {self._path} cannot be read: {error.strerror or error}. "
                f"Check GRAFTER_PLAN; a relative path starts at the job's working directory."
            ) from error
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{self._path}:1:1: a plan file has at most {MAX_BYTES // 1024**2} MiB; this has more.")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            column = error.start - content.rfind(b"\n", 0, error.start)
            raise ConfigError(
                f"{self._path}:{line}:{column}: this is not UTF-8 text. Save the file as UTF-8."
            ) from error

    def _compose(self, text: str) -> Node | None:
        # Here, because most runs have no plan file.
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError
        from ruamel.yaml.reader import ReaderError

        try:
            node: Node | None = YAML(typ="safe", pure=True).compose(text)
            return node
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{self._path}:{mark.line + 1}:{mark.column + 1}" if mark else f"{self._path}:1:1"
            reason = " ".join(str(part) for part in (error.context, error.problem) if part)
            raise ConfigError(f"{place}: this is not YAML: {reason}.") from None
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            column = error.position - text.rfind("\n", 0, error.position)
            raise ConfigError(f"{self._path}:{line}:{column}: YAML does not allow this character.") from None
        except (YAMLError, RecursionError, ValueError) as error:
            raise ConfigError(f"{self._path}:1:1: this is not YAML: {type(error).__name__}.") from None

    def _items(self, node: Node | None, what: str) -> list[tuple[str, Node, Node]]:
        """(name, node of the name, node of the value) of a mapping; an empty file has none."""
        from ruamel.yaml.nodes import MappingNode, ScalarNode

        if node is None or (isinstance(node, ScalarNode) and node.tag == _YAML_TAG + "null"):
            return []
        if not isinstance(node, MappingNode) or node.tag != _YAML_TAG + "map":
            raise self._error(node, f"{what} is a list of `field: value` lines; this is something else.")
        self._refuse_repeated(node)
        return [(str(key.value), key, value) for key, value in node.value]

    def _refuse_repeated(self, node: MappingNode) -> None:
        from ruamel.yaml.nodes import ScalarNode

        first: dict[str, Node] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise self._error(key, "a field's name is one word.")
            if key.value in first:
                line = first[key.value].start_mark.line + 1
                raise self._error(key, f"{key.value} is set twice, first in line {line}. Keep one of them.")
            first[key.value] = key

    def _text_of(self, node: Node, name: str) -> str | None:
        """The text of a single value; None for null."""
        from ruamel.yaml.nodes import ScalarNode

        if not isinstance(node, ScalarNode):
            raise self._error(node, f"{name} takes one value, not a list or a mapping.")
        if node.tag == _YAML_TAG + "null":
            return None
        if node.tag not in _SCALAR_TAGS:
            raise self._error(node, f"{name}: the tag {node.tag!r} is not allowed; write the plain value.")
        return str(node.value).strip()

    def _list(self, node: Node, what: str, first: str) -> list[Node]:
        from ruamel.yaml.nodes import ScalarNode, SequenceNode

        if isinstance(node, ScalarNode) and node.tag == _YAML_TAG + "null":
            return []
        if not isinstance(node, SequenceNode):
            raise self._error(node, f"{what} is a list; start each entry with `- {first}: ...`.")
        return list(node.value)

    def _name_rule(self, node: Node) -> NameRule:
        values: dict[str, Any] = {}
        nodes: dict[str, Node] = {}
        for name, key_node, value in self._items(node, "an entry of names"):
            if name not in NAME_FIELDS:
                raise self._unknown(key_node, name, NAME_FIELDS, "field of an entry of names")
            values[name], nodes[name] = self._text_of(value, name) or "", value
        for needed in ("path", "name"):
            if not values.get(needed):
                raise self._error(node, f"an entry of names needs `{needed}`.")
        try:
            return NameRule(**values)
        except ConfigError as error:
            raise self._error(nodes["path"], str(error)) from None
        except ValidationError as error:
            name, problem = explain_validation(error)[0]
            raise self._error(nodes.get(name, node), f"{name}: {problem}" if name else problem) from None

    def _threshold(self, node: Node) -> Threshold:
        values: dict[str, str] = {}
        nodes: dict[str, Node] = {}
        for name, key_node, value in self._items(node, "an entry of thresholds"):
            if name not in THRESHOLD_FIELDS:
                raise self._unknown(key_node, name, THRESHOLD_FIELDS, "field of an entry of thresholds")
            values[name], nodes[name] = self._text_of(value, name) or "", value
        for needed in THRESHOLD_FIELDS:
            if not values.get(needed):
                raise self._error(node, f"an entry of thresholds needs `{needed}`.")
        try:
            compile_match(values["match"])
        except ConfigError as error:
            raise self._error(nodes["match"], str(error)) from None
        return Threshold(**values, place=f"{self._place(nodes['require'])}: require")

    def _rule(self, node: Node) -> Rule:
        values: dict[str, Any] = {}
        nodes: dict[str, Node] = {}
        for name, key_node, value in self._items(node, "a rule"):
            if name not in RULE_FIELDS:
                raise self._unknown(key_node, name, RULE_FIELDS, "field of a rule")
            text = self._text_of(value, name) or ""
            if not text and name not in RULE_FIELDS_THAT_MAY_BE_EMPTY:
                raise self._error(value, f"{name} has no value.")
            values[name], nodes[name] = text, value
        if "match" not in values:
            raise self._error(node, 'a rule needs `match`, the pattern of the names it is for, such as "layers.*".')
        try:
            compile_match(values["match"])
        except ConfigError as error:
            raise self._error(nodes["match"], str(error)) from None
        try:
            return Rule(**values)
        except ValidationError as error:
            name, problem = explain_validation(error)[0]
            raise self._error(nodes[name], f"{name}: {problem}") from None

    def _unknown(self, node: Node, name: str, legal: tuple[str, ...], what: str) -> ConfigError:
        near = difflib.get_close_matches(name.lower(), legal, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Legal: {', '.join(legal)}."
        return self._error(node, f"{name!r} is no {what}. {hint}")

    def _error(self, node: Node, message: str) -> ConfigError:
        return ConfigError(f"{self._place(node)}: {message}")

    def _place(self, node: Node) -> str:
        return f"{self._path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


# Rules: settings for the points whose name a pattern matches; for each field the first rule that has it wins.


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
