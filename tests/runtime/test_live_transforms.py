"""User transforms between real jobs: who names them, what they are given, what becomes of what they raise."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, Result, succeed, two_jobs

import grafter
from grafter import GraftTransformInput
from grafter.store.ledger import read_ledger

CONCATENATE = f"{Path(__file__).parents[2] / 'transforms' / 'concatenate.py'}:transform"
# This module, as a job that has it on its path names it.
HERE = __name__

KEPT: list[torch.Tensor] = []


def plus_one(graft_input: GraftTransformInput) -> torch.Tensor:
    return graft_input.received_list[0] + 1


def plus_ten(graft_input: GraftTransformInput) -> torch.Tensor:
    return graft_input.received_list[0] + 10


@grafter.transform(receives="same_rank")
def only_own(graft_input: GraftTransformInput) -> torch.Tensor:
    (received,) = graft_input.received_list
    return received


def sum_of_all(graft_input: GraftTransformInput) -> torch.Tensor:
    return torch.stack(graft_input.received_list).sum(0)


def raise_on_rank_1(graft_input: GraftTransformInput) -> torch.Tensor:
    if graft_input.role_rank == 1:
        raise ZeroDivisionError("no scale")
    return graft_input.received_list[0]


def raise_for_bad(graft_input: GraftTransformInput) -> torch.Tensor:
    if graft_input.tags["name"] == "bad":
        raise ZeroDivisionError("no scale")
    return graft_input.received_list[0]


def keep(graft_input: GraftTransformInput) -> torch.Tensor:
    KEPT.append(graft_input.received_list[0])
    KEPT.append(graft_input.received_list[0][1:])
    return graft_input.received_list[0]


def draw(graft_input: GraftTransformInput) -> torch.Tensor:
    return graft_input.received_list[0] + torch.rand(1)


def of_another_shape(graft_input: GraftTransformInput) -> torch.Tensor:
    return torch.ones(7)


def of_no_tensor(graft_input: GraftTransformInput) -> Any:
    return [1.0]


# Who names the transform.


def dump_h(rank: Rank) -> list[float]:
    value = torch.tensor([1.0, 2.0] if rank.is_baseline else [5.0, 6.0])
    return list(grafter.dump("h", value, **(rank.arguments[0] if rank.arguments else {})).tolist())


def test_the_environment_names_it_by_module_and_all_forms_work(tmp_path: Path) -> None:
    for path in (f"{HERE}:plus_one", f"{HERE}.plus_one"):
        with two_jobs(tmp_path / path, dump_h, dump_h, b2t_filter="True", transform_path=path) as jobs:
            assert succeed(jobs.wait())[1] == [2.0, 3.0]


def dump_with_call(rank: Rank) -> list[list[float]]:
    """The same point with a function, with a path, and with what the environment says."""
    found = []
    for transform in (plus_ten, f"{HERE}:plus_ten", None):
        value = torch.zeros(1)
        found.append(grafter.dump("h", value, transform=transform).tolist())
    return found


def test_the_call_wins_over_the_environment(tmp_path: Path) -> None:
    settings = {"b2t_filter": "True", "transform_path": f"{HERE}:plus_one"}
    with two_jobs(tmp_path, dump_with_call, dump_with_call, **settings) as jobs:
        assert succeed(jobs.wait())[1] == [[10.0], [10.0], [1.0]]


def dump_names(rank: Rank) -> list[float]:
    return [float(grafter.dump(name, torch.zeros(1), transform=plus_ten)) for name in ("attn.q", "mlp", "attn.raw")]


def test_the_plan_file_names_one_per_pattern_and_wins_over_the_call(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"b2t_filter: 'True'\nrules:\n  - match: attn.raw\n    transform: ''\n"
        f"  - match: attn.*\n    transform: {HERE}:plus_one\n"
    )
    with two_jobs(tmp_path, dump_names, dump_names, plan=plan) as jobs:
        assert succeed(jobs.wait())[1] == [1.0, 10.0, 0.0]


def test_a_path_that_leads_nowhere_ends_the_job_at_its_first_call(tmp_path: Path) -> None:
    """Not at the first matched point: a wrong path must not cost the loading of a model. And the other job is told."""
    with Jobs(tmp_path, b2t_filter="name == 'never'") as jobs:
        jobs.start("target", 1, dump_h, transform_path=f"{HERE}:plus_noe")
        (target,) = jobs.wait()
    assert target.error_kind == "TransformError"
    assert "Did you mean 'plus_one'" in target.error


# What it is given.


def dump_shard(rank: Rank) -> Any:
    extras = (
        {"dim": 0, "bias": torch.full((3,), 0.5), "deep": {"list": [1, torch.ones(1)]}} if rank.is_baseline else None
    )
    if rank.is_baseline:
        value = torch.full((2, 3), float(rank.role_rank))
    else:
        value = torch.full((4, 3), 9.0)
    with grafter.context(layer_id=3):
        grafter.dump("h", value, tp_rank=rank.role_rank, extras=extras, transform=rank.arguments[0])
    return SEEN or value.tolist()


SEEN: dict[str, Any] = {}


def look(graft_input: GraftTransformInput) -> torch.Tensor:
    SEEN.update(
        tags=graft_input.tags,
        received=[received.tolist() for received in graft_input.received_list],
        target=graft_input.target.tolist(),
        extras=[
            {"dim": e["dim"], "bias": e["bias"].tolist(), "deep": e["deep"]["list"][1].tolist()}
            for e in graft_input.received_extras_list
            if e is not None
        ],
        rest=(
            graft_input.direction,
            graft_input.role,
            graft_input.role_rank,
            graft_input.role_world_size,
            graft_input.sender_ranks,
            graft_input.path,
            graft_input.target_layout,
        ),
    )
    return graft_input.target


def run_shards(directory: Path, transform: Any, ranks: tuple[int, int]) -> tuple[list[Result], dict[Any, Any]]:
    with Jobs(directory, b2t_filter="layer_id == 3") as jobs:
        jobs.start("baseline", ranks[0], dump_shard, transform)
        jobs.start("target", ranks[1], dump_shard, transform)
        return jobs.wait(), jobs.ledgers()


def test_it_is_given_all_that_was_promised(tmp_path: Path) -> None:
    """Every sender's tensor and extras in role-rank order, the target, its tags, and who it is itself."""
    results, ledgers = run_shards(tmp_path, look, (2, 2))
    for role_rank, seen in enumerate(succeed(results)[2:]):
        assert seen["tags"] == {"name": "h", "step": 0, "phase": "forward", "layer_id": 3, "tp_rank": role_rank}
        assert seen["received"] == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]
        assert seen["target"] == [[9.0] * 3] * 4
        assert seen["extras"] == [{"dim": 0, "bias": [0.5] * 3, "deep": [1.0]}] * 2
        assert seen["rest"] == ("b2t", "target", role_rank, 2, [0, 1], "", None)
    # Two shards of 2 x 3 float32, with 3 + 1 float32 of extras each.
    assert [ledgers["target", rank][0].bytes_received for rank in (0, 1)] == [2 * (24 + 16)] * 2


