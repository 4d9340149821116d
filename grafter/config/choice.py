"""Which points are saved: a rule of the plan file says it, else the call's `save=`, else the dump filter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grafter.config.settings.config import GrafterConfig


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
