"""Writes into real jobs' tensors: every mode in a training step, every kind of memory, dtypes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter.wire.exchange.transfer import Transfer

# Gradients, as docs/write-modes.md has them. The target's weight is 0 and its y = exp(0) = 1, the baseline's y is 5,
# and the loss is 2 * y * scale with scale = 1.


def train_one_step(rank: Rank) -> dict[str, Any]:
    options = rank.arguments[0]
    weight = torch.zeros(1, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    produced = weight.exp() if not rank.is_baseline else torch.full((1,), 5.0)
    used = grafter.dump("y", produced, **options)
    if rank.is_baseline:
        return {}
    found: dict[str, Any] = {"used": float(used), "produced": float(produced), "same": used is produced}
    try:
        (2 * used * scale).sum().backward()
    except RuntimeError as error:
        return {**found, "error": str(error)}
    gradient = None if weight.grad is None else float(weight.grad)
    return {**found, "weight": gradient, "scale": float(scale.grad) if scale.grad is not None else None}


@pytest.mark.parametrize("by", ["call", "environment"])
@pytest.mark.parametrize(
    ("write", "gradient", "expected"),
    [
        # exp saved its output, which now is the baseline's: its gradient is the other side's, 2 * 5.
        ("in_place", "straight_through", {"produced": 5.0, "same": True, "weight": 10.0, "scale": 10.0}),
        ("in_place", "strict", {"produced": 5.0, "same": True, "error": "modified by an inplace operation"}),
        ("in_place", "cut", {"produced": 5.0, "same": True, "weight": None, "scale": 10.0}),
        # Exact: exp differentiates at its own value, the loss at the grafted one.
        ("return", "straight_through", {"produced": 1.0, "same": False, "weight": 2.0, "scale": 10.0}),
        ("return", "strict", {"produced": 1.0, "same": False, "weight": 2.0, "scale": 10.0}),
        ("return", "cut", {"produced": 1.0, "same": False, "weight": None, "scale": 10.0}),
    ],
)
def test_a_training_step_has_the_gradients_that_the_docs_say(
    tmp_path: Path, write: str, gradient: str, expected: dict[str, Any], by: str
) -> None:
    """Each write mode with each gradient mode, chosen by the call or for the whole job."""
    mode = {"write": write, "gradient": gradient}
    with Jobs(tmp_path, b2t_filter="True", **(mode if by == "environment" else {})) as jobs:
        jobs.start("baseline", 1, train_one_step, {})
        jobs.start("target", 1, train_one_step, mode if by == "call" else {})
        found = succeed(jobs.wait())[1]
    error = expected.pop("error", None)
    assert (error or "") in found.pop("error", "no error" if error else "")
    assert found == {"used": 5.0, **expected}


# Memory of every kind. Each is (name, a function of the role that makes the tensor, and what to look at).


def parameter(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.nn.Parameter(torch.full((2, 2), value))
    return made, made


def row_of_a_buffer(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.full((3, 2), value)
    return whole[1], whole


def transposed(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.arange(6.0).reshape(2, 3) + value
    return whole.t(), whole


def chunk_that_requires_grad(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.full((4,), value, requires_grad=True) * 1
    return whole.chunk(2)[1], whole


def with_gaps(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.full((6,), value)
    return whole[::2], whole


def under_inference_mode(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        made = torch.full((2,), value)
    return made, made


def without_dims(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.tensor(value)
    return made, made


def empty(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.empty(0, 3)
    return made, made


KINDS = [
    parameter,
    row_of_a_buffer,
    transposed,
    chunk_that_requires_grad,
    with_gaps,
    under_inference_mode,
    without_dims,
    empty,
]
EXPECTED = {
    "parameter": [[1.0, 1.0]] * 2,
    "row_of_a_buffer": [[9.0, 9.0], [1.0, 1.0], [9.0, 9.0]],
    "transposed": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
    "chunk_that_requires_grad": [9.0, 9.0, 1.0, 1.0],
    "with_gaps": [1.0, 9.0, 1.0, 9.0, 1.0, 9.0],
    "under_inference_mode": [1.0, 1.0],
    "without_dims": 1.0,
    "empty": [],
}


def facts_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return tensor.shape, tensor.stride(), tensor.requires_grad, version


def dump_kinds(rank: Rank) -> dict[str, Any]:
    found = {}
    for make in KINDS:
        tensor, whole = make(1.0 if rank.is_baseline else 9.0)
        before = facts_of(tensor)
        returned = grafter.dump(make.__name__, tensor)
        assert returned is tensor
        assert facts_of(tensor) == before
        found[make.__name__] = whole.tolist()
    return found


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_memory_of_every_kind_is_written_and_nothing_beside_it(tmp_path: Path, backend: str) -> None:
    """Only the view's own elements change; shape, strides, version and requires_grad stay."""
    with two_jobs(tmp_path, dump_kinds, dump_kinds, b2t_filter="True", backend=backend) as jobs:
        assert succeed(jobs.wait())[1] == EXPECTED
        assert {record.outcome for record in jobs.ledgers()["target", 0]} == {"grafted"}


