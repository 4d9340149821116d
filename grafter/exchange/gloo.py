"""gloo, for ranks of different hosts, and for tensors that shared memory cannot carry.

gloo's work can be neither polled nor cancelled, and one timeout closes the whole group. So a helper thread waits for
it and owns its buffers, while the dump thread watches the board; whoever gives a transfer up leaves the thread and
the group behind, and counts up its generation, which makes all members build a new group at their next point.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch.distributed import ProcessGroupGloo, TCPStore

from grafter.exchange import Exchange, Outgoing
from grafter.group import make_gloo_group
from grafter.staging import Staging, as_tensor
from grafter.transfer_plan import Piece, TransferPlan
from grafter.watch import PeerGone, Watch

# The sender's staging: what is not contiguous in CPU memory goes through two buffers of this size.
CHUNK_BYTES = 8 << 20
_IN_FLIGHT = 2
_POLL_SECONDS = 0.25


class GlooExchange(Exchange):
    """One per rank. `new_store` gives a store client of its own, for building groups."""

    name: ClassVar[str] = "gloo"

    def __init__(
        self,
        graft_rank: int,
        hall: str,
        new_store: Callable[[], TCPStore],
        local_address: Callable[[], str],
        timeout: float,
    ) -> None:
        self._graft_rank, self._hall, self._timeout = graft_rank, hall, timedelta(seconds=timeout + 30)
        self._new_store, self._local_address = new_store, local_address
        self._store: TCPStore | None = None
        self._groups: dict[tuple[tuple[int, ...], int], ProcessGroupGloo] = {}
        self._tags: dict[tuple[tuple[int, ...], int, int], int] = {}
        self._helper: _Helper | None = None
        # How often this rank has given a group up; announced in its headers.
        self.generation = 0

    def send(self, plan: TransferPlan, outgoing: Sequence[Outgoing], watch: Watch) -> None:
        def work() -> None:
            group: Any = self._group(plan)  # torch's stubs leave out send and recv
            for item in outgoing:
                peer = plan.members.index(item.piece.receiver)
                under_way: list[tuple[Any, torch.Tensor]] = []
                for chunk in chunks_of(item.tensor):
                    under_way.append((group.send([chunk], peer, self._next_tag(plan, item.piece.receiver)), chunk))
                    if len(under_way) >= _IN_FLIGHT:
                        under_way.pop(0)[0].wait()
                for handle, _ in under_way:
                    handle.wait()

        self._run(work, watch, outgoing[0].piece.receiver)

    def receive(
        self, plan: TransferPlan, incoming: Sequence[Piece], staging: Staging, watch: Watch
    ) -> list[torch.Tensor]:
        places = [staging.view(piece.offset, piece.spec.nbytes) for piece in incoming]

        def work() -> None:
            group: Any = self._group(plan)  # torch's stubs leave out send and recv
            for piece, place in zip(incoming, places, strict=True):
                peer = plan.members.index(piece.sender)
                offset = 0
                for nbytes in chunk_sizes(piece.spec.shape, piece.spec.torch_dtype.itemsize):
                    chunk = place[offset : offset + nbytes]
                    group.recv([chunk], peer, self._next_tag(plan, piece.sender)).wait()
                    offset += nbytes

        self._run(work, watch, incoming[0].sender)
        return [
            as_tensor(place, piece.spec.torch_dtype, piece.spec.shape)
            for piece, place in zip(incoming, places, strict=True)
        ]

    def _group(self, plan: TransferPlan) -> ProcessGroupGloo:
        place = (plan.members, plan.generation)
        if place not in self._groups:
            if self._store is None:
                self._store = self._new_store()
            self._groups[place] = make_gloo_group(
                self._store, self._hall, plan, self._graft_rank, self._local_address(), self._timeout
            )
        return self._groups[place]

    def _next_tag(self, plan: TransferPlan, peer: int) -> int:
        """Both ends count the chunks between them alike, so no tag is ever used twice in a group."""
        place = (plan.members, plan.generation, peer)
        self._tags[place] = self._tags.get(place, 0) + 1
        return self._tags[place]

    def _run(self, work: Callable[[], None], watch: Watch, peer: int) -> None:
        if self._helper is None:
            self._helper = _Helper()
        helper = self._helper
        helper.start(work)
        try:
            while not helper.wait(_POLL_SECONDS):
                watch.check()
            helper.raise_failure()
        except RuntimeError as error:
            self._give_up()
            if helper.failed_with is error:
                raise PeerGone(peer, f"gloo reports: {str(error).splitlines()[0][:300]}") from error
            raise
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """The helper may hang in its transfer for ever: leave it its group and its buffers, and build new ones."""
        self._helper = None
        self.generation += 1
        self._groups.clear()

    def close(self) -> None:
        if self._helper is not None:
            self._helper.close()
            self._helper = None
        self._groups.clear()
        self._store = None


class _Helper:
    """A daemon thread that runs one piece of work at a time."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self.failed_with: BaseException | None = None
        threading.Thread(target=self._serve, name="grafter-gloo", daemon=True).start()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                with torch.no_grad():
                    job()
            except BaseException as error:
                self.failed_with = error
            self._done.set()

    def start(self, job: Callable[[], None]) -> None:
        self._done.clear()
        self.failed_with = None
        self._jobs.put(job)

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def raise_failure(self) -> None:
        if self.failed_with is not None:
            raise self.failed_with

    def close(self) -> None:
        self._jobs.put(None)


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


def chunks_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor as contiguous uint8 chunks in CPU memory; copied, a chunk at a time, only where it is not that yet."""
    plain = tensor.detach().resolve_conj().resolve_neg() if _is_lazy(tensor) else tensor.detach()
    buffers: list[torch.Tensor] = []
    for number, (index, nbytes) in enumerate(_split(tuple(plain.shape), plain.dtype.itemsize, CHUNK_BYTES)):
        part = plain[index] if index else plain
        if part.device.type == "cpu" and part.is_contiguous():
            yield part.reshape(-1).view(torch.uint8)
            continue
        if number < _IN_FLIGHT:
            buffers.append(torch.empty(nbytes, dtype=torch.uint8, pin_memory=part.device.type == "cuda"))
        # The buffer's last chunk has arrived by now: no more than `_IN_FLIGHT` are on their way.
        buffer = buffers[number % _IN_FLIGHT] if len(buffers) > number % _IN_FLIGHT else None
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=part.device.type == "cuda")
        chunk = buffer[:nbytes]
        chunk.view(part.dtype).view(part.shape).copy_(part)
        yield chunk


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()
