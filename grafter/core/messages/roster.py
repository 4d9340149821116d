"""The roster: who takes part in the run, as each rank announced itself, and whether the two jobs fit together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from grafter.core.messages.announced_models import AnnouncedModel, find_confused_models, is_tensor_key
from grafter.core.process_identity import ProcessIdentity
from grafter.core.processes import host_identity
from grafter.core.roles import Role


class PlayedFrom(BaseModel):
    """The recording that a rank is played from. last_step: of its last point, None where it has none."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    directory: str
    points: int
    last_step: int | None

    def __str__(self) -> str:
        return f"played from {self.directory}"

    @property
    def end(self) -> str:
        """What is to be said once it is over."""
        if self.last_step is None:
            return "the recording has no point"
        return f"the recording ends after step {self.last_step}; it has no more points"


class Announcement(BaseModel):
    """What a rank says when it joins. Other protocol versions can read its form; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    protocol_version: int
    grafter_version: str
    role: Role
    role_rank: int
    role_world_size: int
    process: ProcessIdentity
    restart_count: int
    # What both jobs must have alike, by setting: the filters, the key.
    shared_settings: dict[str, str]
    # World sizes that this rank's configuration expects, where it gives any.
    expected_world_sizes: dict[str, int]
    # The abstract socket on which the other ranks of its host connect to it; empty where there is none.
    socket_name: str = ""
    # The modules that this rank has hooks on, where `attach` came before the join.
    modules: tuple[str, ...] | None = None
    # The models that these belong to.
    models: tuple[AnnouncedModel, ...] = ()
    # Where it is no live rank.
    played_from: PlayedFrom | None = None
    # How the rendezvous store sees this rank's address: what other hosts can reach.
    address: str = ""

    @property
    def who(self) -> str:
        played = f", {self.played_from}" if self.played_from is not None else ""
        return f"{self.role} rank {self.role_rank} (pid {self.process.pid} on {self.process.hostname}{played})"


ANNOUNCEMENTS = TypeAdapter(list[Announcement])


@dataclass(frozen=True)
class Roster:
    """Both jobs' ranks. A graft rank counts baseline ranks first, then target ranks."""

    baseline: tuple[Announcement, ...]
    target: tuple[Announcement, ...]
    # What follows from it and from the points of its run, once it has been worked out.
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def all(self) -> tuple[Announcement, ...]:
        """By graft rank."""
        return self.baseline + self.target

    def side(self, role: Role) -> tuple[Announcement, ...]:
        return self.baseline if role == "baseline" else self.target

    def graft_rank(self, role: Role, role_rank: int) -> int:
        return role_rank if role == "baseline" else len(self.baseline) + role_rank

    def who(self, graft_rank: int) -> str:
        member = self.all[graft_rank]
        return f"{member.role} rank {member.role_rank}"

    def ranks_with(self, role: Role, module: str) -> tuple[int, ...] | None:
        """Which ranks of a job have announced a module; None where a rank of it has announced none at all.

        `module` may be several keys, one a line: then the first that any rank has counts.
        """
        side = self._modules_of[role]
        if side is None:
            return None
        return next((side[key] for key in module.split("\n") if key in side), ())

    @cached_property
    def _modules_of(self) -> dict[Role, dict[str, tuple[int, ...]] | None]:
        return {"baseline": _modules_of(self.baseline), "target": _modules_of(self.target)}

    def only_at(self, role: Role) -> list[str]:
        """Modules that this job has announced and no rank of the other has; none where one of both says nothing."""
        own, others = self._modules_of[role], self._modules_of[other_role(role)]
        if own is None or others is None:
            return []
        return [module for module in own if module not in others and not is_tensor_key(module)]

    @cached_property
    def has_core_each(self) -> bool:
        """Whether every rank on this host can have a core of its own."""
        own_host = host_identity()
        here = sum(member.process.host == own_host for member in self.all)
        return here <= len(os.sched_getaffinity(0))

    def share_memory(self, one: int, other: int) -> bool:
        """Whether two graft ranks can open each other's memory: on one machine, of one user in one user namespace."""
        return self.all[one].process.memory_domain == self.all[other].process.memory_domain

    @cached_property
    def several_hosts(self) -> bool:
        return len({member.process.host for member in self.all}) > 1


def _modules_of(side: Sequence[Announcement]) -> dict[str, tuple[int, ...]] | None:
    holders: dict[str, list[int]] = {}
    for member in side:
        if member.modules is None:
            return None
        for module in dict.fromkeys(member.modules):
            holders.setdefault(module, []).append(member.role_rank)
    return {module: tuple(ranks) for module, ranks in holders.items()}


def other_role(role: Role) -> Role:
    return "target" if role == "baseline" else "baseline"


def find_disagreement(baseline: Sequence[Announcement], target: Sequence[Announcement]) -> str | None:
    """What keeps the two jobs from grafting, as a sentence both can raise; None if they fit. Pure."""
    everyone = [*baseline, *target]
    first = everyone[0]
    for member in everyone:
        if member.protocol_version != first.protocol_version:
            return (
                f"{first.who} runs grafter {first.grafter_version} (protocol {first.protocol_version}) and "
                f"{member.who} "
                f"runs grafter {member.grafter_version} (protocol {member.protocol_version}). Install the same "
                "grafter in "
                f"both jobs."
            )
    for side in (baseline, target):
        for member in side:
            if member.role_world_size != len(side):
                return (
                    f"{side[0].who} says that the {member.role} has {len(side)} ranks, {member.who} says "
                    f"{member.role_world_size}. All ranks of one job must see the same world size (WORLD_SIZE, or "
                    f"GRAFTER_{member.role.upper()}_WORLD_SIZE)."
                )
    for member in everyone:
        for role, size in member.expected_world_sizes.items():
            actual = len(baseline if role == "baseline" else target)
            if actual != size:
                return (
                    f"{member.who} has GRAFTER_{role.upper()}_WORLD_SIZE={size}, and the {role} job has {actual} "
                    "ranks. "
                    f"Correct the variable, or leave it out: the size is then discovered."
                )
    for member in everyone:
        for setting in sorted(first.shared_settings.keys() | member.shared_settings.keys()):
            mine, theirs = first.shared_settings.get(setting, "unset"), member.shared_settings.get(setting, "unset")
            if mine != theirs:
                return (
                    f"the two sides are set differently: GRAFTER_{setting.upper()} is\n  {mine}\nfor {first.who}, and\n"
                    f"  {theirs}\nfor {member.who}. Give both jobs the same filters (a shared plan file does), since "
                    f"each decides by itself which points meet."
                )
    return find_confused_models([member.models for member in baseline], [member.models for member in target])
