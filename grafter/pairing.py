"""Pairing: before a byte of payload moves, every participant holds both sides' manifests and decides alike.

For one key: each participant describes its part in a `Header`. The lowest participant of each role, its leader,
collects them into a `Manifest`. The two leaders meet under one store key: the first leaves its manifest there and waits
under the second; the other finds it, and answers there. Each leader then hands both manifests to its own side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from pydantic import BaseModel, ConfigDict, TypeAdapter

from grafter.courier import Courier
from grafter.direction import Direction, RoleName, receiver_role, sender_role
from grafter.errors import PairingError, ProtocolError
from grafter.housekeeping import Housekeeping
from grafter.leaves import TensorSpec
from grafter.points import PointKey
from grafter.roster import Roster
from grafter.store import StoreClient
from grafter.waits import Wait

# How long a leader waits for the other to write first. A wait in the store costs more, but finds any leader.
_PATIENCE_SECONDS = 0.01

# What a receiver's transform asks for; "identity" where there is none.
Needs = Literal["identity", "all", "same_rank"]


class Header(BaseModel):
    """One rank's part of a point. `nothing` and `failure` say why there is none; then `leaves` is empty."""

    model_config = ConfigDict(frozen=True)

    role: RoleName
    role_rank: int
    participants: tuple[int, ...]
    direction: Direction
    call_site: str
    leaves: tuple[TensorSpec, ...] = ()
    structure: str = ""
    others: dict[str, str] = {}
    extras: str | None = None
    extras_tensors: tuple[TensorSpec, ...] = ()
    needs: Needs = "identity"
    nothing: str | None = None
    failure: str | None = None
    # How often this rank has given up a transfer group: the highest of all participants names the next group.
    generation: int = 0
    # The GPU that NCCL would use, where this rank asks for NCCL; set apart by NCCL_HOSTID.
    nccl_device: str | None = None
    # The memory this rank receives into: (generation, bytes). A sender that has mapped it writes at once.
    staging: tuple[int, int] = (0, 0)

    @property
    def who(self) -> str:
        return f"{self.role} rank {self.role_rank}"


class Manifest(BaseModel):
    """All headers of one role for one key, in the order of role ranks."""

    model_config = ConfigDict(frozen=True)

    role: RoleName
    headers: tuple[Header, ...]
    # Ranks that describe one point differently: told to everyone instead of headers.
    conflict: str | None = None


_MANIFEST_PAIR = TypeAdapter(tuple[Manifest, Manifest])


@dataclass(frozen=True)
class Pair:
    """Both manifests of one point."""

    baseline: Manifest
    target: Manifest

    def side(self, role: RoleName) -> Manifest:
        return self.baseline if role == "baseline" else self.target

    def senders(self, direction: Direction) -> tuple[Header, ...]:
        return self.side(sender_role(direction)).headers

    def receivers(self, direction: Direction) -> tuple[Header, ...]:
        return self.side(receiver_role(direction)).headers

    @property
    def headers(self) -> tuple[Header, ...]:
        return self.baseline.headers + self.target.headers


class StoreKeys:
    """The places of one point in the store."""

    def __init__(self, hall: str, digest: str) -> None:
        self.base = f"{hall}/p/{digest}"
        self.first = f"{self.base}/1"
        self.second = f"{self.base}/2"

    def header(self, role: RoleName, role_rank: int) -> str:
        return f"{self.base}/{role[0]}/{role_rank}"

    def pair(self, role: RoleName) -> str:
        return f"{self.base}/{role[0]}"

    def vote(self, role_rank: int) -> str:
        return f"{self.base}/v/{role_rank}"

    @property
    def outcome(self) -> str:
        return f"{self.base}/o"


