"""The summary of a run and its tables, from ledgers written by hand."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafter.analysis.run.point_rows import merge_ranks
from grafter.analysis.run.run_summary import find_run, read_run_summary
from grafter.cli.console import log_bar, printable
from grafter.cli.show import report_run, show_run
from grafter.core.records import CopyRecord, Difference, LedgerLeaf, LedgerRecord, RankSummary
from grafter.core.roles import Role
from grafter.errors import GrafterError
from grafter.store.ledger import LedgerWriter
from grafter.tools.launch.pair_result import PairResult


def record(role: Role, role_rank: int, sequence: int, **changes: Any) -> LedgerRecord:
    """A b2t point of one baseline and two target ranks, as `role_rank` of `role` saw it."""
    name = changes.pop("name", "layer")
    tags = changes.pop("tags", {"layer_id": sequence})
    difference = changes.pop("difference", None)
    fields: dict[str, Any] = {
        "sequence": sequence,
        "time": 1.0,
        "name": name,
        "tags": {"name": name, "step": changes.get("step", 0), "phase": "forward", **tags},
        "step": 0,
        "phase": "forward",
        "occurrence": 0,
        "direction": "b2t",
        "role": role,
        "role_rank": role_rank,
        "outcome": "sent" if role == "baseline" else "grafted",
        "call_site": "model.py:7 in forward",
        "participants": {"baseline": [0], "target": [0, 1]},
        "seconds": {"pairing": 0.001, "exchange": 0.002},
        "leaves": [LedgerLeaf(path="", shape=[2, 32, 128], dtype="torch.float32", device="cpu", difference=difference)],
        "difference": difference,
    }
    return LedgerRecord(**{**fields, **changes})


def summary(role: Role, role_rank: int, **changes: Any) -> RankSummary:
    fields: dict[str, Any] = {"outcomes": {}, "unmatched": {}, "filters_never_matched": [], "tags_never_seen": []}
    return RankSummary(role=role, role_rank=role_rank, **{**fields, **changes})


def write_run(run: Path, records: list[LedgerRecord], summaries: list[RankSummary]) -> Path:
    writers: dict[tuple[str, int], LedgerWriter] = {}
    for each in [*records, *summaries]:
        place = (each.role, each.role_rank)
        if place not in writers:
            writers[place] = LedgerWriter(run / each.role, each.role_rank)
        if isinstance(each, LedgerRecord):
            writers[place].write(each)
        else:
            writers[place].write_summary(each)
    for writer in writers.values():
        writer.close()
    return run


EVERYONE = [summary("baseline", 0), summary("target", 0), summary("target", 1)]


def two_layers() -> list[LedgerRecord]:
    worst = Difference(rel=1.8e-6, max_abs=0.003, cosine=0.999998)
    return [
        *(record("baseline", 0, i) for i in range(2)),
        record("target", 0, 0, difference=Difference(rel=1e-14, max_abs=1e-7, cosine=1.0)),
        record("target", 1, 0, difference=Difference(rel=0.0, max_abs=0.0, cosine=1.0)),
        record("target", 0, 1, difference=Difference(rel=1e-7, max_abs=0.001, cosine=1.0)),
        record("target", 1, 1, difference=worst),
    ]


def shown(run: Path, monkeypatch: pytest.MonkeyPatch, columns: int = 0, **options: Any) -> str:
    monkeypatch.setenv("COLUMNS", str(columns) if columns else "")
    stream = io.StringIO()
    show_run(read_run_summary(run, options.get("with_ranks", False)), stream, **options)
    return stream.getvalue()


def test_a_point_is_one_row_with_its_worst_receiver(tmp_path: Path) -> None:
    """Senders are folded into the receivers' row, and the difference shown is the worst rank's."""
    rows = read_run_summary(write_run(tmp_path, two_layers(), EVERYONE)).rows
    assert [row.label for row in rows] == ["layer layer_id=0", "layer layer_id=1"]
    assert [row.outcome for row in rows] == ["grafted", "grafted"]
    assert [row.rel for row in rows] == [1e-14, 1.8e-6]
    assert rows[1].max_abs == 0.003
    assert rows[0].ranks == ("target 0", "target 1", "baseline 0")
    assert rows[0].seconds == pytest.approx(0.003)
    assert [row.disagreement for row in rows] == [None, None]


def test_of_a_pytree_the_worst_leaf_is_shown(tmp_path: Path) -> None:
    """NaN on one side is worse than any number, and the leaf's path and shape go with it."""
    leaves = [
        LedgerLeaf(path="ids", shape=[4], dtype="torch.int64", device="cpu", difference=Difference(rel=0.5)),
        LedgerLeaf(
            path="weights", shape=[], dtype="torch.float32", device="cpu", difference=Difference(rel=0.1, nan=2)
        ),
    ]
    row = merge_ranks([("target", 0, [record("target", 0, 0, leaves=leaves)])])[0]
    assert (row.leaf, row.shape, row.nonfinite) == ("weights", (), 2)


