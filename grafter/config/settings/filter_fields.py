"""The filters among the settings: which field holds which, and which tags each may read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from grafter.core.filters.expression import parse_filter
from grafter.core.points import OPTIONS, is_rank_tag
from grafter.errors import FilterError

FilterDirection = Literal["b2t", "t2b", "compare"]
FILTER_FIELDS: dict[FilterDirection, str] = {"b2t": "b2t_filter", "t2b": "t2b_filter", "compare": "compare_filter"}
# Tags that every point has and that identify it, whatever `key` says.
ALWAYS_IDENTIFYING = frozenset({"name", "step", "phase"})


def split_key(key: str) -> list[str]:
    """The tags that the setting `key` lists."""
    return [tag.strip() for tag in key.split(",") if tag.strip()]


def find_filter_problems(values: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """What is wrong with the filters among `values`; `labels` say where each was set."""
    key = values.get("key")
    key_tags = frozenset(split_key(key)) | ALWAYS_IDENTIFYING if isinstance(key, str) else None
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
