"""The part of `grafter ctl`: a client of the run's store that is no rank. It proposes, asks, and waits for answers."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from grafter.config.control.change import (
    Change,
    Decision,
    Proposal,
    State,
    decision_place,
    proposal_place,
    question_place,
    state_place,
)
from grafter.core.messages.roster import ANNOUNCEMENTS, Announcement, Roster
from grafter.core.messages.wire import PROTOCOL_VERSION, Seal, read_message
from grafter.core.roles import RoleName
from grafter.errors import JoinError, ProtocolError, RunError, UsageError
from grafter.wire.control.decision import put_decision, read_decision, try_to_decide
from grafter.wire.monitor.status_board import BoardLine, board_key, read_line
from grafter.wire.store_client import StoreClient, connect, decode_abort

_LOOK_SECONDS = 0.05
# Ranks look once a second for what is asked of them.
_ANSWER_SECONDS = 3.0


@dataclass(frozen=True)
class RankView:
    """One rank as the run's store shows it. state: None where it did not answer when it was asked."""

    who: str
    line: BoardLine | None
    state: State | None

    @property
    def has_left(self) -> bool:
        return self.line is not None and self.line.state == "left"


@dataclass(frozen=True)
class Agreed:
    """A change that was decided. number: as ranks and files name it."""

    number: int
    decision: Decision


