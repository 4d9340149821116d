"""Options: how a point is treated, and whether it is saved. The plan file, the call and the configuration decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.field_types import DumpLevel
from grafter.core.bounded_memory import BoundedMemory
from grafter.core.roles import Direction, Role, sender_role
from grafter.core.user_transform import UserTransform, load_transform, transform_of

if TYPE_CHECKING:
    from grafter.core.layout.declared import Layout


_MOST_REMEMBERED = 4096
# Options whose setting has another name.
_SETTING_OF = {"transform": "transform_path"}


@dataclass(frozen=True)
class PointOptions:
    """The options of one point, chosen among plan file, call and configuration."""

    transform: UserTransform | None
    write: Literal["in_place", "return"]
    gradient: Literal["straight_through", "cut", "strict"]
    on_transform_error: Literal["skip", "raise"]
    partial_target: Literal["refuse", "first"] = "refuse"
    gradients: bool = False
    wait: Literal["both", "job"] = "both"
    one_sided: Literal["raise", "skip"] = "raise"
    dump_level: DumpLevel = "full"
    tokens: Any = None
    start: Any = None
    run_start: int = 0
    """The setting `start`, for calls without `start`: a sequence that ends before it has no rows that count."""
    new_rows_only: bool = False
    extras: Any = None
    ranks: Any = None
    dims: str | dict[str, str] | None = None
    layout: Layout | dict[str, Layout] | None = None
    axes: Any = None
    seq_lens: Any = None

    def is_posted(self, role: Role, direction: Direction) -> bool:
        """Whether this job sends the point and does not wait for the other job."""
        return role == sender_role(direction) and (self.wait == "job" or self.one_sided == "skip")

    @property
    def has_window(self) -> bool:
        """Whether some rows may not count."""
        return self.start is not None or self.new_rows_only or self.run_start > 0


class OptionChooser:
    """The chooser of points' options. It loads all transforms that the configuration names when it is created."""

    def __init__(self, config: GrafterConfig) -> None:
        self._config = config
        self._transforms = _load_transforms(config)
        self._known: BoundedMemory[Any, PointOptions] = BoundedMemory(_MOST_REMEMBERED, 0)

    def take_over(self, config: GrafterConfig) -> None:
        """Use this configuration from now on; it has the same rules and transforms."""
        self._config = config
        # Replaced rather than cleared: another thread may be about to store options of the old configuration in it.
        self._known = BoundedMemory(_MOST_REMEMBERED, 0)

    def options_of(self, name: str, given: dict[str, Any]) -> PointOptions:
        """The options of a point. They are cached for calls that give no options, or only texts.

        given: the options of the call. Raises UsageError for an illegal option, ConfigError for a bad transform path.
        """
        if given and not all(isinstance(value, str) for value in given.values()):
            return self._choose_options(name, given)
        known = (name, *sorted(given.items())) if given else name
        remembered = self._known
        options = remembered.get(known)
        if options is None:
            options = self._choose_options(name, given)
            remembered.remember(known, options, 0)
        return options

    def _choose_options(self, name: str, given: dict[str, Any]) -> PointOptions:
        """For each field: the plan file's rule, since it corrects code; else the call; else the configuration."""

        def choose(field: str) -> Any:
            rule = self._config.rule_for(field, name)
            if rule is not None:
                return getattr(rule, field)
            if given.get(field) is not None:
                return given[field]
            return getattr(self._config, _SETTING_OF.get(field, field), None)

        transform, dims_are_ruled = choose("transform"), self._config.rule_for("dims", name) is not None
        return PointOptions(
            transform=self._transform(transform) if transform else None,
            write=choose("write"),
            gradient=choose("gradient"),
            on_transform_error=choose("on_transform_error"),
            partial_target=choose("partial_target"),
            gradients=choose("gradients"),
            wait=choose("wait"),
            one_sided=choose("one_sided"),
            dump_level=choose("dump_level"),
            tokens=given.get("tokens"),
            **self._window(given),
            dims=choose("dims") or None,
            layout=None if dims_are_ruled else given.get("layout"),
            axes=given.get("axes"),
            seq_lens=given.get("seq_lens"),
            extras=given.get("extras"),
            ranks=given.get("ranks"),
        )

    def _window(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options that decide which rows count. The configuration applies only to points with tokens."""
        config, start, new_rows_only = self._config, given.get("start"), given.get("new_rows_only")
        if not config.windows:
            return {}
        if given.get("tokens") is None:
            return {"start": start, "new_rows_only": bool(new_rows_only)}
        return {
            "start": start,
            "run_start": config.start if start is None else 0,
            "new_rows_only": config.new_rows_only if new_rows_only is None else bool(new_rows_only),
        }

    def _transform(self, transform: str | Callable[..., Any]) -> UserTransform:
        if isinstance(transform, str):
            if transform not in self._transforms:
                self._transforms[transform] = load_transform(transform)
            return self._transforms[transform]
        return transform_of(transform)


def _load_transforms(config: GrafterConfig) -> dict[str, UserTransform]:
    """Load all transforms that the configuration names, so that a wrong path fails before any model has run."""
    paths = {config.transform_path} | {rule.transform for rule in config.own_rules if rule.has("transform")}
    return {path: load_transform(path) for path in sorted(path for path in paths if path)}


class DumpFilter:
    """The decision which points of one rank are saved: by a rule of the plan file, else the call's `save=`, else the
    dump filter.

    expression: the compiled dump filter; None if it is not set. All methods except `matcher` are called under the lock
    of the rank's points.
    """

    def __init__(self, config: GrafterConfig) -> None:
        self._config = config
        self.expression = config.saved_points
        self._has_rules = any(rule.has("save") for rule in config.own_rules)
        self._has_matched = False

    @property
    def matcher(self) -> Callable[[Mapping[str, Any]], bool] | None:
        """A quick test for every call of the program; it may accept a point that `saves` then leaves out. None if only
        `save=True` in a call can save a point.
        """
        if any(rule.save for rule in self._config.own_rules):
            return self._matches
        return self.expression.matches if self.expression is not None else None

    def saves(self, tags: Mapping[str, Any]) -> bool:
        """Whether a point is saved. tags: with its name, step and phase, and with `save` if the call gives it."""
        if self.expression is None and not self._has_rules:
            # Kept fast: most runs save nothing, and each of their points asks.
            return bool(tags.get("save"))
        matches = self._matches(tags)
        self._has_matched |= matches
        return matches

    def could_save(self, tags: Mapping[str, Any], known: frozenset[str]) -> bool:
        """Whether a point with these tags is saved, or could be with another step or with tags besides `known`."""
        explicit = self._explicit(tags)
        if explicit is not None or self.expression is None:
            return bool(explicit)
        return bool(self.expression.names - known) or "step" in self.expression.names or self.expression(tags)

    def _matches(self, tags: Mapping[str, Any]) -> bool:
        explicit = self._explicit(tags)
        if explicit is not None:
            return explicit
        return self.expression is not None and self.expression.matches(tags)

    def _explicit(self, tags: Mapping[str, Any]) -> bool | None:
        """What a rule or the call says about saving the point; None if neither does."""
        if self._has_rules:
            rule = self._config.rule_for("save", tags["name"])
            if rule is not None:
                return rule.save
        explicit: bool | None = tags.get("save")
        return explicit

    def has_never_matched(self) -> bool:
        """Whether the dump filter is set and no point was saved."""
        return self.expression is not None and not self._has_matched
