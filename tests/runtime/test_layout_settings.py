"""Where dims and axes come from, and what likely mistakes with them say: on every rank, and never by a hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter

COLUMNS = "t h[tp]"


def full_tensor() -> torch.Tensor:
    return torch.arange(24.0).view(4, 6)


def columns(rank: Rank) -> torch.Tensor:
    return full_tensor().chunk(rank.world_size, 1)[rank.role_rank]


# Where they come from.


def dump_columns(rank: Rank, **options: Any) -> list[Any]:
    """Rows of the baseline's ranks, columns of the target's."""
    dim = 0 if rank.is_baseline else 1
    part = full_tensor().chunk(rank.world_size, dim)[rank.role_rank].clone()
    mine = part if rank.is_baseline else torch.zeros_like(part)
    for name in ("layers.0.h", "layers.1.h"):
        mine = part.clone() if rank.is_baseline else torch.zeros_like(part)
        grafter.dump(name, mine, **options)
        if not torch.equal(mine, part):
            return [name, mine.tolist()]
    return []


PLAN = """
rules:
  - {match: layers.0.*, role: baseline, dims: "t[tp] h"}
  - {match: layers.1.*, role: baseline, dims: "t[tp] h  # dp:replicated"}
  - {match: "*.h", role: target, dims: "t h[tp]"}
"""


def dump_columns_with_wrong_dims(rank: Rank) -> list[Any]:
    return dump_columns(rank, dims="a b[tp] c")


@pytest.mark.parametrize("function", [dump_columns, dump_columns_with_wrong_dims])
def test_the_plan_file_has_dims_by_name_and_role_and_corrects_the_code(tmp_path: Path, function: Any) -> None:
    """And GRAFTER_BASELINE_AXES and GRAFTER_TARGET_AXES say the mesh, so that the code knows nothing."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    settings = {"b2t_filter": "True", "plan": plan, "baseline_axes": "dp=1 tp=2", "target_axes": "tp=3"}
    with two_jobs(tmp_path, function, function, ranks=(2, 3), **settings) as jobs:
        assert succeed(jobs.wait()) == [[]] * 5
        assert {r.outcome for own in jobs.ledgers().values() for r in own} == {"sent", "grafted"}


def dump_rank_to_rank(rank: Rank) -> Any:
    mine = torch.full((4, 3), 1.0 + rank.role_rank if rank.is_baseline else 9.0)
    dims = "t[tp] h" if rank.is_baseline else COLUMNS
    grafter.dump("h", mine, dims=dims, axes={"tp": (rank.role_rank, 2)})
    return mine.unique().tolist()