class RunAccess:
    """A run, from outside. Used by one thread."""

    def __init__(self, address: str, port: int, *, group_name: str = "graft", secret: str | None = None) -> None:
        """Raises JoinError where there is no store, UsageError where it holds no run that has begun, ProtocolError
        where the secret is another, and the error that ended the run where it is over."""
        try:
            raw = connect(address, port, timeout=3, keep_trying=lambda: True)
        except JoinError as error:
            raise JoinError(f"{error} A run that only dumps, or has ended, has no store.") from None
        self._by = f"{os.environ.get('USER') or 'ctl'}@{socket.gethostname()}, pid {os.getpid()}"
        self._client = StoreClient(raw, Seal(f"ctl/{os.getpid()}", secret), group_name)
        self._client.set_timeout(10)
        self._place = f"{address}:{port}"
        run = self._client.peek(f"{self._client.job_prefix}/run")
        if run is None and self._client.seal.ignored.count:
            raise ProtocolError(self._client.seal.ignored.note)
        if run is None:
            raise UsageError(
                f"the store at {self._place} has no run of the group {group_name!r}: baseline rank 0 has not come to "
                "its first call of grafter yet, or the run has another GRAFTER_GROUP_NAME (--group)."
            )
        self._client.seal.run_id, _, self.run_name = run.payload.partition(" ")
        self._refuse_ended()
        self.roster = Roster(tuple(self._read_side("baseline")), tuple(self._read_side("target")))

    def _refuse_ended(self) -> None:
        abort = self._client.peek(f"{self._client.job_prefix}/abort")
        if abort is not None:
            raise RunError(f"the run {self.run_name} is over: {decode_abort(abort.payload)}")

    def _read_side(self, role: RoleName) -> list[Announcement]:
        sealed = self._client.peek(f"{self._client.job_prefix}/roster/{role}")
        if sealed is None:
            raise UsageError(
                f"the {role} job of the run {self.run_name} has not joined yet: a job joins at its first call of "
                "grafter, once all of its ranks are there. Try again then."
            )
        members = read_message(ANNOUNCEMENTS.validate_json, sealed.payload, "a roster")
        other = next((m.protocol_version for m in members if m.protocol_version != PROTOCOL_VERSION), None)
        if other is not None:
            raise UsageError(
                f"the {role} job speaks version {other} of the protocol, and this program {PROTOCOL_VERSION}: use the "
                "grafter that the jobs use."
            )
        return members

    # Asking.

    def look(self, seconds: float = _ANSWER_SECONDS) -> list[RankView]:
        """Every rank as it is now, by graft rank. Waits up to `seconds` for those that answer."""
        client, ranks = self._client, range(len(self.roster.all))
        before = {rank: state.count if (state := self._read_state(rank)) is not None else 0 for rank in ranks}
        client.set(question_place(client.run_prefix), "question", f"{self._by} {time.time()}")
        deadline = time.monotonic() + seconds
        states: dict[int, State] = {}
        while True:
            lines = self._read_board()
            for rank in ranks:
                state = self._read_state(rank)
                if state is not None and state.count > before[rank]:
                    states[rank] = state
            awaited = [rank for rank in ranks if rank not in states and not _has_left(lines[rank])]
            if not awaited or time.monotonic() > deadline:
                return [RankView(self.roster.who(rank), lines[rank], states.get(rank)) for rank in ranks]
            time.sleep(_LOOK_SECONDS)

    def _read_state(self, rank: int) -> State | None:
        sealed = self._client.peek(state_place(self._client.run_prefix, rank))
        if sealed is None:
            return None
        return read_message(State.model_validate_json, sealed.payload, "the state of a rank")

    def _read_board(self) -> list[BoardLine | None]:
        places = [board_key(self._client, member.role, member.role_rank) for member in self.roster.all]
        sealed = [self._client.peek(place) for place in places]
        return [read_line(line.payload, self.roster) if line is not None else None for line in sealed]

    # Changing.

    def change(self, change: Change, *, seconds: float = 10.0) -> Agreed:
        """Propose a change, and what all ranks came to. Waits up to about `seconds`; others' changes come first.

        An interrupt (Ctrl-C) withdraws it, unless it is decided already.
        """
        number = self._propose(Proposal(change=change, seconds=seconds, by=self._by[:300], time=time.time()))
        try:
            return Agreed(number, self._await_decision(number, seconds))
        except KeyboardInterrupt:
            rank_status = put_decision(self._client, number, Decision(refused="it was withdrawn"))
            if rank_status.step is None:
                raise
            return Agreed(number, rank_status)

    def _propose(self, proposal: Proposal) -> int:
        number = 0
        while True:
            place = proposal_place(self._client.run_prefix, number)
            if self._client.exists(place):
                earlier = None
            else:
                earlier = self._client.put_if_absent(place, "proposal", proposal.model_dump_json())
                if earlier is None:
                    return number
            if not self._client.exists(decision_place(self._client.run_prefix, number)):
                sealed = earlier or self._client.peek(place)
                assert sealed is not None  # never deleted
                asked = read_message(Proposal.model_validate_json, sealed.payload, "a change of the run")
                self._await_decision(number, asked.seconds)
            number += 1

    def _await_decision(self, number: int, seconds: float) -> Decision:
        deadline = time.monotonic() + seconds
        while True:
            decision = read_decision(self._client, number) or try_to_decide(
                self._client, self.roster, number, is_late=time.monotonic() > deadline, seconds=seconds
            )
            if decision is not None:
                return decision
            self._refuse_ended()
            time.sleep(_LOOK_SECONDS)

    def await_effect(self, number: int, seconds: float) -> list[RankView]:
        """The ranks, once all that have not left have come to the step from which change `number` is in force, or
        after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            views = self.look(min(_ANSWER_SECONDS, max(0.1, deadline - time.monotonic())))
            if all(view.has_left or is_in_force(view, number) for view in views) or time.monotonic() > deadline:
                return views
            self._refuse_ended()


def is_in_force(view: RankView, number: int) -> bool:
    """Whether the rank has come to the step of this change."""
    return view.state is not None and view.state.changes > number


def _has_left(line: BoardLine | None) -> bool:
    return line is not None and line.state == "left"


def place_of_run(directory: Path) -> tuple[str, int, str]:
    """(address, port, group) of a run that goes on, from its directory. Raises UsageError where it does not say."""
    facts = sorted(directory.glob("*/run.json"))
    if not facts:
        runs = [path.parent.parent for path in directory.glob("*/*/run.json")]
        if not runs:
            raise UsageError(f"{directory} holds no run: no <role>/run.json is in it. Give --master HOST:PORT instead.")
        return place_of_run(max(runs, key=lambda run: run.stat().st_mtime))
    try:
        configuration = json.loads(facts[0].read_text())["configuration"]
        address, port, group = (configuration[name] for name in ("master_address", "master_port", "group_name"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{facts[0]} does not say where the run's store is ({error}). Give --master.") from None
    if not isinstance(port, int) or not isinstance(address, str) or not isinstance(group, str):
        raise UsageError(f"{facts[0]}: a run that only dumps has no store, so it cannot be changed while it runs.")
    return address, port, group
