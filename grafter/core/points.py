"""Points: the tags of a dump call, the context around it, the step, and the key that both jobs agree on."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from grafter.errors import UsageError

PHASE = "forward"

# Arguments of `dump` that are never tags.
OPTIONS = frozenset(
    {
        "extras",
        "ranks",
        "transform",
        "write",
        "gradient",
        "dims",
        "layout",
        "axes",
        "seq_lens",
        "tokens",
        "start",
        "new_rows_only",
        "wait",
        "save",
    }
)
# What a `context` may give to the points inside of it.
CONTEXT_OPTIONS = frozenset({"ranks", "axes", "tokens", "start", "new_rows_only"})
# Set by grafter itself for every point.
OWN_TAGS = frozenset({"name", "step", "phase", "occurrence"})
# Arguments for which a call that no filter matches is looked at once more.
LOOKED_AT = OWN_TAGS | {"save"}

# As in grafter.config.settings.plan_file, which imports pydantic: too dear where grafting is off. A test compares them.
LEGAL_OPTIONS = {
    "write": ("in_place", "return"),
    "gradient": ("straight_through", "cut", "strict"),
    "wait": ("both", "job"),
}
_SCALARS = (str, int, float, bool, type(None))
# Frames that stand between the user's line and ours: our own, and what wraps calls around them.
_PASSED_OVER = (
    str(Path(__file__).parents[1]) + os.sep,
    f"{os.sep}contextlib.py",
    f"{os.sep}_dynamo{os.sep}",
    os.sep.join(["", "torch", "nn", "modules", "module.py"]),
)


def is_rank_tag(tag: str) -> bool:
    """Rank tags differ between ranks by nature, so they never identify a point."""
    return tag == "rank" or tag.endswith("_rank")


_MOST_REMEMBERED = 4096
_encoded: dict[tuple[str, str], str] = {}


def _encode_once(name: str, shown: str, identifying: tuple[tuple[str, Any], ...]) -> str:
    # Remembered by `shown`, since 1, 1.0 and True are equal as keys of a dict.
    known = _encoded.get((name, shown))
    if known is None:
        if len(_encoded) >= _MOST_REMEMBERED:
            _encoded.clear()
        known = _encoded[name, shown] = json.dumps([name, identifying])[1:-1]
    return known


class _KeyFields(NamedTuple):
    name: str
    identifying: tuple[tuple[str, Any], ...]
    step: int
    phase: str
    occurrence: int


class PointKey(_KeyFields):
    """What identifies a point in both jobs. `identifying` holds only the tags that identify.

    A named tuple, since one is made at every point.
    """

    _digest: str = ""

    @property
    def digest(self) -> str:
        """24 hex digits, the same for the same point in both jobs: the point's place in the store."""
        if not self._digest:
            self._digest = self._worked_out()
        return self._digest

    def _worked_out(self) -> str:
        # What `json.dumps` makes of all five. The first two stay from step to step, and are encoded once.
        stays = _encode_once(self.name, repr(self.identifying), self.identifying)
        canonical = f'[{stays}, {self.step}, "{self.phase}", {self.occurrence}]'
        return hashlib.blake2b(canonical.encode(), digest_size=12).hexdigest()

    @property
    def text(self) -> str:
        """As messages show it."""
        parts = [f"{tag}={value!r}" for tag, value in self.identifying]
        parts.append(f"step={self.step}")
        if self.phase != PHASE:
            parts.append(f"phase={self.phase}")
        if self.occurrence:
            parts.append(f"occurrence={self.occurrence}")
        return f"{self.name!r} ({', '.join(parts)})"

    def __str__(self) -> str:
        return self.text


def identify(tags: Mapping[str, Any], identifying_tags: frozenset[str] | None) -> tuple[tuple[str, Any], ...]:
    """The tags that identify a point, sorted. `identifying_tags` None: all but rank tags."""
    return tuple(
        (tag, value)
        for tag, value in sorted(tags.items())
        if tag not in OWN_TAGS and (tag in identifying_tags if identifying_tags is not None else not is_rank_tag(tag))
    )


@dataclass
class StepCounter:
    """The step, and how often each key was matched within it."""

    step: int = 0
    _occurrences: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def next_step(self) -> None:
        self.step += 1
        self._occurrences.clear()

    def next_key(
        self, tags: Mapping[str, Any], identifying_tags: frozenset[str] | None, phase: str = PHASE
    ) -> PointKey:
        """The key of a matched point; counts it. `identifying_tags` None: all but rank tags."""
        identifying = identify(tags, identifying_tags)
        # repr keeps 1, 1.0 and True apart, which compare equal.
        counted = (tags["name"], phase, repr(identifying))
        occurrence = self._occurrences.get(counted, 0)
        self._occurrences[counted] = occurrence + 1
        return PointKey(tags["name"], identifying, self.step, phase, occurrence)


