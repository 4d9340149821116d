"""Channels between ranks that are all in this process, for tests without processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

from point_parts import roster

from grafter.core.messages.roster import Roster
from grafter.core.messages.wire import Seal
from grafter.core.process_identity import own_identity
from grafter.wire.rendezvous.channels import Channels
from grafter.wire.rendezvous.connecting import signature_of


class NoEnd:
    def check(self) -> None:
        """A run that nothing ends."""


class EndedError(Exception):
    """What ended the run."""


class Ended:
    def check(self) -> None:
        raise EndedError


def roster_here(baseline: int, target: int, names: Sequence[str] | None = None) -> Roster:
    """Whose ranks are all this process; `names` are those of their sockets, by graft rank."""
    plain = roster(baseline, target)
    names = names or [f"socket-{number}" for number in range(baseline + target)]
    members = [
        member.model_copy(update={"process": own_identity(), "socket_name": name})
        for member, name in zip(plain.all, names, strict=True)
    ]
    return Roster(tuple(members[:baseline]), tuple(members[baseline:]))


def connected_channels(baseline: int, target: int, *, send_buffer_bytes: int | None = None) -> list[Channels]:
    """By graft rank, each connected with each."""
    everyone = roster_here(baseline, target)
    count = len(everyone.all)
    connections: list[dict[int, socket.socket]] = [{} for _ in range(count)]
    for one in range(count):
        for other in range(one + 1, count):
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connections[one][other], connections[other][one] = pair
            for end in pair if send_buffer_bytes is not None else ():
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    return [
        Channels(number, everyone, Seal(signature_of(everyone, number), None), connections[number])
        for number in range(count)
    ]


@contextlib.contextmanager
def in_a_child(function: Callable[[], None]) -> Iterator[int]:
    """A forked process that runs this, and is then killed. Its pid is that of a stranger, or of another rank."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
