"""Run by every Python that a command under `grafter doctor` starts: records how it was started, and waits for torch.

It is on the path behind grafter's own start-up module, if that is there, and runs the next one itself.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from typing import Any

# The variable that holds the directory to which the probes of one run write.
DIRECTORY = "_GRAFTER_PROBE"
_MODELS_MODULE = "torch.nn.modules.module"
_HERE = os.path.dirname(os.path.abspath(__file__))


class _TorchFinder:
    """Finds one module as the other finders do, and starts the probe once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODELS_MODULE:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _call_after(spec.loader, _start_probe)
                return spec
        return None


def _call_after(loader: Any, function: Any) -> None:
    execute = loader.exec_module

    def execute_and_call(module: Any) -> None:
        execute(module)
        function(module)

    loader.exec_module = execute_and_call


def _start_probe(module: Any) -> None:
    try:
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location("_grafter_probe", os.path.join(_HERE, "_grafter_probe.py"))
        assert spec is not None and spec.loader is not None
        probe = module_from_spec(spec)
        sys.modules["_grafter_probe"] = probe
        spec.loader.exec_module(probe)
        probe.start(module, write)
    except Exception as error:
        write("trouble", text=f"{type(error).__name__}: {error}")


def write(kind: str, **content: Any) -> None:
    """Append one line to this process's file. A failure to write never disturbs the program."""
    directory = os.environ.get(DIRECTORY)
    if not directory:
        return
    try:
        line = json.dumps({"kind": kind, "time": time.time(), **content}, default=str) + "\n"
        place = os.path.join(directory, f"{os.environ.get('GRAFTER_ROLE', 'none')}-{os.getpid()}.jsonl")
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return


def _run_next() -> None:
    """Run the `sitecustomize` that this one hides. An earlier one has run this one, and is not run again."""
    from importlib.machinery import PathFinder

    entries = [os.path.abspath(entry) for entry in sys.path]
    behind = sys.path[entries.index(_HERE) + 1 :] if _HERE in entries else []
    spec = PathFinder.find_spec("sitecustomize", behind)
    if spec is None or spec.loader is None:
        return
    from importlib.util import module_from_spec

    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _place() -> int:
    """The position after the finders of grafter's own start-up module, so that we see its module before it does."""
    place = 0
    while place < len(sys.meta_path) and type(sys.meta_path[place]).__module__ == "sitecustomize":
        place += 1
    return place


def _record_end() -> None:
    # It is imported only if grafting is on and something asks for it.
    write("exit", uses_grafter="grafter.rank.grafter" in sys.modules)


if __name__ == "sitecustomize":
    # The function that is registered first runs last.
    atexit.register(_record_end)
    write("start", python=list(sys.version_info[:3]))
    sys.meta_path.insert(_place(), _TorchFinder())
    _run_next()
