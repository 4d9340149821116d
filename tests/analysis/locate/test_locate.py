"""`grafter locate`: the judgement, the measurement and the table, over ledgers made here."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from locate_ledgers import ADDED, ALONE, CLEAN, FLOOR_ADDED, measured, measurement, record
from rich.console import Console
from typer.testing import CliRunner

from grafter.analysis.locate.judgement import FLOOR_FACTOR, PEER_FACTOR, judge, peer_limit
from grafter.analysis.locate.measure import measure_run
from grafter.analysis.locate.verdict import Verdict, verdict_as_json
from grafter.cli.locate_table import BAR_WIDTH, draw_bar, print_verdict
from grafter.cli.main import app
from grafter.core.records import Difference

floors = st.floats(0.0, 1.0).map(lambda exponent: 1e-14 * 10**exponent)


# --- the judgement -------------------------------------------------------------------------------------------------


def test_the_designs_numbers_name_layer_2_with_a_floor() -> None:
    """The demo's fault is named against the measured floor, and the layers that only inherit it are not."""
    verdict = judge(measurement(ALONE), measurement(ADDED), measurement(CLEAN), measurement(FLOOR_ADDED))
    assert verdict.named == "layer 2"
    assert verdict.guilty == ("layer 2",)
    assert verdict.exit_code == 1
    assert verdict.sentence == (
        "The target goes wrong in layer 2: given the baseline's values it still differs by 1.8e-06, "
        "2e+08 times its floor of 1.0e-14."
    )
    assert verdict.inputs.startswith("Inputs: equal")


def test_the_designs_numbers_name_layer_2_without_a_floor() -> None:
    """Without a floor the other layers' median is enough."""
    verdict = judge(measurement(ALONE), measurement(ADDED))
    assert verdict.guilty == ("layer 2",)
    assert "above the limit of 1.3e-12 set by the other points" in verdict.sentence


def test_without_the_fault_no_layer_is_named() -> None:
    """A clean pair ends with exit code 0, with and without a floor."""
    with_floor = judge(measurement(CLEAN), measurement(FLOOR_ADDED), measurement(CLEAN), measurement(FLOOR_ADDED))
    without = judge(measurement(CLEAN), measurement(FLOOR_ADDED))
    for verdict in (with_floor, without):
        assert verdict.named is None
        assert verdict.exit_code == 0
        assert verdict.sentence.startswith("No layer stands out")


@given(
    clean=st.lists(floors, min_size=3, max_size=12),
    position=st.integers(0, 11),
    size=st.floats(3.5, 12.0),
    with_floor=st.booleans(),
)
def test_the_fault_is_named_wherever_it_is(clean: list[float], position: int, size: float, with_floor: bool) -> None:
    """A difference that stands 3.5 decades above scattered floors is named, alone, at any place but the first."""
    names = [f"layer {i}" for i in range(len(clean) + 1)]
    position = 1 + position % len(clean)
    rels = [0.0, *clean]
    rels[position] = max(clean) * 10**size
    floor = measured(names, [0.0, *clean]) if with_floor else None
    verdict = judge(measured(names, rels), measured(names, rels), floor, floor)
    assert verdict.guilty == (names[position],)
    assert verdict.named == names[position]


@given(pairs=st.lists(st.tuples(floors, floors), min_size=3, max_size=12), with_floor=st.booleans())
def test_scattered_floors_name_no_layer(pairs: list[tuple[float, float]], with_floor: bool) -> None:
    """Differences and floors that scatter over one decade, independently of one another, are no error."""
    names = [f"layer {i}" for i in range(len(pairs))]
    added = measured(names, [a for a, _ in pairs])
    floor = measured(names, [f for _, f in pairs]) if with_floor else None
    verdict = judge(added, added, floor, floor)
    assert verdict.named is None
    assert verdict.exit_code == 0


