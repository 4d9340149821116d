"""The session: everything that exists from the moment both jobs have joined until this rank leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from grafter.config.settings.config import GrafterConfig
from grafter.core.copying import share_long_copies
from grafter.core.messages.announced_models import NO_HOOKS, AnnouncedHooks
from grafter.core.messages.roster import PlayedFrom
from grafter.core.points import PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import LedgerLine, LedgerRecord
from grafter.core.roles import Place
from grafter.errors import ConfigError, GrafterError, JoinError, PeerLostError, RunError
from grafter.runtime.failure_log import FailureLog
from grafter.runtime.rank_control import RankControl
from grafter.store.dumps.writer import refuse_earlier_dumps
from grafter.store.ledger import LedgerWriter
from grafter.store.run_files import write_run_facts
from grafter.wire.exchange.shared_memory import SharedMemoryExchange
from grafter.wire.exchange.transfer import Transfer
from grafter.wire.failed_points import FailedPoints, SentPoints
from grafter.wire.monitor.monitor_thread import MonitorThread
from grafter.wire.monitor.store_silence import StoreWait
from grafter.wire.outbox.delivery import Delivery
from grafter.wire.outbox.one_sided import Receivers
from grafter.wire.outbox.outbox import Outbox
from grafter.wire.outbox.pull import Puller
from grafter.wire.outbox.snapshots import Memory
from grafter.wire.pairing.agreement import Agreement
from grafter.wire.pairing.pairing import Pairing
from grafter.wire.rendezvous.channels import Channels
from grafter.wire.rendezvous.connecting import Listener, connect_ranks, open_listener
from grafter.wire.rendezvous.join import LINGER_SECONDS, Membership, StoreServer, join, store_place
from grafter.wire.rendezvous.message_router import MessageRouter
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import connect, local_address_towards

logger = logging.getLogger("grafter")

# So often a line is written where a signal's handler raises meanwhile.
_LEDGER_TRIES = 3
# How long a rank that leaves waits for the store to take its last failures.
_LAST_WORDS_SECONDS = 2.0


def find_place(config: GrafterConfig) -> Place:
    """This process's rank in its job: the configured one, else torch.distributed's, else RANK, else 0."""
    assert config.role is not None
    initialised = dist.is_available() and dist.is_initialized()
    expected = config.baseline_world_size if config.role == "baseline" else config.target_world_size
    if config.rank is not None:
        role_rank, world_size = config.rank, expected
    elif initialised:
        role_rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        role_rank, world_size = _environment_number("RANK", 0), _environment_number("WORLD_SIZE", 1)
    if config.rank is None and expected not in (None, world_size):
        raise ConfigError(_explain_world_size(config.role, expected, world_size, initialised=initialised))
    if world_size is None:
        world_size = dist.get_world_size() if initialised else _environment_number("WORLD_SIZE", 1)
    if role_rank >= world_size:
        raise ConfigError(
            f"this process is rank {role_rank} of a {config.role} job of {world_size} ranks, which count from 0. Check "
            f"GRAFTER_RANK, GRAFTER_{config.role.upper()}_WORLD_SIZE, RANK and WORLD_SIZE."
        )
    return Place(config.role, role_rank, world_size)


def _explain_world_size(role: str, expected: object, world_size: object, *, initialised: bool) -> str:
    text = os.environ.get("WORLD_SIZE", "").strip()
    if initialised:
        found = f"torch.distributed says that this job has {world_size}"
    elif text:
        found = f"WORLD_SIZE={text} says that this job has {world_size}"
    else:
        found = "this process sees only itself: torch.distributed is not initialised, and WORLD_SIZE is not set"
    return (
        f"GRAFTER_{role.upper()}_WORLD_SIZE={expected} says that the {role} has {expected} ranks, and {found}. Correct "
        "the variable, or leave it out: the size is then discovered. For a job larger than torch.distributed's "
        "default group, set GRAFTER_RANK in each process, too."
    )


def _environment_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if text and not text.isdigit():
        raise ConfigError(f"{variable}={text!r} is no number; torchrun sets it, else leave it unset.")
    return int(text) if text else default


@dataclass
class Begun:
    """What a rank that does not wait may have before both jobs have joined: values in its outbox, and dumps here."""

    outbox: Memory
    directory: Path | None = None

    def check(self, run_directory: Path) -> None:
        """Raises ConfigError where the run, as baseline rank 0 has named it, is another one."""
        if self.directory not in (None, run_directory):
            raise ConfigError(
                f"this rank has saved points in {self.directory} before both jobs had joined, and the run is in "
                f"{run_directory}. Give both jobs one GRAFTER_DIR and one GRAFTER_RUN_NAME."
            )


class Session:
    """What a matched point needs, by step: pairing, transfer, agreement, ledger."""

    def __init__(
        self,
        config: GrafterConfig,
        membership: Membership,
        channels: Channels | None,
        begun: Begun,
        control: RankControl | None = None,
    ) -> None:
        self.place, self.roster, self.graft_rank = membership.place, membership.roster, membership.graft_rank
        self.client, self.monitor = membership.client, membership.monitor
        self._server = membership.server
        self.run_directory = Path(config.dir) / membership.run_name
        self.timeout = timeout = config.timeout
        share_long_copies(self.roster.has_core_each)
        self.client.set_timeout(timeout + 5)
        self.client.call_monitor = StoreWait(self.monitor, timeout)
        self._channels = channels
        router = MessageRouter(self.client, self.monitor, self.roster, self.graft_rank, channels, timeout)
        self.pairing = Pairing(self.client, router, self.monitor, self.roster, timeout)
        self.transfer = self._make_transfer(config)
        self.agreement = Agreement(self.client, router, self.roster, self.place.role, self.place.role_rank, timeout)
        begun.check(self.run_directory)
        self._refuse_earlier_dumps(begun)
        self.failures = FailureLog(self.place.who)
        self.ledger = LedgerWriter(self.run_directory / self.place.role, self.place.role_rank)
        self.outbox = Outbox(
            begun.outbox,
            config.outbox_seconds,
            self.graft_rank,
            self.monitor,
            self.pairing.tombstones,
            self._find_gone,
            self.write_line,
            Receivers(self.monitor, self.roster, self.place.role, timeout),
        )
        self.puller = Puller(
            self.roster, self.graft_rank, self.transfer.staging, self.client.seal, self.client.run_prefix
        )
        self.delivery: Delivery | None = None
        if not all(self.roster.share_memory(self.graft_rank, other) for other in range(len(self.roster.all))):
            own_address = local_address_towards(config.master_address, config.master_port or 0)
            self.delivery = Delivery(own_address, self.client.seal, self.outbox.find)
        self._deletable: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
        self._sent: SentPoints[LedgerLine] = SentPoints()
        self._failed = FailedPoints(self.client.run_prefix, self._note_failure)
        self._ledger_lock = threading.Lock()
        if self.place.role_rank == 0:
            sizes = {"baseline": len(self.roster.baseline), "target": len(self.roster.target)}
            directory = self.run_directory / self.place.role
            write_run_facts(directory, config, self.place, membership.run_name, membership.run_id, sizes)
        self._control = control
        if control is not None:
            control.joined(self.monitor, self.roster, self.graft_rank, self.run_directory / self.place.role)
        self.monitor.on_second = self._each_second

    def _make_transfer(self, config: GrafterConfig) -> Transfer:
        address, port = config.master_address, config.master_port or 0
        shared_memory = None
        if self._channels is not None:
            shared_memory = SharedMemoryExchange(self.graft_rank, self.roster, self._channels)
        return Transfer(
            config.backend,
            self.roster,
            self.graft_rank,
            self.monitor,
            self.timeout,
            shared_memory,
            self.client.run_prefix,
            lambda: connect(address, port, timeout=30, keep_trying=lambda: True),
            lambda: local_address_towards(address, port),
        )

    def _refuse_earlier_dumps(self, begun: Begun) -> None:
        try:
            refuse_earlier_dumps(self.run_directory / self.place.role, self.place.role_rank, self.place.who)
        except ConfigError:
            if begun.directory is None:
                raise
            # They are this rank's own, from before it had joined.

    def _each_second(self, client: StoreClient) -> None:
        self.outbox.look_after(client)
        self._failed.report(client)
        self._failed.read(client)
        if self._control is not None:
            self._control.poll(client)

    def _find_gone(self) -> dict[int, str]:
        """Called on the monitor thread."""
        return self.monitor.gone() if self.roster.several_hosts else self.monitor.gone_here()

    # The ledger.

    def record(self, line: LedgerLine, key: PointKey | None = None) -> None:
        """Write one line; `key` for a point whose receivers may still tell that it failed."""
        reason = None
        with self._ledger_lock:
            self._write(line)
            if key is not None:
                reason = self._sent.add(key.digest, line)
        if key is not None and reason is not None:
            self._note_failure(key.digest, reason)

    def write_line(self, record: LedgerRecord) -> None:
        """Write one line; called on any thread."""
        if record.outcome == "failed" and self.monitor.aborted is None:
            self.failures.add(record.name, f"{record.name!r} (step={record.step})", record.reason or "")
        with self._ledger_lock:
            self._write(record)

    def _write(self, record: LedgerRecord | LedgerLine) -> None:
        arrived: BaseException | None = None
        for _ in range(_LEDGER_TRIES):
            try:
                self.ledger.write(record)
                break
            except BaseException as error:
                if not isinstance(error, Exception) or is_from_signal_handler(error):
                    # The program's own, which must not cost the line. One that is there twice counts once.
                    arrived = arrived or error
                    continue
                if not isinstance(error, OSError):
                    raise
                # A full disk costs the ledger, not the run; said for each point, so that nobody misses it.
                logger.error("grafter: the ledger %s cannot be written: %s", self.ledger.path, error)
                break
        if arrived is not None:
            try:
                raise arrived
            finally:
                # Else it would live on in a cycle with this frame, and what the callers hold with it.
                del arrived

    def tell_failure(self, key: PointKey, reason: str) -> None:
        """Called by every receiver of a point that has failed: the senders hear of it within about two seconds."""
        self._failed.add(key.digest, reason)

    def expect_failures(self) -> None:
        """This rank sends, and hears from now on of points that have failed."""
        self._failed.is_listening = True

    def _note_failure(self, digest: str, reason: str) -> None:
        with self._ledger_lock:
            line = self._sent.take_failed(digest, reason)
            if line is not None:
                self._write({**line, "outcome": "failed", "reason": reason})
        if line is not None and self.place.role_rank == min(line["participants"][self.place.role]):
            self.failures.add(line["name"], f"{line['name']!r} (step={line['step']})", reason)

    # Tidying.

    def finished(self, members: tuple[tuple[int, ...], tuple[int, ...]], keys: list[str]) -> None:
        """A point of these participants is over. All of them reached it, so they are done with the previous one."""
        done = self._deletable.pop(members, None)
        if done:
            self.monitor.delete_later(done)
        self._deletable[members] = keys

    # Leaving.

    def close(self, note: str) -> None:
        """Leave: say so on the board, and, where this rank hosts the store, linger until the others can do without."""
        self._failed.leave(self.client, _LAST_WORDS_SECONDS)
        try:
            self.monitor.close(note)
            if self._server is not None:
                self._linger()
        except RunError as error:
            logger.debug("grafter: the store was gone when %s left: %s", self.place.who, error)
        self.agreement.close()
        self.puller.close()
        if self.delivery is not None:
            self.delivery.close()
        self.transfer.close()
        if self._channels is not None:
            self._channels.close()
        self.client.close()
        self.ledger.close()
        self.failures.close()
        if self.client.seal.ignored.count > 1:
            logger.warning("grafter: %s", self.client.seal.ignored.note)

    def _linger(self) -> None:
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline:
            lines = self.monitor.read_board(self.client)
            gone = self.monitor.gone_here()
            if all(line.state == "left" or line.graft_rank in gone for line in lines):
                return
            time.sleep(0.05)


class Joining:
    """The handshake, in the background: a rank whose points never match still hosts, and still says that it left."""

    def __init__(
        self,
        config: GrafterConfig,
        on_refusal: Callable[[JoinError], None],
        on_joined: Callable[[], None],
        begun: Begun,
        hooks: AnnouncedHooks = NO_HOOKS,
        played_from: PlayedFrom | None = None,
        served: StoreServer | None = None,
        control: RankControl | None = None,
    ) -> None:
        """on_refusal, on_joined: called in the background, where the jobs do not fit, and once there is a session.
        played_from: the recording, where this is no live rank. served: the store, where this rank hosts it already.
        control: told once this rank has joined."""
        self._config, self._on_refusal, self._on_joined = config, on_refusal, on_joined
        self._begun = begun
        self._hooks, self._played_from, self._served = hooks, played_from, served
        self._control = control
        self._done = threading.Event()
        self._cancelled = False
        self._session: Session | None = None
        # From when the store is reached.
        self._monitor: MonitorThread | None = None
        self._error: BaseException | None = None
        self._place = find_place(config)
        threading.Thread(target=self._run, name="grafter-join", daemon=True).start()

    def _run(self) -> None:
        listener = None
        try:
            listener = open_listener()
            socket_name = listener.name if listener is not None else ""
            config = self._config
            run_name = config.run_name or time.strftime("%Y%m%d-%H%M%S")
            membership = join(
                config, self._place, run_name, socket_name, lambda: not self._cancelled, self._connected,
                hooks=self._hooks, played_from=self._played_from, served=self._served,
            )  # fmt: skip
            host = store_place(config, self._place)
            membership.monitor.joined(
                membership.roster, membership.graft_rank, membership.roster.graft_rank(*host) if host else None
            )
            self._session = self._begin(membership, listener)
        except BaseException as error:
            self._error = error
            if isinstance(error, JoinError):
                self._on_refusal(error)
            if listener is not None:
                listener.close()
        self._done.set()
        if self._session is not None:
            self._on_joined()

    def _begin(self, membership: Membership, listener: Listener | None) -> Session:
        """The session, with a channel to each rank of this host."""
        channels = None
        try:
            if listener is not None:
                channels = _open_channels(membership, listener, self._config.timeout)
            return Session(self._config, membership, channels, self._begun, self._control)
        except BaseException as error:
            # A disk without room for the ledger, say: the others must not wait for a rank that cannot take part.
            self._leave_at_once(membership, error)
            if channels is not None:
                channels.close()
            raise

    @property
    def is_over(self) -> bool:
        """Whether both jobs have joined, or never will."""
        return self._done.is_set()

    def _leave_at_once(self, membership: Membership, error: BaseException) -> None:
        text = f"{self._place.who} has joined, and cannot take part: {type(error).__name__}: {error}"
        with contextlib.suppress(RunError):
            membership.monitor.abort(RunError(text), membership.client)
        membership.monitor.close(f"{type(error).__name__}: {error}")

    def wait(self) -> Session:
        """The session, once both jobs are there. Raises what kept them from joining."""
        told = time.monotonic() + 10
        while not self._done.wait(0.25):
            if time.monotonic() > told:
                told = time.monotonic() + 60
                logger.info("grafter: %s waits for all ranks of both jobs to join", self._place.who)
        if self._session is None:
            error = self._error
            if isinstance(error, GrafterError):
                raise error
            raise RunError(f"{self._place.who} could not join: {type(error).__name__}: {error}") from error
        return self._session

    def finished(self, *, patient: bool) -> Session | None:
        """At the end of the program: the session, if it comes to one.

        A rank whose points never matched may end before the others have joined, and they need it to: `patient` waits
        for them, up to `join_timeout`. A program that ends with an error does not.
        """
        if patient and not self._done.wait(2.0):
            logger.warning(
                "grafter: %s has ended, and stays until all ranks of both jobs have joined, since they wait for it "
                "(Ctrl-C ends it)",
                self._place.who,
            )
            try:
                self._done.wait()
            except BaseException as error:
                self._call_off(type(error).__name__)
                raise
        if not self._done.wait(2.0):
            self._call_off("an error")
        return self._session

    def _connected(self, monitor: MonitorThread) -> None:
        self._monitor = monitor

    def _call_off(self, why: str) -> None:
        """This rank ends before all have joined, and the others would wait for it until the join times out."""
        self._cancelled = True
        if self._monitor is not None:
            text = f"{self._place.who} has left with {why}, before all ranks of both jobs had joined"
            self._monitor.abort_soon(PeerLostError(f"{text}. Look at the end of its output first."))
        # A rank that hosts the store lingers, so that the others can read it there.
        self._done.wait(LINGER_SECONDS + 1)


def _open_channels(membership: Membership, listener: Listener, timeout: float) -> Channels:
    roster, graft_rank, seal = membership.roster, membership.graft_rank, membership.client.seal
    connections = connect_ranks(listener, roster, graft_rank, seal, timeout, membership.monitor.check)
    return Channels(graft_rank, roster, seal, connections)