def check_tags(tags: dict[str, Any]) -> None:
    """Refuse what cannot be a tag, and turn NumPy scalars and enums of str, int or float into Python's, in place."""
    for tag, value in tags.items():
        if type(value) not in _SCALARS:
            tags[tag] = _as_scalar(tag, value)


def _as_scalar(tag: str, value: Any) -> str | int | float | bool | None:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        item = value.item()
        if type(item) in _SCALARS:
            return item  # type: ignore[no-any-return]
    # `str()` of an enum would be its name.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if hasattr(value, "dtype") and hasattr(value, "item"):
        raise UsageError(
            f"tag {tag} is a {type(value).__name__} of shape {list(getattr(value, 'shape', ()))}. Tags are scalars "
            f"(str, int, float, bool or None), because both jobs must be able to compare them. Pass its value with "
            f"`.item()` (on a GPU this waits for it), or put it into `extras=` if it is data for a transform."
        )
    raise UsageError(
        f"tag {tag}={_shown(value)} is a {type(value).__name__}. Tags are scalars (str, int, float, bool or None), "
        f"because both jobs must be able to compare them. Pass its value, or put data for a transform into `extras=`."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def split_options(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tags, options) of one dump or context call; refuses names that are not free."""
    tags: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in OPTIONS:
            legal = LEGAL_OPTIONS.get(name)
            if legal is not None and value is not None and value not in legal:
                raise UsageError(f"`{name}={_shown(value)}` is not known; legal values are {', '.join(legal)}.")
            if name in ("save", "new_rows_only") and not isinstance(value, (bool, type(None))):
                raise UsageError(f"`{name}={_shown(value)}` is not known; legal values are True and False.")
            options[name] = value
        elif name in OWN_TAGS:
            raise UsageError(_why_not_a_tag(name))
        else:
            tags[name] = value
    return tags, options


def _why_not_a_tag(name: str) -> str:
    sets_it = {
        "name": "the first argument of `grafter.dump`",
        "step": "set by grafter: `grafter.step()` counts it up",
        "phase": "set by grafter for every point",
        "occurrence": "set by grafter: it counts the calls of one point within a step",
    }
    return f"`{name}` is {sets_it[name]}; a tag needs another name."


# The user's line of a point in compiled code, where no frame shows it.
traced_call_site: ContextVar[str | None] = ContextVar("grafter_traced_call_site", default=None)


@lru_cache(maxsize=_MOST_REMEMBERED)
def is_passed_over(file: str) -> bool:
    """Whether a frame's file is none of the user's."""
    return any(part in file for part in _PASSED_OVER)


def call_site() -> str:
    """`file:line in function` of the user's line: the first frame outside of this package."""
    traced = traced_call_site.get()
    if traced is not None:
        return traced
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not is_passed_over(code.co_filename):
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "unknown"


@dataclass(frozen=True)
class Surroundings:
    """What the enclosing `context` blocks add to a point; `outer` is what was around the innermost of them."""

    tags: dict[str, Any]
    options: dict[str, Any]
    outer: Surroundings | None = None


NO_SURROUNDINGS = Surroundings({}, {})
# A thread of its own starts without context, as contextvars do; so does an autograd thread.
surroundings: ContextVar[Surroundings] = ContextVar("grafter_surroundings", default=NO_SURROUNDINGS)


def enter_context(arguments: dict[str, Any]) -> None:
    """Begin a `context` block with these tags and options. Raises UsageError where one is not possible there."""
    tags, options = split_options(arguments)
    unfit = [option for option in options if option not in CONTEXT_OPTIONS]
    if unfit:
        raise UsageError(
            f"context takes tags, `ranks=`, `axes=` and `tokens=` (with `start=`, `new_rows_only=`); `{unfit[0]}=` "
            "belongs to a single dump."
        )
    check_tags(tags)
    around = surroundings.get()
    surroundings.set(Surroundings({**around.tags, **tags}, {**around.options, **options}, around))


def enter_context_of(
    arguments: dict[str, Any], of_self: Callable[[Any], Any], args: tuple[Any, ...], function: Callable[..., Any]
) -> None:
    """The same around a call `function(*args)`, with the tags that `of_self` returns for its first argument."""
    if not args:
        raise UsageError(f"context(function of self) around {function!r}: it was called without a positional argument.")
    tags = of_self(args[0])
    if not isinstance(tags, dict) or not all(isinstance(tag, str) for tag in tags):
        raise UsageError(f"context(function of self) around {function!r}: that function must return a dict of tags.")
    enter_context({**tags, **arguments})


def leave_context() -> None:
    """End the innermost `context` block of this thread."""
    surroundings.set(surroundings.get().outer or NO_SURROUNDINGS)


def why_not_decorated(function: Any) -> str | None:
    """Why `context` cannot decorate a function; None if it can."""
    if isinstance(function, (type, classmethod)):
        return "it is no function. Decorate a method, or put @classmethod above @grafter.context."
    if (
        inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        return "a generator or coroutine would leave it before it runs. Use `with grafter.context(...)` inside."
    return None