@given(shift=st.floats(-200.0, 200.0))
def test_the_judgement_has_no_scale_of_its_own(shift: float) -> None:
    """Multiplying every difference by one number changes no judgement: nothing is held against a constant."""
    factor = 10.0**shift
    scaled = [measurement([value * factor for value in rels]) for rels in (ALONE, ADDED, CLEAN, FLOOR_ADDED)]
    assert judge(*scaled).guilty == ("layer 2",)
    assert judge(*scaled[:2]).guilty == ("layer 2",)


def test_a_bf16_fault_that_drowns_in_its_floor_is_not_named() -> None:
    """The same difference that is an error over a float32 floor is none over a bf16 floor."""
    added = measurement([0.0, 4e-6, 4e-6, 5.8e-6, 4e-6])
    floor = measurement([0.0, 4e-6, 4e-6, 4e-6, 4e-6])
    assert judge(added, added, floor, floor).exit_code == 0


def test_a_difference_where_the_floor_is_exactly_zero_is_an_error() -> None:
    """A point that is equal to the last bit in the floor has no rounding to hide behind."""
    added = measurement([0.0, 1e-14, 1e-14, 1e-9, 1e-14])
    floor = measurement([0.0, 1e-14, 1e-14, 0.0, 1e-14])
    verdict = judge(added, added, floor, floor)
    assert verdict.guilty == ("layer 2",)
    assert "where its floor is 0" in verdict.sentence


def test_all_points_equal_is_a_verdict_even_without_a_floor() -> None:
    """Jobs that agree to the last bit are judged without a floor."""
    zeros = measurement([0.0, 0.0, 0.0])
    assert judge(zeros, zeros).exit_code == 0


def test_one_point_that_differs_among_equal_ones_is_named() -> None:
    """Where every other point is equal to the last bit, the one that is not stands out."""
    rels = measurement([0.0, 0.0, 3e-9, 0.0, 0.0])
    verdict = judge(rels, rels)
    assert verdict.guilty == ("layer 1",)
    assert "where all other points are equal" in verdict.sentence


def test_two_points_that_differ_alike_among_equal_ones_need_a_floor() -> None:
    """Two alike could be two faults or two roundings: that is said, not guessed."""
    rels = measurement([0.0, 0.0, 3e-9, 2e-9, 0.0])
    verdict = judge(rels, rels)
    assert verdict.exit_code == 2
    assert "layer 1 and layer 2" in verdict.sentence
    assert "--floor" in verdict.sentence


def test_two_points_are_too_few_for_a_median() -> None:
    """With fewer than three points, only a floor can tell; with one, two points are enough."""
    rels = measurement([1e-14, 1e-6])
    verdict = judge(rels, rels)
    assert verdict.exit_code == 2
    assert "--floor" in verdict.sentence
    floor = measurement([1e-14, 1e-14])
    assert judge(rels, rels, floor, floor).guilty == ("layer 0",)


@pytest.mark.parametrize("field_name", ["nan", "inf"])
def test_nan_or_inf_that_do_not_match_are_an_infinite_difference(field_name: str) -> None:
    """One NaN that only one side has is an error, whatever `rel` says of the rest, even among two points."""
    records = [record("embedding", 0, 0.0), record("layer 0", 1, 0.0)]
    broken = Difference(rel=0.0, mismatched_fraction=0.1, **{field_name: 1})
    records[1] = records[1].model_copy(update={"difference": broken})
    run = measure_run([("target", 0, records)])
    verdict = judge(run, run)
    assert verdict.guilty == ("layer 0",)
    assert "differs in NaN or Inf" in verdict.sentence
    assert math.isinf(verdict.points[1].added or 0.0)


def test_a_floor_that_is_not_finite_judges_nothing() -> None:
    """Where the floor itself has NaN that do not match, the point is reported as not judged."""
    added, floor = measurement([0.0, 1e-14, 1e-6]), measurement([0.0, 1e-14, math.inf])
    verdict = judge(added, added, floor, floor)
    assert verdict.exit_code == 2
    assert "layer 1" in verdict.sentence