# DTensor.


def dump_dtensor(rank: Rank) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group(
        "gloo", init_method=f"file://{rank.arguments[0]}/{rank.role}", rank=rank.role_rank, world_size=rank.world_size
    )
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("tp",))
    whole = torch.arange(8.0).reshape(4, 2) if rank.is_baseline else torch.zeros(4, 2)
    sharded: Any = distribute_tensor(whole, mesh, [Shard(0)])
    written = grafter.dump("sharded", sharded)
    other: Any = distribute_tensor(whole, mesh, [Shard(1)])
    returned = grafter.dump("returned", other, write="return")
    found = {
        "written": written.full_tensor().tolist(),
        "same": written is sharded,
        "returned": returned.full_tensor().tolist(),
        "placements": str(returned.placements),
        "left alone": other.full_tensor().tolist(),
    }
    dist.destroy_process_group()
    return found


def test_a_dtensors_shards_are_grafted_rank_to_rank(tmp_path: Path) -> None:
    with Jobs(tmp_path, compiler=True, b2t_filter="True") as jobs:
        jobs.start("baseline", 2, dump_dtensor, tmp_path)
        jobs.start("target", 2, dump_dtensor, tmp_path)
        values = succeed(jobs.wait())
        record = jobs.ledgers()["target", 1][0]
    whole = torch.arange(8.0).reshape(4, 2).tolist()
    for found in values[2:]:
        assert found == {
            "written": whole,
            "same": True,
            "returned": whole,
            "placements": values[0]["placements"],
            "left alone": torch.zeros(4, 2).tolist(),
        }
    assert record.leaves[0].shape == [2, 2], "a rank's own shard"


# Dtypes.


def dump_dtypes(rank: Rank) -> Any:
    pairs = {
        "widens": (torch.bfloat16, torch.float32),
        "narrows": (torch.float32, torch.bfloat16),
        "saturates": (torch.float32, torch.float16),
        "bool": (torch.bool, torch.bool),
        "to bool": (torch.float32, torch.bool),
        "to int": (torch.float32, torch.int64),
    }
    found = {}
    for name, (sent, received) in pairs.items():
        if rank.is_baseline:
            value = torch.tensor([1.0, 0.0, 1e6]).to(sent)
        else:
            value = torch.zeros(3, dtype=received)
        grafter.dump(name, value)
        found[name] = value.tolist()
    return found


def test_dtypes_convert_where_that_is_safe_and_what_saturates_is_counted(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_dtypes, dump_dtypes, b2t_filter="True") as jobs:
        found = succeed(jobs.wait())[1]
        ledger = {record.name: record for record in jobs.ledgers()["target", 0]}
    rounded = float(torch.tensor(1e6).bfloat16())
    assert found["widens"] == found["narrows"] == [1.0, 0.0, rounded]
    assert found["saturates"] == [1.0, 0.0, float("inf")]
    assert found["bool"] == [True, False, True]
    assert found["to bool"] == [False] * 3 and found["to int"] == [0] * 3
    assert {name: record.leaves[0].saturated for name, record in ledger.items()} == {
        "widens": 0,
        "narrows": 0,
        "saturates": 1,
        "bool": None,
        "to bool": None,
        "to int": None,
    }
    for name in ("to bool", "to int"):
        assert ledger[name].outcome == "failed"
        assert "cannot be written into" in ledger[name].reason and "transform" in ledger[name].reason


# What is refused, and what then happens.


