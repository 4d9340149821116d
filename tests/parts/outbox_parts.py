"""What tests of the outbox share: waiting until it is empty, and what is in the store."""

from __future__ import annotations

import time
from collections.abc import Collection

from jobs import Jobs

import grafter

_SECONDS = 250


def join() -> None:
    """Both jobs have joined when this returns; what becomes of points before that has tests of its own."""
    grafter._calls._active().begin()
    assert grafter._calls._active().session


def until_nothing_is_pending() -> int:
    """How many entries are left in this rank's outbox once it is empty, or the time is up. No call reaches a point."""
    deadline = time.monotonic() + _SECONDS
    while grafter.pending().entries and time.monotonic() < deadline:
        time.sleep(0.02)
    return grafter.pending().entries


def point_keys(expected: Collection[str] | None = None, *, at_most: int = 0) -> set[str]:
    """What the store holds of points.

    expected: wait until that is all, by the housekeeping of all ranks, or until there are no more than `at_most` keys.
    """
    client = grafter._calls._active().session.client
    deadline = time.monotonic() + _SECONDS
    while True:
        found = {key for key in client.raw.list_keys() if f"{client.run_prefix}/p/" in key}
        if expected is None or found <= set(expected) or len(found) <= at_most or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def outcomes(jobs: Jobs, role: str, rank: int = 0) -> dict[str, str]:
    return {record.name: record.outcome for record in jobs.ledgers()[role, rank]}
