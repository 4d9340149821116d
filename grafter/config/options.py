"""Options: how a point is treated, chosen among the plan file, the call and the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.field_types import DumpLevel
from grafter.core.roles import Direction, RoleName, sender_role
from grafter.core.user_transform import UserTransform, load_transform, transform_of

if TYPE_CHECKING:
    from grafter.core.layout.declared import Layout


_MOST_REMEMBERED = 4096
# Where a field is called otherwise in the configuration.
_SETTING_OF = {"transform": "transform_path"}


@dataclass(frozen=True)
class PointOptions:
    """How one point is treated, chosen among call, plan file and configuration."""

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
    """From the configuration, for a call that has no start: a sequence that ends before it has no rows that count."""
    new_rows_only: bool = False
    extras: Any = None
    ranks: Any = None
    dims: str | dict[str, str] | None = None
    layout: Layout | dict[str, Layout] | None = None
    axes: Any = None
    seq_lens: Any = None

    def is_posted(self, role: RoleName, direction: Direction) -> bool:
        """Whether this job sends the point, and goes on without waiting for the other."""
        return (self.wait == "job" or self.one_sided == "skip") and role == sender_role(direction)

    @property
    def has_window(self) -> bool:
        """Whether some rows may not count."""
        return self.start is not None or self.new_rows_only or self.run_start > 0


class OptionChooser:
    """Chooses a point's options. All transforms that the configuration names are loaded when it is made."""

    def __init__(self, config: GrafterConfig) -> None:
        self._config = config
        self._transforms = _load_transforms(config)
        self._known: dict[Any, PointOptions] = {}

    def take_over(self, config: GrafterConfig) -> None:
        """From now on by this configuration, which has the same rules and transforms."""
        self._config = config
        # Not the same one emptied: another thread may be about to keep there what it made of the old configuration.
        self._known = {}

    def options_of(self, name: str, given: dict[str, Any]) -> PointOptions:
        """How this point is treated; worked out once for calls that give no options of their own, or only words."""
        if given and not all(isinstance(value, str) for value in given.values()):
            return self._choose_options(name, given)
        known = (name, *sorted(given.items())) if given else name
        remembered = self._known
        options = remembered.get(known)
        if options is None:
            if len(remembered) >= _MOST_REMEMBERED:
                remembered.clear()
            options = remembered[known] = self._choose_options(name, given)
        return options

    def _choose_options(self, name: str, given: dict[str, Any]) -> PointOptions:
        """Per field: the plan file's rule, since it is there to correct code; else the call; else the configuration."""

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
        """Which rows count. What the configuration says is for points with tokens alone."""
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
    """All transforms that the configuration names, loaded now: a wrong path fails before any model has run."""
    paths = {config.transform_path} | {rule.transform for rule in config.own_rules if rule.has("transform")}
    return {path: load_transform(path) for path in sorted(path for path in paths if path)}


# Which points are saved: a rule of the plan file says it, else the call's `save=`, else the dump filter.


class DumpChoice:
    """One rank's choice. Asked under the lock of its points, but for `matcher`."""

    def __init__(self, config: GrafterConfig) -> None:
        self._config = config
        self.filter = config.saved_points
        self._has_rules = any(rule.has("save") for rule in config.own_rules)
        self._has_matched = False

    @property
    def matcher(self) -> Callable[[Mapping[str, Any]], bool] | None:
        """What is asked of every call of the program: it may say yes to a point that `saves` then leaves out. None:
        only a call's own `save=True` can save it."""
        if any(rule.save for rule in self._config.own_rules):
            return self._is_meant
        return self.filter.matches if self.filter is not None else None

    def saves(self, tags: Mapping[str, Any]) -> bool:
        """tags: those of the point, its own name, step and phase, and the option `save` where the call has it."""
        if self.filter is None and not self._has_rules:
            # Most runs save nothing, and each of their points asks.
            return bool(tags.get("save"))
        meant = self._is_meant(tags)
        self._has_matched |= meant
        return meant

    def could_save(self, tags: Mapping[str, Any], known: frozenset[str]) -> bool:
        """Whether a point with these tags is saved, or could be with another step or other tags than `known`."""
        said = self._said(tags)
        if said is not None or self.filter is None:
            return bool(said)
        return bool(self.filter.names - known) or "step" in self.filter.names or self.filter(tags)

    def _is_meant(self, tags: Mapping[str, Any]) -> bool:
        said = self._said(tags)
        if said is not None:
            return said
        return self.filter is not None and self.filter.matches(tags)

    def _said(self, tags: Mapping[str, Any]) -> bool | None:
        if self._has_rules:
            rule = self._config.rule_for("save", tags["name"])
            if rule is not None:
                return rule.save
        said: bool | None = tags.get("save")
        return said

    def never_matched(self) -> list[str]:
        return [f"dump: {self.filter.source}"] if self.filter is not None and not self._has_matched else []
