"""Points of all kinds of waiting in one run, in both directions, as they come: both sides' ledgers tell one story."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from jobs import Jobs, Rank, succeed
from outbox_parts import join, until_nothing_is_pending

import grafter

POINTS = 100
WELL, UNMET = {"sent", "grafted"}, {"missed", "expired", "displaced"}


def waits_of(number: int) -> dict[str, str]:
    """Whom each job waits for at a point: all four pairs come, in no order."""
    chosen = random.Random(number)
    return {role: chosen.choice(["both", "job"]) for role in ("baseline", "target")}


def dump_all(rank: Rank) -> tuple[int, int]:
    join()
    pace = random.Random(rank.role)
    sends = {"b2t": rank.is_baseline, "t2b": not rank.is_baseline}
    wrong = 0
    for number in range(POINTS):
        direction = "t2b" if number % 3 == 0 else "b2t"
        fill = float(number + 1 if sends[direction] else -1)
        value = torch.full((number % 5 + 1, 4), fill)
        value = grafter.dump(direction, value, number=number, wait=waits_of(number)[rank.role])
        expected = {number + 1.0} if sends[direction] else {number + 1.0, -1.0}
        wrong += not set(value.flatten().tolist()) <= expected or len(set(value.flatten().tolist())) != 1
        # Now one side is ahead, now the other: all ranks of a side alike, since they wait for each other anyway.
        time.sleep(pace.choice([0, 0, 0, 0.002, 0.01]))
    left = until_nothing_is_pending()
    rank.tell(f"done {rank.role} {rank.role_rank}")
    for role, other in (("baseline", 0), ("baseline", 1), ("target", 0), ("target", 1)):
        rank.wait_for(f"done {role} {other}")
    return wrong, left


def dump_all_on_two_hosts(rank: Rank) -> tuple[int, int]:
    from grafter.wire.rendezvous import join

    there = join.own_identity()
    join.own_identity = lambda: there.model_copy(update={"host": f"the {rank.role}'s"})
    return dump_all(rank)


@pytest.mark.parametrize("function", [dump_all, dump_all_on_two_hosts], ids=["one host", "two hosts"])
def test_sides_that_wait_now_and_then_never_hang_and_always_agree(tmp_path: Path, function: object) -> None:
    """No value is torn or another point's; a point was taken on both sides or on none; nothing is left in an outbox."""
    names = tuple(f"done {role} {rank}" for role in ("baseline", "target") for rank in (0, 1))
    settings = {"b2t_filter": "name == 'b2t'", "t2b_filter": "name == 't2b'", "outbox_seconds": 0.5, "stats": "off"}
    with Jobs(tmp_path, signals=names, **settings) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 2, function)  # type: ignore[arg-type]
        assert succeed(jobs.wait()) == [(0, 0)] * 4
        stories: dict[int, set[str]] = {}
        of_sides: dict[tuple[str, int], set[str]] = {}
        for (role, _), records in jobs.ledgers().items():
            assert len(records) == POINTS
            for record in records:
                number = record.tags["number"]
                of_sides.setdefault((role, number), set()).add(record.outcome)
                kind = "well" if record.outcome in WELL else "unmet" if record.outcome in UNMET else record.outcome
                stories.setdefault(number, set()).add(f"{kind} {record.reason or ''}" if kind == "failed" else kind)
                if set(waits_of(number).values()) == {"both"}:
                    assert kind == "well", (role, record)
        assert all(len(story) == 1 and story <= {"well", "unmet"} for story in stories.values()), stories
        assert all(len(outcomes) == 1 for outcomes in of_sides.values()), "the ranks of a side say the same"
        assert {"well", "unmet"} <= set.union(*stories.values()), "both kinds are to be seen"
