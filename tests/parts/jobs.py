"""Two jobs for a test: ranks that have torch imported already, each running a function, with a store of its own.

    with Jobs(tmp_path, compare_filter="name == 'h'") as jobs:
        jobs.start("baseline", 2, send)          # `send` is a function of a test module: send(rank: Rank) -> data
        jobs.start("target", 2, receive)
        results = jobs.wait()                    # [Result(value, error, error_kind)], baseline ranks first

A limit in seconds only catches what hangs: a busy machine may take a hundred times as long as an idle one.

Ranks come from a fork server that has imported torch and grafter: a fresh rank takes 10 ms instead of 2 s. Ranks that
import torch's compiler, as torch.compile, checkpointing and FSDP2 do, take 0.7 s less with `Jobs(..., compiler=True)`:
their fork server has it. The others' has not, since grafter looks whether it is there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
# Test modules, which ranks import, import pytest.
PRELOAD = ["torch", "torch.distributed.tensor", "grafter.rank.grafter", "grafter.wire.store_client", "numpy", "pytest"]
_CONTEXT.set_forkserver_preload(PRELOAD)
_WITH_COMPILER = forkserver.ForkServer()
_WITH_COMPILER.set_forkserver_preload([*PRELOAD, "torch._dynamo", "torch._inductor.compile_fx"])


@dataclass(frozen=True)
class Rank:
    """What a rank's function is given. `barrier` lets a test order ranks of both jobs without time."""

    role: str
    role_rank: int
    world_size: int
    signals: dict[str, Any]
    arguments: tuple[Any, ...]

    @property
    def is_baseline(self) -> bool:
        return self.role == "baseline"

    def tell(self, name: str) -> None:
        self.signals[name].set()

    def wait_for(self, name: str, seconds: float = 250) -> None:
        if not self.signals[name].wait(seconds):
            raise TimeoutError(f"the test never told {name!r}")


@dataclass
class Result:
    """How one rank ended: with a value, with an error, or killed (then both are None)."""

    value: Any = None
    error: str | None = None
    error_kind: str | None = None
    seconds: float = 0.0


@dataclass
class Job:
    role: str
    processes: list[Any] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)


def _enter_rank(pipe: Connection, rank: Rank, environ: dict[str, str], function: Callable[[Rank], Any]) -> None:
    """In the rank's process: the environment that torchrun and `grafter run` would set, then the function."""
    for name in list(os.environ):
        if name.startswith(("GRAFTER_", "DUMPER_GRAFTER_")):
            del os.environ[name]
    os.environ.update(environ)
    import torch

    import grafter

    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        value = function(rank)
        grafter.close()
        pipe.send(Result(value=value, seconds=time.monotonic() - start))
    except BaseException as error:
        import sys

        sys.last_value = error  # what the interpreter does with an error that nobody caught
        with contextlib.suppress(Exception):
            grafter.close()
        pipe.send(Result(error=str(error), error_kind=type(error).__name__, seconds=time.monotonic() - start))
    finally:
        pipe.close()


def _start(process: Any, *, compiler: bool) -> None:
    if not compiler:
        process.start()
        return
    # multiprocessing knows one fork server.
    with mock.patch.object(forkserver, "connect_to_new_process", _WITH_COMPILER.connect_to_new_process):
        process.start()


