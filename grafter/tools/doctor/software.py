"""Checks Python, torch, the packages that grafter needs, CUDA and NCCL, and the start-up module of `--attach`."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from grafter.rank.job_environment import STARTUP_DIRECTORY, job_environment
from grafter.tools.doctor.finding import Finding, fault, first_line, ok, warning

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
