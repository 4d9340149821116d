"""The packages that the proxy and the replay need in addition, and the error if they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from grafter.errors import UsageError

_PACKAGES = ("httpx", "starlette", "uvicorn", "h11")


def need_extra(command: str) -> None:
    """Raise UsageError if a package of the extra is missing. command: what needs it, as the user wrote it."""
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise UsageError(f"{command} needs {' and '.join(missing)}: pip install {' '.join(_PACKAGES)}")
