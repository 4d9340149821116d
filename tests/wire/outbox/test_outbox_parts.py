"""The parts of the outbox without processes: its memory, its words, who is believed, and what is waited for."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grafter
from grafter.config.options import OptionChooser
from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.plan_file import Rule
from grafter.core.leaves import spec_of
from grafter.core.messages.counts import Pending
from grafter.core.messages.manifest import Header, StoreKeys, manifest_text
from grafter.core.messages.mismatch import find_conflict
from grafter.core.messages.states import (
    FINAL,
    NotMet,
    OutboxPlace,
    open_state,
    read_not_met,
    receivers_account,
    senders_outcome,
)
from grafter.core.messages.wire import Seal, Sealed
from grafter.core.plan.decision import TransferDecision
from grafter.core.process_identity import own_identity
from grafter.core.processes import Abandoned
from grafter.errors import ProtocolError
from grafter.wire.exchange.staging import Staging, new_block
from grafter.wire.monitor.deadlock import find_stuck
from grafter.wire.monitor.status_board import BoardLine
from grafter.wire.outbox import outbox
from grafter.wire.outbox.delivery import Delivery, Fetcher
from grafter.wire.outbox.entries import Claims, OutboxEntry, Tombstones
from grafter.wire.outbox.outbox import Outbox
from grafter.wire.outbox.pull import Puller
from grafter.wire.outbox.snapshots import Memory, Slot, offsets_of, snapshot, tensor_at
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import serve

# Memory.


@given(st.lists(st.tuples(st.integers(1, 3_000_000), st.booleans()), max_size=30), st.integers(4096, 4 << 20))
def test_snapshots_never_overlap_and_their_memory_stays_within_the_limit(
    asked: list[tuple[int, bool]], limit: int
) -> None:
    """Whatever sizes come and go: what is held is bounded, and no two slots that are in use share a byte."""
    memory = Memory(limit)
    held: list[Slot] = []
    for nbytes, frees in asked:
        if frees and held:
            memory.give_back(held.pop(0))
        slot = memory.take(nbytes)
        assert memory.held_bytes <= limit
        if slot is not None:
            held.append(slot)
        places = sorted((s.place.inode, s.place.offset, s.place.offset + s.nbytes) for s in held)
        for (inode, _, end), (other, first, _) in pairwise(places):
            assert inode != other or end <= first
    memory.release()
    assert memory.held_bytes == 0


def test_memory_that_was_given_back_is_used_again() -> None:
    """The same block, since new memory costs eight times as much to touch."""
    memory = Memory(4 << 20)
    first = memory.take(1 << 20)
    assert first is not None
    memory.give_back(first)
    again = memory.take(1 << 20)
    assert again is not None and again.place == first.place
    small = [memory.take(100) for _ in range(300)]
    assert len({slot.place.inode for slot in small if slot is not None}) == 1, "small ones share a descriptor"
    memory.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int8])
def test_a_snapshot_is_what_the_tensors_were(dtype: torch.dtype) -> None:
    """Of any strides, empty ones and scalars, one after the other."""
    base = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = [base.t(), base[:, ::2], base[:0], base[1, 1]]
    specs = [spec_of(str(number), tensor) for number, tensor in enumerate(tensors)]
    offsets, nbytes = offsets_of(specs)
    memory = Memory(1 << 20)
    slot = memory.take(nbytes)
    assert slot is not None
    snapshot(slot, specs, tensors)
    for offset, spec, tensor in zip(offsets, specs, tensors, strict=True):
        assert torch.equal(tensor_at(slot.block.mapped, slot.place.offset + offset, spec), tensor)


# Whose memory is read.


def puller_of(pid: int) -> Puller:
    process = own_identity().model_copy(update={"pid": pid})
    member = SimpleNamespace(process=process)
    roster: Any = SimpleNamespace(
        all=(member,), who=lambda rank: f"baseline rank {rank}", share_memory=lambda one, other: True
    )
    return Puller(roster, 0, Staging(), Seal("target/0", None), "run")


def place_of(fd: int, nbytes: int, offset: int = 0) -> OutboxPlace:
    status = os.fstat(fd)
    return OutboxPlace(fd=fd, inode=status.st_ino, device=status.st_dev, offset=offset, nbytes=nbytes)


def test_a_receiver_maps_the_memory_that_a_sender_names_and_sees_what_is_written_later() -> None:
    """A block is mapped once, and used for all points whose snapshots lie in it."""
    block, fd = new_block(8192)
    puller = puller_of(os.getpid())
    mapped = puller._map(0, place_of(fd, 4096))
    block[:3] = b"abc"
    assert mapped[:3] == b"abc"
    assert puller._map(0, place_of(fd, 4096, offset=4096)) is mapped
    os.close(fd)


def test_what_is_not_the_named_sealed_memory_is_not_read(tmp_path: Any) -> None:
    """Another inode, a block that could shrink, one that is too small, a file, a process that is gone: each is refused
    with a reason, and would else be a crash or another's bytes."""
    puller = puller_of(os.getpid())
    _, fd = new_block(4096)
    with pytest.raises(Abandoned, match="another file"):
        puller._map(0, place_of(fd, 4096).model_copy(update={"inode": 1}))
    with pytest.raises(Abandoned, match="too small"):
        puller._map(0, place_of(fd, 8192))
    assert len(puller._map(0, place_of(fd, 4096))) == 4096
    with pytest.raises(Abandoned, match="beyond its outbox"):
        puller._map(0, place_of(fd, 4096, offset=4096))
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, 4096)
    with pytest.raises(Abandoned, match="could shrink"):
        puller._map(0, place_of(unsealed, 4096))
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 4096)
    with pytest.raises(Abandoned):
        puller._map(0, place_of(file, 4096))
    with pytest.raises(Abandoned, match=r"cannot be read.*ended"):
        puller_of(2**22 + 1)._map(0, place_of(fd, 4096))
    for each in (fd, unsealed, file):
        os.close(each)


