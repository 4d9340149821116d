"""The housekeeping thread of a rank goes on, whatever happens in it: without it no wait would ever be diagnosed."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator

import pytest

from grafter.core.messages.wire import Seal
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.status_board import BoardWriter
from grafter.wire.monitor.store_host import StoreHost
from grafter.wire.store_client import HostedStore, StoreClient, connect


@pytest.fixture
def store() -> Iterator[HostedStore]:
    hosted = HostedStore()
    yield hosted
    hosted.close()


def housekeeping_of(store: HostedStore) -> Housekeeping:
    raw = connect(store.address, store.port, timeout=30, keep_trying=lambda: True)
    client = StoreClient(raw, Seal("target/0", None), "graft")
    return Housekeeping(client, BoardWriter("target", 0), "target rank 0", StoreHost("the test", None))


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_works_in_a_process_with_more_than_a_thousand_open_files(store: HostedStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    seconds: list[StoreClient] = []
    try:
        housekeeping = housekeeping_of(store)
        housekeeping.on_second = seconds.append
        wait_until(lambda: seconds)
        housekeeping.close()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_survives_an_error_of_its_own_anywhere_and_says_so_once(
    store: HostedStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it sleeps, looks at processes, or notes that the store is lost."""
    housekeeping = housekeeping_of(store)
    raised: list[int] = []

    def fail(*_: object) -> None:
        raised.append(1)
        raise ValueError("its own fault")

    sleep = housekeeping._sleep
    housekeeping._sleep = fail  # type: ignore[method-assign, assignment]
    wait_until(lambda: len(raised) >= 3)
    housekeeping._sleep = sleep  # type: ignore[method-assign]
    raised.clear()
    housekeeping._wait_monitor.warn_of_stopped = fail  # type: ignore[method-assign]
    wait_until(lambda: len(raised) >= 3)
    del housekeeping._wait_monitor.warn_of_stopped
    seconds: list[StoreClient] = []
    housekeeping.on_second = seconds.append
    wait_until(lambda: seconds)
    housekeeping.close()
    assert len([line for line in caplog.messages if "unexpected error" in line]) == 1
