"""Direction: which way a point's tensor goes, as the filters decide it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from grafter.errors import DirectionConflict
from grafter.filters.expression import Filter
from grafter.points import OPTIONS, OWN_TAGS, call_site

Direction = Literal["b2t", "t2b", "compare"]
RoleName = Literal["baseline", "target"]


def sender_role(direction: Direction) -> RoleName:
    """Who sends. In a comparison the baseline sends and the target computes the difference."""
    return "target" if direction == "t2b" else "baseline"


def receiver_role(direction: Direction) -> RoleName:
    return "baseline" if direction == "t2b" else "target"


class DirectionFilters:
    """The filters that are set, and what they have met: at close, one that never matched is told."""

    def __init__(self, filters: Mapping[Direction, Filter]) -> None:
        self._filters = list(filters.items())
        # Whether any filter matches is asked of every dump call of the program: bound once, the loop is the caller's.
        self.matchers: tuple[Callable[[Mapping[str, Any]], bool], ...] = tuple(
            filter_.matches for _, filter_ in self._filters
        )
        self._matched: set[Direction] = set()
        own = {"name", "step", "phase"}
        # Tags that a filter reads and no point has had yet.
        self.unseen_tags = {name for _, filter_ in self._filters for name in filter_.names} - own

    def direction_of(self, tags: Mapping[str, Any]) -> Direction | None:
        """b2t, t2b, compare, or None where no filter matches.

        Raises DirectionConflict if two match: before anything is exchanged, and in both jobs, because both hold the
        same filters.
        """
        found: Direction | None = None
        for direction, filter_ in self._filters:
            if filter_(tags):
                if found is not None:
                    raise self._conflict(tags, found, direction)
                found = direction
        if found is not None:
            self._matched.add(found)
        return found

    def could_match(self, tags: Mapping[str, Any]) -> set[Direction]:
        """Directions whose filters match these tags, or could with another step or with tags of a context."""
        known = tags.keys() | {"name", "phase"}
        return {
            direction
            for direction, filter_ in self._filters
            if filter_.names - known or "step" in filter_.names or filter_(tags)
        }

    def _conflict(self, tags: Mapping[str, Any], first: Direction, second: Direction) -> DirectionConflict:
        sources = dict(self._filters)
        own = sorted(tag for tag in tags if tag not in OPTIONS and tag not in OWN_TAGS)
        point = ", ".join(f"{tag}={tags[tag]!r}" for tag in [*own, "step"])
        return DirectionConflict(
            f"the point {tags['name']!r} ({point}) at {call_site()} is matched by two filters, so its direction is not "
            f"decided:\n  {first}: {sources[first].source}\n  {second}: {sources[second].source}\n"
            f"Narrow one of them, for instance with `and not (...)`."
        )

    def never_matched(self) -> list[str]:
        return [f"{d}: {f.source}" for d, f in self._filters if d not in self._matched]

    def tags_never_seen(self) -> list[str]:
        return sorted(self.unseen_tags)
