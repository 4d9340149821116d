"""Programs that share only some of their points, in any order: what both have meets, and nothing hangs."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from jobs import Jobs, Rank, succeed
from outbox_parts import until_nothing_is_pending

import grafter
from tests.wire.outbox.test_one_sided import FAR, WELL

STEPS, NAMES = 12, 10


def points_of(role: str, step: int) -> list[int]:
    """Which points this job has in a step, in its own order."""
    chosen = random.Random(f"{role} {step}")
    return chosen.sample(range(NAMES), chosen.randint(0, NAMES))


def dump_all(rank: Rank) -> tuple[int, int]:
    """How many values were wrong, and how many entries were left."""
    way = rank.arguments[0]
    pace, wrong = random.Random(f"{rank.role} {rank.role_rank}"), 0
    for step in range(STEPS):
        for number in points_of(rank.role, step):
            name = ("t2b" if number % 2 else "b2t") if way == "both ways" else way
            sends = rank.is_baseline == (name != "t2b")
            fill = float(100 * step + number + 1)
            value = torch.full((number % 3 + 1, 4), fill if sends else -1.0)
            got = set(grafter.dump(name, value, number=number).flatten().tolist())
            wrong += got not in ([{fill}] if sends else [{fill}, {-1.0}])
            time.sleep(pace.choice([0, 0, 0, 0.002]))
        grafter.step()
    grafter.close()
    return wrong, until_nothing_is_pending()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", ["compare", "b2t", "t2b"])
def test_one_way_every_point_that_both_have_meets_whatever_the_order(tmp_path: Path, way: str, ranks: int) -> None:
    """And every other is skipped on all ranks of the job that has it."""
    with Jobs(tmp_path, **{f"{way}_filter": "True"}, one_sided="skip", timeout=FAR, stats="off") as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, ranks, dump_all, way)
        assert succeed(jobs.wait()) == [(0, 0)] * 2 * ranks
        ledgers = jobs.ledgers()
    for (role, _), records in ledgers.items():
        other = "target" if role == "baseline" else "baseline"
        told = {(r.step, r.tags["number"]): (r.outcome in WELL, r.only_in) for r in records}
        assert told == {
            (step, number): (True, None) if number in points_of(other, step) else (False, role)
            for step in range(STEPS)
            for number in points_of(role, step)
        }


def test_both_ways_nothing_hangs_and_both_sides_tell_one_story(tmp_path: Path) -> None:
    """A point that both have may be given up, too: on all ranks of both jobs, and no value is another's."""
    with Jobs(
        tmp_path, b2t_filter="name == 'b2t'", t2b_filter="name == 't2b'", one_sided="skip", timeout=FAR, stats="off"
    ) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 2, dump_all, "both ways")
        assert succeed(jobs.wait(200)) == [(0, 0)] * 4
        stories: dict[tuple[int, int], set[bool]] = {}
        for records in jobs.ledgers().values():
            for record in records:
                assert record.outcome in WELL | {"skipped", "missed"}, record
                stories.setdefault((record.step, record.tags["number"]), set()).add(record.outcome in WELL)
    assert all(len(story) == 1 for story in stories.values()), stories
    common = sum(len({*points_of("baseline", s)} & {*points_of("target", s)}) for s in range(STEPS))
    assert 0 < sum(story == {True} for story in stories.values()) <= common
