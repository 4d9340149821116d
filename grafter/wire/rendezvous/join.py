"""Join: each rank announces itself, both jobs' rosters are read, and every rank checks alike that they fit."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import TCPStore

from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.announced_models import NO_HOOKS, AnnouncedHooks
from grafter.core.messages.roster import ANNOUNCEMENTS, Announcement, PlayedFrom, Roster, find_disagreement, other_role
from grafter.core.messages.wire import PROTOCOL_VERSION, Seal, read_message
from grafter.core.process_identity import ProcessIdentity, own_identity
from grafter.core.roles import SHARED_SETTINGS, Place, RoleName
from grafter.errors import JoinError, RunError
from grafter.version import VERSION
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.status_board import BoardWriter
from grafter.wire.monitor.store_host import StoreHost
from grafter.wire.monitor.store_patience import StorePatience
from grafter.wire.monitor.waits import Wait
from grafter.wire.rendezvous.secret_check import SecretCheck
from grafter.wire.store_client import HostedStore, StoreClient, connect, host_place, serve

logger = logging.getLogger("grafter")

LINGER_SECONDS = 3.0
StoreServer = TCPStore | HostedStore


@dataclass(frozen=True)
class Membership:
    """What joining gives: the clients, the roster, and this rank's number in it."""

    place: Place
    client: StoreClient
    housekeeping: Housekeeping
    roster: Roster
    graft_rank: int
    run_id: str
    run_name: str
    # The store's server, where this rank hosts it: it lives as long as this object.
    server: StoreServer | None


def store_place(config: GrafterConfig, place: Place) -> tuple[RoleName, int] | None:
    """(role, role rank) of the rank that hosts the store; None where `grafter run` does."""
    if config.store_host == "launcher":
        return None
    if config.peer is not None:
        return (place.role, 0)
    return (other_role(place.role), 0) if config.store_host == "peer" else ("baseline", 0)


def join(
    config: GrafterConfig,
    place: Place,
    run_name: str,
    socket_name: str,
    keep_trying: Callable[[], bool],
    on_connected: Callable[[Housekeeping], None],
    hooks: AnnouncedHooks = NO_HOOKS,
    played_from: PlayedFrom | None = None,
    served: StoreServer | None = None,
) -> Membership:
    """Called once by every rank of both jobs, in the background. Waits up to `join_timeout` seconds.

    on_connected: called once the store is reached.
    hooks: what this rank announces of its hooks. played_from: where it is no live rank. served: the store, where this
    rank hosts it already.

    Raises JoinError where the jobs do not fit, and what ended the run where something did.
    """
    address, port = config.master_address, config.master_port or 0
    host = store_place(config, place)
    hosts = served is None and host == (place.role, place.role_rank)
    server = serve(address, port) if hosts else served
    secret = config.secret.get_secret_value() if config.secret else None
    seal = Seal(f"{place.role}/{place.role_rank}", secret)
    hosted_by = "grafter run" if host is None else f"{host[0]} rank {host[1]}"

    def new_client() -> StoreClient:
        raw = connect(address, port, timeout=config.join_timeout, keep_trying=keep_trying)
        return StoreClient(raw, seal, config.group_name, hosted_by)

    client = new_client()
    client.set_timeout(config.join_timeout + 30)
    housekeeping = Housekeeping(
        new_client(), BoardWriter(place.role, place.role_rank), place.who, _find_host(client, hosted_by)
    )
    client.patience = StorePatience(housekeeping, config.join_timeout)
    check = SecretCheck(place.role, place.role_rank)
    housekeeping.ask_while_joining(check.look)
    on_connected(housekeeping)
    try:
        check.hail(client)
        handshake = _Handshake(config, place, client, housekeeping, hooks, played_from)
        return handshake.run(run_name, socket_name, server)
    except BaseException as error:
        # Also what could not be read: whoever has another secret cannot read this either, and learns it so.
        with contextlib.suppress(RunError):
            check.look(client)
        if isinstance(error, RunError) and housekeeping.aborted is None:
            with contextlib.suppress(RunError):
                housekeeping.abort(error, client)
        if server is not None and isinstance(error, RunError):
            # The store goes with this process: the others get the time to read there why.
            time.sleep(LINGER_SECONDS)
        housekeeping.close()
        client.close()
        raise


def _find_host(client: StoreClient, name: str) -> StoreHost:
    """Who hosts the store, as far as that is known before the roster is."""
    said = client.peek(host_place(client))
    if said is None:
        return StoreHost(name)
    host = StoreHost(name, read_message(ProcessIdentity.model_validate_json, said.payload, "the store's host"))
    client.hosted_by = str(host)
    return host


