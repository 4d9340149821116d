"""Checks shared memory as two ranks of one host use it: a sealed block, passed over an abstract socket, written and
read.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
from pathlib import Path

from grafter.tools.doctor.finding import Finding, first_line, ok, warning
from grafter.wire.exchange.staging import Staging, StagingRefused, is_sealed_block
from grafter.wire.rendezvous.connecting import open_listener

_TRIAL_BYTES = 64 << 20
_WORD = b"grafter doctor"
_ADVICE = (
    "Grafting works without it, over gloo and more slowly; a container's seccomp rules or `ulimit -f` may forbid it."
)


def check_sharing() -> Finding:
    """Check shared memory. Both ends are in this process, which makes no difference to the kernel."""
    check = "shared memory"
    if not Path("/proc/self/fd").is_dir():
        return warning(check, "/proc/self/fd does not exist", _ADVICE)
    try:
        problem = _pass_block()
    except (OSError, StagingRefused, ValueError) as error:
        problem = first_line(error)
    if problem:
        return warning(check, f"tensors cannot be shared between processes: {problem}", _ADVICE)
    return ok(check, "a sealed block of 64 MiB went over a socket; ranks of one machine write straight to one another")


def _pass_block() -> str:
    """The problem, or an empty text."""
    listener = open_listener()
    if listener is None:
        return "this Python or system has no memfd_create, or no abstract Unix sockets"
    staging = Staging()
    with listener.socket, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
        try:
            staging.reserve(_TRIAL_BYTES)
            sender.connect(f"\0{listener.name}")
            receiver, _ = listener.socket.accept()
            with receiver:
                return _write_through(staging, sender, receiver)
        finally:
            staging.release()


def _write_through(staging: Staging, sender: socket.socket, receiver: socket.socket) -> str:
    descriptor = array.array("i", [staging.fd])
    receiver.sendmsg([b"B"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)])
    sender.settimeout(5)
    _, descriptors, _, _ = socket.recv_fds(sender, 16, 1)
    if len(descriptors) != 1:
        return "no descriptor arrived over the socket"
    try:
        if not is_sealed_block(descriptors[0], _TRIAL_BYTES):
            return "the block arrived unsealed"
        with mmap.mmap(descriptors[0], _TRIAL_BYTES) as block:
            block[-len(_WORD) :] = _WORD
    finally:
        os.close(descriptors[0])
    came = bytes(staging.view(_TRIAL_BYTES - len(_WORD), len(_WORD)).tolist())
    return "" if came == _WORD else "the data written at one end was missing at the other"
