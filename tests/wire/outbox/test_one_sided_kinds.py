"""`one_sided=skip` with every kind of point: on several hosts, gradients, recordings, rules, other waits, hooks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter.analysis.run.point_rows import PointRow, merge_ranks
from grafter.store.ledger import read_run
from tests.rank.offline.test_offline import graft_from, record
from tests.wire.outbox.test_one_sided import FAR, WELL, dump_steps
from tests.wire.outbox.test_outbox_points import dump_of_each_kind


def told(jobs: Jobs) -> list[list[tuple[str, str, str | None]]]:
    return [[(r.name, r.outcome, r.only_in) for r in records] for records in jobs.ledgers().values()]


# Several hosts: through the store, and over TCP.


def dump_on_two_hosts(rank: Rank) -> Any:
    from grafter.wire.rendezvous import join

    there = join.own_identity()
    join.own_identity = lambda: there.model_copy(update={"host": f"the {rank.role}'s"})
    return dump_steps(rank)


def dump_on_a_host_each(rank: Rank) -> Any:
    from grafter.wire.rendezvous import join

    there = join.own_identity()
    join.own_identity = lambda: there.model_copy(update={"host": f"that of {rank.role} {rank.role_rank}"})
    return dump_steps(rank)


@pytest.mark.parametrize("function", [dump_on_two_hosts, dump_on_a_host_each], ids=["a host a job", "a host a rank"])
def test_jobs_on_several_hosts_skip_alike(tmp_path: Path, function: Any) -> None:
    """Their ranks reach each other through the store alone."""
    steps = {"baseline": [["a", "b only", "c"], ["a"]], "target": [["a", "t only", "c"], ["t first", "a"]]}
    with Jobs(tmp_path, compare_filter="True", one_sided="skip", timeout=FAR) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 2, function, steps[role])
        succeed(jobs.wait())
        baseline, _, target, _ = told(jobs)
        assert told(jobs) == [baseline, baseline, target, target]
    assert [outcome for _, outcome, _ in baseline] == ["compared", "skipped", "compared", "compared"]
    assert [outcome for _, outcome, _ in target] == ["compared", "skipped", "compared", "skipped", "compared"]


def test_mutual_waits_through_the_store_end_as_well(tmp_path: Path) -> None:
    """As on one host: the point that only the target has, and then all others are met."""
    steps = {"baseline": [["b2t 1", "t2b 1"]], "target": [["b2t only target", "b2t 1", "t2b 1"]]}
    filters = {"b2t_filter": "name.startswith('b2t')", "t2b_filter": "name.startswith('t2b')"}
    with Jobs(tmp_path, **filters, one_sided="skip", timeout=FAR) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 2, dump_on_a_host_each, steps[role])
        succeed(jobs.wait())
        first, _, last, _ = told(jobs)
    assert [outcome for _, outcome, _ in first] == ["sent", "grafted"]
    assert [outcome for _, outcome, _ in last] == ["skipped", "grafted", "sent"]


# Values of every kind.


def dump_every_kind(rank: Rank) -> dict[str, Any]:
    grafter.dump(f"only {rank.role}", torch.ones(2))
    return dump_of_each_kind(rank)


def test_all_kinds_of_values_meet(tmp_path: Path) -> None:
    """Returned values, comparisons, views, other dtypes, a value that is no tensor, hooks, compiled code."""
    with two_jobs(
        tmp_path, dump_every_kind, dump_every_kind, b2t_filter="name != 'compared'",
        compare_filter="name == 'compared'", one_sided="skip", timeout=FAR, compiler=True,
    ) as jobs:  # fmt: skip
        _, target = succeed(jobs.wait())
        assert {name: target[name] for name in ("compared", "strided", "half", "hooked")} == {
            "compared": [4.0, 4.0], "strided": 66.0, "half": [1.5, 1.5], "hooked": [[2.0, 2.0]],
        }  # fmt: skip
        assert target["returned"] == [[1.0] * 3, [0.0] * 3]
        for records in told(jobs):
            assert [outcome for name, outcome, _ in records if name != "compiled"].count("skipped") == 2
    assert target["compiled"] in ([17.0, 17.0], [1.0, 1.0]), "it does not wait, so it may be missed"


# Gradients.


def differentiate(rank: Rank) -> list[float]:
    weight = torch.nn.Parameter(torch.ones(2))
    scale = 3.0 if rank.is_baseline else 5.0
    h = grafter.dump("h", weight * 2.0)
    only = grafter.dump(f"only {rank.role}", h * 1.0)
    (grafter.dump("g", only * 1.0) * scale).sum().backward()
    grafter.step()
    assert weight.grad is not None
    return weight.grad.tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_points_that_both_have_are_grafted(tmp_path: Path, ranks: int) -> None:
    """The gradient of a point that only one job has is skipped, and the run goes on."""
    with two_jobs(
        tmp_path, differentiate, differentiate, ranks=(ranks, ranks), b2t_filter="phase == 'backward'", gradients=True,
        one_sided="skip", timeout=FAR,
    ) as jobs:  # fmt: skip
        assert succeed(jobs.wait()) == [[6.0, 6.0]] * ranks * 2
        stories = [{name: (outcome, only) for name, outcome, only in records} for records in told(jobs)]
    sent = {"g": ("sent", None), "h": ("sent", None), "only baseline": ("skipped", "baseline")}
    came = {"g": ("grafted", None), "h": ("grafted", None), "only target": ("skipped", "target")}
    assert stories == [sent] * ranks + [came] * ranks


def differentiate_both_ways(rank: Rank) -> list[float]:
    weight = torch.nn.Parameter(torch.ones(2))
    h = grafter.dump("h", weight * 2.0)
    g = grafter.dump("g", h * (1.0 if rank.is_baseline else 2.0))
    (g * (3.0 if rank.is_baseline else 5.0)).sum().backward()
    assert weight.grad is not None
    return weight.grad.tolist()


def test_gradients_may_cross_both_ways_in_one_backward_pass(tmp_path: Path) -> None:
    """The target goes on with the baseline's gradient of g, and the baseline with what the target makes of it for h."""
    with two_jobs(
        tmp_path, differentiate_both_ways, differentiate_both_ways, gradients=True, one_sided="skip", timeout=FAR,
        b2t_filter="phase == 'backward' and name == 'g'", t2b_filter="phase == 'backward' and name == 'h'",
    ) as jobs:  # fmt: skip
        assert succeed(jobs.wait()) == [[12.0, 12.0]] * 2
        assert {outcome for records in told(jobs) for _, outcome, _ in records} == {"sent", "grafted"}


