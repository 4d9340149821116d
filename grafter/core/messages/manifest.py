"""What the ranks of a point say about it: one header per rank, one manifest per role, and both manifests as a pair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.leaves import TensorSpec
from grafter.core.messages.announced_tokens import AnnouncedTokens, told_once
from grafter.core.messages.rank_set import RankSet
from grafter.core.messages.states import OutboxPlace
from grafter.core.roles import Direction, RoleName, receiver_role, sender_role

# What a receiver's transform asks for; "identity" where there is none.
Needs = Literal["identity", "all", "same_rank", "resharded"]


# Most points have none of these, and say nothing of it.
_RARE = ("tokens", "outbox", "early")


class Header(BaseModel):
    """One rank's part of a point. `nothing` and `failure` say why there is none; then `leaves` is empty."""

    model_config = ConfigDict(frozen=True)

    role: RoleName
    role_rank: int
    participants: RankSet
    direction: Direction
    call_site: str
    leaves: tuple[TensorSpec, ...] = ()
    structure: str = ""
    # Path and value, as JSON, of the leaves that are no tensors.
    others: tuple[tuple[str, str], ...] = ()
    extras: str | None = None
    extras_tensors: tuple[TensorSpec, ...] = ()
    needs: Needs = "identity"
    nothing: str | None = None
    failure: str | None = None
    # How often this rank has given up a transfer group: the highest of all participants names the next group.
    generation: int = 0
    # The GPU that NCCL would use, where this rank asks for NCCL; set apart by NCCL_HOSTID.
    nccl_device: str | None = None
    # Where each leaf lies in its global tensor, parallel to `leaves`; empty where nothing is declared.
    layouts: tuple[DeclaredLayout | None, ...] = ()
    # The mesh axes of this rank: (axis, coordinate, size).
    axes: tuple[tuple[str, int, int], ...] = ()
    # Whether this rank wants all replicas of the sender compared; one that does is enough.
    check_replicas: bool = False
    # Whether a value may be written into a tensor that holds summands: the first gets it, the others zeros.
    partial_target: Literal["refuse", "first"] = "refuse"
    # The memory this rank receives into: (generation, bytes). A sender that has mapped it writes at once.
    staging: tuple[int, int] = (0, 0)
    # Which token each row is, where that was given.
    tokens: AnnouncedTokens | None = None
    # Whom this rank waits for: both jobs, or ranks of its own alone.
    wait: Literal["both", "job"] = "both"
    # Where the snapshot lies, of a sender that does not wait for the receivers.
    outbox: OutboxPlace | None = None
    # Whether this rank, which does not wait, came before both jobs had joined, and has nothing for the point any more:
    # a receiver has gone on, and a sender had to give up its snapshot.
    early: bool = False

    @property
    def who(self) -> str:
        return f"{self.role} rank {self.role_rank}"

    def changed(self, **fields: Any) -> Header:
        """Another one with these fields. Not by `model_copy`, which would keep the text."""
        return Header(**{name: getattr(self, name) for name in Header.model_fields} | fields)

    @cached_property
    def text(self) -> str:
        """As it travels."""
        unsaid = {name for name in _RARE if (value := getattr(self, name)) is None or value is False}
        return self.model_dump_json(exclude=unsaid)


class Manifest(BaseModel):
    """All headers of one role for one key, in the order of role ranks."""

    model_config = ConfigDict(frozen=True)

    role: RoleName
    headers: tuple[Header, ...]
    # Ranks that describe one point differently: told to everyone instead of headers.
    conflict: str | None = None


def manifest_text(role: RoleName, header_texts: Sequence[str], conflict: str | None) -> str:
    """A manifest as it travels, made of headers as they travelled."""
    said = "null" if conflict is None else json.dumps(conflict)
    return f'{{"role":"{role}","headers":[{",".join(header_texts)}],"conflict":{said}}}'


def with_tokens_told_once(headers: Sequence[Header]) -> list[Header]:
    """Headers of one role, which often have the same tokens: the first that has them says so for all."""
    instead = told_once([(header.role_rank, header.tokens) for header in headers])
    return [
        header.model_copy(update={"tokens": instead[header.role_rank]}) if header.role_rank in instead else header
        for header in headers
    ]


@dataclass(frozen=True)
class Pair:
    """Both manifests of one point."""

    baseline: Manifest
    target: Manifest
    # What follows from it, once it has been worked out: the same manifests come again in every step.
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def side(self, role: RoleName) -> Manifest:
        return self.baseline if role == "baseline" else self.target

    def senders(self, direction: Direction) -> tuple[Header, ...]:
        return self.side(sender_role(direction)).headers

    def receivers(self, direction: Direction) -> tuple[Header, ...]:
        return self.side(receiver_role(direction)).headers

    def is_posted(self, direction: Direction) -> bool:
        """Whether the senders have posted it and gone on: the receivers take it out of their outboxes."""
        return self.senders(direction)[0].wait == "job"

    @property
    def headers(self) -> tuple[Header, ...]:
        return self.baseline.headers + self.target.headers


@lru_cache(maxsize=64)
def store_keys(run_prefix: str, digest: str) -> StoreKeys:
    """The places of one point; every step of it asks again."""
    return StoreKeys(run_prefix, digest)


class StoreKeys:
    """The places of one point in the store."""

    def __init__(self, run_prefix: str, digest: str) -> None:
        self.base = f"{run_prefix}/p/{digest}"
        self.first = f"{self.base}/1"
        self.second = f"{self.base}/2"

    def header(self, role: RoleName, role_rank: int) -> str:
        return f"{self.base}/{role[0]}/{role_rank}"

    def pair(self, role: RoleName) -> str:
        return f"{self.base}/{role[0]}"

    @property
    def log(self) -> str:
        """The receivers' votes, appended."""
        return f"{self.base}/v"

    @property
    def decided(self) -> str:
        """Put once the log has decided, to wake receivers that wait for that."""
        return f"{self.base}/w"

    @property
    def outcome(self) -> str:
        """Where the receivers say why they have refused a point; ranks that still move its bytes look here."""
        return f"{self.base}/o"

    @property
    def state(self) -> str:
        """Of an entry in outboxes."""
        return f"{self.base}/s"

    def drained(self, graft_rank: int) -> str:
        """Where a sender says that it has dropped its part of an entry that has ended."""
        return f"{self.base}/d/{graft_rank}"