def test_inputs_that_differ_are_said_first_and_named_when_nothing_else_is() -> None:
    """A first point that differs is the inputs' fault, which the line about the inputs says."""
    added, floor = measurement([0.5, 1e-14, 1e-14, 1e-14]), measurement([0.0, 1e-14, 1e-14, 1e-14])
    verdict = judge(added, added, floor, floor)
    assert verdict.inputs.startswith("Inputs: they already differ; the first point, embedding, differs by 5.0e-01")
    assert verdict.named == "embedding"
    assert verdict.sentence.startswith("The two jobs already differ at embedding, the first point, by 5.0e-01")


def test_inputs_that_differ_do_not_hide_a_layer_that_is_wrong() -> None:
    """Grafting gives the layers the right inputs, so a fault further down is still the one that is named."""
    added, floor = measurement([0.5, 1e-14, 1e-6, 1e-14]), measurement([0.0, 1e-14, 1e-14, 1e-14])
    verdict = judge(added, added, floor, floor)
    assert verdict.named == "layer 1"
    assert verdict.guilty == ("embedding", "layer 1")
    assert verdict.inputs.startswith("Inputs: they already differ")


def test_of_several_guilty_points_the_worst_is_named_and_the_others_listed() -> None:
    """Two faults are both reported."""
    added, floor = measurement([0.0, 1e-9, 1e-14, 1e-6, 1e-14]), measurement(FLOOR_ADDED)
    verdict = judge(added, added, floor, floor)
    assert verdict.named == "layer 2"
    assert verdict.sentence.endswith("; layer 0 adds error too.")


def test_a_point_that_failed_is_listed_and_acquits_nobody() -> None:
    """A point that could not be grafted makes a clean run undecided, and the point after it inherits its error."""
    records = [record("embedding", 0), record("layer 0", 1, 1e-14), record("layer 1", 2, None, difference=None)]
    records[2] = records[2].model_copy(update={"outcome": "failed", "reason": "shapes differ: (2, 4) and (4, 2)."})
    after = record("layer 2", 3, 1e-14), record("layer 3", 4, 1e-14)
    clean = measure_run([("target", 0, [*records, *after])])
    verdict = judge(clean, clean)
    assert verdict.exit_code == 2
    assert verdict.points[2].note == "failed at step 0: shapes differ: (2, 4) and (4, 2)."
    assert "layer 1 could not be: failed at step 0: shapes differ: (2, 4) and (4, 2)." in verdict.sentence
    floor = measured(["embedding", "layer 0", "layer 2", "layer 3"], [0.0, 1e-14, 1e-14, 1e-14])
    wrong = measure_run([("target", 0, [*records, record("layer 2", 3, 1e-6), after[1]])])
    verdict = judge(wrong, wrong, floor, floor)
    assert verdict.named == "layer 2"
    assert "or before it, since layer 1 could not be grafted" in verdict.sentence


def test_a_point_that_failed_in_one_step_can_be_convicted_by_another() -> None:
    """The steps that were measured convict; they do not acquit."""
    failed = record("layer 0", 9, None, step=1, outcome="failed", reason="no", difference=None)
    floor = measurement([0.0, 1e-14, 1e-14])
    for rel, exit_code in ((1e-6, 1), (1e-14, 2)):
        run = measure_run([("target", 0, [record("embedding", 0), record("layer 0", 1, rel), failed])])
        assert judge(run, run, floor, floor).exit_code == exit_code


def test_statistics_that_are_off_are_named_as_the_reason() -> None:
    """A ledger without differences judges nothing and says why."""
    run = measure_run([("target", 0, [record("layer 0", 0, None, difference=None, outcome="grafted")])])
    verdict = judge(run, run)
    assert verdict.exit_code == 2
    assert "statistics are off" in (verdict.points[0].note or "")