class _Handshake:
    """The steps of joining, in the order in which they happen."""

    def __init__(
        self,
        config: GrafterConfig,
        place: Place,
        client: StoreClient,
        housekeeping: Housekeeping,
        hooks: AnnouncedHooks,
        played_from: PlayedFrom | None,
    ) -> None:
        self._config, self._place, self._client, self._housekeeping = config, place, client, housekeeping
        self._hooks, self._played_from = hooks, played_from

    def run(self, run_name: str, socket_name: str, server: StoreServer | None) -> Membership:
        run_id, run_name = self._learn_run(run_name)
        self._client.seal.run_id = run_id
        # Before the claim, so that whoever reads the roster finds a line for each of its ranks.
        self._housekeeping.board.running(self._client)
        announcement = self._announce(socket_name)
        self._post_roster(announcement)
        roster = self._read_rosters()
        graft_rank = roster.graft_rank(self._place.role, self._place.role_rank)
        return Membership(self._place, self._client, self._housekeeping, roster, graft_rank, run_id, run_name, server)

    def _wait(self, what: str, *awaits: str) -> Wait:
        return Wait("join", what, self._config.join_timeout, awaits=awaits)

    def _learn_run(self, run_name: str) -> tuple[str, str]:
        """The run's id and name, which baseline rank 0 gives."""
        key = f"{self._client.job_prefix}/run"
        if self._place.role == "baseline" and self._place.role_rank == 0:
            self._client.put_if_absent(key, "run", f"{uuid.uuid4().hex[:16]} {run_name}")
        with self._housekeeping.waiting(self._wait("baseline rank 0 to open the run", key)):
            run_id, _, name = self._client.get(key).payload.partition(" ")
        return run_id, name

    def _announce(self, socket_name: str) -> Announcement:
        config, place = self._config, self._place
        expected = {"baseline": config.baseline_world_size, "target": config.target_world_size}
        announcement = Announcement(
            protocol_version=PROTOCOL_VERSION,
            grafter_version=VERSION,
            role=place.role,
            role_rank=place.role_rank,
            role_world_size=place.role_world_size,
            process=own_identity(),
            restart_count=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0),
            shared_settings={
                **{s: str(getattr(config, s)) for s in SHARED_SETTINGS if getattr(config, s)},
                **config.one_sided_settings,
            },
            expected_world_sizes={role: size for role, size in expected.items() if size is not None},
            socket_name=socket_name,
            modules=self._hooks.modules,
            models=self._hooks.models,
            played_from=self._played_from,
        )
        claimed = self._client.put_if_absent(self._hello(place.role_rank), "hello", announcement.model_dump_json())
        if claimed is not None:
            raise self._refuse(self._explain_claim(_read_announcement(claimed.payload), announcement))
        return announcement

    def _hello(self, role_rank: int) -> str:
        return f"{self._client.job_prefix}/hello/{self._place.role}/{role_rank}"

    def _explain_claim(self, holder: Announcement, mine: Announcement) -> str:
        text = f"two processes claim to be {self._place.who}: {holder.who}, and pid {mine.process.pid} on "
        text += f"{mine.process.hostname}. "
        if mine.restart_count != holder.restart_count:
            return text + (
                "The second one is a restart of the job (torchrun --max-restarts). A run cannot be joined again, "
                "since the other job has reached other points. Restart both jobs."
            )
        return text + (
            "Each process needs its own rank, which is GRAFTER_RANK, else torch.distributed's, else RANK. If another "
            "pair of jobs uses this store, give each pair its own GRAFTER_GROUP_NAME or master port."
        )

    def _refuse(self, text: str) -> JoinError:
        error = JoinError(text)
        self._housekeeping.abort(error, self._client)
        return error

    def _post_roster(self, announcement: Announcement) -> None:
        """The job's rank 0 collects its own ranks and posts them together."""
        if self._place.role_rank != 0:
            return
        others = [self._hello(rank) for rank in range(1, self._place.role_world_size)]
        with self._housekeeping.waiting(self._wait(f"the other ranks of the {self._place.role} to join", *others)):
            members = [_read_announcement(sealed.payload) for sealed in self._client.get_all(others)]
        roster = ANNOUNCEMENTS.dump_json([announcement, *members]).decode()
        self._client.put_if_absent(f"{self._client.job_prefix}/roster/{self._place.role}", "roster", roster)

    def _read_rosters(self) -> Roster:
        other = other_role(self._place.role)
        keys = [f"{self._client.job_prefix}/roster/{role}" for role in ("baseline", "target")]
        logger.info("grafter: %s has joined and waits for the %s job", self._place.who, other)
        with self._housekeeping.waiting(self._wait(f"the {other} job to join", *keys)):
            baseline, target = (
                read_message(ANNOUNCEMENTS.validate_json, sealed.payload, "a roster")
                for sealed in self._client.get_all(keys)
            )
        disagreement = find_disagreement(baseline, target)
        if disagreement is not None:
            raise self._refuse(disagreement)
        return Roster(tuple(baseline), tuple(target))


def _read_announcement(text: str) -> Announcement:
    return read_message(Announcement.model_validate_json, text, "an announcement")
