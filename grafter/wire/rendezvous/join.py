"""Join: each rank announces itself, reads the rosters of both jobs, and applies the same check whether they fit.

Two jobs with different secrets cannot read each other's messages, and would wait until the join times out. So while
ranks join, they also look for signs that the other job has another secret (`SecretCheck`).
"""

from __future__ import annotations

import contextlib
import json
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
from grafter.core.messages.wire import PROTOCOL_VERSION, Seal, Sealed, read_message
from grafter.core.process_identity import ProcessIdentity, own_identity
from grafter.core.roles import SHARED_SETTINGS, RankIdentity, Role
from grafter.errors import JoinError, ProtocolError, RunError
from grafter.version import VERSION
from grafter.wire.monitor.members import StoreHost
from grafter.wire.monitor.monitor_thread import MonitorThread
from grafter.wire.monitor.status_board import BoardWriter
from grafter.wire.monitor.store_silence import StoreWait
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import HostedStore, connect, serve

logger = logging.getLogger("grafter")

LINGER_SECONDS = 3.0
StoreServer = TCPStore | HostedStore


@dataclass(frozen=True)
class Membership:
    """What a rank has once it has joined.

    client: the dump thread's. graft_rank: this rank's place in the roster. server: the store's server, if this rank
    hosts it; the store lives as long as this object.
    """

    place: RankIdentity
    client: StoreClient
    monitor: MonitorThread
    roster: Roster
    graft_rank: int
    run_id: str
    run_name: str
    server: StoreServer | None


def store_place(config: GrafterConfig, place: RankIdentity) -> tuple[Role, int] | None:
    """(role, role rank) of the rank that hosts the store; None if `grafter run` does."""
    if config.store_host == "launcher":
        return None
    if config.peer is not None:
        return (place.role, 0)
    return (other_role(place.role), 0) if config.store_host == "peer" else ("baseline", 0)


def join(
    config: GrafterConfig,
    place: RankIdentity,
    run_name: str,
    socket_name: str,
    keep_trying: Callable[[], bool],
    on_connected: Callable[[MonitorThread], None],
    hooks: AnnouncedHooks = NO_HOOKS,
    played_from: PlayedFrom | None = None,
    served: StoreServer | None = None,
) -> Membership:
    """Join the run. Called once by every rank of both jobs, on a thread in the background.

    Waits up to `join_timeout` seconds for each step. keep_trying: asked while the store cannot be reached yet.
    on_connected: called once it is. hooks: what this rank announces of its hooks. played_from: the recording that it is
    played from, if it is not a live rank. served: the store, if this rank hosts it already.

    Raises JoinError if the jobs do not fit, and what ended the run if it has ended.
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
    monitor = MonitorThread(
        new_client(), BoardWriter(place.role, place.role_rank), place.who, _find_host(client, hosted_by)
    )
    client.call_monitor = StoreWait(monitor, config.join_timeout)
    check = SecretCheck(place.role, place.role_rank)
    monitor.ask_while_joining(check.look)
    on_connected(monitor)
    try:
        check.hail(client)
        handshake = _Handshake(config, place, client, monitor, hooks, played_from)
        return handshake.run(run_name, socket_name, server)
    except BaseException as error:
        # Also if a message could not be read, which another secret explains best.
        with contextlib.suppress(RunError):
            check.look(client)
        if isinstance(error, RunError) and monitor.aborted is None:
            with contextlib.suppress(RunError):
                monitor.abort(error, client)
        if server is not None and isinstance(error, RunError):
            # The store ends with this process: the other ranks have this long to read the error there.
            time.sleep(LINGER_SECONDS)
        monitor.close()
        client.close()
        raise


def _find_host(client: StoreClient, name: str) -> StoreHost:
    """The process that hosts the store, as far as it is known before the roster is."""
    published = client.peek(client.job_keys.host)
    if published is None:
        return StoreHost(name)
    host = StoreHost(name, read_message(ProcessIdentity.model_validate_json, published.payload, "the store's host"))
    client.hosted_by = str(host)
    return host


class _Handshake:
    """The steps of joining, in their order. Used once."""

    def __init__(
        self,
        config: GrafterConfig,
        place: RankIdentity,
        client: StoreClient,
        monitor: MonitorThread,
        hooks: AnnouncedHooks,
        played_from: PlayedFrom | None,
    ) -> None:
        self._config, self._place, self._client, self._monitor = config, place, client, monitor
        self._hooks, self._played_from = hooks, played_from

    def run(self, run_name: str, socket_name: str, server: StoreServer | None) -> Membership:
        run_id, run_name = self._learn_run(run_name)
        self._client.seal.run_id = run_id
        # Before the announcement, so that there is a line for each rank of a roster.
        self._monitor.board.running(self._client)
        announcement = self._announce(socket_name)
        self._post_roster(announcement)
        roster = self._read_rosters()
        graft_rank = roster.graft_rank(self._place.role, self._place.role_rank)
        return Membership(self._place, self._client, self._monitor, roster, graft_rank, run_id, run_name, server)

    def _wait(self, what: str, *awaits: str) -> Wait:
        return Wait("join", what, self._config.join_timeout, awaits=awaits)

    def _learn_run(self, run_name: str) -> tuple[str, str]:
        """The run's id and name, which baseline rank 0 chooses."""
        key = self._client.job_keys.run
        if self._place.role == "baseline" and self._place.role_rank == 0:
            self._client.put_if_absent(key, "run", f"{uuid.uuid4().hex[:16]} {run_name}")
        with self._monitor.waiting(self._wait("baseline rank 0 to open the run", key)):
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
        key = self._client.job_keys.hello(place.role, place.role_rank)
        claimed = self._client.put_if_absent(key, "hello", announcement.model_dump_json())
        if claimed is not None:
            raise self._refuse(self._explain_claim(_read_announcement(claimed.payload), announcement))
        return announcement

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
        self._monitor.abort(error, self._client)
        return error

    def _post_roster(self, announcement: Announcement) -> None:
        """The job's rank 0 collects the announcements of its job and posts them together."""
        if self._place.role_rank != 0:
            return
        others = [self._client.job_keys.hello(self._place.role, rank) for rank in range(1, self._place.role_world_size)]
        with self._monitor.waiting(self._wait(f"the other ranks of the {self._place.role} to join", *others)):
            members = [_read_announcement(sealed.payload) for sealed in self._client.get_all(others)]
        roster = ANNOUNCEMENTS.dump_json([announcement, *members]).decode()
        self._client.put_if_absent(self._client.job_keys.roster(self._place.role), "roster", roster)

    def _read_rosters(self) -> Roster:
        other = other_role(self._place.role)
        keys = [self._client.job_keys.roster(role) for role in ("baseline", "target")]
        logger.info("grafter: %s has joined and waits for the %s job", self._place.who, other)
        with self._monitor.waiting(self._wait(f"the {other} job to join", *keys)):
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


