"""The courier: brings a header, a manifest or a vote to other ranks, by channel on one host, else through the store.

Which way is a matter of the roster alone, so both ends know it: inside a role whose ranks share one host, and between
the roles where the whole run does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from grafter.core.messages.roster import Announcement, Roster
from grafter.core.messages.wire import Sealed
from grafter.core.processes import PeerGone
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.lasting_wait import LastingWait
from grafter.wire.monitor.waits import ABSENT, GivenUp, Wait, WaitWatch
from grafter.wire.rendezvous.channels import LONGEST_MAIL_BYTES, Channels
from grafter.wire.rendezvous.unread_letters import RECALL
from grafter.wire.store_client import ABORT, StoreClient, decode_abort

# A letter that says: too long for mail, look into the store.
_STORED = "stored"
_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.0002, 0.05


def _one_host(members: Sequence[Announcement]) -> bool:
    return all(m.socket_name for m in members) and len({m.process.memory_domain for m in members}) == 1


class Courier:
    """One per rank; used by the dump thread."""

    def __init__(
        self,
        client: StoreClient,
        housekeeping: Housekeeping,
        roster: Roster,
        graft_rank: int,
        channels: Channels | None,
        timeout: float,
    ) -> None:
        """channels: None where this rank can have none. timeout: of one message, in seconds."""
        self._client, self._housekeeping, self._channels = client, housekeeping, channels
        self._roster, self._graft_rank, self._timeout = roster, graft_rank, timeout
        self._left_in_store: list[str] = []
        own_role = roster.side(roster.all[graft_rank].role)
        self.mail_inside = channels is not None and _one_host(own_role)
        self.mail_across = channels is not None and _one_host(roster.all)

    def bring(self, receivers: Sequence[int], key: str, kind: str, payload: str, *, by_mail: bool) -> None:
        """To these graft ranks. Waits for them only where a channel is full, and then no longer than the timeout."""
        if not by_mail or self._channels is None:
            if receivers:
                self._client.set(key, kind, payload)
            return
        # A character takes four bytes at most.
        if len(payload) * 4 > LONGEST_MAIL_BYTES and len(payload.encode()) > LONGEST_MAIL_BYTES:
            # Under a key of this rank's own: the other leader's manifest may be as long, and goes by the same name.
            place = f"{key}/{self._graft_rank}"
            self._client.set(place, kind, payload)
            self._left_in_store.append(place)
            kind, payload = _STORED, place
        for receiver in receivers:
            try:
                # If the run is over, what has room is sent all the same.
                if not self._channels.try_to_send(receiver, key, kind, payload):
                    with LastingWait(self._housekeeping, partial(self._wait_for_room, receiver)) as watch:
                        self._channels.send(receiver, key, kind, payload, watch)
            except PeerGone:
                # Whoever needs it finds out by itself, with a better story: its process is watched.
                continue

    def _wait_for_room(self, receiver: int) -> Wait:
        what = f"room in the channel to {self._roster.who(receiver)}"
        return Wait("sending", what, self._timeout, needs=frozenset([receiver]))

    def fetch(
        self, make_wait: Callable[[], Wait], keys: Sequence[str], *, by_mail: bool, writers: Sequence[int] = ()
    ) -> list[Sealed]:
        """Wait for what was brought under these keys, by the graft ranks `writers` where these are known.

        The wait that `make_wait` makes is looked after by the housekeeping thread. It is not made where the letters
        come shortly, as most do. Raises GivenUp where the wait is of a one-sided point, and is in vain.
        """
        channels = self._channels if by_mail else None
        if channels is not None:
            letters = self.fetch_shortly(make_wait, keys, writers)
            if letters is not None:
                return letters
        wait = make_wait()
        if channels is None:
            wait.awaits = tuple(keys)
            self._housekeeping.look_for_absent(wait, self._client)
            with self._housekeeping.waiting(wait):
                found = self._client.get_all(keys)
            if any(sealed.kind == ABSENT for sealed in found):
                self._left_in_store += keys
            return _none_absent(found)
        wait.has_news = lambda: channels.has_news(keys)
        self._housekeeping.look_for_absent(wait, self._client)
        with self._housekeeping.waiting(wait):
            letters = channels.wait(keys, WaitWatch(self._housekeeping, wait))
        return self._opened(letters, make_wait)

    def fetch_first(self, make_wait: Callable[[], Wait], keys: Sequence[str]) -> tuple[str, Sealed]:
        """Wait for the first letter that comes by mail under any of these keys, with its key; as `fetch` otherwise.

        keys: that of the letter which comes as a rule stands first.
        """
        channels = self._channels
        assert channels is not None
        if (letters := self.fetch_shortly(make_wait, keys[:1])) is not None:
            return keys[0], letters[0]
        wait = make_wait()
        wait.has_news = lambda: any(channels.has_news([key]) for key in keys)
        with self._housekeeping.waiting(wait):
            key, letter = channels.wait_for_any(keys, WaitWatch(self._housekeeping, wait))
        return key, self._opened([letter], make_wait)[0]

    def await_stored(self, make_wait: Callable[[], Wait], key: str) -> None:
        """Wait until something lies under a key of the store. No call of the store blocks meanwhile, so that whatever
        ends this wait, such as what a signal's handler raises, leaves none behind. Raises what ended the run."""
        wait = make_wait()
        wait.awaits, wait.is_polled = (key,), True
        with self._housekeeping.waiting(wait):
            while (found := self._client.peek(key)) is None:
                self._housekeeping.check()
                time.sleep(min(max(wait.seconds / 8, _SHORTEST_POLL_SECONDS), _LONGEST_POLL_SECONDS))
        if found.kind == ABORT:
            raise decode_abort(found.payload)

    def fetch_shortly(
        self, make_wait: Callable[[], Wait], keys: Sequence[str], writers: Sequence[int] = ()
    ) -> list[Sealed] | None:
        """What came by mail under these keys; None if that has not come within about 10 ms."""
        assert self._channels is not None
        if self._housekeeping.aborted is not None:
            self._housekeeping.check()
        letters = self._channels.await_shortly(keys, writers)
        if letters is None:
            return None
        for letter in letters:
            if letter.kind in (_STORED, ABSENT):
                return self._opened(letters, make_wait)
        return letters

    def _opened(self, letters: list[Sealed], make_wait: Callable[[], Wait]) -> list[Sealed]:
        """The letters, those too long for mail read from the store."""
        _none_absent(letters)
        stored = tuple(letter.payload for letter in letters if letter.kind == _STORED)
        if not stored:
            return letters
        wait = make_wait()
        wait.awaits = stored
        with self._housekeeping.waiting(wait):
            return [self._client.get(letter.payload) if letter.kind == _STORED else letter for letter in letters]

    def discard(self, key: str) -> None:
        """What came by another way already need not come by mail again."""
        if self._channels is not None:
            self._channels.discard(key)

    def has(self, key: str) -> bool:
        """Whether a letter has come; it stays where it is."""
        return self._channels is not None and self._channels.has(key)

    def look(self, key: str) -> Sealed | None:
        """A letter that has come, without waiting for one."""
        return self._channels.look(key) if self._channels is not None else None

    def recall(self, receiver: int, key: str) -> None:
        """Take back a letter that was written to the wrong rank, which would keep it for ever."""
        self.bring([receiver], key, RECALL, "", by_mail=True)

    def take_left_in_store(self) -> list[str]:
        """The store keys of letters that were too long, since this was last asked: to be deleted with their point."""
        left, self._left_in_store = self._left_in_store, []
        return left


def _none_absent(letters: list[Sealed]) -> list[Sealed]:
    """Raises GivenUp where one says that the rank which is waited for does not come to a one-sided point."""
    absent = next((letter for letter in letters if letter.kind == ABSENT), None)
    if absent is not None:
        raise GivenUp(absent.payload)
    return letters
