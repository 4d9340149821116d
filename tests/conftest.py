"""What holds for every test: a clean environment, and no property judged by how long an example took."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import hypothesis
import pytest

# The machine is shared with other tests; an example's time says nothing.
hypothesis.settings.register_profile("grafter", deadline=None)
hypothesis.settings.load_profile("grafter")


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the GRAFTER_* variables of whoever runs it."""
    for variable in list(os.environ):
        if variable.startswith(("GRAFTER_", "DUMPER_GRAFTER_")):
            monkeypatch.delenv(variable)
    yield


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """A grafter made in a test's own process, or by a fixture of a whole file, sets up its logger, and programs that
    tests run in process may switch it off: each test begins with an untouched one."""
    ours = logging.getLogger("grafter")
    ours.setLevel(logging.NOTSET)
    ours.handlers.clear()
    ours.disabled, ours.propagate = False, True
