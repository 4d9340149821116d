"""One job of a run, as seen from the launcher: its keeper process, its output, its end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from grafter.core.processes import describe_exit
from grafter.errors import UsageError
from grafter.tools.launch import job_keeper
from grafter.tools.launch.run_output import OutputReader, RunOutput

# Used if the launcher fails: how long to wait for the reader, which closes the pipe itself when it is done.
_LAST_WORDS_SECONDS = 1.0
_KEEPER = str(Path(job_keeper.__file__))


class Job:
    """One running job, started by the constructor. `fileno()` is readable when `read_status()` has news.

    `exit_code` is that of the job's own process (negative: the signal that killed it; 127: it could not be started),
    and None before its end. `gone`: no process of the job is left, and `exit_code` no longer changes; it is still None
    if the keeper was killed before it could report.
    """

    def __init__(self, role: str, command: Sequence[str], environment: Mapping[str, str], output: RunOutput) -> None:
        self.role = role
        self.exit_code: int | None = None
        self.gone = False
        # Set by whoever ends the job: its exit code is then not its own.
        self.ended_by_launcher = False
        self._output = output
        self._pending = b""
        self._status_read, status_write = os.pipe()
        control_read, self._control_write = os.pipe()
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", _KEEPER, str(status_write), str(control_read), *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(status_write, control_read),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._status_read)
            os.close(self._control_write)
            raise
        finally:
            os.close(status_write)
            os.close(control_read)
        assert self._keeper.stdout is not None
        self._reader = OutputReader(self._keeper.stdout, role, output)
        self._reader.start()

    def fileno(self) -> int:
        return self._status_read

    def read_status(self) -> None:
        """Read what the keeper has reported. Blocks if it has reported nothing."""
        data = os.read(self._status_read, 4096)
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "exit" in event:
                self.exit_code = event["exit"]
            if "not_started" in event:
                self._output.say(f"the {self.role} job could not be started: {event['not_started']}")
            if "killed" in event and not self.ended_by_launcher:
                self._output.say(f"the {self.role} job left {_processes(event['killed'])} behind; killed.")
            if "unkillable" in event:
                pids = ", ".join(map(str, event["unkillable"]))
                self._output.say(f"the {self.role} job left processes that SIGKILL does not end (pids {pids}).")
        if not data:
            self._keeper.wait()
            self._reader.job_is_gone()
            self.gone = True

    def end(self) -> None:
        """End the job normally: SIGTERM to its process, 5 s, then SIGKILL to all processes that are left. Returns
        immediately.

        May be called from a signal handler, more than once, and after the job's end.
        """
        self._order(b"t")

    def kill(self) -> None:
        """Send SIGKILL to all processes of the job. Returns immediately; safe wherever `end` is."""
        self._order(b"k")

    def output_is_read(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until all output of a job that is gone has been passed on."""
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def close(self) -> None:
        """Close the file descriptors. Call it only once the job is gone.

        The job's last output is passed on first, for at most one second: if the launcher failed, it has not waited for
        it.
        """
        os.close(self._status_read)
        os.close(self._control_write)
        self._reader.join(_LAST_WORDS_SECONDS)

    def describe_exit(self) -> str:
        """A phrase that follows "the job": "exited with code 1", "was killed by SIGKILL"."""
        return describe_exit(self.exit_code)

    def _order(self, order: bytes) -> None:
        if self.gone:
            return
        if self.exit_code is None:
            self.ended_by_launcher = True
        try:
            os.write(self._control_write, order)
        except BrokenPipeError:
            return  # The keeper has just ended, and with it every process that could be ended.


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


# A job's command: split, found on PATH before anything starts, and kept off a port that the other job would use.

_NO_SHELL = (
    "Commands are started without a shell: write `env NAME=value program` to set a variable and `bash -c '...'` for "
    "anything that a shell must read (cd, &&, |, >)."
)
_TORCHRUN_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_PLACE_OPTIONS = ("--master-port", "--master_port", "--master-addr", "--master_addr")


def split_command(role: str, command: Sequence[str] | str, environment: Mapping[str, str]) -> list[str]:
    """The command as a list of words; its program is known to exist.

    A `command` that is a str is split by a shell's quoting rules (shlex), but no shell runs it. Raises UsageError if it
    is empty, badly quoted, or its program does not exist.
    """
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError as error:
        raise UsageError(f"the {role} command cannot be split into words ({error}): {command}") from error
    if not words:
        raise UsageError(f"the {role} command is empty; say what starts that job, such as 'python train.py'.")
    if shutil.which(words[0], path=environment.get("PATH", os.defpath)) is None:
        problem = "is not an executable file" if "/" in words[0] else "is not a program on PATH"
        raise UsageError(
            f"the {role} command starts with {words[0]!r}, which {problem}; nothing was started. {_NO_SHELL}"
        )
    return words


def keep_off_shared_port(words: Sequence[str]) -> list[str]:
    """The command, changed to `torchrun --standalone` if it is a single-node torchrun that names no port.

    Two such commands on one host would both listen on torchrun's default port, 29500, or join each other. Other
    commands, and those that name a port, are returned unchanged.
    """
    position = _first_argument_of_torchrun(words)
    if position is None or not _meets_at_default_port(list(words[position:])):
        return list(words)
    return [*words[:position], "--standalone", *words[position:]]


def _first_argument_of_torchrun(words: Sequence[str]) -> int | None:
    """The index of torchrun's first argument: after `torchrun`, or after `python -m torch.distributed.run`."""
    start = 0
    if PurePath(words[0]).name == "env":
        start = next((i for i, word in enumerate(words[1:], 1) if not re.match(r"[A-Za-z_]\w*=", word)), len(words))
    if start >= len(words):
        return None
    program = PurePath(words[start]).name
    if program == "torchrun":
        return start + 1
    if re.fullmatch(r"python[\d.]*", program):
        for i in range(start + 1, len(words) - 1):
            if words[i] == "-m":
                return i + 2 if words[i + 1] in _TORCHRUN_MODULES else None
            if not words[i].startswith("-"):
                return None
    return None


def _meets_at_default_port(arguments: list[str]) -> bool:
    # torch's own parser knows where torchrun's arguments end and the script's begin. It is imported here because the
    # import takes seconds, and only a run that hosts a store needs torch anyway.
    from torch.distributed.run import get_args_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            options = get_args_parser().parse_args(arguments)
    except SystemExit:
        return False  # The job's torchrun will report better what is wrong with its arguments.
    own = arguments[: len(arguments) - len(options.training_script_args)]
    says_where = any(word.split("=")[0] in _PLACE_OPTIONS for word in own)
    return (
        not options.standalone
        and not options.rdzv_endpoint
        and not says_where
        and options.nnodes in ("1", "1:1")
        and options.rdzv_backend in ("static", "c10d")
    )
