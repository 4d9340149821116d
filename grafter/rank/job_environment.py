"""The environment of a job that `grafter run` starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from grafter.config.switch import HELPER_MARK, OLD_PREFIX, PREFIX
from grafter.errors import UsageError

# The first entry of a job's PYTHONPATH; every Python of the job loads it before its program.
STARTUP_DIRECTORY = str(Path(__file__).parent / "autoattach" / "startup")

# Variables of a torchrun or another launcher around this process. A job that inherited them would act as a rank of that
# world. torchrun passes TORCHELASTIC_USE_AGENT_STORE on, which makes env:// hang.
_INHERITED_WORLD = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    }
)
_INHERITED_WORLD_PREFIXES = ("MASTER_", "TORCHELASTIC_")
# A store's place for an environment that is only checked and starts no job: any legal port does.
ANY_MASTER = ("127.0.0.1", 1)
# The settings that `grafter run` itself decides, and the option for each.
_OWN_FIELDS = {
    "enable": "leave it out: the jobs run with grafting on",
    "role": "use --baseline and --target, or --role",
    "rank": "it differs between ranks; set GRAFTER_RANK within the job",
    "master_address": "use --address or --master",
    "master_port": "use --host-store or --master",
    "store_host": "leave it out: the store is hosted by `grafter run`",
    "dir": "use --out",
    "run_name": "use --name",
    "record": "use --record",
    "peer": "use --peer",
}
_IDENTITY_FIELDS = frozenset(_OWN_FIELDS) - {"dir"}
# For programs without a grafter call in their code; the player is not one of them.
_NOT_FOR_THE_PLAYER = ("attach", "peer", "record")


def job_environment(
    inherited: Mapping[str, str],
    role: str,
    settings: Mapping[str, str],
    *,
    master: tuple[str, int] | None,
    directory: str | None = None,
    run_name: str | None = None,
) -> dict[str, str]:
    """`inherited` without the variables of another world or run, plus those that make this job a side of the run.

    `settings` are fields of GrafterConfig by name; an empty value unsets an inherited one. If `directory` is None,
    GRAFTER_DIR is inherited or taken from the plan file. `master` None: a job that exchanges nothing with another.
    """
    environment = {
        name: value
        for name, value in inherited.items()
        if name not in _INHERITED_WORLD and not name.startswith(_INHERITED_WORLD_PREFIXES)
    }
    own = {
        "enable": "1",
        "role": role,
        **_store_settings(master),
        **({"run_name": run_name} if run_name else {}),
        **({"dir": directory} if directory else {}),
    }
    for field in {*_IDENTITY_FIELDS, *settings, *own}:
        for prefix in (PREFIX, OLD_PREFIX):
            environment.pop(prefix + field.upper(), None)
    environment.update({PREFIX + field.upper(): value for field, value in {**settings, **own}.items()})
    environment.pop(HELPER_MARK, None)
    if environment.get(f"{PREFIX}ATTACH", "").strip():
        # An empty entry would mean the working directory.
        paths = [STARTUP_DIRECTORY, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    # TCPStore's warnings look up the host's name, which has been seen to take seconds.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


def _store_settings(master: tuple[str, int] | None) -> dict[str, str]:
    if master is None:
        return {}
    return {"master_address": master[0], "master_port": str(master[1]), "store_host": "launcher"}


def player_environment(
    inherited: Mapping[str, str],
    role: str,
    settings: Mapping[str, str],
    *,
    master: tuple[str, int] | None,
    directory: str | None = None,
    run_name: str | None = None,
) -> dict[str, str]:
    """Like `job_environment`, for the program that plays a recording: it can import this package, and has no hooks."""
    own = {field: value for field, value in settings.items() if field not in _NOT_FOR_THE_PLAYER}
    environment = job_environment(
        inherited, role, {**own, "attach": ""}, master=master, directory=directory, run_name=run_name
    )
    paths = [
        path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", STARTUP_DIRECTORY)
    ]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(Path(__file__).parents[2])])
    return environment


def what_defeats_attach(words: Sequence[str]) -> str | None:
    """What in a command keeps Python from running our start-up module; None if nothing visible does."""
    start = 0
    if PurePath(words[0]).name == "env":
        while (start := start + 1) < len(words) and re.match(r"-|[A-Za-z_]\w*=", words[start]):
            if words[start] in ("-i", "-", "--ignore-environment") or words[start].startswith("PYTHONPATH="):
                return f"`env {words[start]}`, which takes PYTHONPATH away"
    if start >= len(words) or not re.fullmatch(r"python[\d.]*", PurePath(words[start]).name):
        return None
    for number in range(start + 1, len(words)):
        word = words[number]
        if not re.fullmatch("-[A-Za-z]+.*", word):
            return None
        # Letters may be joined (-uI). For these four options, the rest of the word or the next word is the value.
        flags = re.split("[cmWX]", word[1:])[0]
        found = next((letter for letter in flags if letter in "IES"), None)
        if found is not None:
            return f"python -{found}, which leaves out PYTHONPATH's start-up module"
        if re.search("[cm]", word[1:]) or word.endswith(("W", "X")):
            return None
    return None


def parse_settings(assignments: list[str]) -> dict[str, str]:
    """`--set FIELD=VALUE` options as settings by field name.

    Raises UsageError for a text that is not an assignment, for a field that `grafter run` decides itself, and for the
    secret.
    """
    settings: dict[str, str] = {}
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        field = field.strip().lower()
        if not equals or not field:
            raise UsageError(f"--set {assignment}: write it as FIELD=VALUE, such as --set timeout=60.")
        if field == "secret":
            raise UsageError(
                "--set secret=... is refused: every user of this machine could read it in the list of processes (ps). "
                "Set the variable GRAFTER_SECRET instead; both jobs inherit it."
            )
        if field in _OWN_FIELDS:
            raise UsageError(f"--set {field}=...: `grafter run` sets this itself; {_OWN_FIELDS[field]}.")
        if field in settings:
            raise UsageError(f"--set {field}=... is given twice; give it once.")
        settings[field] = value
    return settings


def merge_settings(own: dict[str, str], assignments: list[str]) -> dict[str, str]:
    """Settings by field, from a command's own options and from --set. Raises UsageError if both give the same field."""
    assigned = parse_settings(assignments)
    for field in sorted(own.keys() & assigned.keys()):
        raise UsageError(f"{field} is given twice, by its own option and by --set; give it once.")
    return {**assigned, **own}