# Recordings.


def record_program(rank: Rank) -> None:
    for step in range(2):
        for name in ("a", "recorded", "b"):
            grafter.dump(name, torch.full((2,), 1.0), number=step)
        grafter.step()


def live_program(rank: Rank) -> list[float]:
    found = []
    for step in range(2):
        for name in ("a", "live", "b"):
            found.append(grafter.dump(name, torch.full((2,), 2.0), number=step).sum().item())
        grafter.step()
    return found


@pytest.mark.parametrize("direction", ["b2t", "t2b", "compare"])
def test_what_a_recording_lacks_is_skipped(tmp_path: Path, direction: str) -> None:
    """And what the live job lacks: each is said to be in one job alone, whichever of them receives."""
    settings = {f"{direction}_filter": "True", "timeout": FAR}
    recording = record(tmp_path, "baseline", 1, record_program, **settings)
    live, players, ledgers = graft_from(
        tmp_path, recording, ("baseline", 1), live_program, 1, one_sided="skip", **settings
    )
    assert succeed(live) == [[2.0, 4.0, 2.0] * 2 if direction == "b2t" else [4.0] * 6]
    succeed(players)
    for role, name in (("baseline", "recorded"), ("target", "live")):
        outcomes = [(r.name, r.outcome in WELL, r.only_in) for r in ledgers[role, 0]]
        assert outcomes == [("a", True, None), (name, False, role), ("b", True, None)] * 2


