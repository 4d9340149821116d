"""The vote log of receivers that share a host: shared ballots, and a letter to wake those who wait.

One log serves one set of receivers for the whole run. Its lowest rank makes it at the set's first point and says so;
the others look for it among that process's open files when they first vote.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence

from grafter.core.commit_protocol import Ballot, Outcome
from grafter.core.messages.manifest import StoreKeys
from grafter.core.messages.roster import Roster
from grafter.core.messages.wire import Sealed
from grafter.core.processes import is_from_signal_handler
from grafter.core.roles import RoleName
from grafter.errors import RunError
from grafter.wire.monitor.waits import Wait
from grafter.wire.pairing import shared_ballots
from grafter.wire.pairing.shared_ballots import SharedBallots
from grafter.wire.pairing.vote_log import VoteLog
from grafter.wire.rendezvous.courier import Courier

# What a letter says: the log is here; there is no log; the point is decided; give the point up, please.
_HERE, _NONE, _DECIDED, _GIVE_UP = "here", "none", "decided", "give-up"
# So long a receiver waits for the reason of another's refusal, which follows its ballot; the second where it leaves.
_REASON_SECONDS, _LEAVING_SECONDS = 10.0, 1.0

MakeWait = Callable[[Callable[[], bool] | None], Wait]


class HostLogs:
    """The logs of this rank's sets of receivers."""

    def __init__(self, courier: Courier, roster: Roster, role: RoleName, role_rank: int, run_prefix: str) -> None:
        self._courier, self._roster, self._role, self._role_rank = courier, roster, role, role_rank
        self._run_prefix = run_prefix
        # Those that this rank has made, since it is the lowest.
        self._made: dict[tuple[int, ...], SharedBallots] = {}
        # Those that may be used: opened, or made and offered to the others.
        self.usable: dict[tuple[int, ...], SharedBallots] = {}
        # Those of which the lowest rank has told this one, which it does once.
        self._heard: set[tuple[int, ...]] = set()
        # How often the lowest rank could not make a set's log. The next point tries again, under another name.
        self._failures: dict[tuple[int, ...], int] = {}

    def offer(self, receivers: tuple[int, ...]) -> str | None:
        """The lowest rank makes the log, and tells the others. Returns why it could not; then the others hear that."""
        if receivers in self.usable or self._role_rank != receivers[0]:
            return None
        place = self._place(receivers)
        try:
            if receivers not in self._made:
                # There is one, unregistered, where an exception arrived right after it was made. Never make two: some
                # receivers would open the one, and some the other.
                name = self._name(receivers)
                fd = shared_ballots.find(os.getpid(), name)
                if fd is None:
                    fd = shared_ballots.create(name)
                self._made[receivers] = SharedBallots(fd, self._role_rank, receivers, reclaims=True)
            self._bring(receivers, place, _HERE, "")
        except OSError as error:
            if is_from_signal_handler(error):
                raise
            problem = f"{self._role} rank {self._role_rank} cannot make a vote log in shared memory: {error}"
            self._bring(receivers, place, _NONE, problem)
            self._failures[receivers] = self._failures.get(receivers, 0) + 1
            return problem
        self.usable[receivers] = self._made[receivers]
        return None

    def _bring(self, receivers: tuple[int, ...], place: str, kind: str, text: str) -> None:
        self._courier.bring(self.graft_ranks(receivers), place, kind, text, by_mail=True)

    def _name(self, receivers: tuple[int, ...]) -> str:
        text = f"{self._run_prefix} {self._role} {receivers}"
        return f"grafter-votes-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"

    def _place(self, receivers: tuple[int, ...]) -> str:
        return f"{self._run_prefix}/{self._name(receivers)}/{self._failures.get(receivers, 0)}"

    def open(self, receivers: tuple[int, ...], make_wait: MakeWait) -> str | None:
        """Why this rank has no log of these receivers; None if it has one from now on. May wait for the lowest rank."""
        if receivers in self.usable:
            return None
        place = self._place(receivers)
        try:
            if self._role_rank == receivers[0]:
                return self.offer(receivers)
            # Looked for first: an exception may have taken the letter with it.
            problem = self._find(receivers)
            if problem is None and receivers not in self._heard:
                self._courier.discard(place)
            if problem is None or receivers in self._heard:
                # What keeps this rank from opening a log that is there may be over at the next point.
                return problem
            letter = self._courier.fetch(lambda: make_wait(None), [place], by_mail=True)[0]
        except RunError as error:
            return f"the run was over before {self._role} rank {self._role_rank} could vote ({error})"
        if letter.kind == _NONE:
            self._failures[receivers] = self._failures.get(receivers, 0) + 1
            return letter.payload
        self._heard.add(receivers)
        return self._find(receivers)

    def _find(self, receivers: tuple[int, ...]) -> str | None:
        """Open the log that the lowest rank has made; why not, if that is impossible or it has made none."""
        lowest = self._roster.side(self._role)[receivers[0]].process
        try:
            fd = shared_ballots.find(lowest.pid, self._name(receivers))
        except OSError as error:
            if is_from_signal_handler(error):
                raise
            return (
                f"{self._role} rank {self._role_rank} cannot open the vote log of {self._role} rank {receivers[0]} "
                f"(pid {lowest.pid}): {error.strerror}. That process has ended, or this one may not look into it "
                "(another user, or made undumpable)"
            )
        if fd is None:
            return f"{self._role} rank {receivers[0]} (pid {lowest.pid}) has no vote log open"
        self.usable[receivers] = SharedBallots(fd, self._role_rank, receivers, reclaims=False)
        return None

    def graft_ranks(self, receivers: Sequence[int]) -> list[int]:
        """Of all but this rank."""
        return [self._roster.graft_rank(self._role, rank) for rank in receivers if rank != self._role_rank]

    def close(self) -> None:
        for log in (self._made | self.usable).values():
            log.close()
        self._made.clear()
        self.usable.clear()