def call_in_a_process(function: Callable[..., Any], *arguments: Any, seconds: float = 250) -> Any:
    """What a function of a test module returns in a process of its own, which has torch and its compiler imported."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send_result, args=(theirs, function, arguments), daemon=True)
    _start(process, compiler=True)
    theirs.close()
    try:
        assert ours.poll(seconds), f"{function.__name__} hangs"
        return ours.recv()
    except EOFError:
        raise AssertionError(f"{function.__name__} failed; what it said is above") from None
    finally:
        process.kill()
        process.join(10)
        ours.close()


def _send_result(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))
    pipe.close()


class Jobs:
    """Both jobs of one test. Leaves no process behind, whatever the test does."""

    def __init__(
        self,
        directory: Path,
        *,
        hosted: bool = True,
        signals: tuple[str, ...] = (),
        compiler: bool = False,
        **settings: Any,
    ) -> None:
        from grafter.wire.store_client import HostedStore

        self.directory = directory
        self._compiler = compiler
        self._settings = {"timeout": 250, "join_timeout": 250, "log_level": "warning", **settings}
        self._hosted = HostedStore(group_name=str(settings.get("group_name", "graft"))) if hosted else None
        self._reserved = None if hosted else socket.socket()
        if self._reserved is not None:
            # Bound but not listening: nobody else gets the port, and baseline rank 0 may listen on it.
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._reserved.bind(("127.0.0.1", 0))
        self.port = self._hosted.port if self._hosted is not None else self._reserved.getsockname()[1]  # type: ignore[union-attr]
        self.signals = {name: _CONTEXT.Event() for name in signals}
        self.jobs: dict[str, Job] = {}

    @property
    def store(self) -> Any:
        return self._hosted

    def environment(self, role: str, role_rank: int, size: int, **settings: Any) -> dict[str, str]:
        merged = {
            **self._settings,
            "enable": 1,
            "role": role,
            "master_port": self.port,
            "dir": self.directory,
            "run_name": "run",
            "store_host": "launcher" if self._hosted is not None else "rank0",
            **settings,
        }
        environ = {f"GRAFTER_{name.upper()}": str(value) for name, value in merged.items() if value is not None}
        return {**environ, "RANK": str(role_rank), "LOCAL_RANK": str(role_rank), "WORLD_SIZE": str(size)}

    def start(
        self,
        role: str,
        size: int,
        function: Callable[[Rank], Any],
        *arguments: Any,
        only: int | None = None,
        **settings: Any,
    ) -> None:
        """Start the ranks of one job (`only`: just this one of them). `settings` are this job's alone."""
        job = self.jobs.setdefault(role, Job(role))
        for role_rank in range(size) if only is None else [only]:
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            rank = Rank(role, role_rank, size, self.signals, arguments)
            environ = self.environment(role, role_rank, size, **settings)
            process = _CONTEXT.Process(target=_enter_rank, args=(theirs, rank, environ, function), daemon=True)
            _start(process, compiler=self._compiler)
            theirs.close()
            job.processes.append(process)
            job.pipes.append(ours)

    def kill(self, role: str, role_rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.jobs[role].processes[role_rank].pid, number)

    def pid(self, role: str, role_rank: int) -> int:
        return int(self.jobs[role].processes[role_rank].pid)

    def wait(self, seconds: float = 250) -> list[Result]:
        """The results of all ranks, baseline first. A killed rank has an empty one. Raises if a rank hangs."""
        deadline = time.monotonic() + seconds
        results = []
        for role in ("baseline", "target"):
            job = self.jobs.get(role, Job(role))
            for number, (process, pipe) in enumerate(zip(job.processes, job.pipes, strict=True)):
                if not pipe.poll(max(0.1, deadline - time.monotonic())):
                    raise AssertionError(f"{role} rank {number} hangs (alive: {process.is_alive()})")
                try:
                    results.append(pipe.recv())
                except EOFError:
                    results.append(Result())
        for job in self.jobs.values():
            for process in job.processes:
                process.join(max(0.1, deadline - time.monotonic()))
        return results

    def wait_for_one(self, role: str, role_rank: int, seconds: float = 250) -> Result:
        """The result of one rank, while others may hang as the test wants it."""
        job = self.jobs[role]
        assert job.pipes[role_rank].poll(seconds), f"{role} rank {role_rank} hangs"
        result: Result = job.pipes[role_rank].recv()
        del job.pipes[role_rank], job.processes[role_rank]
        return result

    def ledgers(self) -> dict[tuple[str, int], list[Any]]:
        from grafter.store.ledger import read_run

        return {(role, rank): records for role, rank, records in read_run(self.directory / "run")}

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs.values():
            for process, pipe in zip(job.processes, job.pipes, strict=True):
                if process.is_alive():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                process.join(10)
                pipe.close()
        if self._hosted is not None:
            self._hosted.close()
        if self._reserved is not None:
            self._reserved.close()


@contextlib.contextmanager
def two_jobs(
    directory: Path, baseline: Any, target: Any, *, ranks: tuple[int, int] = (1, 1), **settings: Any
) -> Iterator[Jobs]:
    """Both jobs started, each rank running its job's function."""
    with Jobs(directory, **settings) as jobs:
        jobs.start("baseline", ranks[0], baseline)
        jobs.start("target", ranks[1], target)
        yield jobs


def succeed(results: list[Result]) -> list[Any]:
    """The values of ranks that all must have ended well."""
    failed = [f"{result.error_kind}: {result.error}" for result in results if result.error_kind is not None]
    assert not failed, "\n".join(failed)
    return [result.value for result in results]