def test_an_empty_text_in_the_plan_file_switches_a_calls_dims_off(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("b2t_filter: 'True'\nrules:\n  - {match: h, dims: ''}\n")
    with two_jobs(tmp_path, dump_rank_to_rank, dump_rank_to_rank, ranks=(2, 2), plan=plan) as jobs:
        values = succeed(jobs.wait())
    assert values[2:] == [[1.0], [2.0]], "rank k serves rank k"


def dump_with_axes_from(rank: Rank) -> list[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if rank.is_baseline:
        for name in ("mesh", "groups", "context", "call"):
            grafter.dump(name, full_tensor())
        return []
    where = f"file://{rank.arguments[0]}/{rank.role}"
    dist.init_process_group("gloo", init_method=where, rank=rank.role_rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    part = full_tensor().chunk(2, 0)[rank.role_rank // 2].chunk(2, 1)[rank.role_rank % 2]
    wrong = []

    def check(name: str, **options: Any) -> None:
        mine = torch.zeros_like(part)
        grafter.dump(name, mine, dims="t[cp] h[tp]", **options)
        if not torch.equal(mine, part):
            wrong.append(name)

    grafter.set_mesh(mesh)
    check("mesh")
    grafter.set_axes(cp=mesh.get_group("cp"), tp=mesh.get_group("tp"))
    check("groups")
    grafter.set_axes(cp=None, tp=(0, 1))
    places = {"cp": (rank.role_rank // 2, 2), "tp": (rank.role_rank % 2, 2)}
    with grafter.context(axes=places):
        check("context")
    check("call", axes=places)
    dist.destroy_process_group()
    return wrong


def test_axes_come_from_a_mesh_from_groups_from_the_context_or_from_the_call(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        for role, count in (("baseline", 1), ("target", 4)):
            jobs.start(role, count, dump_with_axes_from, tmp_path)
        assert succeed(jobs.wait()) == [[]] * 5
        assert {r.outcome for own in jobs.ledgers().values() for r in own} == {"sent", "grafted"}


# Mistakes.

# What one side's ranks do wrong: (options of the baseline's rank, options of the target's rank) -> words of the reason.
MISTAKES: dict[str, tuple[Any, Any, list[str]]] = {
    "axes not set": (
        lambda r: {"dims": "t[tp] h", "axes": {"tp": (r, 2)}},
        lambda r: {"dims": COLUMNS},
        ["target rank 0 and target rank 1", "no axis 'tp'", "grafter.set_axes(tp=(rank, size))", "GRAFTER_TARGET_AXES"],
    ),
    "axes of one rank only": (
        lambda r: {"dims": "t[tp] h", "axes": {"tp": (r, 2)}},
        lambda r: {"dims": COLUMNS, "axes": {"tp": (r, 2)} if r else {}},
        ["'tp'", "unknown at target rank 0", "of size 2 at target rank 1", "set_axes"],
    ),
    "two sizes of an axis": (
        lambda r: {"dims": "t[tp] h", "axes": {"tp": (r, 2)}},
        lambda r: {"dims": COLUMNS, "axes": {"tp": (r, 2 + r)}},
        ["'tp'", "of size 2 at target rank 0", "of size 3 at target rank 1"],
    ),
    "an axis that is not mentioned": (
        lambda r: {"dims": "t[tp] h", "axes": {"tp": (r, 2)}},
        lambda r: {"dims": "t h", "axes": {"dp": (r, 2)}},
        ["target rank 0 and target rank 1", "'dp'", "`# dp:replicated`", "ranks="],
    ),
    "names that differ": (
        lambda r: {"dims": "t[tp] h", "axes": {"tp": (r, 2)}},
        lambda r: {"dims": "t d[tp]", "axes": {"tp": (r, 2)}},
        ["h only at baseline ('t[tp] h')", "d only at target ('t d[tp]')", "`1`"],
    ),
    "the wrong dim is split": (
        lambda r: {"dims": "t h[tp]", "axes": {"tp": (r, 2)}},
        lambda r: {"dims": COLUMNS, "axes": {"tp": (r, 2)}},
        ["sizes of t disagree", "4", "2", "baseline", "target"],
    ),
    "ranks of one job differ": (
        lambda r: {"dims": "t[tp] h", "axes": {"tp": (r, 2)}},
        lambda r: {"dims": COLUMNS if r else "t[tp] h", "axes": {"tp": (r, 2)}},
        ["target rank 0 declares 't[tp] h'", "target rank 1 declares 't h[tp]'", "alike"],
    ),
    "a rank of one job declares nothing": (
        lambda r: {"dims": "t[tp] h", "axes": {"tp": (r, 2)}},
        lambda r: {"dims": COLUMNS, "axes": {"tp": (r, 2)}} if r else {},
        ["target rank 0 declares no layout", "target rank 1 declares 't h[tp]'"],
    ),
    "one side declares nothing": (
        lambda r: {"dims": "t[tp] h", "axes": {"tp": (r, 2)}},
        lambda r: {},
        ["[2, 6] at baseline rank 0", "[4, 3] at target rank 0", "the target, of 2 ranks, none", "dims="],
    ),
}


def dump_mistakes(rank: Rank) -> Any:
    raised = {}
    for name, (baseline, target, _) in MISTAKES.items():
        options = (baseline if rank.is_baseline else target)(rank.role_rank)
        mine = torch.full((2, 6) if rank.is_baseline else (4, 3), 1.0 if rank.is_baseline else 9.0)
        try:
            grafter.dump(name, mine, **options)
        except grafter.GrafterError as error:
            raised[name] = str(error)
        assert rank.is_baseline or bool((mine == 9.0).all()), name
    return raised


@pytest.mark.parametrize("direction", ["b2t", "compare"])
def test_mistakes_fail_on_all_ranks_with_the_ranks_the_axis_and_what_to_do(tmp_path: Path, direction: str) -> None:
    with two_jobs(tmp_path, dump_mistakes, dump_mistakes, ranks=(2, 2), **{f"{direction}_filter": "True"}) as jobs:
        assert succeed(jobs.wait()) == [{}] * 4
        ledgers = jobs.ledgers()
    for name, (_, _, words) in MISTAKES.items():
        records = [record for own in ledgers.values() for record in own if record.name == name]
        assert [record.outcome for record in records] == ["failed"] * 4, name
        (reason,) = {record.reason for record in records}
        assert reason is not None
        assert [word for word in words if word not in reason] == [], f"{name}: {reason}"


# A call's own mistake: an error there, and the others hear of it.

OWN_MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "does not parse": ({"dims": "t h[tp"}, ["character 7", "^"]),
    "wrong number of dims": ({"dims": "b t h[tp]"}, ["names 3 dims", "has 2", "[4, 3]"]),
    "a dim of size 1": ({"dims": "t 1"}, ["size 1", "[4, 3]"]),
    "no text": ({"dims": 3}, ["dims= is a text"]),
    "no layout": ({"layout": "t h"}, ["grafter.Layout"]),
    "both": ({"dims": "t h", "layout": "x"}, ["give one"]),
    "no place": ({"dims": "t h[tp]", "axes": {"tp": (2, 2)}}, ["tp=(2, 2)", "coordinate < size"]),
    "no dict": ({"dims": "t h[tp]", "axes": [("tp", 0, 2)]}, ["dict", "'tp'"]),
    "no leaf": ({"dims": {"x": "t h"}}, ["dims= is a dict", "bare tensor"]),
    "boxes": ({"layout": None}, ["the boxes of layout= hold 6 values", "[4, 3]"]),
}


def dump_own_mistakes(rank: Rank) -> Any:
    raised = {}
    for name, (options, _) in OWN_MISTAKES.items():
        if rank.is_baseline:
            options = {"dims": "t[tp] h", "axes": {"tp": (rank.role_rank, 2)}}
        elif rank.role_rank == 1:
            options = {"dims": COLUMNS, "axes": {"tp": (1, 2)}}
        elif name == "boxes":
            options = {"layout": grafter.Layout((4, 6), [((0, 0), (2, 3))])}
        mine = torch.full((2, 6) if rank.is_baseline else (4, 3), 1.0 if rank.is_baseline else 9.0)
        try:
            grafter.dump(name, mine, **options)
        except grafter.GrafterError as error:
            raised[name] = f"{type(error).__name__}: {error}"
        assert rank.is_baseline or bool((mine == 9.0).all()), name
    return raised


def test_a_calls_own_mistake_is_its_error_and_a_failure_for_the_others(tmp_path: Path) -> None:
    """The rank raises LayoutError; the other three record it as the reason, and go on."""
    with two_jobs(tmp_path, dump_own_mistakes, dump_own_mistakes, ranks=(2, 2), b2t_filter="True") as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert [values[0], values[1], values[3]] == [{}, {}, {}]
    assert list(values[2]) == list(OWN_MISTAKES)
    for name, (_, words) in OWN_MISTAKES.items():
        error = values[2][name]
        assert error.startswith("LayoutError")
        assert [word for word in words if word not in error] == [], f"{name}: {error}"
        records = [record for own in ledgers.values() for record in own if record.name == name]
        assert [record.outcome for record in records] == ["failed"] * 4
        (reason,) = {record.reason for record in records}
        assert reason == f"target rank 0 failed before the exchange: {error}"


def dump_with_axes_that_do_not_fit(rank: Rank) -> str | None:
    try:
        grafter.dump("h", columns(rank).clone(), dims=COLUMNS)
    except grafter.GrafterError as error:
        return str(error)
    return None


def test_axes_in_a_setting_that_do_not_make_the_jobs_ranks_are_told(tmp_path: Path) -> None:
    settings = {"b2t_filter": "True", "baseline_axes": "tp=2", "target_axes": "tp=4"}
    function = dump_with_axes_that_do_not_fit
    with two_jobs(tmp_path, function, function, ranks=(2, 2), **settings) as jobs:
        values = succeed(jobs.wait())
        reasons = {record.reason for own in jobs.ledgers().values() for record in own}
    assert values[:2] == [None, None]
    for error in values[2:]:
        assert error is not None and "'tp=4' make 4 ranks, and this job has 2" in error
        assert "GRAFTER_TARGET_AXES" in error
    assert len(reasons) == 1


# One side declares, the other does not.


def dump_one_sided(rank: Rank) -> Any:
    """Only the baseline declares: rank k serves rank k, as ever."""
    mine = torch.full((2, 3), 1.0 + rank.role_rank if rank.is_baseline else 9.0)
    grafter.dump("h", mine, **({"dims": COLUMNS, "axes": {"tp": (rank.role_rank, 2)}} if rank.is_baseline else {}))
    return mine.unique().tolist()


def test_where_only_one_side_declares_the_rules_for_whole_tensors_hold(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_one_sided, dump_one_sided, ranks=(2, 2), b2t_filter="True") as jobs:
        assert succeed(jobs.wait())[2:] == [[1.0], [2.0]]


def dump_half_declared(rank: Rank) -> Any:
    """Two leaves; only one has dims. Equal shapes must not hide that the other one lies elsewhere."""
    mine = {"h": torch.full((2, 4), 1.0 if rank.is_baseline else 9.0), "mask": torch.zeros(3)}
    dims = {"h": "t[tp] h" if rank.is_baseline else "h[tp] t"}
    grafter.dump("tree", mine, dims=dims, axes={"tp": (rank.role_rank, 2)})
    return mine["h"].unique().tolist()


def test_leaves_of_which_only_some_declare_a_layout_are_not_exchanged_by_rank(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_half_declared, dump_half_declared, ranks=(2, 2), b2t_filter="True") as jobs:
        assert succeed(jobs.wait())[2:] == [[9.0], [9.0]]
        (reason,) = {record.reason for own in jobs.ledgers().values() for record in own}
    assert reason is not None and "['mask']" in reason and "tp:replicated" in reason
