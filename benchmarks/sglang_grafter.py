"""The dumper module of an unpacked sglang 0.5.23 wheel, loaded from its file with what it imports replaced.

Only that one file runs; it needs neither the rest of sglang nor its dependencies.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_FILE = Path("sglang", "srt", "debug_utils", "dumper.py")
# What its grafter never calls on a CPU, by the module that it imports it from.
_STUBBED: dict[str, tuple[str, ...]] = {
    "zmq": (),
    "sglang": (),
    "sglang.srt": (),
    "sglang.srt.managers": (),
    "sglang.srt.managers.io_struct": ("sock_recv", "sock_send", "wrap_as_pickle"),
    "sglang.srt.runtime_context": ("get_parallel", "get_server_args", "get_serving"),
    "sglang.srt.utils": ("get_device",),
}


def find_dumper(directory: Path) -> Path:
    """The file in an unpacked wheel. Raises ValueError if there is none."""
    path = directory / _FILE
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no {_FILE}. Give the directory into which the sglang 0.5.23 wheel was unpacked: "
            f"pip download --no-deps sglang==0.5.23 && python -m zipfile -e sglang-*.whl DIR"
        )
    return path


def load_dumper_module(directory: Path) -> Any:
    """The module, in a process that will never import the real sglang."""
    path = find_dumper(directory)
    for name, attributes in _STUBBED.items():
        stub = ModuleType(name)
        for attribute in attributes:
            setattr(stub, attribute, _unused(f"{name}.{attribute}"))
        sys.modules[name] = stub
    spec = importlib.util.spec_from_file_location("sglang_dumper", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _unused(name: str) -> Any:
    def stub(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"sglang's grafter called {name}, which the benchmark replaces: not the version it was made for"
        )

    return stub
