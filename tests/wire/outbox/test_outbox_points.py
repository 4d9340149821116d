"""Every kind of point goes through an outbox: compared, returned, hooked, of gradients, compiled, by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jobs import Jobs, Rank, succeed, two_jobs
from outbox_parts import join, until_nothing_is_pending

import grafter

# One rank after the other, so that what the baseline posts is there when the target comes.


def in_turn(rank: Rank, dump: Any) -> Any:
    join()
    if rank.is_baseline:
        found = dump(rank)
        rank.tell("posted")
        assert until_nothing_is_pending() == 0
        return found
    rank.wait_for("posted")
    return dump(rank)


def each_outcome(jobs: Jobs) -> list[list[str]]:
    return [[f"{r.name} {r.phase} {r.outcome}" for r in records] for records in jobs.ledgers().values()]


def dump_of_each_kind(rank: Rank) -> dict[str, Any]:
    base = rank.is_baseline
    kept = torch.zeros(3)
    returned = grafter.dump("returned", torch.ones(3) if base else kept, write="return")
    compared = grafter.dump("compared", torch.full((2,), 3.0 if base else 4.0))
    cut = grafter.dump("strided", (torch.arange(12.0).reshape(3, 4).t() if base else torch.zeros(4, 3)))
    nothing = grafter.dump("nothing", "text" if base else torch.zeros(1))
    kinds = grafter.dump("half", torch.full((2,), 1.5, dtype=torch.bfloat16) if base else torch.zeros(2))
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.constant_(model.weight, 1.0 if base else 5.0)
    with torch.no_grad():
        attachment = grafter.attach(model, "", inputs=False)
        hooked = model(torch.ones(1, 2))
    assert attachment is not None
    attachment.detach()
    compiled = torch.compile(dump_in_compiled_code, backend="eager")(torch.full((2,), 8.0 if base else 0.0))
    return {
        "returned": [returned.tolist(), kept.tolist()],
        "compared": compared.tolist(),
        "strided": cut.sum().item(),
        "nothing": nothing if isinstance(nothing, str) else nothing.tolist(),
        "half": kinds.tolist(),
        "hooked": hooked.tolist(),
        "compiled": compiled.tolist(),
    }


def dump_in_compiled_code(x: torch.Tensor) -> torch.Tensor:
    return grafter.dump("compiled", x * 2, write="return", wait="job") + 1


def every_kind(rank: Rank) -> Any:
    return in_turn(rank, dump_of_each_kind)


def test_all_kinds_of_points_are_posted_and_taken(tmp_path: Path) -> None:
    """Returned values, comparisons, views, other dtypes, a value that is no tensor, hooks, compiled code."""
    with two_jobs(
        tmp_path, every_kind, every_kind, b2t_filter="name != 'compared'", compare_filter="name == 'compared'",
        wait="job", signals=("posted",), compiler=True,
    ) as jobs:  # fmt: skip
        _, target = succeed(jobs.wait())
        assert target == {
            "returned": [[1.0] * 3, [0.0] * 3],
            "compared": [4.0, 4.0],
            "strided": 66.0,
            "nothing": [0.0],
            "half": [1.5, 1.5],
            "hooked": [[2.0, 2.0]],
            "compiled": [17.0, 17.0],
        }
        sent, came = each_outcome(jobs)
        well = [("sent", "grafted"), ("compared", "compared"), *[("sent", "grafted")] * 4]
        names = ["returned", "compared", "strided", "half", "out", "compiled"]
        for (there, here), name in zip(well, names, strict=True):
            assert any(name in one and one.endswith(there) for one in sent), (name, sent)
            assert any(name in one and one.endswith(here) for one in came), (name, came)
        assert "nothing forward skipped" in sent and "nothing forward skipped" in came


def differentiate(rank: Rank) -> list[float]:
    weight = torch.nn.Parameter(torch.ones(2))
    scale = 3.0 if rank.is_baseline else 5.0
    h = grafter.dump("h", weight * 2.0)
    (h * scale).sum().backward()
    assert weight.grad is not None
    gradient = weight.grad.tolist()
    grafter.step()
    return gradient


def gradients(rank: Rank) -> Any:
    return in_turn(rank, differentiate)


def test_gradients_are_posted_where_they_come_and_nobody_is_asked_for_them(tmp_path: Path) -> None:
    """A sender is not held up at the end of its backward pass, nor a receiver inside of its own."""
    with two_jobs(
        tmp_path, gradients, gradients, b2t_filter="phase == 'backward'", gradients=True, wait="job",
        signals=("posted",),
    ) as jobs:  # fmt: skip
        assert succeed(jobs.wait()) == [[6.0, 6.0], [6.0, 6.0]]
        assert each_outcome(jobs) == [["h backward sent"], ["h backward grafted"]]


def gradients_first(rank: Rank) -> Any:
    join()
    if rank.is_baseline:
        rank.wait_for("missed")
    found = differentiate(rank)
    rank.tell("missed")
    return found


def test_a_gradient_that_nobody_has_posted_is_missed(tmp_path: Path) -> None:
    """Each side differentiates with its own."""
    with two_jobs(
        tmp_path, gradients_first, gradients_first, b2t_filter="phase == 'backward'", gradients=True, wait="job",
        signals=("missed",),
    ) as jobs:  # fmt: skip
        assert succeed(jobs.wait()) == [[6.0, 6.0], [10.0, 10.0]]
        assert each_outcome(jobs) == [["h backward missed"], ["h backward missed"]]


def by_token(rank: Rank) -> list[float]:
    order = [0, 1, 2, 3] if rank.is_baseline else [3, 1, 5]
    tokens = grafter.Tokens.from_positions([7] * len(order), order)
    value = torch.tensor([[float(position + 1)] for position in order]) if rank.is_baseline else torch.zeros(3, 1)
    return grafter.dump("h", value, dims="t h", tokens=tokens).flatten().tolist()  # type: ignore[no-any-return]


def tokens(rank: Rank) -> Any:
    return in_turn(rank, by_token)


def test_rows_that_are_addressed_by_token_are_picked_out_of_what_was_posted(tmp_path: Path) -> None:
    """The sender posts all its rows, since it does not know which the others will have."""
    with two_jobs(tmp_path, tokens, tokens, b2t_filter="True", wait="job", signals=("posted",)) as jobs:
        assert succeed(jobs.wait())[1] == [4.0, 2.0, 0.0]
        assert each_outcome(jobs) == [["h forward sent"], ["h forward grafted"]]