def test_a_point_that_the_floor_lacks_is_judged_against_the_others() -> None:
    """A floor need not dump every point; the row says by what it was judged."""
    added = measurement(ADDED)
    floor = measured(["embedding", "layer 0", "layer 1"], FLOOR_ADDED[:3])
    verdict = judge(measurement(ALONE), added, floor, floor)
    assert verdict.guilty == ("layer 2",)
    assert verdict.points[3].judged_by == "others"
    assert "the floor lacks this point" in (verdict.points[3].note or "")


def test_no_points_is_not_a_clean_bill() -> None:
    """A verdict over nothing ends with 2."""
    empty = measure_run([])
    assert judge(empty, empty).exit_code == 2


def test_half_of_the_points_wrong_still_stand_out_from_the_rest() -> None:
    """The median bears with as many faults as there are sound points less one, measured by hand here."""
    assert peer_limit([1e-14, 1e-14, 1e-6]) == pytest.approx(1e-12)
    assert peer_limit([1e-14]) is None


# --- the measurement -----------------------------------------------------------------------------------------------


def test_a_point_is_as_bad_as_its_worst_step_rank_and_leaf() -> None:
    """Steps, ranks and leaves of one point become one row that holds the largest difference."""
    leaf = {"path": "ids", "shape": [2], "dtype": "float32", "device": "cpu"}
    with_leaf = record("layer", 1, 2e-14, leaves=[{**leaf, "difference": Difference(rel=0.0, nan=3)}])
    steps = [record("layer", 0, 1e-14), record("layer", 1, 3e-14, step=1)]
    assert [m.rel for m in measure_run([("target", 0, steps)]).points.values()] == [3e-14]
    ranks = [("target", rank, [record("layer", 0, rel, role_rank=rank)]) for rank, rel in ((0, 1e-14), (1, 5e-14))]
    assert [m.rel for m in measure_run(ranks).points.values()] == [5e-14]  # type: ignore[arg-type]
    assert [m.rel for m in measure_run([("target", 0, [with_leaf])]).points.values()] == [math.inf]


def test_rows_are_told_apart_by_what_identifies_a_point() -> None:
    """Tags, phase and occurrence make rows; steps and rank tags do not; `key` narrows the tags."""
    records = [
        record("layer", 0, tags={"layer_id": 0, "tp_rank": 0, "seed": 1}),
        record("layer", 1, tags={"layer_id": 0, "tp_rank": 1, "seed": 1}, step=1),
        record("layer", 2, tags={"layer_id": 1, "seed": 2}, occurrence=1),
        record("layer", 3, tags={"layer_id": 1}, phase="backward"),
    ]
    assert [str(p) for p in measure_run([("target", 0, records)]).points] == [
        "layer layer_id=0 seed=1",
        "layer layer_id=1 seed=2 occurrence=1",
        "layer layer_id=1 phase=backward",
    ]
    assert [str(p) for p in measure_run([("target", 0, records[:2])], ["layer_id"]).points] == ["layer layer_id=0"]


def test_rows_follow_the_baselines_order() -> None:
    """Pipeline stages are merged by clock, without reordering the points of one rank."""
    stages = [
        [record("a", 0, time=5.0), record("b", 1, time=6.0)],
        [record("c", 0, time=7.0), record("d", 1, time=1.0)],
    ]
    ledgers = [
        ("baseline", rank, [r.model_copy(update={"role": "baseline", "role_rank": rank}) for r in records])
        for rank, records in enumerate(stages)
    ]
    target = ("target", 0, [record(name, i) for i, name in enumerate(["d", "c", "b", "a", "e"])])
    assert [str(p) for p in measure_run([target, *ledgers]).points] == ["a", "b", "c", "d", "e"]  # type: ignore[list-item]


# --- the table -----------------------------------------------------------------------------------------------------


def shown(verdict: Verdict) -> list[str]:
    text = StringIO()
    print_verdict(verdict, Console(file=text, width=80))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_the_table_fits_80_columns_marks_the_guilty_row_and_ends_with_one_sentence() -> None:
    """What a person reads: the inputs first, the table, the sentence last."""
    verdict = judge(measurement(ALONE), measurement(ADDED), measurement(CLEAN), measurement(FLOOR_ADDED))
    lines = shown(verdict)
    assert lines[0] == verdict.inputs
    assert lines[-1] == verdict.sentence
    assert all(len(line) <= 80 for line in lines[1:-1])
    marked = [line for line in lines if ">" in line]
    assert len(marked) == 1
    assert "layer 2" in marked[0]
    assert marked[0].count("1.8e-06") == 2
    assert "1.0e-14" in marked[0]


