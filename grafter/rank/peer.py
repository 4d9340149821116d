"""GRAFTER_PEER: a live job without the other job. Its first rank hosts the store and starts the player."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

from grafter.config.settings.config import SETTING_FIELDS, GrafterConfig
from grafter.core.messages.roster import other_role
from grafter.core.processes import describe_exit
from grafter.core.roles import Place
from grafter.errors import ConfigError, DumpError
from grafter.rank.job_environment import player_environment
from grafter.store.recording import find_recording, settings_of
from grafter.wire.store_client import HostedStore

logger = logging.getLogger("grafter")

# The player leaves by itself within about two seconds after the live job has left.
_LEAVE_SECONDS = 4.0
_TERMINATE_SECONDS = 2.0
# Settings of the live job's own place and memory, which the player does not get.
_NOT_PASSED_ON = frozenset(
    {"enable", "role", "rank", "peer", "record", "attach", "master_address", "master_port", "store_host"}
) | {"dir", "run_name"}


class Peer:
    """The player of one live job, as seen from that job's rank 0. config: the live rank's, with the store's actual
    port.
    """

    def __init__(self, config: GrafterConfig, place: Place, directory: Path) -> None:
        """Host the store, unless `grafter run` does, and start the player. Raises JoinError and ConfigError."""
        self._role = other_role(place.role)
        secret = config.secret.get_secret_value() if config.secret else None
        self.store: HostedStore | None = None
        port = config.master_port
        if config.store_host != "launcher":
            self.store = HostedStore(
                config.master_address, config.master_port or 0, group_name=config.group_name, secret=secret
            )
            port = self.store.port
        self.config = config.model_copy(update={"master_port": port})
        environment = player_environment(
            os.environ,
            self._role,
            _settings_for_player(config),
            master=(config.master_address, port or 0),
            directory=os.path.abspath(config.dir),
            run_name=config.run_name,
        )
        environment["GRAFTER_STORE_HOST"] = "launcher" if self.store is None else "peer"
        command = [sys.executable, "-m", "grafter.rank.offline.player", str(directory), "--parent", str(os.getpid())]
        try:
            # The live program handles a Ctrl-C; the player learns about it through the board.
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            raise ConfigError(f"GRAFTER_PEER: the player cannot be started ({error}): {' '.join(command)}") from error
        threading.Thread(target=self._watch, name="grafter-peer", daemon=True).start()

    def _watch(self) -> None:
        """Report a player that cannot start, so that no rank waits for it. After the join, its processes are watched
        themselves.
        """
        code = self._process.wait()
        if code and self.store is not None:
            try:
                self.store.report_job_exit(self._role, f"(a recording) {describe_exit(code)}")
            except (AttributeError, RuntimeError) as error:
                logger.debug("grafter: the player ended after the store: %s", error)

    def close(self) -> None:
        """Called after the live rank has left: the player ends now, if not by itself."""
        try:
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            try:
                self._process.wait(_TERMINATE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self.store is not None:
            self.store.close()


def start_peer(config: GrafterConfig, place: Place) -> Peer | None:
    """Called by every rank of a live job with GRAFTER_PEER, before it joins; the first rank starts the player.

    Raises ConfigError, on every rank, if the directory is not a recording, or does not fit this run.
    """
    assert config.peer is not None
    try:
        directory, facts = find_recording(config.peer, other_role(place.role))
    except DumpError as error:
        raise ConfigError(f"GRAFTER_PEER={config.peer}: {error}") from None
    recorded, key = facts.shared_settings, settings_of(config).get("key")
    if recorded.get("key") != key:
        raise ConfigError(
            f"GRAFTER_PEER={config.peer}: the recording has GRAFTER_KEY={recorded.get('key', 'unset')}, and here it "
            f"is {key or 'unset'}. What identifies a point must be the same; set it as it was."
        )
    if config.master_port is None and place.role_world_size > 1:
        raise ConfigError(
            f"GRAFTER_PEER is set, and the {place.role} has {place.role_world_size} ranks, which must meet at one "
            "port: set GRAFTER_MASTER_PORT to one free port on all of them, or start the job with `grafter run --peer`."
        )
    return Peer(config, place, directory) if place.role_rank == 0 else None


def _settings_for_player(config: GrafterConfig) -> dict[str, str]:
    """The settings of the live job's configuration, wherever they were set, as variables for the player."""
    settings = {}
    for field in SETTING_FIELDS:
        if field in _NOT_PASSED_ON or field not in config.model_fields_set:
            continue
        value = getattr(config, field)
        if field == "secret":
            value = value.get_secret_value() if value is not None else None
        if value is not None:
            settings[field] = str(int(value)) if isinstance(value, bool) else str(value)
    if "plan" in settings:
        settings["plan"] = os.path.abspath(settings["plan"])
    return settings