class HostVotes(VoteLog):
    """The log of one point."""

    def __init__(
        self,
        logs: HostLogs,
        courier: Courier,
        keys: StoreKeys,
        digest: str,
        receivers: tuple[int, ...],
        role_rank: int,
        make_wait: MakeWait,
    ) -> None:
        self._logs, self._courier, self._receivers = logs, courier, receivers
        self._digest, self._role_rank, self._make_wait = bytes.fromhex(digest), role_rank, make_wait
        self._key = keys.outcome
        # Its own: a letter replaces an earlier one under its key.
        self._excuse_key = f"{self._key}/{_GIVE_UP}"
        # Looked up once for each point, though it serves all of them.
        self._log = logs.usable.get(receivers)
        self._letter: Sealed | None = None
        self._has_woken = False

    def offer(self) -> None:
        if self._log is None:
            self._logs.offer(self._receivers)
            self._log = self._logs.usable.get(self._receivers)

    def open(self) -> str | None:
        if self._log is None:
            problem = self._logs.open(self._receivers, self._make_wait)
            if problem is not None:
                return problem
            self._log = self._logs.usable[self._receivers]
        return None

    def append(self, kind: int, reason: str) -> None:
        assert self._log is not None
        self._log.append(self._digest, kind)

    def read(self) -> Sequence[Ballot]:
        assert self._log is not None
        return self._log.read(self._digest)

    def await_news(self) -> str | None:
        assert self._log is not None
        has_grown = self._log.has_grown
        key, letter = self._courier.fetch_first(lambda: self._make_wait(has_grown), (self._key, self._excuse_key))
        if key == self._excuse_key:
            return letter.payload
        self._letter = letter
        return None

    def wake(self, outcome: Outcome, reason: str) -> None:
        if not outcome.is_committed:
            # Nothing has to be asked for any more.
            self._courier.discard(self._excuse_key)
        if outcome.decided_by != self._role_rank:
            if outcome.is_committed and self._letter is None:
                # It read the log before the letter came.
                self._letter = Sealed(_DECIDED, "", "")
                self._courier.discard(self._key)
        elif not self._has_woken:
            self._bring(self._key, _DECIDED, reason)
            self._has_woken = True

    def excuse(self, reason: str) -> None:
        self._bring(self._excuse_key, _GIVE_UP, reason)
        for key in (self._key, self._excuse_key):
            self._courier.discard(key)

    def _bring(self, key: str, kind: str, reason: str) -> None:
        try:
            self._courier.bring(self._logs.graft_ranks(self._receivers), key, kind, reason, by_mail=True)
        except RunError:
            # Where the run is over, all others hear that, and read the log by themselves.
            return

    def reason_of(self, outcome: Outcome, *, is_leaving: bool) -> str:
        began, key = time.monotonic(), self._key
        while self._letter is None:
            if not is_leaving:
                try:
                    letters = self._courier.fetch_shortly(lambda: self._make_wait(None), [key])
                    self._letter = letters[0] if letters is not None else None
                except RunError:
                    is_leaving = True
            else:
                self._letter = self._courier.look(key)
                time.sleep(0 if self._letter is not None else 0.001)
            seconds = _LEAVING_SECONDS if is_leaving else _REASON_SECONDS
            if self._letter is None and time.monotonic() > began + seconds:
                return f"rank {outcome.decided_by} of the receivers has given the point up"
        return self._letter.payload

    def close(self) -> None:
        if self._log is not None:
            self._log.forget(self._digest)