def test_a_place_that_holds_less_than_the_tensors_is_refused() -> None:
    """The sizes are those of the header's tensors; what the place says is only compared with them."""
    _, fd = new_block(4096)
    header = SimpleNamespace(
        leaves=(spec_of("", torch.ones(100)),), extras_tensors=(), outbox=place_of(fd, 64), who="baseline rank 0"
    )
    with pytest.raises(Abandoned, match="says that it has posted 448 bytes"):
        puller_of(os.getpid())._source(0, header, 0, TransferDecision({}), None, "")  # type: ignore[arg-type]
    os.close(fd)


# What is delivered, and to whom.


def delivered(entries: dict[str, OutboxEntry], **asked: Any) -> bytes:
    """What a receiver gets of the entry `a`, who asks for all of it unless told otherwise."""
    server = Delivery("127.0.0.1", sealed(asked.pop("server_secret", None)), entries.get)
    try:
        with Fetcher(sealed(asked.pop("secret", None))) as fetcher:
            given = {"base": "a", "offset": 0, "nbytes": 5, "who": "baseline rank 0", **asked}
            return bytes(fetcher.fetch(address=server.address, port=server.port, **given).tolist())
    finally:
        server.close()


def sealed(secret: str | None) -> Seal:
    seal = Seal("target/0", secret)
    seal.run_id = "run"
    return seal


def one_entry(**fields: Any) -> dict[str, OutboxEntry]:
    slot = Memory(1 << 20).take(5)
    assert slot is not None
    first = slot.place.offset
    slot.block.mapped[first : first + 5] = b"bytes"
    return {"a": OutboxEntry(StoreKeys("run", "a"), open_state("baseline", 0), "b2t", (0,), slot, 5, **fields)}


def test_a_receiver_elsewhere_gets_the_bytes_that_it_asks_for() -> None:
    """Some or all of a snapshot, from whoever has the run's secret."""
    assert delivered(one_entry()) == b"bytes"
    assert delivered(one_entry(), offset=2, nbytes=2, secret="s", server_secret="s") == b"te"


@pytest.mark.parametrize(
    "asked",
    [{"base": "b"}, {"nbytes": 6}, {"offset": 5, "nbytes": 1}, {"secret": "x"}, {"server_secret": "x"}, {"offset": -1}],
)
def test_what_is_not_to_be_had_ends_the_connection(asked: dict[str, Any]) -> None:
    """Another entry, bytes beyond the snapshot, another secret or none: no byte is sent, and the receiver says so."""
    with pytest.raises(
        (Abandoned, ValueError), match=r"cannot be read: the connection was closed|greater than or equal"
    ):
        delivered(one_entry(), **asked)


