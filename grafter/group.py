"""Dedicated process groups: of the run's own making, from its own store, never registered with the job's."""

from __future__ import annotations

import hashlib
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from grafter.transfer_plan import TransferPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupNCCL

# Members meet here at the same point, so whoever is missing after this long is not coming.
CONSTRUCTION_TIMEOUT = timedelta(seconds=60)


def group_prefix(hall: str, plan: TransferPlan, kind: str) -> str:
    """The place of one set of members in the store; a new generation is a new place."""
    members = hashlib.blake2b(",".join(map(str, plan.members)).encode(), digest_size=8).hexdigest()
    return f"{hall}/group/{kind}/{members}/{plan.generation}"


def local_address_towards(address: str, port: int) -> str:
    """The address of this machine from which the store is reached: the one that other hosts can reach, too."""
    with socket.create_connection((address, port), timeout=10) as connection:
        return str(connection.getsockname()[0])


def make_gloo_group(
    store: TCPStore, hall: str, plan: TransferPlan, graft_rank: int, local_address: str, timeout: timedelta
) -> ProcessGroupGloo:
    """Called by all members of the plan. Ranks within the group are places in `plan.members`.

    Takes 1 to 2 ms; raises RuntimeError if a member does not come within `CONSTRUCTION_TIMEOUT`.
    """
    # torch's stubs leave out most of what a backend has.
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=local_address)]
    options._timeout = CONSTRUCTION_TIMEOUT
    options._threads = 2
    prefixed = PrefixStore(group_prefix(hall, plan, "gloo"), store)
    group = ProcessGroupGloo(prefixed, plan.members.index(graft_rank), len(plan.members), options)
    group._set_default_timeout(timeout)
    return group


def make_nccl_group(
    store: TCPStore, hall: str, plan: TransferPlan, graft_rank: int, timeout: timedelta
) -> ProcessGroupNCCL:
    """Called by all members of the plan. The communicator itself is built at the first transfer."""
    from torch.distributed import ProcessGroupNCCL

    # Its watchdog would end the process when a transfer is late; ours is to raise in the user's program instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    prefixed = PrefixStore(group_prefix(hall, plan, "nccl"), store)
    return ProcessGroupNCCL(prefixed, plan.members.index(graft_rank), len(plan.members), options)
