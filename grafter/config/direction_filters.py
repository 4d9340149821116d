"""The filters of a rank: which direction a point has, whether it is saved, and which filters never matched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from grafter.core.filters.expression import Filter
from grafter.core.points import OPTIONS, OWN_TAGS, call_site
from grafter.core.roles import Direction
from grafter.errors import DirectionConflict

if TYPE_CHECKING:
    from grafter.config.options import DumpFilter


class DirectionFilters:
    """The filters of one rank, with a record of which of them matched, which is reported at close."""

    def __init__(self, filters: Mapping[Direction, Filter], dumps: DumpFilter | None = None) -> None:
        """dumps: decides which points are saved, whatever their direction; None if the rank saves none."""
        self._filters = list(filters.items())
        self._dumps = dumps
        # Every dump call of the program asks whether any filter matches, so callers loop over these bound methods.
        self.matchers: tuple[Callable[[Mapping[str, Any]], bool], ...] = tuple(
            filter_.matches for _, filter_ in self._filters
        )
        read = {name for _, filter_ in self._filters for name in filter_.names}
        if dumps is not None:
            if dumps.matcher is not None:
                self.matchers += (dumps.matcher,)
            read |= dumps.expression.names if dumps.expression is not None else set()
        self._matched: set[Direction] = set()
        self._read = frozenset(read - {"name", "step", "phase"})
        self._had_directions = bool(self._filters)
        # The texts of the filters that these replaced, and those of them that had matched.
        self._texts_before: tuple[str, ...] = ()
        self._met_before: frozenset[str] = frozenset()
        # Tags that a filter reads and that no point has had so far.
        self.unseen_tags = read - {"name", "step", "phase"}

    @property
    def have_directions(self) -> bool:
        """Whether any point can be grafted or compared; otherwise points are only saved."""
        return self._had_directions

    def direction_of(self, tags: Mapping[str, Any]) -> Direction | None:
        """The direction of a point with these tags; None if no filter matches.

        Raises DirectionConflict if two filters match. As both jobs have the same filters, both raise it, before
        anything is exchanged.
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
        """Whether a point is saved. tags: with its name, step and phase, and with `save` if the call gives it."""
        return self._dumps is not None and self._dumps.saves(tags)

    def could_match(self, tags: Mapping[str, Any]) -> set[Direction | Literal["dump"]]:
        """The directions whose filters match these tags, or could match with another step or with tags of an enclosing
        context; and `dump` if the point is saved, or could be.
        """
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
        """Replace the filters of `earlier` during a run, and take over their record of matches."""
        self._had_directions |= earlier._had_directions
        self.unseen_tags = (self.unseen_tags - (earlier._read - earlier.unseen_tags)) | earlier.unseen_tags
        self._read |= earlier._read
        own, matched = earlier._texts()
        self._texts_before = (*earlier._texts_before, *own)
        self._met_before = earlier._met_before | matched

    def _texts(self) -> tuple[list[str], set[str]]:
        """The filters as reported, and those of them that have matched."""
        own = [f"{d}: {f.source}" for d, f in self._filters]
        matched = {f"{d}: {f.source}" for d, f in self._filters if d in self._matched}
        if self._dumps is not None and self._dumps.expression is not None:
            text = f"dump: {self._dumps.expression.source}"
            own.append(text)
            if not self._dumps.has_never_matched():
                matched.add(text)
        return own, matched

    def never_matched(self) -> list[str]:
        """The filters that have matched no point, as `direction: expression`."""
        own, matched = self._texts()
        met = matched | self._met_before
        return [text for text in dict.fromkeys((*self._texts_before, *own)) if text not in met]

    def tags_never_seen(self) -> list[str]:
        """The tags that a filter reads and that no point has had."""
        return sorted(self.unseen_tags)
