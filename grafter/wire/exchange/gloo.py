"""gloo, for ranks of different hosts, and for tensors that shared memory cannot carry.

gloo's work can be neither polled nor cancelled, and one timeout closes the whole group. So a helper thread waits for
it and owns its buffers, while the dump thread can be interrupted. A rank that gives a transfer up abandons the thread
and the group, and increments its generation, which makes all members build a new group at their next point.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from grafter.core.plan.transfer_plan import Piece, TransferPlan
from grafter.core.processes import PeerGone, Watch
from grafter.errors import GrafterError, PeerLostError
from grafter.wire.exchange import Exchange, Incoming, Outgoing, group_prefix
from grafter.wire.exchange.gloo_messages import IN_FLIGHT, first_line, landings_of, messages_of
from grafter.wire.exchange.staging import Staging

# All members build a group at the same point, so a member that is missing after this long will not come.
_CONSTRUCTION_TIMEOUT = timedelta(seconds=60)
_POLL_SECONDS = 0.25

_Item = TypeVar("_Item")


class GlooExchange(Exchange):
    """The exchange of one rank by gloo.

    new_store: makes a client of the store, for building groups. generation: announced in this rank's headers; groups of
    a lower generation are abandoned.
    """

    name: ClassVar[str] = "gloo"

    def __init__(
        self,
        graft_rank: int,
        run_prefix: str,
        new_store: Callable[[], TCPStore],
        local_address: Callable[[], str],
        timeout: float,
    ) -> None:
        self._graft_rank, self._run_prefix, self._timeout = graft_rank, run_prefix, timedelta(seconds=timeout + 30)
        self._new_store, self._local_address = new_store, local_address
        self._store: TCPStore | None = None
        self._groups: dict[tuple[tuple[int, int], int], ProcessGroupGloo] = {}
        self._tags: dict[tuple[int, int], int] = {}
        self._helper: _TransferThread | None = None
        self.generation = 0

    def send(self, plan: TransferPlan, outgoing: Sequence[Outgoing], watch: Watch) -> None:
        def work(at: _At) -> None:
            by_peer = list(_by_peer((item.piece.receiver, item) for item in outgoing))
            for at.peer, group in self._groups_with(plan, [peer for peer, _ in by_peer]):
                items = dict(by_peer)[at.peer]
                other = int(at.peer > self._graft_rank)
                under_way: list[tuple[Any, torch.Tensor]] = []
                for message in messages_of([item.tensor for item in items]):
                    under_way.append((group.send([message], other, self._next_tag(plan, at.peer)), message))
                    if len(under_way) >= IN_FLIGHT:
                        under_way.pop(0)[0].wait()
                for handle, _ in under_way:
                    handle.wait()

        self._run(work, plan, watch)

    def receive(self, plan: TransferPlan, incoming: Sequence[Incoming], staging: Staging, watch: Watch) -> None:
        def work(at: _At) -> None:
            by_peer = list(_by_peer((item.piece.sender, item) for item in incoming))
            for at.peer, group in self._groups_with(plan, [peer for peer, _ in by_peer]):
                items = dict(by_peer)[at.peer]
                other = int(at.peer > self._graft_rank)
                for landing in landings_of([item.tensor for item in items]):
                    message = landing.room()
                    group.recv([message], other, self._next_tag(plan, at.peer)).wait()
                    landing.unpack(message)

        self._run(work, plan, watch)

    def refuse(self, plan: TransferPlan, incoming: Sequence[Piece], reason: str, watch: Watch) -> None:
        """gloo cannot report it: the senders read it in the outcome of the point. All build a new group afterwards."""
        self._give_up(plan)

    def _groups_with(self, plan: TransferPlan, peers: Sequence[int]) -> list[tuple[int, Any]]:
        """A group with each peer. All are built before any transfer, so that no peer waits for another's transfer.

        Groups have two ranks: a group of all participants would wait for those without pieces.
        """
        return [(peer, self._group(plan, peer)) for peer in peers]

    def _group(self, plan: TransferPlan, peer: int) -> ProcessGroupGloo:
        pair = (min(peer, self._graft_rank), max(peer, self._graft_rank))
        place = (pair, plan.generation)
        if place not in self._groups:
            if self._store is None:
                self._store = self._new_store()
            try:
                group = make_gloo_group(
                    self._store,
                    self._run_prefix,
                    pair,
                    plan.generation,
                    self._graft_rank,
                    self._local_address(),
                    self._timeout,
                )
            except (RuntimeError, OSError) as error:
                raise PeerLostError(
                    f"no gloo connection between graft ranks {pair[0]} and {pair[1]}: {first_line(error)}. Check "
                    f"that the hosts reach each other on any port (a firewall?)."
                ) from error
            if plan.generation < self.generation:
                # Abandoned while it was being built.
                return group
            # Both have joined the new group, so neither uses an old one, which breaks when it is deleted.
            for old in [old for old in self._groups if old[0] == pair]:
                del self._groups[old]
            for tag in [tag for tag in self._tags if tag[0] == peer and tag[1] < plan.generation]:
                del self._tags[tag]
            self._groups[place] = group
        return self._groups[place]

    def _next_tag(self, plan: TransferPlan, peer: int) -> int:
        """Both ends count the messages between them, so no tag is ever used twice in a group."""
        place = (peer, plan.generation)
        self._tags[place] = self._tags.get(place, 0) + 1
        return self._tags[place]

    def _run(self, work: Callable[[_At], None], plan: TransferPlan, watch: Watch) -> None:
        if self._helper is None:
            self._helper = _TransferThread()
        # Announced in the next headers, so that the generation of a pair's group never decreases.
        self.generation = max(self.generation, plan.generation)
        helper, at = self._helper, _At()
        helper.start(lambda: work(at))
        try:
            while not helper.wait(_POLL_SECONDS):
                watch.check()
        except BaseException:
            self._give_up(plan)
            raise
        failure = helper.take_failure()
        if failure is not None:
            self._give_up(plan)
            if isinstance(failure, RuntimeError) and not isinstance(failure, GrafterError) and at.peer >= 0:
                raise PeerGone(at.peer, f"gloo reports: {first_line(failure)}") from failure
            raise failure

    def _give_up(self, plan: TransferPlan) -> None:
        """Abandon the helper thread, which may hang for ever, with its group, buffers and store.

        The members use their highest generation, so this rank's must exceed the abandoned one.
        """
        if self._helper is not None:
            self._helper.close()
        self._helper = self._store = None
        self.generation = max(self.generation, plan.generation + 1)

    def close(self) -> None:
        if self._helper is not None:
            self._helper.close()
            self._helper = None
        self._groups.clear()
        self._store = None


def make_gloo_group(
    store: TCPStore,
    run_prefix: str,
    members: Sequence[int],
    generation: int,
    graft_rank: int,
    local_address: str,
    timeout: timedelta,
) -> ProcessGroupGloo:
    """Build a group. Called by all members; a rank within the group is an index into `members`.

    Takes 1 to 2 ms; raises RuntimeError if a member does not call it within `_CONSTRUCTION_TIMEOUT`.
    """
    # torch's stubs leave out most of what a backend has.
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=local_address)]
    options._timeout = _CONSTRUCTION_TIMEOUT
    options._threads = 1
    prefixed = PrefixStore(group_prefix(run_prefix, members, generation, "gloo"), store)
    group = ProcessGroupGloo(prefixed, members.index(graft_rank), len(members), options)
    group._set_default_timeout(timeout)
    return group


@dataclass
class _At:
    """The peer that a transfer is dealing with; -1 while the group is built."""

    peer: int = -1


class _TransferThread:
    """A daemon thread that runs one transfer at a time."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._failure: BaseException | None = None
        threading.Thread(target=self._serve, name="grafter-gloo", daemon=True).start()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                with torch.no_grad():
                    job()
            except BaseException as error:
                self._failure = error
            # It refers to the user's tensor, or the staging memory, which must not be kept until the next point.
            del job
            self._done.set()

    def start(self, job: Callable[[], None]) -> None:
        self._done.clear()
        self._jobs.put(job)

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def take_failure(self) -> BaseException | None:
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> None:
        self._jobs.put(None)


def _by_peer(items: Iterable[tuple[int, _Item]]) -> Iterator[tuple[int, list[_Item]]]:
    """The items of each peer, in their order. Peers are in the order of ranks, so that no two wait for each other."""
    by_peer: dict[int, list[_Item]] = {}
    for peer, item in items:
        by_peer.setdefault(peer, []).append(item)
    yield from sorted(by_peer.items())