def test_gradients_of_a_recording_are_posted_as_well(tmp_path: Path) -> None:
    """A recorded sender is not asked for each of them."""
    settings = {"b2t_filter": "phase == 'backward'", "gradients": True, "timeout": FAR}
    recording = record(tmp_path, "baseline", 1, differentiate, **settings)
    live, players, ledgers = graft_from(
        tmp_path, recording, ("baseline", 1), differentiate, 1, one_sided="skip", **settings
    )
    assert succeed(live) == [[6.0, 6.0]]
    succeed(players)
    assert {r.name: r.outcome for r in ledgers["target", 0]} == {
        "g": "grafted", "h": "grafted", "only target": "skipped",
    }  # fmt: skip


# Rows addressed by token.


def route(rank: Rank) -> None:
    """An expert that both jobs call, with other tokens; and one that only one of them calls."""
    chosen = [0, 1, 2] if rank.is_baseline else [2, 3, 1, 4]
    value = torch.stack([torch.full((4,), float(token)) for token in chosen])
    tokens = grafter.Tokens.from_positions(["x"] * len(chosen), chosen)
    for name in ("expert", f"only {rank.role}"):
        grafter.dump(name, value, dims="t h", tokens=tokens)


def test_an_expert_that_both_call_with_other_tokens_is_compared_by_token(tmp_path: Path) -> None:
    """The tokens that both sent to it are equal, whatever their place."""
    with two_jobs(tmp_path, route, route, compare_filter="True", one_sided="skip", timeout=FAR) as jobs:
        succeed(jobs.wait())
        both, alone = jobs.ledgers()["target", 0]
    assert (both.outcome, both.difference.rel, both.tokens.matched) == ("compared", 0.0, 2)
    assert (both.tokens.only_here, both.tokens.only_there) == (2, 1)
    assert (alone.outcome, alone.only_in) == ("skipped", "target")


# Other ways to wait, and rules.


def by_rules(rank: Rank) -> None:
    for name in ("a", f"expert {rank.role}", "b"):
        grafter.dump(name, torch.ones(2))


@pytest.mark.parametrize("rest", ["both", "raise"])
def test_a_rule_says_it_for_some_names(tmp_path: Path, rest: str) -> None:
    """All other points raise, as ever."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("rules:\n- {match: 'expert *', one_sided: skip}\n")
    names = by_rules if rest == "both" else by_rules_and_another
    with two_jobs(tmp_path, names, names, compare_filter="True", plan=plan, timeout=FAR) as jobs:
        results = jobs.wait()
    assert {result.error_kind for result in results} == ({None} if rest == "both" else {"PairingError"})


def by_rules_and_another(rank: Rank) -> None:
    by_rules(rank)
    grafter.dump(f"last {rank.role}", torch.ones(2))


def receiver_does_not_wait(rank: Rank) -> None:
    for name in ("a", f"only {rank.role}", "b"):
        grafter.dump(name, torch.ones(2), wait="job")
    rank.tell(rank.role)
    rank.wait_for("target" if rank.is_baseline else "baseline")


def test_points_that_do_not_wait_keep_their_own_rules(tmp_path: Path) -> None:
    """`wait=job` comes first: such a receiver misses what is not there, and nobody waits for the end of a step."""
    with two_jobs(
        tmp_path, receiver_does_not_wait, receiver_does_not_wait, compare_filter="True", one_sided="skip", timeout=FAR,
        signals=("baseline", "target"),
    ) as jobs:  # fmt: skip
        succeed(jobs.wait())
        outcomes = [outcome for records in told(jobs) for _, outcome, _ in records]
    assert set(outcomes) <= {"compared", "missed", "expired", "skipped"}


# A program that knows nothing of grafter.

ROUTED = """
import sys, torch
from torch import nn
torch.manual_seed(0)
flipped_to, layer = int(sys.argv[1]), [0]

