"""A job's command: split, found on PATH before anything starts, and kept off a port that the other job would use."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from grafter.errors import UsageError

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
