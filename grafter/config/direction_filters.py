"""The filters that are set: which direction a point has, and which filters never matched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from grafter.core.filters.expression import Filter
from grafter.core.points import OPTIONS, OWN_TAGS, call_site
from grafter.core.roles import Direction
from grafter.errors import DirectionConflict

if TYPE_CHECKING:
    from grafter.config.options import DumpChoice


class DirectionFilters:
    """The filters that are set, and what they have met: at close, one that never matched is told."""

    def __init__(self, filters: Mapping[Direction, Filter], dumps: DumpChoice | None = None) -> None:
        """dumps: which points are saved, whatever their direction."""
        self._filters = list(filters.items())
        self._dumps = dumps
        # Whether any filter matches is asked of every dump call of the program: bound once, the loop is the caller's.
        self.matchers: tuple[Callable[[Mapping[str, Any]], bool], ...] = tuple(
            filter_.matches for _, filter_ in self._filters
        )
        read = {name for _, filter_ in self._filters for name in filter_.names}
        if dumps is not None:
            if dumps.matcher is not None:
                self.matchers += (dumps.matcher,)
            read |= dumps.filter.names if dumps.filter is not None else set()
        self._matched: set[Direction] = set()
        self._read = frozenset(read - {"name", "step", "phase"})
        self._had_directions = bool(self._filters)
        # Of those that these have taken the place of: as they are told, and which of them had matched.
        self._texts_before: tuple[str, ...] = ()
        self._met_before: frozenset[str] = frozenset()
        # Tags that a filter reads and no point has had yet.
        self.unseen_tags = read - {"name", "step", "phase"}

    @property
    def have_directions(self) -> bool:
        """Whether any point can meet the other job; else points are only saved."""
        return self._had_directions

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

    def saves(self, tags: Mapping[str, Any]) -> bool:
        """Whether a point is saved. tags: its own name, step and phase, too, and `save` where the call has it."""
        return self._dumps is not None and self._dumps.saves(tags)

    def could_match(self, tags: Mapping[str, Any]) -> set[Direction | Literal["dump"]]:
        """Directions whose filters match these tags, or could with another step or with tags of a context; and `dump`,
        where the point is saved, or could be."""
        known = frozenset(tags.keys() | {"name", "phase"})
        possible: set[Direction | Literal["dump"]] = {
            direction
            for direction, filter_ in self._filters
            if filter_.names - known or "step" in filter_.names or filter_(tags)
        }
        if self._dumps is not None and self._dumps.could_save(tags, known):
            possible.add("dump")
        return possible

    def _conflict(self, tags: Mapping[str, Any], first: Direction, second: Direction) -> DirectionConflict:
        sources = dict(self._filters)
        own = sorted(tag for tag in tags if tag not in OPTIONS and tag not in OWN_TAGS)
        point = ", ".join(f"{tag}={tags[tag]!r}" for tag in [*own, "step"])
        return DirectionConflict(
            f"the point {tags['name']!r} ({point}) at {call_site()} is matched by two filters, so its direction is not "
            f"decided:\n  {first}: {sources[first].source}\n  {second}: {sources[second].source}\n"
            f"Narrow one of them, for instance with `and not (...)`."
        )

    def continue_from(self, earlier: DirectionFilters) -> None:
        """These take the place of others in the middle of a run: what those have met counts, too."""
        self._had_directions |= earlier._had_directions
        self.unseen_tags = (self.unseen_tags - (earlier._read - earlier.unseen_tags)) | earlier.unseen_tags
        self._read |= earlier._read
        own, matched = earlier._texts()
        self._texts_before = (*earlier._texts_before, *own)
        self._met_before = earlier._met_before | matched

    def _texts(self) -> tuple[list[str], set[str]]:
        """The filters as they are told; and those of them that have matched."""
        own = [f"{d}: {f.source}" for d, f in self._filters]
        matched = {f"{d}: {f.source}" for d, f in self._filters if d in self._matched}
        if self._dumps is not None and self._dumps.filter is not None:
            text = f"dump: {self._dumps.filter.source}"
            own.append(text)
            if not self._dumps.never_matched():
                matched.add(text)
        return own, matched

    def never_matched(self) -> list[str]:
        own, matched = self._texts()
        met = matched | self._met_before
        return [text for text in dict.fromkeys((*self._texts_before, *own)) if text not in met]

    def tags_never_seen(self) -> list[str]:
        return sorted(self.unseen_tags)
