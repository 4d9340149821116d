"""Votes of two receivers of one host: each tells the other, and nobody leads, which saves a wait.

Both have voted yes: both write. One has voted no: neither does. A yes cannot be taken back alone, for the other may
have written by it. Who has to leave (Ctrl-C, or the run is over) while it waits for the other's vote

    1. says so        2. looks for the other's vote        3. says what that makes of the point

and the other, once it has voted and has that yes, looks whether it has said so. A letter that was sent has arrived: so
either the one finds the vote in step 2, and both write, or the other finds the word of step 1, and waits for that of
step 3. Where both have to leave, the lower rank decides, unless one of them has before it heard of the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from grafter.errors import RunError
from grafter.pairing.manifest import StoreKeys
from grafter.rendezvous.courier import Courier
from grafter.rendezvous.wire import Sealed

COMMIT, REFUSE, YES, NO = "commit", "refuse", "yes", "no"
_LEAVES, _YOURS = "leaves", "yours"
# Between steps 1 and 3 lies no wait; who takes longer has died, or was stopped.
_PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.0005


class MutualVote:
    """One rank's; used by its dump thread. `own` and `other` are role ranks, `peer` is the other's graft rank."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        # What made this rank leave a point that both write: to be raised once it has written.
        self.interrupted_by: BaseException | None = None

    def vote(self, keys: StoreKeys, own: int, peer: int, refusal: str | None) -> None:
        """Never waits."""
        self._tell(peer, keys.vote(own), YES if refusal is None else NO, refusal or "")

    def leave(self, keys: StoreKeys, own: int, other: int, peer: int, reason: str) -> None:
        """Vote no, and wait for nothing."""
        self.vote(keys, own, peer, reason)
        self._courier.discard(keys.vote(other))

    def outcome(
        self, keys: StoreKeys, own: int, other: int, peer: int, refusal: str | None, fetch: Callable[[str], Sealed]
    ) -> str | None:
        """None: write. Else the one reason why neither does. fetch: waits for a letter, or raises what ended the run.

        Called once this rank has voted.
        """
        try:
            theirs = fetch(keys.vote(other))
        except BaseException as error:
            if refusal is not None or not self._is_committed_all_the_same(keys, own, other, peer):
                raise
            if not isinstance(error, RunError):
                self.interrupted_by = error
            return None
        if refusal is not None:
            return theirs.payload if theirs.kind == NO and other < own else refusal
        interrupt: KeyboardInterrupt | None = None
        while theirs.kind == YES:
            try:
                # Before this rank had voted, the other may have had to leave.
                theirs = self._courier.look(keys.vote(other)) or theirs
                break
            except KeyboardInterrupt as error:
                # The other may have written by now.
                interrupt = error
        if theirs.kind == _LEAVES:
            theirs = self._last_word(keys)
        is_committed = theirs.kind in (YES, COMMIT)
        self._raise_unless(is_committed, interrupt)
        return None if is_committed else theirs.payload

    def _is_committed_all_the_same(self, keys: StoreKeys, own: int, other: int, peer: int) -> bool:
        """This rank has voted yes, and must leave."""
        self._tell(peer, keys.vote(own), _LEAVES, "")
        theirs = self._courier.look(keys.vote(other))
        if theirs is None:
            word = Sealed(REFUSE, "", "a receiver had to leave before both had voted")
            # Nobody will read it.
            self._courier.discard(keys.vote(other))
        elif theirs.kind == _LEAVES and own < other:
            word = self._last_word(keys)
            if word.kind != _YOURS:
                return word.kind == COMMIT
            word = Sealed(COMMIT, "", "")
        elif theirs.kind == _LEAVES:
            # Both have voted yes, and both leave: the lower rank has the last word, unless it has had it.
            self._tell(peer, keys.outcome, _YOURS, "")
            return self._last_word(keys).kind == COMMIT
        else:
            word = Sealed(COMMIT if theirs.kind == YES else REFUSE, "", theirs.payload)
        self._tell(peer, keys.outcome, word.kind, word.payload)
        return word.kind == COMMIT

    def _last_word(self, keys: StoreKeys) -> Sealed:
        """What the other, which leaves, makes of the point. An interrupt comes after it."""
        deadline, interrupt, word = time.monotonic() + _PATIENCE_SECONDS, None, None
        while word is None:
            try:
                word = self._courier.look(keys.outcome)
                if word is None and time.monotonic() > deadline:
                    word = Sealed(REFUSE, "", "the other receiver had to leave, and does not say what it did")
                elif word is None:
                    time.sleep(_POLL_SECONDS)
            except KeyboardInterrupt as error:
                interrupt = error
        self._raise_unless(word.kind == COMMIT, interrupt)
        return word

    def _raise_unless(self, is_committed: bool, interrupt: KeyboardInterrupt | None) -> None:
        """An interrupt of a point that is written comes after it."""
        if interrupt is not None:
            if not is_committed:
                raise interrupt
            self.interrupted_by = interrupt

    def _tell(self, peer: int, place: str, kind: str, payload: str) -> None:
        self._courier.bring([peer], place, kind, payload, by_mail=True)
