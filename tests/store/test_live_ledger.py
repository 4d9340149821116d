"""What a run writes down: every field of a record, by outcome; the statistics; the summary; and never the secret."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter.analysis.run.run_summary import read_run_summary
from grafter.core.records import LedgerRecord
from grafter.store.ledger import read_ledger, read_summaries

SECRET = "correct-horse-battery-staple"


def dump_each_outcome(rank: Rank) -> None:
    base = rank.is_baseline
    with grafter.context(layer_id=3):
        grafter.dump(
            "grafted", torch.tensor([[1.0, 2.0], [3.0, 4.0]] if base else [[1.0, 2.0], [3.0, 8.0]]), kind="mlp"
        )
    grafter.step()
    grafter.dump("compared", torch.tensor([3.0, 4.0] if base else [3.0, float("nan")]))
    grafter.dump("failed", torch.ones(2 if base else 3))
    grafter.dump("skipped", "text" if base else torch.ones(1))
    grafter.dump("tree", {"good": torch.ones(2), "bad": torch.zeros(2) if base else torch.ones(2)})
    for _ in range(3):
        grafter.dump("unmatched", torch.ones(1), special=1)


B2T = "name != 'compared' and name != 'unmatched'"


FILTERS = {"b2t_filter": B2T, "compare_filter": "name == 'compared'", "t2b_filter": "layer_idx == 3"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one signed run that has a point of every outcome."""
    made = tmp_path_factory.mktemp("ledger")
    # Hosted by baseline rank 0, which signs; the harness's store has no secret.
    with Jobs(made, hosted=False, secret=SECRET, **FILTERS) as jobs:
        jobs.start("baseline", 1, dump_each_outcome)
        jobs.start("target", 1, dump_each_outcome)
        succeed(jobs.wait())
    return made / "run"


def records(directory: Path, role: str) -> dict[str, LedgerRecord]:
    return {record.name: record for record in read_ledger(directory / role / "rank0.ledger.jsonl")}


def test_every_outcome_has_its_record_on_both_sides_and_unmatched_points_have_none(directory: Path) -> None:
    assert {name: r.outcome for name, r in records(directory, "target").items()} == {
        "grafted": "grafted",
        "compared": "compared",
        "failed": "failed",
        "skipped": "skipped",
        "tree": "grafted",
    }
    assert {name: r.outcome for name, r in records(directory, "baseline").items()} == {
        "grafted": "sent",
        "compared": "compared",
        "failed": "failed",
        "skipped": "skipped",
        "tree": "sent",
    }


@pytest.mark.parametrize("role", ["baseline", "target"])
def test_a_line_is_what_the_published_schema_makes_of_it(directory: Path, role: str) -> None:
    """All fields, in their order: lines are written without being validated."""
    for line in (directory / role / "rank0.ledger.jsonl").read_text().splitlines():
        assert LedgerRecord.model_validate_json(line).model_dump_json() == line


def test_a_record_says_what_point_it_was_and_where(directory: Path) -> None:
    sent, grafted = records(directory, "baseline")["grafted"], records(directory, "target")["grafted"]
    for record, role in ((sent, "baseline"), (grafted, "target")):
        assert record.tags == {"layer_id": 3, "kind": "mlp"}
        assert (record.step, record.phase, record.occurrence, record.direction) == (0, "forward", 0, "b2t")
        assert (record.role, record.role_rank) == (role, 0)
        assert record.participants == {"baseline": [0], "target": [0]}
        assert f"{Path(__file__).name}:" in record.call_site and " in dump_each_outcome" in record.call_site
        assert record.reason is None
    assert (sent.bytes_sent, sent.bytes_received) == (16, 0)
    assert (grafted.bytes_sent, grafted.bytes_received) == (0, 16)
    assert records(directory, "target")["compared"].step == 1
    assert [record.sequence for record in records(directory, "target").values()] == [1, 2, 3, 4, 5]


def test_the_stages_that_took_time_are_told(directory: Path) -> None:
    target, baseline = records(directory, "target"), records(directory, "baseline")
    stages = {"pairing", "exchange", "transform", "agreement", "write", "statistics"}
    assert set(target["grafted"].seconds) == stages
    assert set(target["compared"].seconds) == stages - {"write"}
    assert set(target["failed"].seconds) == set(target["skipped"].seconds) == {"pairing"}
    assert set(baseline["grafted"].seconds) == {"pairing", "exchange"}
    assert all(0 <= seconds < 60 for record in target.values() for seconds in record.seconds.values())


