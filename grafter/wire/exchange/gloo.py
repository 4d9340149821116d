"""gloo, for ranks of different hosts, and for tensors that shared memory cannot carry.

gloo's work can be neither polled nor cancelled, and one timeout closes the whole group. So a helper thread waits for
it and owns its buffers, while the dump thread watches the board; whoever gives a transfer up leaves the thread and
the group behind, and counts up its generation, which makes all members build a new group at their next point.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
from torch.distributed import ProcessGroupGloo, TCPStore

from grafter.core.plan.transfer_plan import Piece, TransferPlan
from grafter.core.processes import Abandoned, PeerGone, Watch
from grafter.errors import GrafterError, PeerLostError
from grafter.wire.exchange import Exchange, Incoming, Outgoing
from grafter.wire.exchange.group import make_gloo_group
from grafter.wire.exchange.staging import Staging, as_tensor

# The sender's staging: what is not contiguous in CPU memory goes through two buffers of this size.
CHUNK_BYTES = 8 << 20
# Pieces up to this size share a message: on its own, each would cost a round of its own.
SMALL_BYTES = 256 << 10
_IN_FLIGHT = 2
_POLL_SECONDS = 0.25

_Item = TypeVar("_Item")


class GlooExchange(Exchange):
    """One per rank. `new_store` gives a store client of its own, for building groups."""

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
        self._helper: _Helper | None = None
        # Announced in this rank's headers. Groups of a lower generation are given up.
        self.generation = 0

    def send(self, plan: TransferPlan, outgoing: Sequence[Outgoing], watch: Watch) -> None:
        def work(at: _At) -> None:
            by_peer = list(_by_peer((item.piece.receiver, item) for item in outgoing))
            for at.peer, group in self._groups_with(plan, [peer for peer, _ in by_peer]):
                items = dict(by_peer)[at.peer]
                other = int(at.peer > self._graft_rank)
                under_way: list[tuple[Any, torch.Tensor]] = []
                for message in _messages([item.tensor for item in items]):
                    under_way.append((group.send([message], other, self._next_tag(plan, at.peer)), message))
                    if len(under_way) >= _IN_FLIGHT:
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
                for landing in _landings([item.tensor for item in items]):
                    message = landing.room()
                    group.recv([message], other, self._next_tag(plan, at.peer)).wait()
                    landing.unpack(message)

        self._run(work, plan, watch)

    def refuse(self, plan: TransferPlan, incoming: Sequence[Piece], reason: str, watch: Watch) -> None:
        """gloo cannot say so; the senders hear it from the outcome of the point. All build a new group after it."""
        self._give_up(plan)

    def _groups_with(self, plan: TransferPlan, peers: Sequence[int]) -> list[tuple[int, Any]]:
        """A group with each peer, all built before a byte moves: a peer waits for it no longer than its turn takes.

        Groups are of two ranks: one of all participants would wait for those that have nothing to move.
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
                    f"no gloo connection between graft ranks {pair[0]} and {pair[1]}: {_first_line(error)}. Check "
                    f"that the hosts reach each other on any port (a firewall?)."
                ) from error
            if plan.generation < self.generation:
                # Given up while it was being built.
                return group
            # Both have come to the new one, so neither is left in an old one that would be seen to break.
            for old in [old for old in self._groups if old[0] == pair]:
                del self._groups[old]
            for tag in [tag for tag in self._tags if tag[0] == peer and tag[1] < plan.generation]:
                del self._tags[tag]
            self._groups[place] = group
        return self._groups[place]

    def _next_tag(self, plan: TransferPlan, peer: int) -> int:
        """Both ends count the chunks between them alike, so no tag is ever used twice in a group."""
        place = (peer, plan.generation)
        self._tags[place] = self._tags.get(place, 0) + 1
        return self._tags[place]

    def _run(self, work: Callable[[_At], None], plan: TransferPlan, watch: Watch) -> None:
        if self._helper is None:
            self._helper = _Helper()
        # Told in the next headers, so that the generation of a pair's group never goes down, whoever else takes part.
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
                raise PeerGone(at.peer, f"gloo reports: {_first_line(failure)}") from failure
            raise failure

    def _give_up(self, plan: TransferPlan) -> None:
        """The helper may hang in its transfer for ever: leave it its group, buffers and store, and begin anew.

        The highest generation among the members counts, so ours must exceed the one that is given up.
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


@dataclass
class _At:
    """Whom a transfer deals with at the moment; -1 while the group is built."""

    peer: int = -1


class _Helper:
    """A daemon thread that runs one piece of work at a time."""

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
            # It holds the user's tensor, or the staging memory: neither may be kept until the next point.
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


# --- what travels as one message


def _by_peer(items: Iterable[tuple[int, _Item]]) -> Iterator[tuple[int, list[_Item]]]:
    """Peers in order of rank on both sides, so that no two wait for one another; each peer's items in their order."""
    by_peer: dict[int, list[_Item]] = {}
    for peer, item in items:
        by_peer.setdefault(peer, []).append(item)
    yield from sorted(by_peer.items())


def parcels(sizes: Sequence[int]) -> Iterator[range]:
    """Which neighbouring pieces between two ranks share a message, by their bytes: small ones, up to a chunk."""
    start = together = 0
    for number, nbytes in enumerate(sizes):
        if nbytes > SMALL_BYTES or together + _aligned(nbytes) > CHUNK_BYTES:
            if number > start:
                yield range(start, number)
            start, together = number, 0
            if nbytes > SMALL_BYTES:
                yield range(number, number + 1)
                start = number + 1
                continue
        together += _aligned(nbytes)
    if len(sizes) > start:
        yield range(start, len(sizes))