def test_an_entry_that_ends_while_it_is_delivered_is_not_believed() -> None:
    """Its memory may hold another one by then."""
    with pytest.raises(Abandoned, match="went from the outbox of baseline rank 0 while it was read"):
        delivered(one_entry(is_over=True))


@pytest.mark.parametrize("hello", [b"", b"\0", b"\xff\xff\xff\xff", b"\0\0\0\3abc", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_stranger_that_says_anything_else_is_sent_nothing(hello: bytes) -> None:
    """And the next receiver is served."""
    entries = one_entry()
    server = Delivery("127.0.0.1", sealed(None), entries.get)
    try:
        with socket.create_connection((server.address, server.port), timeout=10) as stranger:
            stranger.sendall(hello)
            sent = b""
            # It may have hung up by now, and does so hard where something was left unread.
            with contextlib.suppress(OSError):
                stranger.shutdown(socket.SHUT_WR)
                sent = stranger.recv(1)
            assert sent == b""
        with Fetcher(sealed(None)) as fetcher:
            assert len(fetcher.fetch("a", server.address, server.port, 0, 5, "baseline rank 0")) == 5
    finally:
        server.close()


# States and words.


def test_every_final_state_has_an_outcome_and_no_other_word_has() -> None:
    """A state that this grafter does not know is an error, not an outcome."""
    assert {senders_outcome(state, "b2t") for state in FINAL} == {
        "sent", "skipped", "failed", "expired", "displaced", "missed",
    }  # fmt: skip
    assert senders_outcome("taken", "compare") == "compared"
    with pytest.raises(ProtocolError):
        senders_outcome("claimed", "b2t")


def test_a_leader_tells_its_followers_why_there_is_no_pair() -> None:
    """The text comes back as it was, lines and all; anything else is refused."""
    for told in (NotMet("missed", "a\nb"), NotMet("failed", "")):
        assert read_not_met(told.text) == told
    with pytest.raises(ProtocolError):
        read_not_met("grafted\nno")
    assert receivers_account("expired", "x").outcome == "missed"
    assert receivers_account("withdrawn", "x").outcome == "failed"


def test_words_for_a_side_that_never_comes_do_not_fill_the_store() -> None:
    """Of the last 16,384 they are kept; each more removes the oldest."""
    deleted: list[str] = []
    tombstones = Tombstones(deleted.extend)
    for number in range(16_384 + 500):
        tombstones.add(f"place {number}")
    assert deleted == [f"place {number}" for number in range(500)]


def test_a_header_that_is_not_posted_says_nothing_of_an_outbox() -> None:
    """What most points say does not get longer; what is posted comes back as it was."""
    header = Header(role="baseline", role_rank=0, participants=(0,), direction="b2t", call_site="x")
    assert "outbox" not in header.text
    place = OutboxPlace(fd=3, inode=4, device=5, offset=64, nbytes=6)
    posted = Header(**{**dict(header), "outbox": place, "wait": "job"})
    assert Header.model_validate_json(posted.text) == posted
    assert "wait" in (find_conflict([header, posted]) or "")
    assert '"conflict":null' in manifest_text("baseline", [posted.text], None)


# The entry's end, whoever tells it first.


class OneStore:
    """A store in this process, as the outbox asks it."""

    def __init__(self) -> None:
        self.values: dict[str, Sealed] = {}
        self.asked = 0
        self.seal = Seal("baseline/0", None)

    def put_if_absent(self, key: str, kind: str, payload: str) -> Sealed | None:
        self.asked += 1
        found = self.values.get(key)
        if found is None:
            self.values[key] = Sealed(kind, "baseline/0", payload)
        return found

    def exchange(self, key: str, expected: Sealed, kind: str, payload: str) -> Sealed | None:
        self.asked += 1
        if self.values.get(key) == expected:
            self.values[key] = Sealed(kind, "baseline/0", payload)
            return None
        return self.values.get(key, expected)

    def find_other(self, key: str, expected: Sealed) -> Sealed | None:
        self.asked += 1
        found = self.values.get(key, expected)
        return None if found == expected else found


def make_outbox(
    limit: int = 1 << 20, keep_seconds: float = 60, gone: dict[int, str] | None = None, patience: Any = None
) -> Any:
    """patience: of the sender of one-sided points, in a list, so that a test can change it."""
    deleted: list[str] = []
    receivers: Any = SimpleNamespace(
        sender="baseline", role="target", graft_ranks=[1], are_given_up=False, passed=0,
        waited_for=lambda *, posts_more: contextlib.nullcontext(patience),
    )  # fmt: skip
    receivers.passed_step = lambda _: receivers.passed
    monitor: Any = SimpleNamespace(aborted=None, delete_later=deleted.extend)
    lines: list[Any] = []
    outbox = Outbox(
        Memory(limit),
        keep_seconds,
        0,
        monitor,
        Tombstones(deleted.extend),
        lambda: gone or {},
        lines.append,
        receivers,
    )
    return SimpleNamespace(
        outbox=outbox, store=OneStore(), deleted=deleted, lines=lines, monitor=monitor, receivers=receivers
    )


def add_entry(
    parts: Any, name: str, nbytes: int = 1000, participants: tuple[int, ...] = (0,), step: int | None = None
) -> OutboxEntry:
    slot, why_not = parts.outbox.make_room(nbytes, parts.store)
    assert why_not is None
    posted = open_state("baseline", 0)
    entry = OutboxEntry(StoreKeys("run", name), posted, "b2t", participants, slot, nbytes, step, is_announced=True)
    parts.store.values[entry.keys.state] = posted
    parts.outbox.add(entry)
    return entry


def test_a_claimed_entry_is_never_displaced() -> None:
    """It stays when there is no room; what is open goes, the oldest first, and what was taken makes room by itself."""
    parts = make_outbox(limit=3 * (1 << 19))
    claimed, taken, still_open = (add_entry(parts, name, 1 << 19) for name in ("a", "b", "c"))
    parts.store.values[claimed.keys.state] = Sealed("claimed", "target/0", "[1]")
    parts.store.values[taken.keys.state] = Sealed("taken", "target/0", "")
    assert parts.outbox.make_room(1 << 19, parts.store)[0] is not None
    assert (claimed.is_over, taken.state, still_open.is_over) == (False, "taken", False)
    add_entry(parts, "d", 1000)
    slot, _ = parts.outbox.make_room(1 << 19, parts.store)
    assert slot is not None and still_open.state == "displaced" and not claimed.is_over
    refused, why_not = parts.outbox.make_room(3 << 19, parts.store)
    assert refused is None and "1 of its entries are being taken" in why_not
    parts.store.values[claimed.keys.state] = Sealed("taken", "target/0", "")
    assert parts.outbox.make_room(1 << 19, parts.store)[0] is not None, "it has been taken in the meantime"
    assert dict(parts.outbox.settled) == {"sent": 2, "displaced": 2}


def test_a_sender_tidies_up_itself_where_the_monitor_thread_is_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is left to do nor the keys in the store grow with the number of points."""
    monkeypatch.setattr(outbox, "_MOST_CHORES", 3)
    parts = make_outbox(limit=1 << 19)
    for number in range(10):
        add_entry(parts, f"entry {number}", 1 << 19)
    assert dict(parts.outbox.settled) == {"displaced": 9}
    assert len(parts.outbox._chores) == 3
    assert len([key for key in parts.deleted if key.endswith("/s")]) == 6


def test_only_what_nobody_has_claimed_expires() -> None:
    """An old entry that is being taken is left to its receivers."""
    parts = make_outbox(keep_seconds=0.0)
    claimed, still_open = add_entry(parts, "a"), add_entry(parts, "b")
    parts.store.values[claimed.keys.state] = Sealed("claimed", "target/0", "[1]")
    parts.outbox.look_after(parts.store)
    assert (claimed.state, still_open.state) == ("claimed", "expired")
    assert parts.outbox.pending.claimed == 1 and parts.store.values[still_open.keys.first].kind == "gone"


def test_the_death_of_those_who_take_is_final_and_is_told_once() -> None:
    """A claim names its receivers; one that is gone makes the entry `failed`, unless it had come to its end before."""
    parts = make_outbox(gone={1: "is gone"})
    entry, ended = add_entry(parts, "a"), add_entry(parts, "b")
    for each in (entry, ended):
        parts.store.values[each.keys.state] = Sealed("claimed", "target/0", "[1]")
    parts.store.values[ended.keys.state] = Sealed("taken", "target/0", "")
    parts.outbox.look_after(parts.store)
    assert (entry.state, ended.state, parts.outbox.pending.entries) == ("failed", "taken", 0)
    parts.outbox.end(entry, parts.store, "expired", "too late")
    assert entry.state == "failed" and parts.outbox.settled == {"failed": 1, "sent": 1}


# One-sided points.


def test_a_one_sided_entry_is_kept_until_it_is_taken_or_the_receivers_have_passed_its_step() -> None:
    """However old it is; then it is the baseline's alone, its memory is free, and its keys are deleted."""
    parts = make_outbox(keep_seconds=0.0)
    first, second, claimed = (add_entry(parts, name, step=step) for name, step in (("a", 0), ("b", 1), ("c", 0)))
    parts.store.values[claimed.keys.state] = Sealed("claimed", "target/0", "[1]")
    parts.outbox.look_after(parts.store)
    assert not (first.is_over or second.is_over or claimed.is_over)
    parts.receivers.passed = 1
    parts.outbox.look_after(parts.store)
    assert (first.state, second.is_over, claimed.is_over) == ("one-sided", False, False)
    assert first.ended == ("skipped", "only the baseline reached this point")
    assert {first.keys.state, first.keys.first} <= set(parts.deleted)


def test_the_line_of_a_one_sided_entry_says_whose_it_is() -> None:
    """Also where it had ended before its line was written."""
    for is_early in (False, True):
        parts = make_outbox()
        entry = add_entry(parts, "a", step=0)
        record = SimpleNamespace(outcome="posted", reason=None, model_copy=lambda *, update: update)
        if not is_early:
            parts.outbox.recorded(entry, record)
        parts.receivers.passed = 1
        parts.outbox.look_after(parts.store)
        if is_early:
            assert parts.outbox.recorded(entry, record) == "skipped"
        assert (parts.lines[-1]["outcome"], parts.lines[-1]["only_in"]) == ("skipped", "baseline")


def test_a_receiver_that_is_gone_fails_what_it_was_to_take() -> None:
    """It is not a point of the baseline alone."""
    parts = make_outbox(gone={1: "is gone"})
    entry = add_entry(parts, "a", step=0)
    parts.outbox.look_after(parts.store)
    assert entry.ended == ("failed", "a rank of the target is gone")


class Asked:
    """Patience that is over at the n-th question; `then` happens at each."""

    story, has_failed = "nobody took it", False

    def __init__(self, times: int, then: Any = lambda: None) -> None:
        self.left, self.then = times, then

    def is_over(self, _: Any) -> bool:
        self.left -= 1
        self.then()
        return self.left < 0


def test_without_room_a_one_sided_point_waits_for_the_receivers_and_then_takes_the_oldest_place() -> None:
    """What has been taken, or is over with its step, makes room first; what is displaced says so."""
    for happens, ended in (("taken", "taken"), ("passed", "one-sided"), ("nothing", "displaced")):
        patience = Asked(3)
        parts = make_outbox(limit=1 << 19, patience=patience)
        entry = add_entry(parts, "a", 1 << 19, step=0)

        def then(parts: Any = parts, entry: OutboxEntry = entry, happens: str = happens) -> None:
            if happens == "taken":
                parts.store.values[entry.keys.state] = Sealed("taken", "target/0", "")
            parts.receivers.passed = int(happens == "passed")

        patience.then = then
        slot, _ = parts.outbox.make_room(1 << 19, parts.store, patient=True)
        assert slot is not None and entry.state == ended
        assert (patience.left < 0) == (happens == "nothing")


def test_the_end_of_the_sender_waits_for_one_sided_points_alone() -> None:
    """All else expires at once, as ever; so do they once patience is over."""
    patience = Asked(3)
    parts = make_outbox(patience=patience)
    kept, passed, other = add_entry(parts, "a", step=5), add_entry(parts, "b", step=0), add_entry(parts, "c")
    parts.receivers.passed = 1
    parts.outbox.close(parts.store, patient=True)
    assert (kept.state, passed.state, other.state) == ("expired", "one-sided", "expired")
    assert kept.ended == ("expired", "nobody took it") and patience.left < 0


def test_looking_after_many_entries_costs_no_more_than_a_bound_and_comes_to_all_of_them() -> None:
    """512 states a second, in turn."""
    parts = make_outbox(limit=1 << 22)
    entries = [add_entry(parts, str(number), 100) for number in range(1200)]
    for _ in range(3):
        parts.store.asked = 0
        for entry in entries:
            parts.store.values[entry.keys.state] = Sealed("claimed", "target/0", "[1]")
        parts.outbox.look_after(parts.store)
        assert parts.store.asked <= 512
    assert parts.outbox.pending.claimed == 1200


def test_nothing_is_pending_where_grafting_is_off() -> None:
    """No outbox is made for the question."""
    assert grafter.pending() == Pending(0, 0, 0, 0)


@pytest.fixture(scope="module")
def client() -> Iterator[StoreClient]:
    """A real store, in this process."""
    store = serve("127.0.0.1", 0)
    yield StoreClient(store, sealed(None), "graft", is_server=True)


def test_a_state_changes_only_from_what_was_found(client: StoreClient) -> None:
    """An exchange does nothing to another value, nor to a key that was deleted; whoever asks is told what is there."""
    posted = Sealed("open", "target/0", "")
    assert client.exchange("s", posted, "claimed", "x") == posted
    assert not client.exists("s") and client.find_other("s", posted) is None
    client.set("s", "open", "")
    assert client.find_other("s", posted) is None
    assert client.exchange("s", posted, "claimed", "x") is None
    assert client.exchange("s", posted, "expired", "y") == Sealed("claimed", "target/0", "x")
    assert client.find_other("s", posted) == Sealed("claimed", "target/0", "x")


def test_a_receiver_that_was_held_up_does_not_claim_what_is_gone(client: StoreClient) -> None:
    """Stopped in a debugger between its look and its claim, say: the memory may hold another point by now."""
    keys, posted, claims = StoreKeys(client.run_prefix, "held"), open_state("target", 0), Claims(client)
    not_met = claims.claim(keys, "held", posted, [1])
    assert not_met is not None and not_met.outcome == "missed" and not client.exists(keys.state)
    client.set(keys.state, "open", "")
    assert claims.claim(keys, "held", posted, [1]) is None
    second = Claims(client).claim(keys, "held", posted, [2])
    assert second is not None, "one side takes it, once"
    claims.settle("held", "taken", None)
    claims.settle("held", "failed", "too late")
    assert client.find_other(keys.state, posted) == Sealed("taken", "target/0", "")


# Whom a point waits for.


def chosen(given: dict[str, Any], **settings: Any) -> str:
    config = GrafterConfig(enable=True, role="target", master_port=1, b2t_filter="True", **settings)
    return OptionChooser(config).options_of("h", given).wait


def test_the_plan_file_comes_before_the_call_and_the_call_before_the_setting() -> None:
    """As for every option; a rule can be for one job alone."""
    rules = (Rule(match="h", role="target", wait="both"), Rule(match="*", wait="job"))
    assert chosen({}) == "both"
    assert chosen({}, wait="job") == "job"
    assert chosen({"wait": "both"}, wait="job") == "both"
    assert chosen({"wait": "job"}) == "job"
    assert chosen({"wait": "job"}, rules=rules) == "both"
    assert chosen({}, rules=rules[1:]) == "job"


def line(role: str, rank: int, state: str, **fields: Any) -> BoardLine:
    first = 0 if role == "baseline" else 2
    return BoardLine(role=role, role_rank=rank, graft_rank=first + rank, sequence=1, state=state, since=0.0, **fields)  # type: ignore[arg-type]


def test_a_leader_that_waits_for_its_own_ranks_alone_is_stuck_only_with_them() -> None:
    """The other job may be anywhere, or have left: who does not need it is not stuck for it. Without its own it is."""
    own = {"digest": "k", "participants": (0, 1), "own_side": True}
    others = [line("target", 0, "left"), line("target", 1, "left")]
    waiting = line("baseline", 0, "waiting", **own)
    assert find_stuck([waiting, line("baseline", 1, "running"), *others]) == []
    assert find_stuck([waiting, line("baseline", 1, "waiting", **own), *others]) == []
    assert find_stuck([waiting, line("baseline", 1, "left"), *others]) == [waiting]
    needs_both = waiting.model_copy(update={"own_side": False})
    assert find_stuck([needs_both, line("baseline", 1, "running"), *others]) == [needs_both]


def test_a_mapped_block_outlives_its_descriptor() -> None:
    """A sender that has closed its outbox does not pull the memory from under a receiver that reads it."""
    memory = Memory(1 << 20)
    slot = memory.take(1 << 19)
    assert slot is not None
    slot.block.mapped[:2] = b"ok"
    mapped = puller_of(os.getpid())._map(0, slot.place)
    memory.release()
    assert mapped[:2] == b"ok" and isinstance(mapped, mmap.mmap)
    assert replace(slot).nbytes == 1 << 19
