"""Checks the store and a gloo group on loopback by making them, and whether another machine's store can be reached."""

from __future__ import annotations

import array
import mmap
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from grafter.tools.doctor.finding import Finding, fault, first_line, ok, warning
from grafter.wire.exchange.staging import Staging, StagingRefused, is_sealed_block
from grafter.wire.rendezvous.connecting import open_listener

if TYPE_CHECKING:
    from torch.distributed import TCPStore


_PATIENCE_SECONDS = 20.0
_CONNECT_SECONDS = 10.0
_SLOW_LOOKUP_SECONDS = 1.0
_ROUND_TRIPS = 50

Value = TypeVar("Value")


def check_network(master: tuple[str, int] | None) -> Iterator[Finding]:
    """The findings about the network. `master`: where another machine hosts the store."""
    yield check_store()
    yield check_gloo()
    yield check_own_name(socket.gethostname())
    if master is not None:
        yield from check_master(*master)


def within(seconds: float, function: Callable[[], Value]) -> Value:
    """What the function returns or raises. TimeoutError if it takes longer; it then continues on its thread."""
    outcome: queue.Queue[tuple[Value | None, BaseException | None]] = queue.Queue()

    def call() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def check_store() -> Finding:
    """Host a store on loopback, as `grafter run` does, and connect to it as a rank does."""
    try:
        seconds = within(_PATIENCE_SECONDS, _try_store)
    except (OSError, RuntimeError) as error:
        return fault(
            "store",
            f"it cannot be hosted and reached on 127.0.0.1: {first_line(error)}",
            "Check this host's firewall.",
        )
    return ok("store", f"hosted and reached on 127.0.0.1; a round trip takes {seconds * 1e6:.0f} us")


def _try_store() -> float:
    from grafter.wire.store_client import connect, serve

    server = serve("127.0.0.1", 0)
    client = connect("127.0.0.1", server.port, timeout=_CONNECT_SECONDS, keep_trying=lambda: True)
    server.set("doctor", "said")
    if client.get("doctor") != b"said":
        raise RuntimeError("a stored value was not returned")
    start = time.perf_counter()
    for _ in range(_ROUND_TRIPS):
        client.get("doctor")
    return (time.perf_counter() - start) / _ROUND_TRIPS


def check_gloo() -> Finding:
    """Make two ranks, on threads of this process, and send a message between them."""
    try:
        within(_PATIENCE_SECONDS, _try_gloo)
    except (OSError, RuntimeError) as error:
        text = f"no group can be made on 127.0.0.1: {first_line(error)}"
        return fault("gloo", text, "Check that torch is built with gloo, and that loopback is up (ip addr show lo).")
    return ok("gloo", "a group of two ranks was made on 127.0.0.1, and a message went through")


def _try_gloo() -> None:
    import torch
    from torch.distributed import PrefixStore, ProcessGroupGloo

    from grafter.wire.store_client import connect, serve

    server = serve("127.0.0.1", 0)
    port = server.port
    sent, came = torch.arange(1000.0), torch.zeros(1000)

    def rank(number: int) -> None:
        client: TCPStore = connect("127.0.0.1", port, timeout=_CONNECT_SECONDS, keep_trying=lambda: True)
        # torch's stubs omit most of a backend's methods.
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=_CONNECT_SECONDS)
        group: Any = ProcessGroupGloo(PrefixStore("doctor", client), number, 2, options)
        work = group.send([sent], 1, 0) if number == 0 else group.recv([came], 0, 0)
        work.wait()

    other = threading.Thread(target=rank, args=(0,), daemon=True)
    other.start()
    rank(1)
    other.join(_CONNECT_SECONDS)
    if not torch.equal(sent, came):
        raise RuntimeError("the received message differs from the sent one")


def check_own_name(name: str) -> Finding:
    """Look up this machine's name. torch does so in several places, and if it is slow, jobs stall for no visible
    reason.
    """
    start = time.monotonic()
    try:
        addresses = {entry[4][0] for entry in within(_CONNECT_SECONDS, lambda: socket.getaddrinfo(name, None))}
        within(_CONNECT_SECONDS, socket.getfqdn)
    except (OSError, UnicodeError) as error:
        text = f"this machine's name, {name}, has no address: {first_line(error)}"
        return warning("own name", text, f"Add a line `127.0.0.1 {name}` to /etc/hosts, or set GLOO_SOCKET_IFNAME.")
    seconds = time.monotonic() - start
    if seconds > _SLOW_LOOKUP_SECONDS:
        text = f"looking up {name} took {seconds:.1f} s"
        return warning("own name", text, "torch does so at its start: put the name into /etc/hosts.")
    return ok("own name", f"{name} is {', '.join(sorted(map(str, addresses)))}")


def check_master(host: str, port: int) -> Iterator[Finding]:
    """Look up the name, connect, and query the store, each as a separate step, so that the finding names the one that
    fails.
    """
    check = f"store at {host}:{port}"
    start = time.monotonic()
    try:
        entries = within(_CONNECT_SECONDS, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        yield fault(
            check, f"{host} has no address: {first_line(error)}", "Give its IP address, or repair this host's DNS."
        )
        return
    looked_up = time.monotonic() - start
    start = time.monotonic()
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as connection:
            own = connection.getsockname()[0]
    except OSError as error:
        yield fault(check, f"not reached: {error.strerror or first_line(error)}", _why_not_reached(error, port))
        return
    connected = time.monotonic() - start
    try:
        within(_CONNECT_SECONDS, lambda: _ask_store(host, port))
    except (OSError, RuntimeError) as error:
        text = f"something listens there, but it is not a store: {first_line(error)}"
        yield fault(check, text, "Check which port the other side printed (`hosts the store; ...`), and give that one.")
        return
    text = (
        f"{entries[0][4][0]}, looked up in {looked_up * 1e3:.0f} ms, connected in {connected * 1e3:.1f} ms, from {own}"
    )
    if looked_up > _SLOW_LOOKUP_SECONDS:
        yield warning(check, text, "Looking it up is slow: give its IP address, or put the name into /etc/hosts.")
    else:
        yield ok(check, text)


def _ask_store(host: str, port: int) -> None:
    from torch.distributed import TCPStore

    client = TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_CONNECT_SECONDS / 2)
    )
    client.check(["grafter doctor"])


def _why_not_reached(error: OSError, port: int) -> str:
    if isinstance(error, ConnectionRefusedError):
        return (
            f"Nothing listens there: start the side with --host-store {port} first, with an --address that this "
            "machine reaches (its default is 127.0.0.1)."
        )
    if isinstance(error, TimeoutError):
        return f"A firewall may drop it: let port {port} through, or choose one that is let through."
    return "Check that the machine is up and that a route leads there (ping, ip route get)."


# Checks shared memory as two ranks of one host use it: a sealed block, passed over an abstract socket, written and
# read.

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
