"""Points: the tags of a dump call, the context around it, the step, and the key that both jobs agree on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafter.errors import UsageError

PHASE = "forward"

# Arguments of `dump` that are never tags: some are used now, the others are kept for what comes later.
OPTIONS = frozenset(
    {
        "extras",
        "ranks",
        "transform",
        "write",
        "gradient",
        "dims",
        "layout",
        "tokens",
        "start",
        "new_rows_only",
        "wait",
        "save",
    }
)
OPTIONS_IN_USE = frozenset({"extras", "ranks", "transform", "write", "gradient"})
# Set by grafter itself for every point.
OWN_TAGS = frozenset({"name", "step", "phase", "occurrence"})

_SCALARS = (str, int, float, bool, type(None))
# Frames that stand between the user's line and ours: our own, and what wraps calls around them.
_PASSED_OVER = (str(Path(__file__).parent) + os.sep, f"{os.sep}contextlib.py", f"{os.sep}_dynamo{os.sep}")


def is_rank_tag(tag: str) -> bool:
    """Rank tags differ between ranks by nature, so they never identify a point."""
    return tag == "rank" or tag.endswith("_rank")


@dataclass(frozen=True)
class PointKey:
    """What identifies a point in both jobs. `identifying` holds only the tags that identify."""

    name: str
    identifying: tuple[tuple[str, Any], ...]
    step: int
    phase: str
    occurrence: int

    @property
    def digest(self) -> str:
        """24 hex digits, the same for the same point in both jobs: the point's place in the store."""
        canonical = json.dumps([self.name, self.identifying, self.step, self.phase, self.occurrence])
        return hashlib.blake2b(canonical.encode(), digest_size=12).hexdigest()

    def __str__(self) -> str:
        parts = [f"{tag}={value!r}" for tag, value in self.identifying]
        parts.append(f"step={self.step}")
        if self.phase != PHASE:
            parts.append(f"phase={self.phase}")
        if self.occurrence:
            parts.append(f"occurrence={self.occurrence}")
        return f"{self.name!r} ({', '.join(parts)})"


@dataclass
class StepCounter:
    """The step, and how often each key was matched within it."""

    step: int = 0
    _occurrences: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def next_step(self) -> None:
        self.step += 1
        self._occurrences.clear()

    def next_key(self, tags: Mapping[str, Any], identifying_tags: frozenset[str] | None) -> PointKey:
        """The key of a matched point; counts it. `identifying_tags` None: all but rank tags."""
        identifying = tuple(
            (tag, value)
            for tag, value in sorted(tags.items())
            if tag not in OWN_TAGS
            and (tag in identifying_tags if identifying_tags is not None else not is_rank_tag(tag))
        )
        # repr keeps 1, 1.0 and True apart, which compare equal.
        counted = (tags["name"], repr(identifying))
        occurrence = self._occurrences.get(counted, 0)
        self._occurrences[counted] = occurrence + 1
        return PointKey(tags["name"], identifying, self.step, PHASE, occurrence)


def check_tags(tags: dict[str, Any]) -> None:
    """Refuse what cannot be a tag, and turn NumPy scalars into Python's, in place."""
    for tag, value in tags.items():
        if type(value) in _SCALARS:
            continue
        if hasattr(value, "dtype") and hasattr(value, "item") and not hasattr(value, "device"):
            tags[tag] = value.item()
            continue
        raise UsageError(
            f"tag {tag}={value!r} is a {type(value).__name__}. Tags are scalars (str, int, float, bool or None), because "
            f"both jobs must be able to compare them. Pass its value (`{tag}=int(...)`), or put data into `extras=`."
        )


def split_options(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tags, options) of one dump or context call; refuses names that are not free."""
    tags: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in OPTIONS:
            if name not in OPTIONS_IN_USE:
                raise UsageError(f"`{name}=` is reserved and not in this version; a tag needs another name.")
            options[name] = value
        elif name in OWN_TAGS:
            raise UsageError(f"`{name}` is set by grafter for every point; a tag needs another name.")
        else:
            tags[name] = value
    return tags, options


def call_site() -> str:
    """`file:line in function` of the user's line: the first frame outside of this package."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not any(part in code.co_filename for part in _PASSED_OVER):
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "unknown"


@dataclass(frozen=True)
class Surroundings:
    """What the enclosing `context` blocks add to a point."""

    tags: dict[str, Any]
    options: dict[str, Any]


NO_SURROUNDINGS = Surroundings({}, {})
# A thread of its own starts without context, as contextvars do; so does an autograd thread.
surroundings: ContextVar[Surroundings] = ContextVar("grafter_surroundings", default=NO_SURROUNDINGS)
