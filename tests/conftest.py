"""What holds for every test: a clean environment, and no property judged by how long an example took."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

# The machine is shared with other tests; an example's time says nothing.
hypothesis.settings.register_profile("grafter", deadline=None)
hypothesis.settings.load_profile("grafter")

# A shell's background job (`nohup ./launch/test.sh &`) ignores SIGINT, and so would every program that a test starts
# and then interrupts: what is ignored stays so over exec. A handler that does nothing does not, and this process, like
# the workers that it starts, goes on ignoring it.
_IGNORED = "_GRAFTER_TESTS_IGNORE_SIGINT"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN or _IGNORED in os.environ:
    os.environ[_IGNORED] = "1"
    signal.signal(signal.SIGINT, lambda *_: None)


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
