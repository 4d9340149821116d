"""`grafter run` as functions: host the store, start both jobs, supervise them, and return how the run ended.

settings    checked before anything is opened or started
commands    their programs found; two torchruns kept off one port
store       hosted in this process
jobs        each below its keeper (`grafter/tools/launch/job_keeper.py`), so that none of their processes is left
watch       until both are gone (`grafter/tools/launch/supervision.py`)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from grafter.errors import ConfigError, DumpError, UsageError
from grafter.rank.job_environment import job_environment, player_environment, what_defeats_attach
from grafter.tools.launch.job import Job, keep_off_shared_port, split_command
from grafter.tools.launch.run_output import RunOutput
from grafter.tools.launch.supervision import RendezvousStore, Supervisor

if TYPE_CHECKING:
    from grafter.config.settings.config import GrafterConfig

GRACE_SECONDS = 15.0
# How long a rank of the other machine may need to write its last message to the store, and to read ours.
_LINGER_SECONDS = 3.0
_ROLES = ("baseline", "target")


@dataclass(frozen=True)
class PairResult:
    """How a run ended, as far as its processes can tell; the ledgers in `run_directory` say what was grafted.

    `exit_codes` by role: negative for a signal, None if a job was never started or its end was not seen. `failed_role`
    is the job that failed first, and by itself. `ended_roles` are the jobs that the launcher ended. `unreached` are the
    jobs in which `attach` found no model, as far as this process can tell. `attach`: its patterns, if any.
    `is_recorded`: the run was to record its jobs' values. `last_lines` are the last lines (200 at most) of each job's
    output, by role, even of a quiet run.
    """

    run_directory: Path
    exit_codes: dict[str, int | None]
    interrupted: bool
    seconds: float
    stop_signal: int | None = None
    failed_role: str | None = None
    ended_roles: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    attach: str | None = None
    is_recorded: bool = False
    last_lines: dict[str, list[str]] = field(default_factory=dict)


def run_pair(
    baseline: Sequence[str] | str | None,
    target: Sequence[str] | str | None,
    *,
    settings: Mapping[str, str],
    out: Path | None = None,
    run_name: str | None = None,
    peer: Path | None = None,
    quiet: bool = False,
    output: TextIO | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> PairResult:
    """Run both jobs to their end and return how the run ended. None of their processes is left then, whatever happens.

    Commands are lists of words, or text that is split by a shell's quoting rules and run without a shell. `settings`
    are fields of GrafterConfig by name, as text; they override GRAFTER_* variables, and an empty one unsets an
    inherited variable. `peer`: a recording, which is played as the job whose command is None. `out` None: GRAFTER_DIR,
    or the plan file's `dir`, or `grafter_out`. `quiet` prints nothing. `output` defaults to sys.stdout. In the main
    thread, SIGINT, SIGTERM and SIGHUP end both jobs.

    Raises ConfigError or UsageError, before anything is started, for wrong settings or commands, and JoinError if the
    store cannot be hosted.
    """
    given = {"baseline": baseline, "target": target}
    commands = {role: command for role, command in given.items() if command is not None}
    if peer is not None and len(commands) == 1:
        played = next(role for role in _ROLES if role not in commands)
        commands = {role: commands.get(role, ()) for role in _ROLES}
        run = _Run(commands, settings, out, run_name, quiet, output, grace_seconds, Played(played, peer))
    elif peer is not None or len(commands) != 2:
        raise UsageError("give two commands, or one command and a recording to play.")
    else:
        run = _Run(commands, settings, out, run_name, quiet, output, grace_seconds)
    return run.host("127.0.0.1", 0)


def run_side(
    role: str,
    command: Sequence[str] | str,
    *,
    settings: Mapping[str, str],
    host: tuple[str, int] | None = None,
    master: tuple[str, int] | None = None,
    out: Path | None = None,
    run_name: str | None = None,
    peer: Path | None = None,
    quiet: bool = False,
    output: TextIO | None = None,
) -> PairResult:
    """Run one job of a pair. Another `grafter run`, on another machine or in another terminal, runs the other job.

    Give exactly one of `host` (address and port on which this process hosts the store) and `master` (where it is
    hosted). A job that is recorded alone (setting `record`) needs neither. `peer`: a recording, which is played as this
    job; there is no command then. Otherwise like `run_pair`.
    """
    is_alone = host is None and master is None and bool(settings.get("record"))
    if (host is None) == (master is None) and not is_alone:
        raise UsageError(
            "one side of a pair needs either --host-store (to host the store) or --master (where it is hosted)."
        )
    played = Played(role, peer) if peer is not None else None
    run = _Run({role: command}, settings, out, run_name, quiet, output, GRACE_SECONDS, played, is_alone=is_alone)
    if host is not None:
        return run.host(*host)
    return run.supervise(None, master)


def host_store(address: str, port: int, *, group_name: str, secret: str | None) -> RendezvousStore:
    """The rendezvous store of the run, hosted in this process. Raises JoinError if it cannot listen there."""
    from grafter.tools.launch.supervision import WatchedStore  # imports torch, which takes seconds

    return WatchedStore(address, port, group_name=group_name, secret=secret)


@dataclass(frozen=True)
class Played:
    """The job that is a recording."""

    role: str
    directory: Path

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "grafter.rank.offline.player", os.path.abspath(self.directory)]

    def check(self) -> None:
        """Raise UsageError if there is no recording of this role."""
        from grafter.store.recording import find_recording  # imports torch

        try:
            find_recording(self.directory, "baseline" if self.role == "baseline" else "target")
        except DumpError as error:
            raise UsageError(f"--peer {self.directory}: {error}") from None


class _Run:
    """One run, from its arguments to its result. The constructor checks everything that can be checked in advance."""

    def __init__(
        self,
        commands: Mapping[str, Sequence[str] | str],
        settings: Mapping[str, str],
        out: Path | None,
        run_name: str | None,
        quiet: bool,
        output: TextIO | None,
        grace_seconds: float,
        played: Played | None = None,
        *,
        is_alone: bool = False,
    ) -> None:
        self._started = time.monotonic()
        self._settings = dict(settings)
        self._played, self._is_alone = played, is_alone
        if self._settings.get("plan"):
            # A job may change its directory before it reads this path.
            self._settings["plan"] = os.path.abspath(self._settings["plan"])
        self._config = _read_configuration(next(iter(commands)), self._settings, out, run_name, is_alone=is_alone)
        if self._config.attach is not None:
            # The plan file may set it, but the start of a Python does not read the plan file.
            self._settings["attach"] = self._config.attach
        self._out = Path(self._config.dir)
        self._given_name = run_name
        self._output = RunOutput(output or sys.stdout, quiet)
        self._grace_seconds = grace_seconds
        self._commands = {
            role: played.command
            if played is not None and role == played.role
            else split_command(role, command, os.environ)
            for role, command in commands.items()
        }
        self._refuse_used_name()
        if played is not None:
            played.check()

    def host(self, address: str, port: int) -> PairResult:
        """Host the store here, and run the jobs."""
        config = self._config
        secret = config.secret.get_secret_value() if config.secret else None
        store = host_store(address, port, group_name=config.group_name, secret=secret)
        try:
            return self.supervise(store, (_reachable(store.address), store.port))
        finally:
            store.close()

    def supervise(self, store: RendezvousStore | None, master: tuple[str, int] | None) -> PairResult:
        """Run the jobs against the store at `master`, which is `store` if this process hosts it.

        `master` None: the jobs exchange nothing.
        """
        supervisor = Supervisor(store, self._output, self._grace_seconds)
        with self._run_directory() as name, supervisor.stop_signals_handled():
            self._announce(store, name)
            try:
                self._start_jobs(supervisor, master, name)
                supervisor.watch()
                if len(self._commands) == 1 and store is not None:
                    supervisor.linger(_LINGER_SECONDS)
            except BaseException:
                supervisor.kill_all()
                raise
            finally:
                for job in supervisor.jobs:
                    if job.gone:
                        job.close()
            return self._result(supervisor, name, self._tell_unreached(store, supervisor.jobs))

    def _start_jobs(self, supervisor: Supervisor, master: tuple[str, int] | None, name: str | None) -> None:
        commands = {role: self._on_own_port(role, command) for role, command in self._commands.items()}
        played_role = self._played.role if self._played is not None else None
        for role, command in commands.items():
            if supervisor.signals:
                return
            make = player_environment if role == played_role else job_environment
            environment = make(os.environ, role, self._settings, master=master, directory=str(self._out), run_name=name)
            asks = self._config.attach is not None and role != played_role
            defeat = what_defeats_attach(command) if asks else None
            if defeat is not None:
                self._output.say(f"--attach will not reach the {role} job: its command has {defeat}.")
            supervisor.add(Job(role, command, environment, self._output))

    @contextmanager
    def _run_directory(self) -> Iterator[str | None]:
        """The run's name, and its directory, which is removed again if nothing was written to it.

        The name is None for one side of a pair without a given name, if the other side may choose it.
        """
        if self._given_name is None and "baseline" not in self._commands and not self._is_alone:
            yield None
            return
        directory = self._claim_directory()
        try:
            yield directory.name
        finally:
            for empty in (directory, self._out):
                if empty.is_dir() and not any(empty.iterdir()):
                    empty.rmdir()

    def _claim_directory(self) -> Path:
        """Make `<out>/<name>`. Without a given name, use the time, changed until no other run has it."""
        self._out.mkdir(parents=True, exist_ok=True)
        if self._given_name is not None:
            (self._out / self._given_name).mkdir(exist_ok=True)
            return self._out / self._given_name
        stamp = time.strftime("%Y%m%d-%H%M%S")
        number = 1
        while True:
            directory = self._out / (stamp if number == 1 else f"{stamp}-{number}")
            try:
                directory.mkdir()
                return directory
            except FileExistsError:
                number += 1

    def _refuse_used_name(self) -> None:
        """Raise UsageError for a used name: ledgers are appended to, so a second run of that name would mix with the
        first.
        """
        for role in self._commands if self._given_name is not None else ():
            assert self._given_name is not None
            directory = self._out / self._given_name / role
            if any(directory.glob("rank*")):
                raise UsageError(
                    f"{directory} already holds a run, and this one would be mixed with it. Give "
                    f"{'--record another directory' if self._config.record else 'another --name'}, or move that "
                    f"directory away."
                )

    def _announce(self, store: RendezvousStore | None, name: str | None) -> None:
        if name is not None and self._is_alone:
            self._output.say(f"recording into {_shown_path(self._out / name)}; graft from it with --peer")
        elif name is not None:
            self._output.say(f"run {name}; its ledgers go to {_shown_path(self._out / name)}")
        if self._played is not None:
            self._output.say(f"the {self._played.role} job is a recording, played from {self._played.directory}")
        if store is not None and len(self._commands) == 1:
            other = next(role for role in _ROLES if role not in self._commands)
            self._output.say(f"hosts the store; start the other side with --role {other} --master HOST:{store.port}")

    def _on_own_port(self, role: str, command: list[str]) -> list[str]:
        kept_off = keep_off_shared_port(command)
        if kept_off != command:
            self._output.say(
                f"the {role} command is a torchrun that names no port: started with --standalone (a free port), "
                f"so that two of them do not meet on one."
            )
        return kept_off

    def _tell_unreached(self, store: RendezvousStore | None, jobs: Sequence[Job]) -> tuple[str, ...]:
        if store is None or self._config.attach is None:
            return ()
        announced = [role for role in _ROLES if store.has_announced(role)]
        failed = [job.role for job in jobs if job.exit_code not in (0, None) and not job.ended_by_launcher]
        unreached = tuple(role for role in find_unreached(announced, failed) if role in self._commands)
        if unreached:
            self._output.say(describe_unreached(unreached))
        return unreached

    def _result(self, supervisor: Supervisor, name: str | None, unreached: tuple[str, ...]) -> PairResult:
        directory = self._out / name if name is not None else newest_run_of_role(self._out, next(iter(self._commands)))
        exit_codes: dict[str, int | None] = dict.fromkeys(self._commands)
        exit_codes.update({job.role: job.exit_code for job in supervisor.jobs})
        return PairResult(
            run_directory=directory,
            exit_codes=exit_codes,
            interrupted=bool(supervisor.signals),
            seconds=time.monotonic() - self._started,
            stop_signal=supervisor.signals[0] if supervisor.signals else None,
            failed_role=supervisor.first_failure.role if supervisor.first_failure else None,
            ended_roles=tuple(job.role for job in supervisor.jobs if job.ended_by_launcher),
            unreached=unreached,
            attach=self._config.attach,
            is_recorded=self._config.record,
            last_lines={role: list(self._output.last_lines.get(role, ())) for role in self._commands},
        )


def find_unreached(announced: Collection[str], failed: Collection[str]) -> tuple[str, ...]:
    """The jobs that could have attached a model and did not. announced: those that have reached their join.

    Baseline rank 0 opens the run, and no target can announce itself before that: if the baseline is missing, nothing is
    known about the target. A job that failed by itself may have failed before it had a model.
    """
    missing = ("target",) if "baseline" in announced else ("baseline",)
    return tuple(role for role in missing if role not in announced and role not in failed)


def describe_unreached(roles: Sequence[str]) -> str:
    """Why `--attach` may have found nothing, as sentences."""
    return (
        f"--attach reached no model in the {' job and in the '.join(roles)} job: no module there has hooks. Either its "
        "program called no torch module that has parameters, or its Python ignores PYTHONPATH (python -I, -E "
        "or -S; a command that sets PYTHONPATH itself). See docs/zero-code.md."
    )


def newest_run_of_role(out: Path, role: str) -> Path:
    """The run directory under `out` to which a job of `role` wrote last; `out` itself if there is none."""
    written = [(path.stat().st_mtime, path.parent.parent) for path in out.glob(f"*/{role}/rank*")]
    return max(written)[1] if written else out


def _read_configuration(
    role: str, settings: Mapping[str, str], out: Path | None, run_name: str | None, *, is_alone: bool
) -> GrafterConfig:
    """The configuration as a job will read it, with `dir` absolute. A bad filter is reported here, once, and not by
    every rank.
    """
    from grafter.config.settings.config import GrafterConfig  # imports pydantic

    # The port is not known yet; any legal port is enough for the check.
    environment = job_environment(
        os.environ,
        role,
        settings,
        master=None if is_alone else ("127.0.0.1", 1),
        directory=None if out is None else str(out),
        run_name=run_name,
    )
    config = GrafterConfig.from_environment(environment)
    directory = os.path.abspath(config.dir)
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise ConfigError(f"{directory} is to hold the ledgers of this run and is not a directory; give another --out.")
    return config.model_copy(update={"dir": directory})


def _reachable(address: str) -> str:
    """The address at which this machine's own job reaches a store that listens on `address`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def _shown_path(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