class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 5), nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, hidden):
        chosen = torch.arange(6) % 4
        if layer[0] == 1:
            chosen[chosen == 3] = flipped_to
        layer[0] += 1
        out, weights = torch.zeros_like(hidden), self.gate(hidden).softmax(-1)
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).nonzero()[:, 0]
            out[rows] = self.experts[expert](hidden[rows]) * weights[rows, expert, None]
        return out

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Moe() for _ in range(3))

    def forward(self, x):
        for each in self.layers:
            x = x + each(x)
        return x

with torch.no_grad():
    Model()(torch.randn(6, 8))
"""


def run_routed(tmp_path: Path, direction: str, flipped_to: int) -> tuple[int, str, list[PointRow]]:
    """(exit code, output, points) of a run in whose target one choice of layer 1 is flipped, from expert 3."""
    program = tmp_path / "routed.py"
    program.write_text(ROUTED)
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("grafter")), "run", "--baseline", f"{sys.executable} {program} 3",
            "--target", f"{sys.executable} {program} {flipped_to}", "--attach", "*", f"--{direction}",
            "name.endswith('.out')", "--set", "one_sided=skip", "--out", str(tmp_path / "out"),
        ],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    (directory,) = (tmp_path / "out").iterdir()
    return run.returncode, run.stdout + run.stderr, merge_ranks(list(read_run(directory)))


@pytest.mark.parametrize("direction", ["compare", "b2t"])
def test_one_flipped_routing_choice_costs_its_own_points_alone(tmp_path: Path, direction: str) -> None:
    """Of an expert that nobody else chose: each that only one job called is listed, and the exit code is 0."""
    code, said, rows = run_routed(tmp_path, direction, 4)
    assert code == 0, said
    verb = "compared" if direction == "compare" else "grafted"
    assert f"18 {verb}; 1 only in the baseline, 1 only in the target: not judged" in said
    assert "1 point was only in the baseline, and not judged: layers.experts.*.out (1 call)" in said
    assert {row.label: (row.only_in, row.outcome) for row in rows if row.only_in} == {
        "layers.experts.3.out layer_id=1": ("baseline", "skipped"),
        "layers.experts.4.out layer_id=1": ("target", "skipped"),
    }
    assert {row.outcome for row in rows if not row.only_in} == {verb}
    assert {row.step for row in rows} == {0} and len(rows) == 20


def test_an_expert_that_both_call_with_other_numbers_of_rows_fails_as_ever(tmp_path: Path) -> None:
    """Pairing stays verified: its shapes do not fit, so the exit code is 1, and all else is compared."""
    code, said, rows = run_routed(tmp_path, "compare", 0)
    assert code == 1 and "17 compared, 1 failed; 1 only in the baseline: not judged" in said, said
    assert {row.label: row.outcome for row in rows if row.outcome != "compared"} == {
        "layers.experts.0.out layer_id=1": "failed",
        "layers.experts.3.out layer_id=1": "skipped",
    }


def shorter(rank: Rank) -> None:
    for number in range(2):
        grafter.dump("a", torch.ones(2), number=number)
        grafter.step()


def longer(rank: Rank) -> None:
    for number in range(5):
        grafter.dump("a", torch.ones(2), number=number)
        grafter.step()


@pytest.mark.parametrize("role", ["baseline", "target"])
def test_the_rest_of_a_longer_recording_is_in_it_alone(tmp_path: Path, role: str) -> None:
    """Each of its points has a line, whether the recording sends or receives."""
    settings = {"compare_filter": "True", "timeout": FAR}
    recording = record(tmp_path, role, 1, longer, **settings)
    live, players, ledgers = graft_from(tmp_path, recording, (role, 1), shorter, 1, one_sided="skip", **settings)
    succeed([*live, *players])
    assert [(r.outcome, r.only_in) for r in ledgers[role, 0]] == [("compared", None)] * 2 + [("skipped", role)] * 3