def test_ranks_that_disagree_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point is as bad as its worst rank; what each rank had is in the notes, a missing record too."""
    records = [
        record("target", 0, 0),
        record("target", 1, 0, outcome="failed", reason="shape [2] does not fit"),
        record("target", 0, 1),
        record("target", 1, 2, tags={"layer_id": 7}, participants={"baseline": [], "target": [1]}),
    ]
    read = read_run_summary(write_run(tmp_path, records, [summary("target", 0), summary("target", 1)]))
    assert [row.outcome for row in read.rows] == ["failed", "grafted", "grafted"]
    assert read.rows[0].disagreement == "target 0: grafted; target 1: failed"
    assert read.rows[1].disagreement == "target 0: grafted; target 1: no record"
    assert read.rows[2].disagreement is None
    assert sum("ranks disagree" in note for note in read.notes) == 2


def test_rank_tags_do_not_split_a_point(tmp_path: Path) -> None:
    """What differs between ranks by nature does not identify; with a `key`, only what it lists does."""
    records = [record("target", rank, 0, tags={"tp_rank": rank, "layer_id": 1, "note": rank}) for rank in (0, 1)]
    assert len(read_run_summary(write_run(tmp_path, records, [])).rows) == 2
    (tmp_path / "target" / "run.json").write_text(json.dumps({"configuration": {"key": "layer_id"}}))
    assert [row.label for row in read_run_summary(tmp_path).rows] == ["layer layer_id=1"]


def test_the_table_fits_80_columns_and_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns no line is longer; in a pipe nothing is wrapped; neither has escape sequences."""
    long_name = "model.layers.3.self_attn.very_long_projection_name.output"
    records = [*two_layers(), record("target", 0, 9, name=long_name, difference=Difference(rel=0.2, max_abs=12.0))]
    write_run(tmp_path, records, EVERYONE)
    narrow = shown(tmp_path, monkeypatch, columns=80)
    table = narrow[narrow.index("step") : narrow.index("notes:")]
    assert max(map(len, table.splitlines())) <= 80
    assert "1.8e-06" in table
    wide = shown(tmp_path, monkeypatch)
    assert any(long_name in line and "2.0e-01" in line and "cosine" not in line for line in wide.splitlines())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in narrow + wide + shown(tmp_path, monkeypatch)


def test_names_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets are no markup, and what a terminal would obey is spelt out."""
    records = [record("target", 0, 0, name="[bold]x[/bold]", tags={"why": "\x1b[31mred\n"})]
    text = shown(write_run(tmp_path, records, []), monkeypatch)
    assert "[bold]x[/bold] why=\\x1b[31mred\\n" in text


def test_failed_points_come_first_with_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed and skipped points are listed before the others, with reason and place, and alone with --failed."""
    records = [
        *two_layers(),
        record("target", 0, 5, name="ids", outcome="skipped", reason="it is no tensor in the baseline"),
        record("target", 0, 6, name="scores", outcome="failed", reason="the transform raised [KeyError]"),
    ]
    write_run(tmp_path, records, EVERYONE)
    text = shown(tmp_path, monkeypatch)
    assert text.index("it is no tensor in the baseline (at model.py:7 in forward)") < text.index("layer layer_id=0")
    assert "the transform raised [KeyError]" in text
    assert "1 point failed; the first is scores layer_id=6 at step 0." in text
    assert "layer layer_id=0" not in shown(tmp_path, monkeypatch, only_trouble=True)