def _aligned(nbytes: int) -> int:
    """Every part of a message begins where any dtype may."""
    return -(-nbytes // 16) * 16


def _messages(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The messages that bring these tensors to one peer: contiguous bytes in CPU memory."""
    for parcel in parcels([tensor.numel() * tensor.element_size() for tensor in tensors]):
        if len(parcel) == 1:
            yield from _readable_chunks(tensors[parcel[0]])
            continue
        parts = [tensors[number] for number in parcel]
        message = torch.empty(sum(_aligned(part.numel() * part.element_size()) for part in parts), dtype=torch.uint8)
        for place, part in _places(message, parts):
            _read_into(place, part)
        yield message


def _places(message: torch.Tensor, parts: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Where each part lies in a message, as a contiguous tensor of its dtype and shape."""
    offset = 0
    for part in parts:
        nbytes = part.numel() * part.element_size()
        yield as_tensor(message[offset : offset + nbytes], part.dtype, tuple(part.shape)), part
        offset += _aligned(nbytes)


def _landings(tensors: Sequence[torch.Tensor]) -> Iterator[_Landing]:
    """The messages that bring these tensors from one peer, and where their bytes belong."""
    for parcel in parcels([tensor.numel() * tensor.element_size() for tensor in tensors]):
        parts = [tensors[number] for number in parcel]
        if len(parts) > 1:
            yield _Landing(parts, sum(_aligned(part.numel() * part.element_size()) for part in parts))
            continue
        shape, itemsize = tuple(parts[0].shape), parts[0].element_size()
        indices = [index for index, _ in _split(shape, itemsize, CHUNK_BYTES)]
        for index, nbytes in zip(indices, chunk_sizes(shape, itemsize), strict=True):
            yield _Landing([parts[0][index] if index else parts[0]], nbytes)


@dataclass(frozen=True)
class _Landing:
    """Parts of staged values that one message brings."""

    parts: Sequence[torch.Tensor]
    nbytes: int

    def room(self) -> torch.Tensor:
        """Memory to receive into: the part itself where it lies in one stretch, else a buffer of at most a chunk."""
        if self._lies_flat:
            return _as_bytes(self.parts[0])
        return torch.empty(self.nbytes, dtype=torch.uint8)

    def unpack(self, message: torch.Tensor) -> None:
        if not self._lies_flat:
            for place, part in _places(message, self.parts):
                part.copy_(place)

    @property
    def _lies_flat(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].is_contiguous()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _split(shape: Sequence[int], itemsize: int, limit: int) -> Iterator[tuple[tuple[slice | int, ...], int]]:
    """Indices that cut a tensor into parts, in row-major order, each at most `limit` bytes; with each part's bytes."""
    row_bytes = itemsize
    for size in shape[1:]:
        row_bytes *= size
    if not shape or shape[0] * row_bytes <= limit:
        nbytes = row_bytes * shape[0] if shape else itemsize
        if nbytes:
            yield (), nbytes
        return
    if row_bytes <= limit:
        rows = limit // row_bytes
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            yield (slice(start, stop),), (stop - start) * row_bytes
        return
    for row in range(shape[0]):
        for index, nbytes in _split(shape[1:], itemsize, limit):
            yield (row, *index), nbytes


def chunk_sizes(shape: Sequence[int], itemsize: int) -> Iterator[int]:
    """The byte counts in which a tensor of this shape travels; both ends compute them."""
    for _, nbytes in _split(shape, itemsize, CHUNK_BYTES):
        yield nbytes


def _readable_chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The chunks; a tensor that cannot be read is this rank's own trouble, not its peer's."""
    try:
        yield from chunks_of(tensor)
    except RuntimeError as error:
        raise Abandoned(f"a sender cannot read its tensor: {_first_line(error)}") from error


def _read_into(place: torch.Tensor, tensor: torch.Tensor) -> None:
    try:
        place.copy_(tensor.detach())
    except RuntimeError as error:
        raise Abandoned(f"a sender cannot read its tensor: {_first_line(error)}") from error


def chunks_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor as contiguous uint8 chunks in CPU memory; copied, a chunk at a time, only where it is not that yet."""
    plain = tensor.detach()
    # Conjugation and negation that torch has put off are done by the copy.
    as_it_lies = plain.device.type == "cpu" and not plain.is_conj() and not plain.is_neg()
    buffers: list[torch.Tensor] = []
    for number, (index, nbytes) in enumerate(_split(tuple(plain.shape), plain.dtype.itemsize, CHUNK_BYTES)):
        part = plain[index] if index else plain
        if as_it_lies and part.is_contiguous():
            yield part.reshape(-1).view(torch.uint8)
            continue
        # No more than `_IN_FLIGHT` are on their way, so the chunk that was in this buffer has arrived.
        turn = number % _IN_FLIGHT
        if turn == len(buffers):
            buffers.append(torch.empty(nbytes, dtype=torch.uint8, pin_memory=part.device.type == "cuda"))
        elif buffers[turn].numel() < nbytes:
            buffers[turn] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=part.device.type == "cuda")
        chunk = buffers[turn][:nbytes]
        chunk.view(part.dtype).view(part.shape).copy_(part)
        yield chunk


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
