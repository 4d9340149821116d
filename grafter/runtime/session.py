"""The session: everything that exists from the moment both jobs have joined until this rank leaves."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from grafter.config.settings.config import GrafterConfig
from grafter.core.copying import share_long_copies
from grafter.errors import ConfigError, RunError
from grafter.runtime.point_ledger import PointLedger
from grafter.runtime.rank_control import RankControl
from grafter.store.dumps.writer import refuse_earlier_dumps
from grafter.store.run_files import write_run_facts
from grafter.wire.exchange.shared_memory import SharedMemoryExchange
from grafter.wire.exchange.transfer import Transfer
from grafter.wire.monitor.store_silence import StoreWait
from grafter.wire.outbox.delivery import Delivery
from grafter.wire.outbox.one_sided import Receivers
from grafter.wire.outbox.outbox import Outbox
from grafter.wire.outbox.pull import Puller
from grafter.wire.outbox.snapshots import Memory
from grafter.wire.pairing.agreement import Agreement
from grafter.wire.pairing.pairing import Pairing
from grafter.wire.rendezvous.channels import Channels
from grafter.wire.rendezvous.join import LINGER_SECONDS, Membership
from grafter.wire.rendezvous.message_router import MessageRouter
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import connect, local_address_towards

logger = logging.getLogger("grafter")


@dataclass
class BeforeJoining:
    """What one rank has before both jobs have joined, and its session uses after that.

    outbox: memory of values that it sends without waiting. dumps_directory: where it has saved points already.
    """

    outbox: Memory
    control: RankControl
    dumps_directory: Path | None = None

    def check(self, run_directory: Path) -> None:
        """Raises ConfigError where the run, as baseline rank 0 has named it, is another one."""
        if self.dumps_directory not in (None, run_directory):
            raise ConfigError(
                f"this rank has saved points in {self.dumps_directory} before both jobs had joined, and the run is in "
                f"{run_directory}. Give both jobs one GRAFTER_DIR and one GRAFTER_RUN_NAME."
            )

    def refuse_earlier_dumps(self, run_directory: Path, membership: Membership) -> None:
        """Raises ConfigError where the run's directory holds dumps of an earlier run."""
        place = membership.place
        try:
            refuse_earlier_dumps(run_directory / place.role, place.role_rank, place.who)
        except ConfigError:
            if self.dumps_directory is None:
                raise
            # They are this rank's own, from before it had joined.


class Session:
    """What a matched point needs, by step: pairing, transfer, agreement, ledger. One per rank and run."""

    def __init__(
        self, config: GrafterConfig, membership: Membership, channels: Channels | None, before: BeforeJoining
    ) -> None:
        """config: with the port of the store. channels: to the ranks of this host, where they are possible.

        Raises ConfigError where the directory of the run holds another one's files, and OSError where it cannot be
        written.
        """
        self.place, self.roster, self.graft_rank = membership.place, membership.roster, membership.graft_rank
        self.client, self.monitor = membership.client, membership.monitor
        # What the keys of this run begin with in the store.
        self.run_prefix = self.client.run_prefix
        self._server, self._channels, self._control = membership.server, channels, before.control
        self.run_directory = Path(config.dir) / membership.run_name
        self.timeout = timeout = config.timeout
        share_long_copies(self.roster.has_core_each)
        self.client.set_timeout(timeout + 5)
        self.client.call_monitor = StoreWait(self.monitor, timeout)
        router = MessageRouter(self.client, self.monitor, self.roster, self.graft_rank, channels, timeout)
        self.pairing = Pairing(self.client, router, self.monitor, self.roster, timeout)
        self.transfer = self._make_transfer(config)
        self.agreement = Agreement(self.client, router, self.roster, self.place.role, self.place.role_rank, timeout)
        before.check(self.run_directory)
        before.refuse_earlier_dumps(self.run_directory, membership)
        self.ledger = PointLedger(self.place, self.run_directory, self.run_prefix, self.monitor)
        self.outbox = self._make_outbox(config, before)
        self.puller = Puller(self.roster, self.graft_rank, self.transfer.staging, self.client.seal, self.run_prefix)
        self.delivery: Delivery | None = None
        if not all(self.roster.share_memory(self.graft_rank, other) for other in range(len(self.roster.all))):
            own_address = local_address_towards(config.master_address, config.master_port or 0)
            self.delivery = Delivery(own_address, self.client.seal, self.outbox.find)
        # Store keys of the last point of each set of participants.
        self._deletable: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
        if self.place.role_rank == 0:
            sizes = {"baseline": len(self.roster.baseline), "target": len(self.roster.target)}
            directory = self.run_directory / self.place.role
            write_run_facts(directory, config, self.place, membership.run_name, membership.run_id, sizes)
        before.control.joined(self.monitor, self.roster, self.graft_rank, self.run_directory / self.place.role)
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
            self.run_prefix,
            lambda: connect(address, port, timeout=30, keep_trying=lambda: True),
            lambda: local_address_towards(address, port),
        )

    def _make_outbox(self, config: GrafterConfig, before: BeforeJoining) -> Outbox:
        return Outbox(
            before.outbox,
            config.outbox_seconds,
            self.graft_rank,
            self.monitor,
            self.pairing.tombstones,
            self._find_gone,
            self.ledger.write_line,
            Receivers(self.monitor, self.roster, self.place.role, self.timeout),
        )

    # On the monitor thread.

    def _each_second(self, client: StoreClient) -> None:
        self.outbox.look_after(client)
        self.ledger.poll(client)
        self._control.poll(client)

    def _find_gone(self) -> dict[int, str]:
        return self.monitor.gone() if self.roster.several_hosts else self.monitor.gone_here()

    # On the thread of the points.

    def finished(self, members: tuple[tuple[int, ...], tuple[int, ...]], keys: list[str]) -> None:
        """A point of these participants is over. All of them reached it, so the previous point's keys are not needed.

        keys: those of this point in the store.
        """
        done = self._deletable.pop(members, None)
        if done:
            self.monitor.delete_later(done)
        self._deletable[members] = keys

    def close(self, note: str) -> None:
        """Leave: say so on the board, and, where this rank hosts the store, linger until the others have left, too.

        note: the error with which this rank leaves; empty if there is none.
        """
        self.ledger.leave(self.client)
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
