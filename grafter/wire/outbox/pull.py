"""Pull: a receiver copies its pieces out of the senders' snapshots, which lie still as long as the entry is claimed.

It opens the sender's memory by itself, through `/proc/<pid>/fd/<fd>`, which the kernel allows to processes of one user.
So nothing is waited for: neither a sender that is stopped, nor a thread of it that another keeps from running. What was
opened must be the memory that the sender named (its inode), and sealed against shrinking, or a read could kill us.

From another machine, or another user's process, the tensor is fetched whole (delivery).
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict

import torch

from grafter.core.copying import copy
from grafter.core.messages.manifest import Header, Pair, store_keys
from grafter.core.messages.roster import Roster
from grafter.core.messages.states import OutboxPlace
from grafter.core.messages.wire import Seal
from grafter.core.plan.decision import Decision
from grafter.core.plan.transfer_plan import TransferPlan, Value
from grafter.core.processes import Abandoned, is_from_signal_handler
from grafter.core.roles import Direction
from grafter.wire.exchange.staging import Staging, StagingRefused, as_tensor, is_sealed_block
from grafter.wire.outbox.delivery import Fetcher
from grafter.wire.outbox.memory import offsets_of, tensor_at

_MOST_MAPPED = 64


class Puller:
    """One per rank; used by its dump thread."""

    def __init__(self, roster: Roster, graft_rank: int, staging: Staging, seal: Seal, run_prefix: str) -> None:
        self._roster, self._graft_rank, self._staging, self._seal = roster, graft_rank, staging, seal
        self._run_prefix = run_prefix
        # Blocks are used again for later points. A block that its sender has released holds no memory any more.
        self._mapped: OrderedDict[tuple[int, int, int], mmap.mmap] = OrderedDict()

    def pull(
        self, plan: TransferPlan, pair: Pair, decision: Decision, direction: Direction
    ) -> tuple[dict[Value, torch.Tensor], int]:
        """The values that the plan stages at this rank, complete, and the bytes that came. They lie in the staging
        memory until the next point. Raises Abandoned, with the reason, where they cannot be had."""
        me = self._graft_rank
        try:
            self._staging.reserve(plan.staging_bytes.get(me, 0))
        except StagingRefused as refused:
            raise Abandoned(f"{self._roster.who(me)} has no memory to receive into: {refused}") from refused
        values = {
            value: self._staging.tensor(value.offset, value.spec.torch_dtype, value.spec.shape)
            for value in plan.values_of(me)
        }
        headers = {self._roster.graft_rank(each.role, each.role_rank): each for each in pair.senders(direction)}
        sources: dict[tuple[int, int], torch.Tensor] = {}
        base = store_keys(self._run_prefix, plan.digest).base
        nbytes = 0
        with Fetcher(self._seal) as fetcher:
            for piece in plan.incoming(me):
                source = sources.get((piece.sender, piece.index))
                if source is None:
                    source = self._source(piece.sender, headers[piece.sender], piece.index, decision, fetcher, base)
                    sources[piece.sender, piece.index] = source
                copy(piece.landing(values[piece.value]), piece.taken_from(source))
                nbytes += piece.spec.nbytes
        return values, nbytes

    def _source(
        self, sender: int, header: Header, index: int, decision: Decision, fetcher: Fetcher, base: str
    ) -> torch.Tensor:
        """One tensor of a snapshot: as the plan takes pieces of it. base: of the entry's keys."""
        specs = header.leaves + header.extras_tensors
        offsets, needed = offsets_of(specs)
        if specs[index].numel == 0:
            return torch.empty(specs[index].shape, dtype=specs[index].torch_dtype)
        if header.outbox is None or needed > header.outbox.nbytes:
            raise Abandoned(f"{header.who} says that it has posted {needed} bytes, and does not say where they lie")
        place = header.outbox
        if self._roster.share_memory(sender, self._graft_rank):
            tensor = tensor_at(self._map(sender, place), place.offset + offsets[index], specs[index])
        else:
            nbytes = specs[index].nbytes
            fetched = fetcher.fetch(base, place.address, place.port, offsets[index], nbytes, header.who)
            tensor = as_tensor(fetched, specs[index].torch_dtype, specs[index].shape)
        rows = decision.rows_of(header)
        return rows[index].of(tensor) if rows is not None and index < len(rows) else tensor

    def _map(self, sender: int, place: OutboxPlace) -> mmap.mmap:
        known = (sender, place.device, place.inode)
        mapped = self._mapped.get(known)
        if mapped is None:
            mapped = self._mapped[known] = self._open(sender, place)
            if len(self._mapped) > _MOST_MAPPED:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(known)
        if place.offset + place.nbytes > len(mapped):
            raise Abandoned(f"{self._roster.who(sender)} names a place beyond its outbox")
        return mapped

    def _open(self, sender: int, place: OutboxPlace) -> mmap.mmap:
        process, who = self._roster.all[sender].process, self._roster.who(sender)
        try:
            fd = os.open(f"/proc/{process.pid}/fd/{place.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if is_from_signal_handler(error):
                raise
            raise Abandoned(
                f"the outbox of {who} (pid {process.pid} on {process.hostname}) cannot be read: {error.strerror}. Its "
                "process has ended, or it may not be looked into by this one (another user, or made undumpable)"
            ) from error
        try:
            status = os.fstat(fd)
            is_the_one = (status.st_ino, status.st_dev) == (place.inode, place.device) and status.st_uid == os.getuid()
            if not is_the_one or not is_sealed_block(fd, place.offset + place.nbytes):
                raise Abandoned(f"what {who} names as its outbox is another file, too small, or could shrink")
            # Private, since torch wants memory that could be written; nobody writes here.
            return mmap.mmap(fd, status.st_size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            if is_from_signal_handler(error):
                raise
            raise Abandoned(f"the outbox of {who} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(fd)

    def close(self) -> None:
        self._mapped.clear()