def test_a_pipe_gets_no_blanks_at_the_ends_of_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor a name cut in two: nobody limits the width there."""
    name = "model.layers.10.self_attn.rotary_embedding.position_table.out.cosine_and_sine"
    verdict = judge(*(measured([name, "b", "c"], ALONE[:3]) for _ in range(2)))
    monkeypatch.setattr("grafter.tools.locate_runner.locate", lambda *_, **__: verdict)
    monkeypatch.delenv("COLUMNS", raising=False)
    result = CliRunner().invoke(app, ["locate", "--baseline", "a", "--target", "b", "--out", str(tmp_path)])
    lines = result.output.splitlines()
    assert sum(line.startswith(f"    {name} ") for line in lines) == 1
    assert all(line == line.rstrip() for line in lines)


def test_names_as_long_as_the_demos_stay_on_one_line() -> None:
    """`layer layer_id=2` is not folded in 80 columns, so that rows can be read and searched."""
    names = ["embedding", *(f"layer layer_id={i}" for i in range(4))]
    lines = shown(judge(*(measured(names, rels) for rels in (ALONE, ADDED, CLEAN, FLOOR_ADDED))))
    assert sum(line.count("layer layer_id=") for line in lines[1:-1]) == 4


@given(values=st.lists(st.floats(1e-300, 2.0), min_size=2, max_size=2))
def test_a_larger_difference_has_no_shorter_bar(values: list[float]) -> None:
    """Bars are monotonic, at least one and at most BAR_WIDTH characters; equal points have none."""
    small, large = (draw_bar(value, (-301.0, 1.0)) for value in sorted(values))
    assert 1 <= len(small) <= len(large) <= BAR_WIDTH
    assert draw_bar(0.0, (-301.0, 1.0)) == draw_bar(None, (-301.0, 1.0)) == ""
    assert len(draw_bar(math.inf, (-301.0, 1.0))) == BAR_WIDTH


def test_json_is_json_even_for_an_infinite_difference() -> None:
    """An infinite difference becomes a string, since JSON has no infinity."""
    run = measurement([0.0, 1e-14, math.inf])
    parsed = json.loads(verdict_as_json(judge(run, run)), parse_constant=lambda name: pytest.fail(name))
    assert parsed["points"][2]["added"] == "inf"
    assert parsed["guilty"] == ["layer 1"]
    assert parsed["exit_code"] == 1


def test_the_documentation_states_the_factors_of_the_code() -> None:
    """docs/locate.md gives the numbers that judge, so it must follow the code."""
    text = (Path(__file__).parents[3] / "docs" / "locate.md").read_text()
    assert f"{FLOOR_FACTOR:.0f} times" in text
    assert f"{PEER_FACTOR:.0f} times" in text


def test_values_that_are_no_numbers_and_differ_are_an_infinite_difference() -> None:
    """Nothing says by how much, and they are not equal."""
    for fraction, rel in ((0.5, math.inf), (0.0, 0.0)):
        found = Difference(mismatched_fraction=fraction) if fraction else Difference(rel=0.0, mismatched_fraction=0.0)
        run = measure_run([("target", 0, [record(difference=found)])])
        (measured_point,) = run.points.values()
        assert measured_point.rel == rel and measured_point.bitwise_equal == (not fraction)


def test_a_comparison_without_figures_acquits_nobody() -> None:
    """Its reason is what the verdict says of it."""
    run = measure_run([("target", 0, [record(difference=None, reason="no room")])])
    (found,) = run.points.values()
    assert found.rel is None and found.problems == ("was compared without figures at step 0: no room",)