class Pairing:
    """Meets the other side at one point after another. Called by the dump thread of every participant."""

    def __init__(
        self, client: StoreClient, courier: Courier, housekeeping: Housekeeping, roster: Roster, timeout: float
    ) -> None:
        self._client, self._courier, self._housekeeping = client, courier, housekeeping
        self._roster, self._timeout = roster, timeout
        # By own participants: the graft rank of the leader that they met.
        self._last_other_leader: dict[tuple[int, ...], int] = {}
        # What this rank has put into the store for the point under way.
        self._left_in_store: list[str] = []

    def meet(self, key: PointKey, header: Header) -> Pair:
        """Wait for all participants of both sides. Raises what ended the run, if something does."""
        keys = StoreKeys(self._client.hall, key.digest)
        leader = min(header.participants)
        if header.role_rank == leader:
            manifest = self._collect(key, header, keys)
            baseline, target = self._meet_other_leader(key, header, manifest, keys)
        else:
            own = keys.header(header.role, header.role_rank)
            self._bring([self._roster.graft_rank(header.role, leader)], own, "header", header.model_dump_json())
            payload = self._wait_for(key, header, [keys.pair(header.role)], by_mail=self._courier.mail_inside)[0]
            baseline, target = _MANIFEST_PAIR.validate_json(payload)
        pair = Pair(baseline, target)
        self._check(key, pair)
        return pair

    def _bring(self, receivers: Sequence[int], place: str, kind: str, payload: str) -> None:
        self._courier.bring(receivers, place, kind, payload, by_mail=self._courier.mail_inside)

    @overload
    def _wait_for(self, key: PointKey, header: Header, places: Sequence[str], *, by_mail: bool) -> list[str]: ...
    @overload
    def _wait_for(
        self, key: PointKey, header: Header, places: Sequence[str], *, by_mail: bool, patience: float
    ) -> list[str] | None: ...
    def _wait_for(
        self, key: PointKey, header: Header, places: Sequence[str], *, by_mail: bool, patience: float | None = None
    ) -> list[str] | None:
        wait = Wait(
            "pairing",
            str(key),
            self._timeout,
            leader=header.role_rank == min(header.participants),
            digest=key.digest,
            participants=header.participants,
            call_site=header.call_site,
        )
        fetched = self._courier.fetch(wait, places, by_mail=by_mail, patience=patience)
        return [sealed.payload for sealed in fetched] if fetched is not None else None

    def _collect(self, key: PointKey, header: Header, keys: StoreKeys) -> Manifest:
        """The leader's part: its own role's headers, checked against each other."""
        headers = [header]
        places = [keys.header(header.role, rank) for rank in header.participants if rank != header.role_rank]
        if places:
            payloads = self._wait_for(key, header, places, by_mail=self._courier.mail_inside)
            headers += [Header.model_validate_json(payload) for payload in payloads]
        return Manifest(role=header.role, headers=tuple(headers), conflict=find_conflict(headers))

    def _meet_other_leader(
        self, key: PointKey, header: Header, manifest: Manifest, keys: StoreKeys
    ) -> tuple[Manifest, Manifest]:
        """The leaders' part: each gets the other's manifest, and hands both to its own side."""
        mine = manifest.model_dump_json()
        if self._courier.mail_across:
            theirs, told = self._swap_by_mail(key, header, mine, keys)
        else:
            theirs, told = self._swap_in_store(key, header, mine, keys), None
        others = [self._roster.graft_rank(header.role, r) for r in header.participants if r != header.role_rank]
        if others:
            ordered = (mine, theirs) if header.role == "baseline" else (theirs, mine)
            self._bring(others, keys.pair(header.role), "pair", f"[{ordered[0]},{ordered[1]}]")
        other = Manifest.model_validate_json(theirs)
        if self._courier.mail_across:
            self._answer(header, other, mine, keys, told)
        return (manifest, other) if manifest.role == "baseline" else (other, manifest)

    def _swap_in_store(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> str:
        found = self._client.put_if_absent(keys.first, "manifest", mine)
        if found is not None:
            self._client.set(keys.second, "manifest", mine)
            self._left_in_store.append(keys.second)
            return found.payload
        self._left_in_store.append(keys.first)
        return self._wait_for(key, header, [keys.second], by_mail=False)[0]

    def _swap_by_mail(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> tuple[str, int | None]:
        """(their manifest, the graft rank that was written to).

        Write to the leader that these participants met last time; it has usually written, too.

        Where that was the wrong one, or there was no last time, the store brings the two together: whoever comes second
        there finds the first, and writes to it. A manifest is the same whichever way it comes.
        """
        told = self._last_other_leader.get(header.participants)
        other = None
        if told is not None:
            self._courier.bring([told], keys.second, "manifest", mine, by_mail=True)
            other = self._wait_for(key, header, [keys.second], by_mail=True, patience=_PATIENCE_SECONDS)
        if other is None:
            found = self._client.put_if_absent(keys.first, "manifest", mine)
            if found is not None:
                other = [found.payload]
                self._courier.discard(keys.second)
            else:
                self._left_in_store.append(keys.first)
                other = self._wait_for(key, header, [keys.second], by_mail=True)
        return other[0], told

    def _answer(self, header: Header, other: Manifest, mine: str, keys: StoreKeys, told: int | None) -> None:
        """Write to the leader that was met, unless that was done already, and write to it first next time."""
        leader = self._roster.graft_rank(other.role, other.headers[0].role_rank)
        if leader != told:
            self._courier.bring([leader], keys.second, "manifest", mine, by_mail=True)
            self._last_other_leader[header.participants] = leader

    def _check(self, key: PointKey, pair: Pair) -> None:
        conflict = pair.baseline.conflict or pair.target.conflict
        if conflict is None and pair.baseline.role == pair.target.role:
            conflict = _two_leaders(pair.baseline.headers[0], pair.target.headers[0])
        if conflict is not None:
            raise self._housekeeping.abort(PairingError(f"at the point {key}: {conflict}"), self._client)
        directions = {header.direction for header in pair.headers}
        if len(directions) != 1:
            error_text = f"the point {key} came with the directions {sorted(directions)}; the two jobs' filters differ."
            raise self._housekeeping.abort(ProtocolError(error_text), self._client)

    def keys_to_delete(self, key: PointKey, header: Header) -> list[str]:
        """What this rank deletes of a point, once a later point proves that all participants are done with it."""
        if header.role_rank != min(header.participants):
            return []
        keys = StoreKeys(self._client.hall, key.digest)
        mine, self._left_in_store = self._left_in_store, []
        if not self._courier.mail_inside and len(header.participants) > 1:
            mine += [keys.header(header.role, rank) for rank in header.participants if rank != header.role_rank]
            mine.append(keys.pair(header.role))
        return mine


def find_conflict(headers: Sequence[Header]) -> str | None:
    """Whether ranks of one role describe one point differently; the sentence says how. Pure."""
    first = headers[0]
    for header in headers[1:]:
        if header.participants != first.participants:
            return _two_leaders(first, header)
        if header.direction != first.direction:
            return (
                f"{first.who} takes it as {first.direction}, {header.who} as {header.direction}; their filters differ."
            )
    return None


def _two_leaders(first: Header, second: Header) -> str:
    return (
        f"ranks of one job declare different participants: {first.who} says {list(first.participants)} "
        f"(at {first.call_site}), {second.who} says {list(second.participants)} (at {second.call_site}). All "
        "ranks that "
        f"share a point must give the same `ranks=`; ranks that do not share it need another tag (such as "
        f"`pp_stage=...`) so that their points differ."
    )


@dataclass(frozen=True)
class Decision:
    """What happens at one point, the same on every participant.

    `sources` is, for each receiving role rank, the sending role ranks whose whole value it gets, in order. Where
    `outcome` is not None, nothing moves, and `reason` says why.
    """

    sources: dict[int, tuple[int, ...]]
    outcome: Literal["skipped", "failed"] | None = None
    reason: str | None = None


def decide(direction: Direction, pair: Pair) -> Decision:
    """One pure function of both manifests, computed by every participant."""
    senders, receivers = pair.senders(direction), pair.receivers(direction)
    failed = next((h for h in pair.headers if h.failure is not None), None)
    if failed is not None:
        return Decision({}, "failed", f"{failed.who} failed before the exchange: {failed.failure}")
    nothing = [h for h in pair.headers if h.nothing is not None]
    if nothing:
        return Decision({}, "skipped", "; ".join(f"{h.who}: {h.nothing}" for h in nothing[:4]))
    shared_gpu = _find_shared_gpu(pair.headers)
    if shared_gpu is not None:
        return Decision({}, "failed", shared_gpu)
    needs = {h.needs for h in receivers}
    if len(needs) != 1:
        return Decision(
            {}, "failed", f"the receivers ask for different things: {sorted(needs)}; give all one transform"
        )
    if needs == {"all"}:
        everyone = tuple(h.role_rank for h in senders)
        return Decision({h.role_rank: everyone for h in receivers})
    if needs == {"same_rank"}:
        return _pair_by_position(senders, receivers, same_shape=False)
    return _identity(senders, receivers)


def _find_shared_gpu(headers: Sequence[Header]) -> str | None:
    owners: dict[str, Header] = {}
    for header in headers:
        if header.nccl_device is not None:
            other = owners.setdefault(header.nccl_device, header)
            if other is not header:
                return (
                    f"{other.who} and {header.who} use one GPU ({header.nccl_device}), and NCCL refuses two ranks on "
                    "one "
                    f"device. Use GRAFTER_BACKEND=auto, or give each job GPUs of its own."
                )
    return None


def _identity(senders: Sequence[Header], receivers: Sequence[Header]) -> Decision:
    """Without a transform: a single sender serves every receiver of its shape, else the k-th serves the k-th."""
    if len(senders) == 1:
        mismatch = next((m for h in receivers if (m := find_mismatch(senders[0], h))), None)
        if mismatch is not None:
            return Decision({}, "failed", mismatch)
        return Decision({h.role_rank: (senders[0].role_rank,) for h in receivers})
    return _pair_by_position(senders, receivers, same_shape=True)


def _pair_by_position(senders: Sequence[Header], receivers: Sequence[Header], *, same_shape: bool) -> Decision:
    if len(senders) != len(receivers):
        return Decision(
            {},
            "failed",
            f"{len(senders)} ranks send and {len(receivers)} receive, so rank k of one does not belong to rank k "
            "of the "
            f"other. Give a transform that says what each receiver makes of all the senders' tensors "
            f"(transforms/ has one that concatenates).",
        )
    for sender, receiver in zip(senders, receivers, strict=True):
        mismatch = find_mismatch(sender, receiver) if same_shape else None
        if mismatch is not None:
            return Decision({}, "failed", mismatch)
    return Decision({r.role_rank: (s.role_rank,) for s, r in zip(senders, receivers, strict=True)})


def find_mismatch(sender: Header, receiver: Header) -> str | None:
    """Why one sender's value cannot be this receiver's as it is; None if it can."""
    if sender.structure != receiver.structure:
        return (
            f"the values are built differently: {_structure(sender)} at {sender.who}, {_structure(receiver)} at "
            f"{receiver.who}"
        )
    if sender.others != receiver.others:
        path = next(p for p in sender.others if sender.others[p] != receiver.others.get(p))
        return (
            f"the leaf {path} is {json.loads(sender.others[path])[1]!r} at {sender.who} and "
            f"{json.loads(receiver.others.get(path, '[0, null]'))[1]!r} at {receiver.who}; leaves that are no "
            "tensors must be equal"
        )
    for ours, theirs in zip(sender.leaves, receiver.leaves, strict=True):
        if ours.shape != theirs.shape:
            leaf = f" of {ours.path}" if ours.path else ""
            return (
                f"the shapes{leaf} differ: {ours} at {sender.who} ({sender.call_site}), {theirs} at {receiver.who} "
                f"({receiver.call_site}). A transform can turn one into the other (transforms/ has examples)"
            )
    return None


def _structure(header: Header) -> str:
    paths = json.loads(header.structure) if header.structure != "tensor" else None
    return "a tensor" if paths is None else f"leaves {', '.join(paths[:6])}{', ...' if len(paths) > 6 else ''}"
