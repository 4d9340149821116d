"""The message router: sends headers, manifests and messages about votes by channel on one host, else through the store.

The roster alone decides which, so both ends know it: by channel between ranks of a role whose ranks share one host, and
between the roles if the whole run shares one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from grafter.core.messages.roster import Announcement, Roster
from grafter.core.messages.wire import Sealed
from grafter.core.processes import PeerGone
from grafter.wire.monitor.monitor_thread import MonitorThread
from grafter.wire.monitor.waits import ABSENT, GivenUp, LastingWait, Wait, WaitWatch
from grafter.wire.rendezvous.channels import LONGEST_MESSAGE_BYTES, Channels
from grafter.wire.rendezvous.unread_messages import RECALL
from grafter.wire.store_client import ABORT, StoreClient, decode_abort

# The kind of a message whose text is too long for a channel: its payload is the store key of that text.
_STORED = "stored"
_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.0002, 0.05


def _one_host(members: Sequence[Announcement]) -> bool:
    """Whether all of these ranks can have channels with each other."""
    return all(m.socket_name for m in members) and len({m.process.memory_domain for m in members}) == 1


class MessageRouter:
    """Sends and receives the messages of one rank. Used by its dump thread.

    Methods that wait, or use the store, raise what ended the run.
    """

    def __init__(
        self,
        client: StoreClient,
        monitor: MonitorThread,
        roster: Roster,
        graft_rank: int,
        channels: Channels | None,
        timeout: float,
    ) -> None:
        """channels: None if this rank has none. timeout: of one message, in seconds."""
        self._client, self._monitor, self._channels = client, monitor, channels
        self._roster, self._graft_rank, self._timeout = roster, graft_rank, timeout
        self._left_in_store: list[str] = []
        own_role = roster.side(roster.all[graft_rank].role)
        self.channels_within_job = channels is not None and _one_host(own_role)
        self.channels_between_jobs = channels is not None and _one_host(roster.all)

    def send(self, receivers: Sequence[int], key: str, kind: str, payload: str, *, by_channel: bool) -> None:
        """Send a message to these graft ranks. Waits only if a channel is full, and no longer than the timeout.

        by_channel: `channels_within_job` or `channels_between_jobs`, depending on the receivers.
        """
        if not by_channel or self._channels is None:
            if receivers:
                self._client.set(key, kind, payload)
            return
        # A character takes four bytes at most.
        if len(payload) * 4 > LONGEST_MESSAGE_BYTES and len(payload.encode()) > LONGEST_MESSAGE_BYTES:
            # Under a key of this rank's own: the other leader's manifest may be as long, and has the same key.
            place = f"{key}/{self._graft_rank}"
            self._client.set(place, kind, payload)
            self._left_in_store.append(place)
            kind, payload = _STORED, place
        for receiver in receivers:
            try:
                # Even if the run is over, as long as there is room.
                if not self._channels.try_to_send(receiver, key, kind, payload):
                    with LastingWait(self._monitor, partial(self._wait_for_room, receiver)) as watch:
                        self._channels.send(receiver, key, kind, payload, watch)
            except PeerGone:
                # The ranks that need it will report that it is gone: its process is watched.
                continue

    def _wait_for_room(self, receiver: int) -> Wait:
        what = f"room in the channel to {self._roster.who(receiver)}"
        return Wait("sending", what, self._timeout, needs=frozenset([receiver]))

    def receive(
        self, make_wait: Callable[[], Wait], keys: Sequence[str], *, by_channel: bool, writers: Sequence[int] = ()
    ) -> list[Sealed]:
        """Wait for the messages under these keys. writers: the graft ranks that send them, if these are known.

        The monitor thread looks after the wait that `make_wait` makes. It is not made if the messages arrive soon, as
        most do. Raises GivenUp if the other ranks will not reach a one-sided point.
        """
        channels = self._channels if by_channel else None
        if channels is not None:
            messages = self.receive_shortly(make_wait, keys, writers)
            if messages is not None:
                return messages
        wait = make_wait()
        if channels is None:
            wait.awaits = tuple(keys)
            self._monitor.look_for_absent(wait, self._client)
            with self._monitor.waiting(wait):
                found = self._client.get_all(keys)
            if any(sealed.kind == ABSENT for sealed in found):
                self._left_in_store += keys
            return _none_absent(found)
        wait.has_news = lambda: channels.has_news(keys)
        self._monitor.look_for_absent(wait, self._client)
        with self._monitor.waiting(wait):
            messages = channels.wait(keys, WaitWatch(self._monitor, wait))
        return self._read_stored(messages, make_wait)

    def receive_first(self, make_wait: Callable[[], Wait], keys: Sequence[str]) -> tuple[str, Sealed]:
        """Wait for the first message that arrives by channel under one of these keys; return (its key, the message).

        keys: the key of the usual message first. Otherwise as `receive`.
        """
        channels = self._channels
        assert channels is not None
        if (messages := self.receive_shortly(make_wait, keys[:1])) is not None:
            return keys[0], messages[0]
        wait = make_wait()
        wait.has_news = lambda: any(channels.has_news([key]) for key in keys)
        with self._monitor.waiting(wait):
            key, message = channels.wait_for_any(keys, WaitWatch(self._monitor, wait))
        return key, self._read_stored([message], make_wait)[0]

    def await_stored(self, make_wait: Callable[[], Wait], key: str) -> None:
        """Wait until a key of the store has a value. It polls the key, so that an exception that ends this wait, such
        as that of a signal handler, leaves no blocked call of the store behind. Raises what ended the run."""
        wait = make_wait()
        wait.awaits, wait.is_polled = (key,), True
        with self._monitor.waiting(wait):
            while (found := self._client.peek(key)) is None:
                self._monitor.check()
                time.sleep(min(max(wait.seconds / 8, _SHORTEST_POLL_SECONDS), _LONGEST_POLL_SECONDS))
        if found.kind == ABORT:
            raise decode_abort(found.payload)

    def receive_shortly(
        self, make_wait: Callable[[], Wait], keys: Sequence[str], writers: Sequence[int] = ()
    ) -> list[Sealed] | None:
        """The messages that arrive by channel under these keys; None if one has not arrived within about 10 ms."""
        assert self._channels is not None
        if self._monitor.aborted is not None:
            self._monitor.check()
        messages = self._channels.await_shortly(keys, writers)
        if messages is None:
            return None
        for message in messages:
            if message.kind in (_STORED, ABSENT):
                return self._read_stored(messages, make_wait)
        return messages

    def _read_stored(self, messages: list[Sealed], make_wait: Callable[[], Wait]) -> list[Sealed]:
        """The messages, after those that are too long for a channel were read from the store."""
        _none_absent(messages)
        stored = tuple(message.payload for message in messages if message.kind == _STORED)
        if not stored:
            return messages
        wait = make_wait()
        wait.awaits = stored
        with self._monitor.waiting(wait):
            return [self._client.get(message.payload) if message.kind == _STORED else message for message in messages]

    def discard(self, key: str) -> None:
        """Drop the message under this key, now or when it arrives: its text has arrived through the store already."""
        if self._channels is not None:
            self._channels.discard(key)

    def has(self, key: str) -> bool:
        """Whether a message has arrived by channel; it stays unread. Never waits."""
        return self._channels is not None and self._channels.has(key)

    def look(self, key: str) -> Sealed | None:
        """A message that has arrived by channel, or None. Never waits."""
        return self._channels.look(key) if self._channels is not None else None

    def recall(self, receiver: int, key: str) -> None:
        """Withdraw a message that was sent to the wrong rank, which would keep it for ever."""
        self.send([receiver], key, RECALL, "", by_channel=True)

    def take_left_in_store(self) -> list[str]:
        """The store keys of the long messages since the last call of this: to be deleted with their point."""
        left, self._left_in_store = self._left_in_store, []
        return left


def _none_absent(messages: list[Sealed]) -> list[Sealed]:
    """The messages. Raises GivenUp if one says that its sender will not reach a one-sided point."""
    absent = next((message for message in messages if message.kind == ABSENT), None)
    if absent is not None:
        raise GivenUp(absent.payload)
    return messages