def test_two_ranks_are_put_together_for_one_by_the_cookbooks_transform(tmp_path: Path) -> None:
    """transforms/concatenate.py, named by file; the dim comes with the senders' extras."""
    results, _ = run_shards(tmp_path, CONCATENATE, (2, 1))
    assert succeed(results)[2] == [[0.0] * 3] * 2 + [[1.0] * 3] * 2


def dump_rank(rank: Rank) -> float:
    value = torch.tensor(float(rank.role_rank + 1) if rank.is_baseline else 9.0)
    return float(grafter.dump("h", value, transform=rank.arguments[0]))


@pytest.mark.parametrize(
    ("transform", "values", "nbytes"), [(only_own, [1.0, 2.0, 3.0], 4), (sum_of_all, [6.0] * 3, 12)]
)
def test_only_what_it_asks_for_moves(tmp_path: Path, transform: Any, values: list[float], nbytes: int) -> None:
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        jobs.start("baseline", 3, dump_rank, transform)
        jobs.start("target", 3, dump_rank, transform)
        assert succeed(jobs.wait())[3:] == values
        ledgers = jobs.ledgers()
    assert [ledgers["target", rank][0].bytes_received for rank in range(3)] == [nbytes] * 3


def test_receivers_that_ask_for_different_things_fail_alike(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        jobs.start("baseline", 2, dump_rank, None)
        jobs.start("target", 2, dump_rank, only_own, only=0)
        jobs.start("target", 2, dump_rank, sum_of_all, only=1)
        assert succeed(jobs.wait())[2:] == [9.0, 9.0]
        ledgers = jobs.ledgers()
    for records in ledgers.values():
        assert (records[0].outcome, "give all one transform" in records[0].reason) == ("failed", True)


def dump_and_keep(rank: Rank) -> Any:
    for i in range(5):
        value = torch.full((rank.arguments[0],), float(i) if rank.is_baseline else 9.0)
        grafter.dump("h", value, transform=keep)
    return [kept.unique().tolist() for kept in KEPT]


@pytest.mark.parametrize("backend", ["auto", "gloo"])
@pytest.mark.parametrize("size", [4, 1_000_000])
def test_what_a_transform_keeps_does_not_change_at_later_points(tmp_path: Path, size: int, backend: str) -> None:
    """A transform that remembers a received tensor, or a view of one, still reads the values of that point."""
    with Jobs(tmp_path, b2t_filter="True", backend=backend) as jobs:
        jobs.start("baseline", 1, dump_and_keep, size)
        jobs.start("target", 1, dump_and_keep, size)
        kept = succeed(jobs.wait())[1]
    assert kept == [[float(i)] for i in range(5) for _ in range(2)]


def draw_after_graft(rank: Rank) -> list[Any]:
    torch.manual_seed(7)
    value = grafter.dump("h", torch.zeros(1), transform=draw if rank.arguments[0] else None)
    return [torch.rand(3).tolist(), torch.get_rng_state().tolist(), float(value)]


def test_a_transform_that_draws_random_numbers_does_not_shift_the_models(tmp_path: Path) -> None:
    found = []
    for draws in (True, False):
        with Jobs(tmp_path / str(draws), b2t_filter="True") as jobs:
            jobs.start("baseline", 1, draw_after_graft, draws)
            jobs.start("target", 1, draw_after_graft, draws)
            found.append(succeed(jobs.wait())[1])
    drawn, plain = found
    assert drawn[2] > 0 and plain[2] == 0
    assert drawn[:2] == plain[:2]


def dump_pytree(rank: Rank) -> Any:
    value = {"q": torch.zeros(2), "k": torch.zeros(3)} if rank.is_baseline else {"k": torch.ones(3), "q": torch.ones(2)}
    grafter.dump("qk", value, transform=by_path)
    return {name: tensor.tolist() for name, tensor in value.items()}


def by_path(graft_input: GraftTransformInput) -> torch.Tensor:
    return graft_input.received_list[0] + {"['q']": 10, "['k']": 20}[graft_input.path]


def test_each_leaf_of_a_pytree_is_transformed_with_its_path(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_pytree, dump_pytree, b2t_filter="True") as jobs:
        assert succeed(jobs.wait())[1] == {"k": [20.0] * 3, "q": [10.0] * 2}


def test_a_comparison_uses_it_too(tmp_path: Path) -> None:
    settings = {"compare_filter": "True", "transform_path": f"{HERE}:plus_one"}
    with two_jobs(tmp_path, dump_h, dump_h, **settings) as jobs:
        assert succeed(jobs.wait())[1] == [5.0, 6.0], "nothing is written"
        (record,) = jobs.ledgers()["target", 0]
    assert record.difference.max_abs == 3.0


# What goes wrong.


def dump_good_bad_good(rank: Rank) -> Any:
    found: list[Any] = []
    for name in ("good", "bad", "good"):
        value = torch.tensor(1.0 if rank.is_baseline else 2.0)
        try:
            grafter.dump(name, value)
            found.append(float(value))
        except grafter.GrafterError as error:
            found.append((type(error).__name__, str(error), float(value)))
    if rank.is_baseline:
        ledger = Path(rank.arguments[0]) / "run" / "baseline" / f"rank{rank.role_rank}.ledger.jsonl"
        wait_to_hear_of_failures(ledger, rank.arguments[1])
    return found


def wait_to_hear_of_failures(ledger: Path, failures: int = 1) -> None:
    """A sender hears of a failure within about two seconds; it must still be there to write it down."""
    deadline = time.monotonic() + 250
    while sum(record.outcome == "failed" for record in read_ledger(ledger)) < failures and time.monotonic() < deadline:
        time.sleep(0.02)


def run_bad(directory: Path, transform: str, failures: int = 1, **settings: Any) -> tuple[list[Any], dict[Any, Any]]:
    with Jobs(directory, b2t_filter="True", transform_path=f"{HERE}:{transform}", **settings) as jobs:
        jobs.start("baseline", 2, dump_good_bad_good, directory, failures)
        jobs.start("target", 2, dump_good_bad_good, directory, failures)
        return succeed(jobs.wait()), jobs.ledgers()


def test_a_transform_that_raises_fails_the_point_everywhere_and_the_run_goes_on(tmp_path: Path) -> None:
    """skip: every receiver keeps its tensor, the reason has the user's line, and the senders hear of it."""
    values, ledgers = run_bad(tmp_path, "raise_for_bad")
    assert values == [[1.0] * 3] * 2 + [[1.0, 2.0, 1.0]] * 2
    for records in ledgers.values():
        good, bad, again = records
        assert (good.outcome, again.outcome) == (("sent",) * 2 if good.role == "baseline" else ("grafted",) * 2)
        assert bad.outcome == "failed"
        assert "ZeroDivisionError: no scale" in bad.reason
        assert "test_live_transforms.py:" in bad.reason and "raise_for_bad" in bad.reason
        assert bad.reason == ledgers["target", 0][1].reason, "one reason for all"


def test_one_receiver_that_cannot_keeps_all_from_writing(tmp_path: Path) -> None:
    values, ledgers = run_bad(tmp_path, "raise_on_rank_1", failures=3)
    assert values[2:] == [[2.0] * 3] * 2
    assert {r.outcome for records in ledgers.values() for r in records} == {"failed"}
    assert all("target rank 1" in r.reason for records in ledgers.values() for r in records)


def test_raise_raises_on_every_receiver_and_nothing_is_written(tmp_path: Path) -> None:
    values, _ = run_bad(tmp_path, "raise_for_bad", on_transform_error="raise")
    assert values[:2] == [[1.0] * 3] * 2, "senders go on"
    for good, bad, again in values[2:]:
        assert (good, again) == (1.0, 1.0)
        kind, text, value = bad
        assert (kind, value) == ("PointFailed", 2.0)
        assert "the point 'bad' (step=0) failed on every receiver" in text and "no scale" in text


@pytest.mark.parametrize(
    ("transform", "reason"), [("of_another_shape", r"shape [7]"), ("of_no_tensor", "returned an object of type list")]
)
def test_what_is_not_the_value_to_write_fails_the_point(tmp_path: Path, transform: str, reason: str) -> None:
    settings = {"b2t_filter": "True", "transform_path": f"{HERE}:{transform}"}
    with two_jobs(tmp_path, dump_h, dump_h, **settings) as jobs:
        assert succeed(jobs.wait())[1] == [5.0, 6.0]
        (record,) = jobs.ledgers()["target", 0]
    assert record.outcome == "failed"
    assert reason in record.reason


def dump_bad_extras(rank: Rank) -> Any:
    found = []
    for extras in ({"a": 1}, {"f": object()}, {"a": 1}):
        value = torch.tensor(1.0 if rank.is_baseline else 2.0)
        try:
            grafter.dump("h", value, extras=extras if rank.is_baseline else None)
            found.append((None, float(value)))
        except grafter.GrafterError as error:
            found.append((f"{type(error).__name__}: {error}", float(value)))
    return found


def test_extras_that_are_no_data_raise_at_the_caller_and_fail_the_point_there_and_here(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_bad_extras, dump_bad_extras, b2t_filter="True") as jobs:
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    text = "UsageError: extras['f'] is an object. Extras are data"
    assert baseline[1][0].startswith(text)
    assert [value for _, value in target] == [1.0, 2.0, 1.0]
    assert [error for error, _ in target] == [None] * 3
    for records in ledgers.values():
        assert records[1].outcome == "failed"
        assert "baseline rank 0 failed before the exchange" in records[1].reason and text in records[1].reason
