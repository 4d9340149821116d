"""Checks this machine, one check after the other; none of them can end the others."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from grafter.config.switch import OLD_PREFIX, PREFIX
from grafter.core.processes import host_identity, process_state
from grafter.errors import ConfigError
from grafter.rank.job_environment import STARTUP_DIRECTORY, job_environment
from grafter.tools.doctor.finding import Finding, fault, first_line, listed, ok, warning


def check_machine(out: Path, master: tuple[str, int] | None = None) -> Iterator[Finding]:
    """All findings, each as soon as it is known. `out`: the directory for ledgers. `master`: another
    machine's store.
    """
    torch_finding = check_torch()
    if torch_finding.level == "fault":
        # Everything that follows needs it.
        yield check_python(sys.version_info[:3])
        yield torch_finding
        return
    from grafter.tools.doctor.network import check_network, check_sharing

    yield from _guarded("software", check_software)
    yield from _guarded("system", lambda: check_system(out))
    yield from _guarded("shared memory", lambda: iter([check_sharing()]))
    yield from _guarded("network", lambda: check_network(master))
    yield from _guarded("environment", lambda: check_environment(os.environ))


def _guarded(subject: str, checks: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Turn an unforeseen error of a check into a finding, so that the other checks still run."""
    try:
        yield from checks()
    except Exception as error:
        text = f"a check failed: {type(error).__name__}: {first_line(error)}"
        yield fault(subject, text, "This is a fault of `grafter doctor`, or a kind of machine that it does not know.")


# Checks variables: settings that are misspelt or illegal, and variables that an outer launcher has left.


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


# Checks Python, torch, the packages that grafter needs, CUDA and NCCL, and the start-up module of `--attach`.

LOWEST_PYTHON = (3, 10)
TESTED_PYTHON = (3, 11)
# The lowest version that is tested, and the highest.
TESTED_TORCH = ((2, 6), (2, 13))
PACKAGES = ("numpy", "pydantic", "ruamel.yaml", "typer", "rich")

# A program for a job's Python: was our start-up module run, and which module does it hide?
_ASK_STARTUP = """
import sys
finders = [type(f).__module__ for f in sys.meta_path]
module = sys.modules.get('sitecustomize')
print('awaits', 'sitecustomize' in finders, getattr(module, '__file__', ''))
"""
_START_SECONDS = 60.0


def check_software() -> Iterator[Finding]:
    yield check_python(sys.version_info[:3])
    yield check_torch()
    yield check_packages(PACKAGES)
    yield check_cuda()
    yield check_startup([sys.executable], os.environ)


def check_python(version: Sequence[int]) -> Finding:
    text = _dotted(version)
    if tuple(version[:2]) < LOWEST_PYTHON:
        return fault("Python", f"{text} is too old", f"Use Python {_dotted(LOWEST_PYTHON)} or newer.")
    remark = "" if tuple(version[:2]) == TESTED_PYTHON else f", tested on {_dotted(TESTED_PYTHON)}"
    return ok("Python", f"{text}{remark} ({sys.executable})")


def check_torch(version: str | None = None) -> Finding:
    """Check torch. `version` None: that of the installed torch."""
    if version is None:
        try:
            import torch
        except (ImportError, OSError) as error:
            return fault("torch", f"it cannot be imported: {first_line(error)}", "Install torch 2.6 or newer here.")
        version = torch.__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    lowest, highest = TESTED_TORCH
    if numbers < lowest:
        return fault("torch", f"{version} is too old", f"Install torch {_dotted(lowest)} or newer.")
    if numbers > highest:
        advice = f"If something fails that should not, try torch {_dotted(highest)}."
        return warning("torch", f"{version}, newer than any that was tested ({_dotted(highest)})", advice)
    return ok("torch", f"{version}, tested from {_dotted(lowest)} to {_dotted(highest)}")


def check_packages(names: Sequence[str]) -> Finding:
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return fault("packages", f"not installed: {', '.join(missing)}", f"Install them: pip install {missing[0]} ...")
    return ok("packages", ", ".join(found))


