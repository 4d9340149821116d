"""Dedicated process groups: made from the run's own store, and never registered with the job's torch.distributed."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroupNCCL

# All members build the group at the same point, so a member that is missing after this long will not come.
CONSTRUCTION_TIMEOUT = timedelta(seconds=60)


def group_prefix(run_prefix: str, members: Sequence[int], generation: int, kind: str) -> str:
    """The prefix of one set of members in the store; each generation has its own."""
    digest = hashlib.blake2b(",".join(map(str, members)).encode(), digest_size=8).hexdigest()
    return f"{run_prefix}/group/{kind}/{digest}/{generation}"


def local_address_towards(address: str, port: int) -> str:
    """The address of this host from which the store is reached, which other hosts can reach, too. Raises OSError."""
    with socket.create_connection((address, port), timeout=10) as connection:
        return str(connection.getsockname()[0])


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

    Takes 1 to 2 ms; raises RuntimeError if a member does not call it within `CONSTRUCTION_TIMEOUT`.
    """
    # torch's stubs leave out most of what a backend has.
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=local_address)]
    options._timeout = CONSTRUCTION_TIMEOUT
    options._threads = 1
    prefixed = PrefixStore(group_prefix(run_prefix, members, generation, "gloo"), store)
    group = ProcessGroupGloo(prefixed, members.index(graft_rank), len(members), options)
    group._set_default_timeout(timeout)
    return group


def make_nccl_group(
    store: TCPStore,
    run_prefix: str,
    members: Sequence[int],
    generation: int,
    graft_rank: int,
    timeout: timedelta,
    device: torch.device,
) -> ProcessGroupNCCL:
    """Build a group and its communicator, which waits for all. Called by all members, also if they have no pieces."""
    from torch.distributed import ProcessGroupNCCL

    # Otherwise its watchdog ends the process when a transfer is late; grafter raises an exception instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    prefixed = PrefixStore(group_prefix(run_prefix, members, generation, "nccl"), store)
    group = ProcessGroupNCCL(prefixed, members.index(graft_rank), len(members), options)
    group.eager_connect_single_device(device)
    return group