def test_the_difference_is_that_of_the_numbers(directory: Path) -> None:
    """before [1 2 3 8], incoming [1 2 3 4]: taken before the write, with the definitions of DESIGN section 6."""
    record = records(directory, "target")["grafted"]
    assert record.before is not None and record.incoming is not None and record.difference is not None
    assert (record.before.numel, record.before.max, record.before.mean) == (4, 8.0, 3.5)
    assert (record.incoming.max, record.incoming.mean, record.incoming.abs_mean) == (4.0, 2.5, 2.5)
    difference = record.difference
    assert difference.rel == pytest.approx(16 / (30 + 78))
    assert difference.rel_l2 == pytest.approx(4 / math.sqrt(30))
    assert (difference.max_abs, difference.max_abs_index, difference.max_abs_values) == (4.0, [1, 1], [8.0, 4.0])
    assert difference.mean_abs == 1.0
    assert difference.cosine == pytest.approx((1 + 4 + 9 + 32) / math.sqrt(30 * 78))
    assert difference.mismatched_fraction == 0.25
    assert (difference.nan, difference.inf) == (0, 0)
    assert records(directory, "baseline")["grafted"].difference is None, "the sender computes nothing"


def test_a_nan_is_counted_and_left_out_of_the_sums(directory: Path) -> None:
    record = records(directory, "target")["compared"]
    assert record.before is not None and record.difference is not None
    assert record.before.nan == 1 and record.difference.nan == 1
    assert record.difference.rel == 0.0


def test_a_pytree_has_its_leaves_and_the_worst_of_them_stands_for_the_point(directory: Path) -> None:
    record = records(directory, "target")["tree"]
    assert [leaf.path for leaf in record.leaves] == ["['bad']", "['good']"]
    assert record.difference == record.leaves[0].difference
    assert record.difference is not None and record.difference.max_abs == 1.0


def test_reasons_of_failed_and_skipped_points_are_the_same_on_both_sides(directory: Path) -> None:
    for name in ("failed", "skipped"):
        reasons = {records(directory, role)[name].reason for role in ("baseline", "target")}
        assert len(reasons) == 1 and None not in reasons


def test_the_summary_counts_what_matched_and_tells_what_never_did(directory: Path) -> None:
    baseline, target = read_summaries(directory)
    assert target.outcomes == {"grafted": 2, "compared": 1, "failed": 1, "skipped": 1}
    assert baseline.outcomes == {"sent": 2, "compared": 1, "failed": 1, "skipped": 1}
    for summary in (baseline, target):
        assert summary.unmatched == {"unmatched": 3}
        assert summary.filters_never_matched == ["t2b: layer_idx == 3"]
        assert summary.tags_never_seen == ["layer_idx"]
        assert (summary.error, summary.error_kind) == (None, None)


def test_run_json_holds_configuration_versions_and_world_of_each_job(directory: Path) -> None:
    for role in ("baseline", "target"):
        facts = json.loads((directory / role / "run.json").read_text())
        assert facts["role"] == facts["configuration"]["role"] == role
        assert facts["configuration"]["b2t_filter"] == B2T
        assert facts["versions"]["torch"] == torch.__version__
        assert (facts["baseline_world_size"], facts["target_world_size"]) == (1, 1)
        assert facts["run_name"] == "run" and facts["command"]


def test_the_secret_is_in_no_file_that_the_run_wrote(directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) == 6, files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def dump_after_an_error(rank: Rank) -> None:
    grafter.dump("h", torch.ones(1))
    if rank.is_baseline:
        raise ValueError("the user's own fault")


def test_the_summary_of_a_rank_that_raised_says_so(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_after_an_error, dump_after_an_error, compare_filter="True") as jobs:
        jobs.wait()
    baseline, target = read_summaries(tmp_path / "run")
    assert (baseline.error, baseline.error_kind) == ("the user's own fault", "ValueError")
    assert target.error is None


def dump_some(rank: Rank) -> None:
    grafter.dump("h", torch.arange(6.0) + (0 if rank.is_baseline else 1))


@pytest.mark.parametrize("stats", ["full", "light", "off"])
def test_stats_say_how_much_is_computed(tmp_path: Path, stats: str) -> None:
    """light: what one pass gives, which has the same values as full; off: nothing."""
    with two_jobs(tmp_path, dump_some, dump_some, compare_filter="True", stats=stats) as jobs:
        succeed(jobs.wait())
        (record,) = jobs.ledgers()["target", 0]
        problems = read_run_summary(tmp_path / "run").problems
    assert record.outcome == "compared"
    assert record.leaves[0].shape == [6]
    if stats == "off":
        assert record.before is record.incoming is record.difference is None
        assert record.reason == "GRAFTER_STATS=off: no figures were taken"
        assert problems == [
            "1 point met without figures, so nothing says whether the values are equal; the first is h at step 0: "
            f"{record.reason}."
        ]
        return
    assert problems == [] and record.reason is None
    assert record.difference is not None
    assert record.difference.rel == pytest.approx(6 / (55 + 91))
    assert record.difference.max_abs == 1.0
    computed = record.difference.model_dump(exclude_none=True)
    assert set(computed) == (FULL if stats == "full" else LIGHT)


FULL = {
    "rel",
    "rel_l2",
    "max_abs",
    "max_abs_index",
    "max_abs_values",
    "mean_abs",
    "cosine",
    "mismatched_fraction",
    "nan",
    "inf",
}
LIGHT = FULL - {"mean_abs", "cosine"}
