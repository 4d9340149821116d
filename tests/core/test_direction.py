"""Direction: which of the filters a point matches, what two of them are, and what never matched. Pure, then live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter.config.direction_filters import DirectionFilters
from grafter.config.settings.config import GrafterConfig
from grafter.core.points import PHASE, PointKey
from grafter.core.roles import receiver_role, sender_role
from grafter.errors import DirectionConflict, UsageError


def filters(**sources: str) -> DirectionFilters:
    return DirectionFilters(GrafterConfig(**{f"{name}_filter": source for name, source in sources.items()}).filters)


def tags(**more: Any) -> dict[str, Any]:
    return {"name": "h", "step": 0, "phase": "forward", **more}


def test_a_point_goes_the_way_of_the_filter_that_matches_it() -> None:
    decided = filters(b2t="layer == 1", t2b="layer == 2", compare="layer == 3")
    assert [decided.direction_of(tags(layer=layer)) for layer in range(5)] == [None, "b2t", "t2b", "compare", None]


def test_who_sends_and_who_receives() -> None:
    """In a comparison the baseline sends and the target computes."""
    assert [(sender_role(d), receiver_role(d)) for d in ("b2t", "t2b", "compare")] == [
        ("baseline", "target"),
        ("target", "baseline"),
        ("baseline", "target"),
    ]


@pytest.mark.parametrize("pair", [("b2t", "t2b"), ("b2t", "compare"), ("t2b", "compare")])
def test_two_filters_that_match_are_an_error_that_names_the_point_and_both(pair: tuple[str, str]) -> None:
    sources = {pair[0]: "layer >= 1", pair[1]: "name == 'h'"}
    decided = filters(**sources)
    assert decided.direction_of(tags(layer=0)) == pair[1]
    with pytest.raises(DirectionConflict) as caught:
        decided.direction_of(tags(layer=3, extras={"weights": torch.ones(10_000)}))
    message = str(caught.value)
    assert "'h' (layer=3, step=0)" in message
    assert f"{pair[0]}: {sources[pair[0]]}" in message
    assert f"{pair[1]}: {sources[pair[1]]}" in message
    assert "test_direction.py:" in message, "where in the user's code"
    assert "tensor(" not in message, "an option is no tag"
    assert isinstance(caught.value, UsageError)


def test_what_never_matched_and_tags_that_no_point_had_are_told() -> None:
    decided = filters(b2t="layer_idx == 3", compare="name == 'h' and layer_id == 1")
    assert decided.never_matched() == ["b2t: layer_idx == 3", "compare: name == 'h' and layer_id == 1"]
    decided.unseen_tags -= tags(layer_id=1).keys()
    decided.direction_of(tags(layer_id=1))
    assert decided.never_matched() == ["b2t: layer_idx == 3"]
    assert decided.tags_never_seen() == ["layer_idx"]


# Live.


def catch_conflict(rank: Rank) -> tuple[str, float]:
    """Two points of which the second matches both filters; what was caught, and what the tensor holds then."""
    grafter.dump("ok", torch.ones(1))
    value = torch.tensor(1.0 if rank.is_baseline else 2.0)
    try:
        grafter.dump("x", value, layer=1)
    except grafter.GrafterError as error:
        grafter.dump("after", torch.ones(1))
        return f"{type(error).__name__}: {error}", float(value)
    return "no error", float(value)


def test_a_conflict_raises_on_every_rank_before_anything_is_exchanged(tmp_path: Path) -> None:
    """Nothing is written, recorded or posted for the point; whoever catches the error may go on to the next one."""
    settings = {"b2t_filter": "layer == 1", "compare_filter": "True"}
    with two_jobs(tmp_path, catch_conflict, catch_conflict, ranks=(2, 2), **settings) as jobs:
        results = jobs.wait()
        ledgers = jobs.ledgers()
    for number, result in enumerate(results):
        text, value = result.value
        assert text.startswith("DirectionConflict: the point 'x' (layer=1, step=0)"), text
        assert "b2t: layer == 1" in text and "compare: True" in text
        assert value == (1.0 if number < 2 else 2.0)
    assert {role_rank: [r.name for r in records] for role_rank, records in ledgers.items()} == {
        (role, rank): ["ok", "after"] for role in ("baseline", "target") for rank in (0, 1)
    }


def conflict_after_a_point(rank: Rank) -> None:
    grafter.dump("ok", torch.ones(1))
    with pytest.raises(DirectionConflict):
        grafter.dump("x", torch.ones(1), both=True)
    rank.tell(f"{rank.role} caught")
    rank.wait_for("looked")


def test_a_conflict_leaves_no_key_of_a_point_in_the_store(tmp_path: Path) -> None:
    signals = ("baseline caught", "target caught", "looked")
    with Jobs(tmp_path, b2t_filter="True", t2b_filter="both", signals=signals) as jobs:
        jobs.start("baseline", 1, conflict_after_a_point)
        jobs.start("target", 1, conflict_after_a_point)
        for signal in signals[:2]:
            assert jobs.signals[signal].wait(250)
        keys = "\n".join(str(key) for key in jobs.store._store.list_keys())
        jobs.signals["looked"].set()
        succeed(jobs.wait())
    assert f"/p/{PointKey('ok', (), 0, PHASE, 0).digest}" in keys
    assert f"/p/{PointKey('x', (('both', True),), 0, PHASE, 0).digest}" not in keys


def conflict_on_one_side(rank: Rank) -> None:
    grafter.dump("ok", torch.ones(1))
    grafter.dump("x", torch.ones(1), **({"special": 1} if rank.is_baseline else {}))


def test_a_conflict_on_one_side_alone_ends_the_other_with_its_name(tmp_path: Path) -> None:
    """Only the baseline's tags match both filters: it raises, and the target, which waits, is told by whom and why."""
    settings = {"b2t_filter": "special == 1", "compare_filter": "True", "timeout": 100}
    with two_jobs(tmp_path, conflict_on_one_side, conflict_on_one_side, ranks=(2, 1), **settings) as jobs:
        *baseline, target = jobs.wait()
    assert [result.error_kind for result in baseline] == ["DirectionConflict"] * 2
    assert target.error_kind == "PeerLostError"
    assert "DirectionConflict" in target.error
    assert target.seconds < 20