def dump_shapes(rank: Rank) -> Any:
    found = []
    for name, shape in (
        ("h", (3,)),
        ("h", (2, 3) if rank.is_baseline else (3, 2)),
        ("h", (1,) if rank.is_baseline else ()),
    ):
        value = torch.full(shape, 1.0 if rank.is_baseline else 9.0)
        grafter.dump(name, value)
        found.append(value.unique().tolist())
    return found


def test_other_shapes_fail_the_point_with_both_call_sites_and_the_run_goes_on(tmp_path: Path) -> None:
    """Nothing is broadcast or reshaped, not even [1] into []; both sides record the same reason."""
    with two_jobs(tmp_path, dump_shapes, dump_shapes, b2t_filter="True") as jobs:
        assert succeed(jobs.wait())[1] == [[1.0], [9.0], [9.0]]
        ledgers = jobs.ledgers()
    reasons = [ledgers[role, 0][1].reason for role in ("baseline", "target")]
    assert reasons[0] == reasons[1]
    assert "float32[2, 3] at baseline rank 0" in reasons[0] and "float32[3, 2] at target rank 0" in reasons[0]
    assert reasons[0].count("test_live_writes.py:") == 2
    assert [record.outcome for record in ledgers["target", 0]] == ["grafted", "failed", "failed"]


def dump_expanded_on_one_rank(rank: Rank) -> list[float]:
    value = torch.full((1, 2), 1.0 if rank.is_baseline else 9.0).expand(3, 2)
    if rank.role_rank == 0:
        value = value.contiguous()
    grafter.dump("h", value)
    return list(value.flatten().tolist())


def test_a_write_that_one_receiver_cannot_do_is_done_on_none(tmp_path: Path) -> None:
    with two_jobs(
        tmp_path, dump_expanded_on_one_rank, dump_expanded_on_one_rank, ranks=(2, 2), b2t_filter="True"
    ) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values[2:] == [[9.0] * 6] * 2
    for rank in (0, 1):
        (record,) = ledgers["target", rank]
        assert record.outcome == "failed"
        assert "target rank 1" in record.reason and "may share memory" in record.reason


def dump_returns(rank: Rank) -> Any:
    kept = [
        grafter.dump("h", torch.full((1000,), float(i) if rank.is_baseline else 9.0), write="return") for i in range(4)
    ]
    return [value.unique().tolist() for value in kept]


def test_returned_values_do_not_change_at_later_points(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_returns, dump_returns, b2t_filter="True") as jobs:
        baseline, target = succeed(jobs.wait())
    assert target == [[float(i)] for i in range(4)]
    assert baseline == target, "the sender goes on with its own"


def dump_and_look_at_the_graph(rank: Rank) -> Any:
    x = torch.ones(2, requires_grad=True)
    y = x * 3
    before = y.grad_fn
    out = grafter.dump("h", y)
    assert out is y and y.grad_fn is before and y._version == 0
    out.sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


@pytest.mark.parametrize("direction", ["b2t", "t2b", "compare"])
def test_a_senders_graph_is_left_alone(tmp_path: Path, direction: str) -> None:
    """Neither a sender's nor a comparing rank's autograd graph is touched, nor their gradients."""
    settings = {f"{direction}_filter": "True"}
    with two_jobs(tmp_path, dump_and_look_at_the_graph, dump_and_look_at_the_graph, **settings) as jobs:
        assert succeed(jobs.wait()) == [[3.0, 3.0]] * 2


def test_whoever_still_has_the_point_that_was_under_way_keeps_no_memory_of_it_in_use(tmp_path: Path) -> None:
    """As the housekeeping thread may, a little longer than the point lasts: the next one is received into the same
    block."""
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        jobs.start("baseline", 1, dump_and_note_the_point)
        jobs.start("target", 1, dump_and_note_the_point)
        _, (seen, generations) = succeed(jobs.wait())
    assert seen == 4
    assert generations == {1}


def dump_and_note_the_point(rank: Rank) -> tuple[int, set[int]]:
    seen: list[Any] = []
    generations: set[int] = set()
    transfer: list[Any] = []
    receive = Transfer.receive

    def noted(self: Transfer, *arguments: Any) -> Any:
        seen.append(self._housekeeping.underway)
        transfer.append(self)
        return receive(self, *arguments)

    Transfer.receive = noted  # type: ignore[method-assign]
    for number in range(4):
        grafter.dump("x", torch.full((1000,), float(number)))
        generations |= {one.staging.generation for one in transfer}
    return len(seen), generations
