"""Checks the machine itself: processor, memory, disk, clock, /proc, open files."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from grafter.core.processes.liveness import host_identity, process_state
from grafter.tools.doctor.finding import Finding, fault, first_line, ok, warning
from grafter.wire.exchange.staging import _available_bytes

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
