"""Names: the plan file's mapping from a job's own module paths to names that both jobs share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from grafter.core.messages.announced_models import TENSOR_KEY_MARK
from grafter.core.patterns import compile_match
from grafter.core.points import OPTIONS, OWN_TAGS

_CAPTURE = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")
# The dot between a module's path and the path of one of its tensors.
_TENSOR_PART = re.compile(r"\.(?=(?:in|out)(?:\.|$))")
# The layer id at a segment of a path, by the segment's number. The text of the path may lack it.
LayerIdAt = Callable[[int], "int | str"]


@dataclass(frozen=True)
class PointName:
    """The name of a point, and the tags that its path gave."""

    name: str
    tags: dict[str, Any]
    # For the module's path: the value that rules for its tensors capture as `layer_id`.
    layer_id_at: LayerIdAt | None = field(default=None, compare=False, repr=False)

    def with_suffix(self, suffix: str) -> PointName:
        """The name of one of the module's tensors."""
        return PointName(self.name + suffix, self.tags)

    @property
    def key(self) -> str:
        """The text under which a rank announces that it has this module."""
        return f"{self.name} {sorted(self.tags.items())!r}"

    @property
    def tensor_key(self) -> str:
        """The text under which a rank announces a tensor with a separate name."""
        return TENSOR_KEY_MARK + self.key

    def announced_as(self, module: PointName, suffix: str, *, is_known: bool) -> str:
        """The keys under which ranks of either job may have announced this point of `module`, the first that applies
        first, as one text. is_known: whether the name is known before the program runs.
        """
        if not is_known:
            return module.key
        keys = [self.tensor_key, module.key]
        if self.name != module.name + suffix:
            # In the other job it may be the input or output of a module with the common name.
            places = [match.start() for match in _TENSOR_PART.finditer(self.name)]
            if places and places[-1]:
                keys.insert(1, PointName(self.name[: places[-1]], self.tags).key)
        return "\n".join(keys)


class NameRule(BaseModel):
    """An entry of the plan file's `names`.

    path: a pattern for the path of a module, of a weight, or of a module's tensor, which ends in `in` or `out` and what
    follows it (`*.self_attn.out.0`). name: the common name. It may use captures of `path`; the other captures become
    tags. role: the job to whose paths the entry applies; None: to both jobs'.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    path: str
    name: str
    role: Literal["baseline", "target"] | None = None

    @field_validator("path")
    @classmethod
    def _check_path(cls, pattern: str) -> str:
        compile_match(pattern)
        return pattern

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name:
            raise ValueError("it must not be empty")
        return name

    @model_validator(mode="after")
    def _check_captures(self) -> NameRule:
        captured, used = set(_CAPTURE.findall(self.path)), set(_CAPTURE.findall(self.name))
        unknown = used - captured
        if unknown:
            raise ValueError(f"{self.name!r} uses {{{min(unknown)}}}, which {self.path!r} does not capture")
        refused = (captured - used) & (OPTIONS | OWN_TAGS)
        if refused:
            raise ValueError(f"{{{min(refused)}}} would be a tag, and grafter reserves this name; use another")
        return self

    @property
    def names_a_tensor(self) -> bool:
        """Whether this may be an entry for one tensor of a module."""
        return self._tensor_patterns is not None

    @property
    def known_suffix(self) -> str | None:
        """The path below its module of the only tensor that the entry names; None if the pattern may match several."""
        patterns = self._tensor_patterns
        return None if patterns is None or re.search(r"[*?{]", patterns[1]) else f".{patterns[1]}"

    @cached_property
    def _tensor_patterns(self) -> tuple[str, str] | None:
        """The patterns of the module and of its tensor, if the entry is for a tensor."""
        places = [match.start() for match in _TENSOR_PART.finditer(self.path)]
        return (self.path[: places[-1]], self.path[places[-1] + 1 :]) if places and places[-1] else None

    def apply(self, path: str, layer_id_at: LayerIdAt | None = None) -> PointName | None:
        """The common name and tags of a module or weight; None if the pattern does not match."""
        match = compile_match(self.path).fullmatch(path)
        return None if match is None else self._named(_captures(match, layer_id_at))

    def apply_to_tensor(self, path: str, suffix: str, layer_id_at: LayerIdAt | None = None) -> PointName | None:
        """The common name and tags of a module's tensor. suffix: its path below the module, such as `.out.0`."""
        if self._tensor_patterns is None:
            return None
        of_module, of_tensor = self._tensor_patterns
        upper, lower = compile_match(of_module).fullmatch(path), compile_match(of_tensor).fullmatch(suffix[1:])
        if upper is None or lower is None:
            return None
        above, below = _captures(upper, layer_id_at), _captures(lower, None)
        if any(above[name] != below[name] for name in above.keys() & below.keys()):
            return None
        return self._named({**above, **below})

    def _named(self, captures: dict[str, int | str]) -> PointName:
        used = set(_CAPTURE.findall(self.name))
        name = _CAPTURE.sub(lambda found: str(captures[found[1]]), self.name)
        return PointName(name, {tag: value for tag, value in captures.items() if tag not in used})


NAME_FIELDS = tuple(NameRule.model_fields)


def _captures(match: re.Match[str], layer_id_at: LayerIdAt | None) -> dict[str, int | str]:
    captures: dict[str, int | str] = {}
    for name, text in match.groupdict().items():
        if name.startswith("_"):  # an internal group of the pattern
            continue
        if name == "layer_id" and layer_id_at is not None:
            captures[name] = layer_id_at(match.string.count(".", 0, match.start(name)))
        else:
            captures[name] = int(text) if text.isdecimal() else text
    return captures
