"""What a point costs one rank in messages and bytes, from 8 + 8 to 1024 + 1024 ranks, and what grows with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jobs import Jobs, Rank, succeed
from point_parts import header

from grafter.core.messages.roster import Announcement, Roster
from grafter.core.messages.wire import Seal, Sealed
from grafter.core.points import PointKey
from grafter.core.process_identity import ProcessIdentity
from grafter.core.roles import Role
from grafter.wire.pairing.pairing import Pairing
from grafter.wire.rendezvous import message_router
from grafter.wire.rendezvous.channels import Channels
from grafter.wire.store_client import StoreClient

SIZES = (8, 64, 1024)
# How the ranks are spread: all on one host, each job on one of its own, or eight of a job to a host.
PLACES: dict[str, Callable[[str, int], str]] = {
    "one host": lambda role, rank: "host",
    "a host for each job": lambda role, rank: f"{role}'s host",
    "eight to a host": lambda role, rank: f"{role}'s host {rank // 8}",
}
PATIENCE_SECONDS = 250


class NotYet(Exception):
    """A rank that only sends in this simulation has come to where it would wait."""


@dataclass
class Traffic:
    """The messages of one rank at one point: over channels, and values that are written to the store or read there."""

    messages_out: int = 0
    bytes_out: int = 0
    messages_in: int = 0
    bytes_in: int = 0

    @property
    def messages(self) -> int:
        return self.messages_out + self.messages_in

    @property
    def bytes(self) -> int:
        return self.bytes_out + self.bytes_in

    def begin(self) -> None:
        self.messages_out = self.bytes_out = self.messages_in = self.bytes_in = 0

    def sent(self, text: str | bytes) -> None:
        self.messages_out += 1
        self.bytes_out += len(text)

    def came(self, text: str | bytes) -> None:
        self.messages_in += 1
        self.bytes_in += len(text)


@dataclass
class Messages:
    """Texts by key, and their waiting readers: those in the store, or those that have arrived at one rank."""

    values: dict[str, Any] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, key: str, value: Any) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str, *, waits: bool) -> Any:
        with self.changed:
            if not waits and key not in self.values:
                raise NotYet(key)
            assert self.changed.wait_for(lambda: key in self.values, PATIENCE_SECONDS), f"nobody wrote {key}"
            return self.values[key]


@dataclass
class CountedStore:
    """What one rank has of the rendezvous store: the operations of a TCPStore that the client uses."""

    shelf: Messages
    traffic: Traffic
    waits: bool

    def set(self, key: str, value: str) -> None:
        self.traffic.sent(value)
        self.shelf.put(key, value.encode())

    def get(self, key: str) -> bytes:
        value: bytes = self.shelf.get(key, waits=self.waits)
        self.traffic.came(value)
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.traffic.sent(desired)
        with self.shelf.changed:
            if key not in self.shelf.values and not expected:
                self.shelf.put(key, desired.encode())
            found: bytes = self.shelf.values[key]
        self.traffic.came(found)
        return found


@dataclass
class CountedChannels:
    """The channels of one rank: messages to the others, sealed as on a real channel."""

    own: Messages
    others: Sequence[Messages]
    seal: Seal
    traffic: Traffic
    waits: bool

    def try_to_send(self, graft_rank: int, key: str, kind: str, payload: str) -> bool:
        message = self.seal.seal(key, kind, payload)
        self.traffic.sent(message)
        self.others[graft_rank].put(key, message.encode())
        return True

    def await_shortly(self, keys: Sequence[str], writers: Sequence[int]) -> list[Sealed]:
        messages = [self.own.get(key, waits=self.waits) for key in keys]
        for message in messages:
            self.traffic.came(message)
        return [self.seal.unseal(message)[1] for message in messages]

    def discard(self, key: str) -> None:
        """The store was faster than the channel; what arrives is never read."""


class NoMonitor:
    """Nothing goes wrong here, and nobody interrupts a wait."""

    aborted = None

    def waiting(self, wait: object) -> nullcontext[None]:
        return nullcontext()

    def check(self) -> None: ...

    def look_for_absent(self, wait: object, client: object) -> None: ...

    def delete_later(self, keys: list[str]) -> None: ...


class Simulation:
    """Two jobs of real pairings over a store and channels that count. Points follow one another.

    The leaders, and the second and the last rank of each job, go through with a point; the others do what they do
    before they wait, which is all that they send.
    """

    def __init__(self, size: int, place: Callable[[str, int], str]) -> None:
        self.size = size
        self._roster = make_roster(size, place)
        self._store = Messages()
        self._arrived = [Messages() for _ in range(2 * size)]
        # Read once and shared: what it takes to read them is not counted here.
        self._pairs: dict[str, Any] = {}
        self._traffic = [Traffic() for _ in range(2 * size)]
        everyone = self._roster.all
        self._headers = [header(member.role, member.role_rank, size) for member in everyone]
        # Each rank works it out for itself, in time linear in the ranks; here once for all of them.
        known = {
            id(side): message_router._one_host(side) for side in (self._roster.baseline, self._roster.target, everyone)
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(message_router, "_one_host", lambda side: known[id(side)])
            self._ranks = [self._make_rank(number) for number in range(2 * size)]

    def _watched(self, number: int) -> bool:
        return number % self.size in (0, 1, self.size - 1)

    def _make_rank(self, number: int) -> Pairing:
        member, traffic, waits = self._roster.all[number], self._traffic[number], self._watched(number)
        seal = Seal(f"{member.role}/{member.role_rank}", None)
        store: Any = CountedStore(self._store, traffic, waits)
        client = StoreClient(store, seal, "graft", is_server=True)
        monitor: Any = NoMonitor()
        channels: Any = CountedChannels(self._arrived[number], self._arrived, seal, traffic, waits)
        own = message_router.MessageRouter(client, monitor, self._roster, number, channels, PATIENCE_SECONDS)
        pairing = Pairing(client, own, monitor, self._roster, PATIENCE_SECONDS)
        pairing._cache.pairs = self._pairs
        return pairing

    def point(self, step: int) -> list[Traffic]:
        """What each rank sent and took in, by graft rank; of those that do not go through with it, what they sent."""
        for traffic in self._traffic:
            traffic.begin()
        key = PointKey("h", (("layer_id", 3),), step, "forward", 0)
        everyone, errors = range(2 * self.size), []
        for number in everyone:
            if not self._watched(number):
                with pytest.raises(NotYet):
                    self._meet(key, number)

        def take_part(number: int) -> None:
            try:
                pair = self._meet(key, number)
                assert [len(pair.baseline.headers), len(pair.target.headers)] == [self.size, self.size]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=take_part, args=(n,), daemon=True) for n in everyone if self._watched(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert not errors, errors
        return self._traffic

    def _meet(self, key: PointKey, number: int) -> Any:
        return self._ranks[number].meet(key, self._headers[number])


def make_roster(size: int, place: Callable[[str, int], str]) -> Roster:
    def announcement(role: Role, rank: int) -> Announcement:
        host = place(role, rank)
        process = ProcessIdentity(host=host, hostname=host, uid=0, pid=100 + rank, start_time=1)
        return Announcement(
            protocol_version=1, grafter_version="0", role=role, role_rank=rank, role_world_size=size, process=process,
            restart_count=0, shared_settings={}, expected_world_sizes={}, socket_name=f"{role}-{rank}",
        )  # fmt: skip

    return Roster(
        tuple(announcement("baseline", rank) for rank in range(size)),
        tuple(announcement("target", rank) for rank in range(size)),
    )


@dataclass(frozen=True)
class Measured:
    """One point of one world: the two leaders, and the followers of each job that went through with it."""

    leaders: dict[str, Traffic]
    followers: dict[str, list[Traffic]]
    senders_only: list[Traffic]


@cache
def measured(place: str, size: int) -> Measured:
    """Of the second point: from then on, leaders write to each other without asking the store where the other is."""
    simulation = Simulation(size, PLACES[place])
    simulation.point(0)
    traffic = simulation.point(1)
    return Measured(
        {"baseline": traffic[0], "target": traffic[size]},
        {"baseline": [traffic[1], traffic[size - 1]], "target": [traffic[size + 1], traffic[-1]]},
        [traffic[n] for n in range(2, size - 1)],
    )


def growth(values: Sequence[int]) -> list[float]:
    """By how much a value grows per rank of each job, between the sizes."""
    return [(b - a) / (m - n) for a, b, n, m in zip(values, values[1:], SIZES, SIZES[1:], strict=False)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("role", ["baseline", "target"])
def test_a_follower_has_as_many_messages_in_any_world(place: str, role: str) -> None:
    """One header and one pair of manifests. A longer pair comes in two."""
    for size in SIZES:
        for traffic in measured(place, size).followers[role]:
            assert traffic.messages_out == 1
            assert traffic.messages_in - 1 in (0, 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("role", ["baseline", "target"])
def test_a_leader_has_messages_in_proportion_to_its_ranks(place: str, role: str) -> None:
    """So many per rank of its own job, and a few for the other leader."""
    leaders = [measured(place, size).leaders[role] for size in SIZES]
    for size, leader in zip(SIZES, leaders, strict=True):
        assert leader.messages <= 2 * (size - 1) + 6


@pytest.mark.parametrize("place", PLACES)
def test_no_rank_sends_or_takes_in_bytes_by_the_square_of_the_ranks(place: str) -> None:
    """Bytes per rank of a job grow no faster among many ranks than among few, but for the digits of their numbers."""
    every = [measured(place, size) for size in SIZES]
    for role in ("baseline", "target"):
        followers = [max(t.bytes for t in one.followers[role]) for one in every]
        few, many = growth(followers)
        assert many <= 1.2 * few, f"a follower at {role}: {followers} bytes among {SIZES} ranks"
    # Of both leaders: which of them finds the other's manifest in the store, and which waits there, is chance.
    few, many = growth([sum(leader.bytes_in for leader in one.leaders.values()) for one in every])
    assert many <= 1.2 * few
    # By channel, a leader writes to each follower, until the pair is so long that it goes into the store, once for all.
    sent = [sum(leader.bytes_out for leader in one.leaders.values()) for one in every]
    assert sent[-1] <= 1.2 * sent[-2] * SIZES[-1] / SIZES[-2], f"the leaders send {sent} bytes among {SIZES} ranks"


@pytest.mark.parametrize("place", PLACES)
def test_what_a_follower_sends_does_not_grow(place: str) -> None:
    """Its header says nothing about every other rank; numbers have a few digits more."""
    sent = [max(traffic.bytes_out for traffic in measured(place, size).senders_only) for size in SIZES]
    assert sent[-1] - sent[0] <= 32, f"{sent} bytes among {SIZES} ranks"


POINTS = 4


def count_messages(rank: Rank) -> list[tuple[int, int]]:
    """In a real rank: how many messages it writes at each point, in pairing and to say that the point is decided."""
    import torch

    import grafter

    messages = [[0, 0]]
    try_to_send = Channels.try_to_send

    def counted(own: Channels, graft_rank: int, key: str, *rest: Any) -> bool:
        # What moves the tensors is no part of the pairing.
        if not key.startswith(("block/", "word/")):
            messages[-1][key.endswith("/o")] += 1
        return try_to_send(own, graft_rank, key, *rest)

    Channels.try_to_send = counted  # type: ignore[method-assign]
    value = torch.full((4,), float(rank.is_baseline))
    for _ in range(POINTS):
        grafter.dump("h", value)
        grafter.step()
        messages.append([0, 0])
    assert value.tolist() == [1.0] * 4
    return [(pairing, outcomes) for pairing, outcomes in messages[:POINTS]]


def test_real_ranks_write_as_many_messages_as_simulated_ones(tmp_path: Path) -> None:
    """4 + 4 processes of one host write, at each point after the first, what the simulation counts for them.

    And of the receivers, the one that decides the point writes to each other.
    """
    simulation = Simulation(4, PLACES["one host"])
    simulation.point(0)
    simulated = [traffic.messages_out for traffic in simulation.point(1)]
    with Jobs(tmp_path, b2t_filter="name == 'h'") as jobs:
        jobs.start("baseline", 4, count_messages)
        jobs.start("target", 4, count_messages)
        real = succeed(jobs.wait())
    for point in range(1, POINTS):
        assert [counts[point][0] for counts in real] == simulated
        assert [counts[point][1] for counts in real[:4]] == [0] * 4
        assert sorted(counts[point][1] for counts in real[4:]) == [0, 0, 0, 3]
