"""Thresholds: what a difference may be, by the name of the point; the first pattern that matches decides.

    attn.*: rel <= 0.0085 or max_abs <= 1e-3
    root.out.logits: kl <= 1e-4 and p99 <= 0.02

The expression is one of the filters' language, and its names are measures (docs/compare.md). Whatever it says, a pair
with unequal non-finite values fails it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from grafter.core.filters.expression import Filter, parse_filter
from grafter.core.patterns import compile_match
from grafter.errors import ConfigError

Value = float | int | None

# What a rule may read. With `narrow_` before it, the same of both tensors in the narrower of the two dtypes.
MEASURES = (
    "rel", "rel_l2", "max_abs", "mean_abs", "cosine", "mismatched_fraction", "nan", "inf", "max_ulp", "mean_ulp",
    "p50", "p90", "p99", "p99_9", "worst_row_rel", "rows_far", "rows_differing",
)  # fmt: skip
KL_MEASURES = ("kl", "max_kl")
_NARROW = "narrow_"
_KL_OF_DIM = re.compile(r"(?:max_)?kl_(?P<dim>[A-Za-z][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Threshold:
    """One rule. match: a pattern over names, as in the plan file's rules; require: an expression over measures.

    place: where it was said, for messages. Raises ConfigError for what is no pattern, FilterError for what is no
    expression, with the position.
    """

    match: str
    require: str
    place: str = field(default="threshold", compare=False)

    def __post_init__(self) -> None:
        compile_match(self.match)
        # Parsed where it is read, so that a misspelt measure is not found when the comparison is half done.
        _ = self.filter

    @cached_property
    def filter(self) -> Filter:
        return parse_filter(self.require, setting=self.place, check_name=complain_of_measure)

    @property
    def names(self) -> frozenset[str]:
        """The measures that it reads."""
        return self.filter.names

    @property
    def kl_dims(self) -> frozenset[str | None]:
        """The dims whose KL it asks for, by name; None is the last dim."""
        found: set[str | None] = set()
        for name in self.names:
            if name in KL_MEASURES:
                found.add(None)
            elif (of_dim := _KL_OF_DIM.fullmatch(name)) is not None:
                found.add(of_dim["dim"])
        return frozenset(found)

    def matches(self, name: str) -> bool:
        return compile_match(self.match).fullmatch(name) is not None

    def holds(self, values: Mapping[str, Value]) -> bool:
        """Whether the measures satisfy it. One that is not there, or None, satisfies no comparison."""
        nonfinite = ["nan", "inf"]
        if any(name.startswith(_NARROW) for name in self.names):
            nonfinite += [_NARROW + name for name in nonfinite]
        return not any(values.get(name) for name in nonfinite) and self.filter(values)

    def __str__(self) -> str:
        return f"{self.match}: {self.require}"


THRESHOLD_FIELDS = ("match", "require")


def complain_of_measure(name: str) -> str | None:
    """What is wrong with a name in an expression; None for a measure."""
    plain = name.removeprefix(_NARROW)
    if plain in MEASURES or name in KL_MEASURES or _KL_OF_DIM.fullmatch(name) is not None:
        return None
    legal = (*MEASURES, *KL_MEASURES, *(_NARROW + measure for measure in MEASURES))
    near = difflib.get_close_matches(name, legal, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"measures are {', '.join((*MEASURES, *KL_MEASURES))}"
    return f"`{name}` is no measure; {hint}"


# Where nobody said what a difference may be, none may be.
NO_DIFFERENCE = Threshold("*", "mismatched_fraction == 0", "without thresholds")


class Thresholds:
    """All rules, in order. Without any, no difference is allowed; with some, a name that none covers is an error."""

    def __init__(self, rules: Iterable[Threshold]) -> None:
        self.rules: Sequence[Threshold] = tuple(rules)

    def rule_for(self, name: str) -> Threshold | None:
        """The first rule that matches; None where none does."""
        if not self.rules:
            return NO_DIFFERENCE
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def never_matched(self, names: Iterable[str]) -> list[Threshold]:
        """The rules whose pattern is of none of these names, or of none that an earlier rule leaves."""
        used = {id(rule) for name in set(names) if (rule := self.rule_for(name)) is not None}
        return [rule for rule in self.rules if id(rule) not in used]


def parse_threshold(text: str, place: str = "--threshold") -> Threshold:
    """`PATTERN: EXPRESSION`. Raises ConfigError (FilterError, with the position, for a bad expression)."""
    pattern, colon, expression = text.partition(": ")
    if not colon:
        pattern, colon, expression = text.partition(":")
    if not colon or not pattern.strip() or not expression.strip():
        raise ConfigError(
            f"{place} {text!r}: write it as 'PATTERN: EXPRESSION', such as 'attn.*: rel <= 1e-3 or max_abs <= 1e-3'."
        )
    return Threshold(pattern.strip(), expression.strip(), place)