def test_rows_are_sorted_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rel the worst comes first; a limit says how much it left out; --all-ranks has a row per rank."""
    write_run(tmp_path, two_layers(), EVERYONE)
    by_rel = shown(tmp_path, monkeypatch, sort="rel", limit=1)
    assert "layer_id=1" in by_rel and "layer_id=0" not in by_rel
    assert "and 1 more (--limit)" in by_rel
    every = " ".join(shown(tmp_path, monkeypatch, with_ranks=True).split())
    assert [every.count(f"{rank} layer") for rank in ("baseline 0", "target 0", "target 1")] == [2, 2, 2]


@given(st.floats(min_value=0, max_value=2), st.floats(min_value=0, max_value=2))
def test_the_bar_grows_with_the_logarithm(a: float, b: float) -> None:
    """A larger rel never has a shorter bar; 0 has none, 1 and above a full one of 8."""
    low, high = sorted((a, b))
    order = " ▏▎▍▌▋▊▉█"
    assert [order.index(c) for c in log_bar(low)] <= [order.index(c) for c in log_bar(high)]
    assert log_bar(0.0) == log_bar(1e-16) == log_bar(None) == ""
    assert log_bar(1.0) == log_bar(2.0) == "█" * 8
    assert log_bar(1e-8) == "█" * 4
    assert log_bar(1e-8, " #") == "####"


@given(st.text())
def test_printable_text_obeys_nothing(text: str) -> None:
    """What is shown has no control character, whatever the name."""
    assert printable(text).isprintable()


def test_nothing_matched_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that grafted nothing tells the names that were called, the filter, near names, and tags never seen."""
    facts = {
        "unmatched": {"attn_out": 8, "mlp_out": 4},
        "filters_never_matched": ["b2t: name == 'atn_out' and layer_idx == 3"],
        "tags_never_seen": ["layer_idx"],
    }
    write_run(tmp_path, [], [summary("baseline", 0, **facts), summary("target", 0, **facts)])
    text = shown(tmp_path, monkeypatch)
    assert "nothing was grafted or compared: no filter matched a point; 2 names occurred, up to 8 times a rank" in text
    assert "8 times a rank (see the notes)." in text
    assert "a filter never matched: b2t: name == 'atn_out' and layer_idx == 3; there are points named attn_out" in text
    assert "no point had the tag layer_idx" in text
    assert "attn_out (8 calls each), mlp_out (4 calls each)" in text


def test_a_filter_that_one_stage_matched_is_no_note(tmp_path: Path) -> None:
    """Of a pipeline, each stage leaves some filters unmatched; only what no rank matched is told."""
    stages = [
        summary("target", 0, filters_never_matched=["b2t: name == 'a'", "compare: name == 'c'"]),
        summary("target", 1, filters_never_matched=["compare: name == 'c'"]),
    ]
    notes = read_run_summary(write_run(tmp_path, two_layers(), stages)).notes
    assert [note for note in notes if "never matched" in note] == ["a filter never matched: compare: name == 'c'"]


def test_ranks_that_never_closed_are_named(tmp_path: Path) -> None:
    """A ledger without a summary is of a rank that was killed."""
    notes = read_run_summary(write_run(tmp_path, two_layers(), [summary("baseline", 0), summary("target", 1)])).notes
    assert "ended without closing (killed, crashed, or still running): target 0" in notes


def test_errors_of_ranks_are_told_once(tmp_path: Path) -> None:
    """One error that all ranks raise is one problem, with the ranks that left with it."""
    left = {"error": "the jobs ask for different points", "error_kind": "PairingError"}
    ranks = [summary("baseline", 0, **left), summary("target", 0, **left)]
    problems = read_run_summary(write_run(tmp_path, two_layers(), ranks)).problems
    assert problems == ["baseline 0, target 0 left with PairingError: the jobs ask for different points"]