def check_cuda() -> Finding:
    """Report the devices; nothing is initialised on them."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is not None:
            text = f"torch is built for CUDA {torch.version.cuda}, and no device can be used"
            return warning("CUDA", text, "If this machine has a GPU, check nvidia-smi and CUDA_VISIBLE_DEVICES.")
        return ok("CUDA", "none; tensors on the CPU are grafted over shared memory or gloo")
    count = torch.cuda.device_count()
    nccl = "without NCCL"
    if torch.distributed.is_nccl_available():
        nccl = "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    text = f"{count} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}, {nccl}"
    return ok("CUDA", f"{text}; grafts go through the CPU unless backend=nccl is set")


def check_startup(python: Sequence[str], inherited: Mapping[str, str]) -> Finding:
    """Start a Python as `--attach` would for a job, and check that it ran the start-up module."""
    check = "start-up module"
    environment = job_environment(
        inherited, "target", {"attach": "x"}, master=("127.0.0.1", 1), directory=None, run_name=None
    )
    without = "programs that call grafter themselves are not affected"
    try:
        done = subprocess.run(
            [*python, "-c", _ASK_STARTUP], env=environment, capture_output=True, text=True, timeout=_START_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return fault(check, f"{python[0]} cannot be started: {first_line(error)}", "Start it by hand to see why.")
    words = done.stdout.strip().rsplit("\n", 1)[-1].split(" ", 2)
    if words[:2] != ["awaits", "True"]:
        text = f"{python[0]} does not run it, so `--attach` reaches nothing ({without})"
        return warning(
            check,
            text,
            f"Start it without -I, -E or -S, and check that `{STARTUP_DIRECTORY}` is first in its sys.path.",
        )
    complaint = done.stderr.strip()
    if complaint:
        text = f"it runs, but another module reports an error at the start: {first_line(complaint.splitlines()[-1])}"
        return warning(check, text, "Check the sitecustomize and .pth files of this Python.")
    hidden = words[2] if len(words) > 2 and os.path.dirname(words[2]) != STARTUP_DIRECTORY else ""
    return ok(check, "it runs before a program" + (f", and then the one that it hides, {hidden}" if hidden else ""))


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


# Checks the machine itself: processor, memory, disk, clock, /proc, open files.

_GIB = 2**30
_LEAST_FREE_DISK_BYTES = 1 * _GIB
_LEAST_FREE_MEMORY_BYTES = 1 * _GIB
_LEAST_OPEN_FILES = 1024
_DISK_TRIAL_BYTES = 1 << 20
_DAY_SECONDS = 86_400.0


def check_system(out: Path) -> Iterator[Finding]:
    """The findings about the system. `out`: the directory for ledgers; it need not exist."""
    yield check_platform(sys.platform)
    yield check_cores(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    yield check_memory(free_memory_bytes())
    yield check_disk(out)
    yield check_proc()
    yield check_clock(time.time(), package_time())
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def check_platform(platform: str) -> Finding:
    if platform.startswith("linux"):
        return ok("system", f"Linux {os.uname().release}")
    text = f"{platform}: `grafter run` needs Linux, because it must leave no process of a job behind"
    return fault("system", text, "Run both jobs on Linux, or start them by hand with GRAFTER_* set (docs/cli.md).")


def check_cores(count: int) -> Finding:
    if count < 2:
        advice = "Give this process more cores (taskset, cgroup), or expect each point to take some milliseconds."
        return warning("processor", "one core for both jobs: they take turns at every point", advice)
    return ok("processor", f"{count} cores")


def free_memory_bytes() -> int | None:
    """The free memory of the machine, within the limit of this process's control group."""
    from grafter.wire.exchange.staging import _available_bytes

    free = _available_bytes()
    limit, used = (_number_in(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        free = min(limit - used, limit if free is None else free)
    return free


def _number_in(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def check_memory(free: int | None) -> Finding:
    if free is None:
        return warning(
            "memory",
            "the amount of free memory cannot be read",
            "Check it yourself: a receiver needs room for one tensor.",
        )
    text = f"{free / _GIB:.1f} GiB free"
    if free < _LEAST_FREE_MEMORY_BYTES:
        advice = "Free some memory: both jobs need their own, and a receiver one tensor of each point besides."
        return warning("memory", text, advice)
    return ok("memory", text)


def check_disk(out: Path) -> Finding:
    """Write a file to the ledger directory and remove it."""
    place = out.absolute()
    if place.exists() and not place.is_dir():
        return fault("disk", f"{out} should hold the ledgers but is not a directory", "Give another --out.")
    while not place.exists():
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".grafter-doctor-") as file:
            file.write(b"\0" * _DISK_TRIAL_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"nothing can be written under {place}: {error.strerror or first_line(error)}"
        return fault("disk", text, "Free some space, or give another --out where you may write.")
    free = shutil.disk_usage(place).free
    text = f"{free / _GIB:.1f} GiB free at the place of {out}"
    if free < _LEAST_FREE_DISK_BYTES:
        return warning(
            "disk", text, "Ledgers take about 1 KiB a point and rank; free some space or give another --out."
        )
    return ok("disk", text)


def check_proc() -> Finding:
    state, start_time = process_state(os.getpid())
    if not state or start_time == 0 or host_identity().startswith("unknown/"):
        advice = "Mount /proc in this container: otherwise a killed rank is noticed only after 60 s of silence."
        return warning("/proc", "it cannot be read, so no job can see whether the other's processes are alive", advice)
    return ok("/proc", "readable: a killed or stopped rank is noticed immediately")


def package_time() -> float:
    """When the newest file of this package was written: no run can be earlier."""
    package = Path(__file__).parents[2]
    return max(path.stat().st_mtime for path in package.rglob("*.py"))


def check_clock(now: float, package: float) -> Finding:
    first = time.monotonic()
    time.sleep(0.001)
    if time.monotonic() <= first:
        return fault("clock", "the monotonic clock stands still", "Timeouts cannot work here; use another machine.")
    # One day, because an archive may have stored the time of another time zone.
    if now < package - _DAY_SECONDS:
        date = time.strftime("%Y-%m-%d", time.localtime(now))
        return warning("clock", f"it says {date}, before grafter was written", "Set it (timedatectl, ntp).")
    return ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)))


def check_open_files(limit: int) -> Finding:
    if limit != resource.RLIM_INFINITY and limit < _LEAST_OPEN_FILES:
        text = f"a process may have {limit} files open"
        return warning(
            "open files",
            text,
            "Run `ulimit -n 4096` first: a rank needs a socket for each rank that it communicates with.",
        )
    return ok("open files", "no limit" if limit == resource.RLIM_INFINITY else f"{limit} a process")
