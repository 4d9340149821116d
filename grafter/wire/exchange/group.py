"""Dedicated process groups: of the run's own making, from its own store, never registered with the job's."""

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

# Members meet here at the same point, so whoever is missing after this long is not coming.
CONSTRUCTION_TIMEOUT = timedelta(seconds=60)


def group_prefix(run_prefix: str, members: Sequence[int], generation: int, kind: str) -> str:
    """The place of one set of members in the store; a new generation is a new place."""
    digest = hashlib.blake2b(",".join(map(str, members)).encode(), digest_size=8).hexdigest()
    return f"{run_prefix}/group/{kind}/{digest}/{generation}"


def local_address_towards(address: str, port: int) -> str:
    """The address of this machine from which the store is reached: the one that other hosts can reach, too."""
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
    """Called by all members. Ranks within the group are places in `members`.

    Takes 1 to 2 ms; raises RuntimeError if a member does not come within `CONSTRUCTION_TIMEOUT`.
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
    """Called by all members, those with nothing to move, too: the communicator is built here, and waits for all."""
    from torch.distributed import ProcessGroupNCCL

    # Its watchdog would end the process when a transfer is late; ours is to raise in the user's program instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    prefixed = PrefixStore(group_prefix(run_prefix, members, generation, "nccl"), store)
    group = ProcessGroupNCCL(prefixed, members.index(graft_rank), len(members), options)
    group.eager_connect_single_device(device)
    return group