def test_the_newest_run_of_a_directory_is_found(tmp_path: Path) -> None:
    """A run directory is itself; of an out directory the newest run is taken; anything else is explained."""
    old = write_run(tmp_path / "z", two_layers(), [])
    new = write_run(tmp_path / "a", two_layers(), [])
    for path in old.glob("*/*"):
        os.utime(path, (1, 1))
    assert find_run(tmp_path) == new
    assert find_run(old) == old
    with pytest.raises(GrafterError, match="no such file or directory"):
        find_run(tmp_path / "none")
    (tmp_path / "compared.jsonl").touch()
    with pytest.raises(GrafterError, match=r"is a file, not a run's directory.*grafter report.*compare --json"):
        find_run(tmp_path / "compared.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GrafterError, match="holds no run"):
        find_run(tmp_path / "empty")


def test_dumps_and_recordings_are_no_run_and_say_what_they_are(tmp_path: Path) -> None:
    """Dumps of one role, of both, and a recording: each with the command that takes it."""

    def made(name: str, *roles: str, record: bool = False) -> Path:
        for role in roles:
            (tmp_path / name / role).mkdir(parents=True)
            (tmp_path / name / role / "rank0.dumps.jsonl").touch()
            (tmp_path / name / role / "run.json").write_text(json.dumps({"configuration": {"record": record}}))
        return tmp_path / name

    alone = made("alone", "target")
    for directory in (alone, alone / "target"):
        with pytest.raises(GrafterError, match=r"only dumps of the target.*grafter compare BASELINE TARGET"):
            find_run(directory)
    both = made("both", "baseline", "target")
    with pytest.raises(GrafterError, match=f"dumps of both roles.*grafter compare {both}"):
        find_run(both)
    recorded = made("recorded", "baseline", record=True)
    with pytest.raises(GrafterError, match=f"a recording of the baseline.*--peer {recorded}"):
        find_run(recorded)


def test_a_recording_that_went_well_says_how_many_points_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no ledger, and what is in it is grafted from later."""
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "rec", [], [summary("baseline", 0, dumped=4, only_dumps=True)])
    assert report(run)[1].startswith(f"{run}: 4 points saved\n")
    (run / "baseline" / "run.json").write_text(json.dumps({"configuration": {"record": True}}))
    code, text = report(run)
    assert code == 0 and text.startswith(f"{run}: 4 points recorded; graft from it with --peer rec\n")


def test_an_attachment_that_reached_nothing_is_told_as_such(tmp_path: Path) -> None:
    """Programs that are attached never call `grafter.dump`, so that cannot be what is missing."""
    run = write_run(tmp_path / "run", [], EVERYONE)
    assert any("no rank called `grafter.dump` at all" in text for text in read_run_summary(run).problems)
    for role in ("baseline", "target"):
        (run / role / "run.json").write_text(json.dumps({"configuration": {"attach": ":*DecoderLayer"}}))
    (problem,) = read_run_summary(run).problems
    assert "no module was attached: --attach ':*DecoderLayer' matches none" in problem
    run = write_run(run, [], [summary("target", 0, hooks_never_fired=["layers.0"])])
    (problem,) = read_run_summary(run).problems
    assert "modules have hooks, and no call reached them" in problem


def report(run: Path, **changes: Any) -> tuple[int, str]:
    stream = io.StringIO()
    fields: dict[str, Any] = {"exit_codes": {"baseline": 0, "target": 0}}
    return report_run(PairResult(run_directory=run, **{**fields, **changes}), stream), stream.getvalue()


def test_the_exit_code_of_a_run(tmp_path: Path) -> None:
    """0 where points were grafted and nothing failed; else 1 with the reason; 128 + the signal that ended it."""
    good = write_run(tmp_path / "good", two_layers(), EVERYONE)
    assert report(good)[0] == 0
    code, text = report(
        good, exit_codes={"baseline": -15, "target": 3}, failed_role="target", ended_roles=("baseline",)
    )
    assert code == 1
    assert "the target job exited with code 3." in text
    assert "the baseline job was ended by grafter (was killed by SIGTERM)." in text
    assert report(good, stop_signal=2)[0] == 130
    failed = write_run(tmp_path / "failed", [*two_layers(), record("target", 0, 3, outcome="failed")], EVERYONE)
    assert report(failed)[0] == 1
    skipped = write_run(tmp_path / "skipped", [*two_layers(), record("target", 0, 3, outcome="skipped")], EVERYONE)
    assert report(skipped)[0] == 0
    only_skipped = write_run(tmp_path / "only", [record("target", 0, 3, outcome="skipped")], EVERYONE)
    assert report(only_skipped)[0] == 1
    code, text = report(tmp_path / "nothing")
    assert code == 1
    assert "the jobs ended before both had joined" in text
    assert "Programs that never import grafter need --attach '*'." in text
    assert "need --attach" not in report(tmp_path / "nothing", attach="*")[1]


# --- what was compared, and what was not


def comparison(rank: int, difference: Difference | None, number: int = 0, **changes: Any) -> LedgerRecord:
    """One target rank's line of a comparison with one baseline rank."""
    return record("target", rank, number, direction="compare", outcome="compared", difference=difference, **changes)


def test_a_comparison_without_figures_is_no_agreement(tmp_path: Path) -> None:
    """It is counted apart, shown with its reason, and a problem; the sender, which takes no figures, is no reason."""
    equal = Difference(rel=0.0, max_abs=0.0, mismatched_fraction=0.0)
    records = [
        record("baseline", 0, 0, direction="compare", outcome="compared"),
        comparison(0, equal),
        comparison(1, None, reason="no figures of the tensor: MemoryError: no room."),
        record("baseline", 0, 1, direction="compare", outcome="compared", step=1),
        *(comparison(rank, equal, 1, step=1) for rank in (0, 1)),
    ]
    found = read_run_summary(write_run(tmp_path / "run", records, EVERYONE))
    assert found.problems == [
        "1 point met without figures, so it is unknown whether the values are equal; the first is layer layer_id=0 at "
        "step 0: no figures of the tensor: MemoryError: no room."
    ]
    out = io.StringIO()
    show_run(found, out)
    assert ": 1 compared, 1 met without figures" in out.getvalue()
    assert any("no figures" in line and "MemoryError" in line for line in out.getvalue().splitlines())


@pytest.mark.parametrize(
    ("difference", "cells"),
    [
        (Difference(rel=0.0, max_abs=0.0, mismatched_fraction=0.5), "0 !=    0 !="),
        (Difference(mismatched_fraction=0.5), "- !=    - !="),
        (Difference(rel=0.0, max_abs=0.0, mismatched_fraction=0.0), "0       0 "),
        (Difference(rel=0.5, max_abs=1.0, mismatched_fraction=0.5), "5.0e-01 1.0e+00 "),
        (Difference(rel=0.0, max_abs=0.0, mismatched_fraction=0.5, nan=1), "0!      0! "),
    ],
)
def test_other_bits_are_marked_where_rel_does_not_show_them(difference: Difference, cells: str, tmp_path: Path) -> None:
    """-0.0 against 0.0, and values that are no numbers; a note says what the mark is."""
    records = [
        record("baseline", 0, 0, direction="compare", outcome="compared"),
        *(comparison(rank, difference) for rank in (0, 1)),
    ]
    found = read_run_summary(write_run(tmp_path / "run", records, EVERYONE))
    out = io.StringIO()
    show_run(found, out)
    assert cells in out.getvalue(), out.getvalue()
    assert ("!= marks points" in out.getvalue()) == ("!=" in cells)


def test_the_leaf_that_is_shown_is_one_that_differs(tmp_path: Path) -> None:
    """Of leaves whose rel is 0, one with other bits; before all of these, one of values that are no numbers."""
    leaves = [
        LedgerLeaf(path=path, shape=[2], dtype="x", device="cpu", difference=Difference(**figures))
        for path, figures in (
            ("['equal']", {"rel": 0.0, "mismatched_fraction": 0.0}),
            ("['bits']", {"mismatched_fraction": 0.5}),
            ("['zero']", {"rel": 0.0, "mismatched_fraction": 0.5}),
        )
    ]
    for count, shown in ((3, "['bits']"), (1, "['equal']")):
        records = [comparison(rank, leaves[0].difference, leaves=leaves[:count]) for rank in (0, 1)]
        (row,) = merge_ranks([("target", rank, [own]) for rank, own in enumerate(records)])
        assert row.leaf == shown
    (row,) = merge_ranks([("target", 0, [comparison(0, leaves[0].difference, leaves=[leaves[0], leaves[2]])])])
    assert row.leaf == "['zero']"


def copy_leaf(checksum: str | None, rel: float, **changes: Any) -> list[LedgerLeaf]:
    copy = CopyRecord(ranks=[0, 1], checksum=checksum, **changes)
    difference = Difference(rel=rel, max_abs=rel, mismatched_fraction=1.0)
    return [LedgerLeaf(path="", shape=[2], dtype="float32", device="cpu", difference=difference, copy_of=copy)]


@pytest.mark.parametrize("direction", ["compare", "b2t"])
def test_receivers_copies_are_compared_by_their_ledgers(direction: str, tmp_path: Path) -> None:
    """Unequal ones are a problem that names the ranks, and how far each is from what came."""
    outcome = "compared" if direction == "compare" else "grafted"
    for name, checksums in (("equal", "aa"), ("unequal", "ab")):
        records = [
            record("target", rank, 0, direction=direction, outcome=outcome, leaves=copy_leaf(checksum, (1 + rank) / 10))
            for rank, checksum in enumerate(checksums)
        ]
        found = read_run_summary(write_run(tmp_path / name, records, EVERYONE))
        assert found.problems == (
            []
            if name == "equal"
            else [
                "the receiver's replicas differ at 1 point, though they were declared copies; the worst is layer "
                "layer_id=0 at step 0, on target 0 and target 1 (rel to the received values: target 0 "
                "0.1, target 1 0.2)."
            ]
        )


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"leaves": copy_leaf(None, 0.1, reason="MemoryError: no room")}, "target 1: MemoryError: no room"),
        (None, "target 1: its ledger is not here, or has no record of it"),
    ],
    ids=["no checksum", "no ledger"],
)
def test_a_copy_that_could_not_be_compared_is_a_problem(second: Any, why: str, tmp_path: Path) -> None:
    """It was asked for, and nobody knows."""
    records = [record("target", 0, 0, leaves=copy_leaf("a", 0.1))]
    records += [record("target", 1, 0, **second)] if second else []
    found = read_run_summary(write_run(tmp_path, records, EVERYONE if second else EVERYONE[:2]))
    (problem,) = found.problems
    assert problem.startswith("not all of the receiver's replicas could be compared at 1 point") and why in problem


