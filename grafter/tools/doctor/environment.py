"""Checks variables: settings that are misspelt or illegal, and variables that an outer launcher has left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from grafter.config.switch import OLD_PREFIX, PREFIX
from grafter.errors import ConfigError
from grafter.rank.job_environment import job_environment
from grafter.tools.doctor.finding import Finding, fault, listed, ok, warning


def check_environment(environ: Mapping[str, str]) -> Iterator[Finding]:
    yield check_settings(environ)
    yield check_left_over(environ)


def check_settings(environ: Mapping[str, str]) -> Finding:
    """Read the settings as a rank would; those that only a run sets (a role, a port) may be missing."""
    from grafter.config.settings.config import GrafterConfig

    names = sorted(name for name in environ if name.startswith((PREFIX, OLD_PREFIX)) and environ[name].strip())
    try:
        own = {name: text for name, text in environ.items() if name not in (f"{PREFIX}ENABLE", f"{OLD_PREFIX}ENABLE")}
        GrafterConfig.from_environment(own)
    except ConfigError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        return fault("GRAFTER_* variables", " ".join(lines), "Correct or unset them: no run starts while they are set.")
    if f"{PREFIX}ENABLE" in names or f"{OLD_PREFIX}ENABLE" in names:
        text = "GRAFTER_ENABLE is set in this shell, so every program here that calls grafter waits for another job"
        return warning("GRAFTER_* variables", text, "Unset it; `grafter run` sets it for its jobs.")
    return ok("GRAFTER_* variables", f"set and legal: {', '.join(names)}" if names else "none set")


def check_left_over(environ: Mapping[str, str]) -> Finding:
    kept = job_environment(environ, "target", {}, master=("127.0.0.1", 1), directory=None, run_name=None)
    left = sorted(name for name in environ if name not in kept and not name.startswith((PREFIX, OLD_PREFIX)))
    if left:
        text = f"this shell runs inside another launcher's job: {listed(left)} are set"
        return warning("launcher variables", text, "`grafter run` removes them; if you start jobs by hand, unset them.")
    return ok("launcher variables", "none (RANK, WORLD_SIZE, MASTER_* and similar)")
