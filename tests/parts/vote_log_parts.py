"""What vote logs need of a rank, in one process: letters that have arrived once they are sent, and a roster."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from grafter.core.messages.wire import Sealed
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

RECEIVERS = (0, 1, 2)
DIGEST = "0123456789abcdef01234567"


class Post:
    """Letters of all ranks of a host: what was brought has arrived."""

    def __init__(self) -> None:
        self.boxes: dict[int, dict[str, Sealed]] = defaultdict(dict)
        # (rank, key) of letters that are dropped when they come.
        self.unwanted: set[tuple[int, str]] = set()


class Courier:
    """As one rank sees it. A letter that is waited for must be there."""

    def __init__(self, post: Post, rank: int, client: StoreClient | None = None) -> None:
        self._post, self._rank, self._client = post, rank, client

    def bring(self, receivers: Sequence[int], key: str, kind: str, payload: str, *, by_mail: bool) -> None:
        for receiver in receivers:
            if (receiver, key) in self._post.unwanted:
                self._post.unwanted.remove((receiver, key))
                continue
            self._post.boxes[receiver][key] = Sealed(kind, str(self._rank), payload)

    def look(self, key: str) -> Sealed | None:
        return self._post.boxes[self._rank].pop(key, None)

    def await_stored(self, make_wait: Callable[[], Wait], key: str) -> None:
        assert self._client is not None
        assert self._client.peek(key) is not None

    def fetch(self, make_wait: Callable[[], Wait], keys: Sequence[str], *, by_mail: bool) -> list[Sealed]:
        return [self._post.boxes[self._rank].pop(key) for key in keys]

    def fetch_first(self, make_wait: Callable[[], Wait], keys: Sequence[str]) -> tuple[str, Sealed]:
        box = self._post.boxes[self._rank]
        key = next((key for key in keys if key in box), keys[0])
        return key, box.pop(key)

    def fetch_shortly(self, make_wait: Callable[[], Wait], keys: Sequence[str]) -> list[Sealed] | None:
        box = self._post.boxes[self._rank]
        return [box.pop(key) for key in keys] if all(key in box for key in keys) else None

    def discard(self, key: str) -> None:
        if self._post.boxes[self._rank].pop(key, None) is None:
            self._post.unwanted.add((self._rank, key))


class Process:
    pid = os.getpid()


class Roster:
    class Member:
        process = Process()

    def side(self, role: str) -> list[Any]:
        return [self.Member()] * len(RECEIVERS)

    def graft_rank(self, role: str, role_rank: int) -> int:
        return role_rank


def make_wait(has_grown: Callable[[], bool] | None = None) -> Wait:
    return Wait("agreement", "h", 5.0)