_LONGEST = 200


class SecretCheck:
    """Finds out, while a rank joins, whether the other job has another secret, or none. One per rank.

    A message that is not signed with this job's secret is ignored, since any program may have written it. So the first
    ranks of both jobs each publish a random number, and repeat the other's, which anyone can read. A rank that finds
    its job's number repeated in a message that it cannot verify knows that the message is written now: by the other
    job, or by a program that could keep the jobs apart anyway, by overwriting the messages of the join.

    `look` is called on one thread at a time.
    """

    def __init__(self, role: Role, role_rank: int) -> None:
        self._role, self._leads = role, role_rank == 0
        self._number = os.urandom(16).hex()
        self._repeated = ""

    def hail(self, client: StoreClient) -> None:
        """Publish this job's number, before any message that the other job could fail to read."""
        if self._leads:
            client.set(_place(client, self._role), "hail", json.dumps([self._number, self._repeated]))

    def look(self, client: StoreClient) -> RunError | None:
        """The error to raise if the secrets differ, else None. A few round trips; never waits."""
        theirs = client.peek_at_other(_place(client, other_role(self._role)))
        if theirs is None:
            return None
        number, repeated = _read(theirs)
        if self._leads and number != self._repeated:
            self._repeated = number
            self.hail(client)
        own = self._number
        if not self._leads:
            first = client.peek(_place(client, self._role))
            own = _read(first)[0] if first is not None else ""
        if not own or repeated != own:
            return None
        return ProtocolError(
            f"the {other_role(self._role)} job has another secret than this one, or only one of the two has any: "
            "neither can read the other's messages. Set GRAFTER_SECRET to the same value in both jobs."
        )


def _place(client: StoreClient, role: Role) -> str:
    return f"{client.job_prefix}/hail/{role}"


def _read(message: Sealed) -> tuple[str, str]:
    """(its number, the one that it repeats); empty texts if the message is something else."""
    try:
        number, repeated = json.loads(message.payload)
    except ValueError:
        return "", ""
    if not isinstance(number, str) or not isinstance(repeated, str) or len(number + repeated) > _LONGEST:
        return "", ""
    return number, repeated
