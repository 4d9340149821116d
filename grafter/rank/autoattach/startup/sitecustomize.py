"""Run by every Python that starts with this directory on its path, before the program itself.

Where GRAFTER_ENABLE and GRAFTER_ATTACH ask for it, one finder waits for the import of torch's modules, and is gone
then. Nothing of grafter, torch or pydantic is imported here. The `sitecustomize` that this file hides is run, too.
"""

from __future__ import annotations

import os
import sys

# As mypy reads it; importing typing would be half of what a start costs here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Set by a process that has joined the run as a rank: what it starts are its helpers, and no ranks.
HELPER_MARK = "_GRAFTER_RANK_PROCESS"
_AWAITED = "torch.nn.modules.module"


class ImportAwaited:
    """A finder that finds one module as the other finders do, and has `function` called with it once it has run."""

    def __init__(self, name: str, function: Any) -> None:
        self._name, self._function = name, function
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _call_after(spec.loader, self._function)
                return spec
        return None


def _call_after(loader: Any, function: Any) -> None:
    execute = loader.exec_module

    def execute_and_call(module: Any) -> None:
        del loader.exec_module
        execute(module)
        function(module)

    loader.exec_module = execute_and_call


def _watch(module: Any) -> None:
    """A program must not fail because a debugger does: what keeps us from it is logged, and nothing is attached."""
    try:
        _find_grafter()
        if not _is_set("ATTACH") and not _plan_attaches():
            return
        from grafter.rank.autoattach.first_call import watch
    except Exception as error:
        print(f"grafter: nothing is attached in process {os.getpid()} ({sys.executable}): {error}", file=sys.stderr)
    else:
        watch(module)


def _find_grafter() -> None:
    """This very package, if the job's Python does not have it. Its dependencies must be installed there anyway."""
    import importlib.util

    if "grafter" in sys.modules or importlib.util.find_spec("grafter") is not None:
        return
    directory = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    place = os.path.join(directory, "__init__.py")
    spec = importlib.util.spec_from_file_location("grafter", place, submodule_search_locations=[directory])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["grafter"] = module
    spec.loader.exec_module(module)


def _run_hidden() -> None:
    """The next `sitecustomize` on the path, as if this one were not there; what it raises is raised here."""
    # importlib itself, which most programs do not need, takes milliseconds; this part of it is always there.
    from _frozen_importlib_external import PathFinder

    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if os.path.abspath(entry) != here])
    if spec is None or spec.loader is None:
        return
    from _frozen_importlib import module_from_spec

    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _wanted() -> bool:
    on = os.environ.get("GRAFTER_ENABLE", "").strip().lower() in ("1", "true", "yes", "on")
    return on and (_is_set("ATTACH") or _is_set("PLAN")) and HELPER_MARK not in os.environ


def _is_set(setting: str) -> bool:
    return bool(os.environ.get(f"GRAFTER_{setting}", "").strip())


def _plan_attaches() -> bool:
    """Asked where only the plan file may say it, which pydantic is needed to read."""
    from grafter.config.settings.config import GrafterConfig

    return bool(GrafterConfig.from_environment().attach)


if __name__ == "sitecustomize":
    if _wanted():
        ImportAwaited(_AWAITED, _watch)
    _run_hidden()