def test_copies_of_a_point_that_failed_are_no_problem_of_their_own(tmp_path: Path) -> None:
    """Its reason says what there is to say."""
    leaves = [copy_leaf(checksum, 0.1) for checksum in "ab"]
    records = [record("target", rank, 0, outcome="failed", reason="r", leaves=leaves[rank]) for rank in (0, 1)]
    problems = read_run_summary(write_run(tmp_path, records, EVERYONE)).problems
    assert not any("replicas" in problem for problem in problems)


# Points that only one job came to.


def alone(role: Role, sequence: int, name: str, **changes: Any) -> LedgerRecord:
    reason = f"only the {role} reached this point"
    told = {"outcome": "skipped", "reason": reason, "only_in": role, "participants": {role: [0]}, "tags": {}, **changes}
    return record(role, 0, sequence, name=name, **told)


def one_sided_run(tmp_path: Path) -> Path:
    records = [
        *two_layers(),
        alone("baseline", 2, "layers.0.experts.3.out"),
        alone("baseline", 3, "layers.1.experts.2.out"),
        alone("target", 2, "layers.1.experts.0.out"),
    ]
    return write_run(tmp_path, records, EVERYONE)


def test_points_that_only_one_job_came_to_are_counted_by_job_and_listed_by_kind(tmp_path: Path) -> None:
    """They are no failure: what both jobs have decides."""
    run = one_sided_run(tmp_path)
    code, said = report(run)
    assert code == 0
    assert f"{run}: 2 grafted; 2 only in the baseline, 1 only in the target: not judged\n" in said
    assert "2 points were only in the baseline, and not judged: layers.*.experts.*.out (2 calls)" in said
    assert "1 point was only in the target, and not judged: layers.*.experts.*.out (1 call)" in said
    assert said.count("only the baseline reached this point") == 2
    assert "ranks disagree" not in said and "skipped," not in said


