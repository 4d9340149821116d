"""Answers become one decision, which is put once and is the same for everybody, whoever puts it."""

from __future__ import annotations

from collections.abc import Mapping

from grafter.config.control.change import ChangeAnswer, ChangeDecision, answer_place, decision_place
from grafter.core.messages.roster import Roster
from grafter.core.messages.wire import read_message
from grafter.wire.monitor.status_board import board_key, read_line
from grafter.wire.store_client import StoreClient


def decide(answers: Mapping[str, ChangeAnswer], silent: list[str], *, seconds: float) -> ChangeDecision:
    """answers: of all who gave one, by their name. silent: who has not left and has not answered in `seconds`."""
    refusals: dict[str, list[str]] = {}
    for who, answer in answers.items():
        if answer.refused is not None:
            refusals.setdefault(answer.refused, []).append(who)
    if refusals:
        told = "; ".join(f"{', '.join(ranks)}: {reason}" for reason, ranks in refusals.items())
        return ChangeDecision(refused=told)
    if silent:
        return ChangeDecision(
            refused=f"no answer from {', '.join(silent)} within {seconds:.0f} s: a process that is stopped, gone, or "
            "without a reply from the store. Nothing was changed anywhere"
        )
    steps = [answer.step for answer in answers.values() if answer.step is not None]
    if not steps:
        return ChangeDecision(refused="all ranks have left the run")
    idle = {answer.idle for answer in answers.values()}
    if None not in idle:
        return ChangeDecision(refused=f"it would change nothing on any rank: {'; '.join(sorted(filter(None, idle)))}")
    return ChangeDecision(step=max(steps) + 1)


def read_decision(client: StoreClient, number: int) -> ChangeDecision | None:
    """What was decided; None where nothing is yet. Never waits."""
    sealed = client.peek(decision_place(client.run_prefix, number))
    if sealed is None:
        return None
    return read_message(ChangeDecision.model_validate_json, sealed.payload, "a decision")


def try_to_decide(
    client: StoreClient, roster: Roster, number: int, *, is_late: bool, seconds: float
) -> ChangeDecision | None:
    """Decide what can be decided: once all have answered, or the time is up. None while answers may still come.

    A few round trips for each rank; never waits. Raises RunError where the store is lost.
    """
    answers: dict[str, ChangeAnswer] = {}
    silent: list[str] = []
    for graft_rank, member in enumerate(roster.all):
        sealed = client.peek(answer_place(client.run_prefix, number, graft_rank))
        if sealed is not None:
            answers[roster.who(graft_rank)] = read_message(
                ChangeAnswer.model_validate_json, sealed.payload, "an answer"
            )
            continue
        line = client.peek(board_key(client, member.role, member.role_rank))
        # Who has left has no more points, whatever is in force.
        if line is None or read_line(line.payload, roster).state != "left":
            if not is_late:
                return None
            silent.append(roster.who(graft_rank))
    return put_decision(client, number, decide(answers, silent, seconds=seconds))


def put_decision(client: StoreClient, number: int, decision: ChangeDecision) -> ChangeDecision:
    """What stands: this decision, or the one that was put first."""
    found = client.put_if_absent(decision_place(client.run_prefix, number), "decision", decision.model_dump_json())
    if found is None:
        return decision
    return read_message(ChangeDecision.model_validate_json, found.payload, "a decision")