def test_a_point_that_both_jobs_came_to_apart_is_neithers_alone(tmp_path: Path) -> None:
    """Where they waited for each other, say: the receivers skipped it, and the senders found that they had gone on."""
    records = [*two_layers(), alone("target", 2, "x"), alone("baseline", 2, "x", outcome="missed", only_in=None)]
    summary = read_run_summary(write_run(tmp_path, records, EVERYONE))
    assert [row.only_in for row in summary.rows] == [None, None, "both"]
    assert summary.rows[2].disagreement is None
    assert any("1 point was in both jobs, which did not meet there" in note for note in summary.notes)


def test_a_run_in_which_every_point_is_one_sided_has_failed_and_says_what_may_map_them(tmp_path: Path) -> None:
    """Another name in each job, say."""
    records = [alone("baseline", 0, "blocks.0.out"), alone("target", 0, "layers.0.out")]
    (problem,) = read_run_summary(write_run(tmp_path, records, EVERYONE)).problems
    assert "the jobs have no point in common; the first of the baseline is blocks.0.out" in problem
    assert "`grafter plan suggest`" in problem


def test_ranks_whose_outcomes_are_all_the_same_do_not_disagree() -> None:
    """One was told that only the other job comes, one was not: both skipped the point."""
    records = [
        record("baseline", 0, 0, outcome="skipped", only_in="baseline"),
        *(record("target", rank, 0, outcome="skipped") for rank in range(2)),
    ]
    rows = merge_ranks([(r.role, r.role_rank, [r]) for r in records])
    assert [row.disagreement for row in rows] == [None]
