"""`grafter compare` itself: verdicts, severity, findings, exit codes, JSON lines. Costs about 3 s of one core."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from compare_parts import compared, json_told, random, sides, told
from dump_parts import RankDumps

from grafter.analysis.compare.record import FindingRecord, Measures, PointRecord, json_schema
from grafter.analysis.compare.verdict import innermost_culprits, split_name, with_severity

X = random(4, 8)


def layers(directory: Path, bad: set[str], *, inputs: bool = True) -> None:
    """Two layers, each with an input and an output; `bad` ones differ at the target."""
    names = [name for layer in "01" for name in (f"l{layer}.in.x", f"l{layer}.out")]
    for side in sides(directory):
        for name in names:
            if inputs or ".in." not in name:
                side.add(name, X * 1.5 if side.role == "target" and name in bad else X)


# --- severity


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"l0.out", "l1.in.x", "l1.out"}, {"l0.out": "culprit", "l1.in.x": "unknown", "l1.out": "inherited"}),
        ({"l1.out"}, {"l1.out": "culprit"}),
        ({"l0.in.x", "l0.out"}, {"l0.in.x": "unknown", "l0.out": "inherited"}),
        (set(), {}),
    ],
)
def test_a_bad_output_is_judged_by_its_inputs(tmp_path: Path, bad: set[str], expected: dict[str, str]) -> None:
    """Out of good inputs it is the culprit, out of bad ones inherited."""
    layers(tmp_path, bad)
    assert {point.name: point.severity for point in compared(tmp_path).points if point.severity} == expected


def test_without_inputs_nobody_can_say(tmp_path: Path) -> None:
    """An output of which no input was dumped is bad for an unknown reason."""
    layers(tmp_path, {"l1.out"}, inputs=False)
    assert [point.severity for point in compared(tmp_path).points] == [None, "unknown"]


def record(name: str, verdict: str, **fields: object) -> PointRecord:
    told_of = {"order": 0, "order_b": 0, "label": name, "tags": {}, "step": 0, "phase": "forward", "occurrence": 0}
    return PointRecord.model_validate({**told_of, "name": name, "verdict": verdict, **fields})


def test_gradients_flow_the_other_way() -> None:
    """In the backward phase the gradient of the output is what a module is given."""
    points = [record("m.out", "passed", phase="backward"), record("m.in.x", "failed", phase="backward")]
    assert [point.severity for point in with_severity(points)] == [None, "culprit"]
    points[0] = record("m.out", "failed", phase="backward")
    assert [point.severity for point in with_severity(points)] == ["unknown", "inherited"]


def test_inputs_belong_to_their_own_call() -> None:
    """Another layer's, step's or call's inputs say nothing; an input that could not be judged may have been bad."""
    bad = record("m.out", "failed", tags={"layer_id": 1})
    for other in ({"tags": {"layer_id": 2}}, {"step": 1}, {"occurrence": 1}, {"name": "n.in.x"}):
        fields = {"name": "m.in.x", "tags": {"layer_id": 1}, **other}
        name = str(fields.pop("name"))
        assert with_severity([record(name, "passed", **fields), bad])[1].severity == "unknown"
    for verdict, severity in (("error", "unknown"), ("allowed", "inherited"), ("passed", "culprit")):
        given = record("m.in.x", verdict, tags={"layer_id": 1})
        assert with_severity([given, bad])[1].severity == severity


def test_of_modules_within_each_other_the_innermost_is_named() -> None:
    """A model and its layer both turn good inputs bad: the layer is meant; another layer's call is another one."""
    names = [
        ("root.out", {}),
        ("layers.out", {"layer_id": 1}),
        ("layers.mlp.out", {"layer_id": 1}),
        ("layerss.out", {}),
    ]
    points = [record(name, "failed", tags=tags, severity="culprit") for name, tags in names]
    assert [point.name for point in innermost_culprits(points)] == ["layers.mlp.out", "layerss.out"]
    apart = [points[1], record("layers.mlp.out", "failed", tags={"layer_id": 2}, severity="culprit")]
    assert innermost_culprits(apart) == apart


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.mlp.in.hidden_states", ("model.layers.mlp", "in")),
        ("m.out", ("m", "out")),
        ("m.out.0", ("m", "out")),
        ("root.out.logits", ("root", "out")),
        ("attn.out.out", ("attn.out", "out")),
        ("attn.out.in.x", ("attn.out", "in")),
        ("attn_out", None),
        ("out", None),
        ("m.in", ("m", "in")),
        ("m.weight", None),
    ],
)
def test_names_of_attach(name: str, parts: tuple[str, str] | None) -> None:
    """The module, and whether the tensor is its input or its output."""
    assert split_name(name) == parts


# --- the command


def test_a_run_is_compared_with_itself_and_names_the_culprit(tmp_path: Path) -> None:
    """`grafter compare RUN`: a table in the baseline's order, and the module that is at fault in the last sentence."""
    layers(tmp_path, {"l0.out", "l1.in.x", "l1.out"})
    code, out, err = told(tmp_path, "--threshold", "*: rel <= 1e-3")
    assert (code, err) == (1, "")
    assert [line.split("'")[1] for line in out.splitlines() if "(step=0) " in line and "'l" in line] == [
        "l0.in.x",
        "l0.out",
        "l1.in.x",
        "l1.out",
    ]
    assert "failed, culprit" in out and "failed, inherited" in out
    sentence = out.splitlines()[-1]
    assert sentence.startswith(
        "B first differs from A at 'l0.out' (step=0): rel 0.0769, where the rule is rel <= 1e-3."
    )
    assert "Its inputs agree, so the module itself is at fault. 3 of 4 points differ." in sentence


def test_equal_sides_pass(tmp_path: Path) -> None:
    """Exit code 0, and what was said of how."""
    layers(tmp_path, set())
    code, out, _ = told(tmp_path / "baseline", tmp_path / "target")
    assert code == 0
    assert out.splitlines()[-1] == "B agrees with A: all 4 points are bitwise the same."


def test_without_a_threshold_any_difference_counts(tmp_path: Path) -> None:
    """The last bit of one value fails, and the sentence says how to allow it."""
    a, b = sides(tmp_path)
    y = X.clone()
    y[1, 2] = y[1, 2].nextafter(y.new_tensor(9.0))
    a.add("x", X)
    b.add("x", y)
    code, out, _ = told(tmp_path)
    assert code == 1 and "any difference counts; --threshold '*: rel <= 1e-3' sets one" in out
    assert told(tmp_path, "--threshold", "*: max_ulp <= 1")[0] == 0


def test_a_name_that_no_rule_covers_is_an_error(tmp_path: Path) -> None:
    """Exit code 2 where all others pass; a difference elsewhere is a difference."""
    layers(tmp_path, {"l1.out"})
    code, out, _ = told(tmp_path, "--threshold", "l0.*: rel <= 1")
    assert code == 2 and "no threshold is for this name" in out
    assert out.splitlines()[-1] == (
        "Not all could be compared: 2 of 4 points have no threshold; the other 2 are within their threshold. "
        "(Why: the lines `error:` above.)"
    )
    assert told(tmp_path, "--threshold", "*.out: rel <= 1e-9")[0] == 1
    lines, summary = json_told(tmp_path, "--threshold", "l0.*: rel <= 1")
    assert [line.what for line in lines if isinstance(line, FindingRecord)] == ["no_rule", "no_rule"]
    assert summary.counts == {"passed": 2, "error": 2}


def test_what_could_not_be_read_is_no_agreement(tmp_path: Path) -> None:
    """The sentence begins with it, in whatever the rest agrees."""
    for side in sides(tmp_path):
        side.add("x", X)
        side.add("near", X * (2 if side.role == "target" else 1))
        path = side.add("y", X)
    path.write_bytes(path.read_bytes()[:-4])
    assert compared(tmp_path, allow=["near"]).summary.sentence == (
        "Not all could be compared: 1 of 3 points could not be read or measured; 1 allowed failure; the other 1 is "
        "bitwise the same."
    )
    nothing = compared(tmp_path, filter="name == 'y'").summary
    assert nothing.sentence == "Nothing could be compared: 1 of 1 point could not be read or measured."
    different = compared(tmp_path).summary
    assert different.exit_code == 1 and different.sentence.endswith("1 of 3 points could not be read or measured.")


def test_a_name_that_begins_another_is_the_one_that_was_meant(tmp_path: Path) -> None:
    """Either way round; of a long name the first letters say nothing."""
    a, b = sides(tmp_path)
    for name in ("hid", "logits_of_rank", "m"):
        a.add(name, X)
    for name in ("hidden", "logits", "model.layers.0.mlp"):
        b.add(name, X)
    near = {finding.name: finding.near for finding in compared(tmp_path).findings}
    assert near == {
        "hid": ["hidden"],
        "hidden": ["hid"],
        "logits_of_rank": ["logits"],
        "logits": ["logits_of_rank"],
        "m": [],
        "model.layers.0.mlp": [],
    }


def test_the_table_explains_a_question_mark_and_fills_no_lines_up(tmp_path: Path) -> None:
    """Only where one is shown; what is piped has no blanks at its ends, and a caption of one line."""
    layers(tmp_path, {"l0.in.x"})
    code, out, _ = told(tmp_path)
    assert code == 1 and "\n? unknown: not a module's output, or its inputs were not dumped" in out
    assert "\nrel of the worst tensor, on a logarithmic scale from 1e-16 to 1; worst row: of its rows (tokens)\n" in out
    assert all(line == line.rstrip() for line in out.splitlines())
    layers(tmp_path / "equal", set())
    assert "? unknown" not in told(tmp_path / "equal")[1]


def test_allowed_failures(tmp_path: Path) -> None:
    """They are told, and do not count."""
    layers(tmp_path, {"l1.out"})
    code, out, _ = told(tmp_path, "--allow", "l1.*")
    assert code == 0 and "B agrees with A but for 1 allowed failure: the other 3 are bitwise the same." in out
    assert told(tmp_path, "--allow", "l0.*")[0] == 1


def test_what_one_side_alone_has_is_told(tmp_path: Path) -> None:
    """With the name that was probably meant, or the tags that differ; --forbid-skips makes it exit code 2."""
    a, b = sides(tmp_path)
    a.add("attn_out", X, tags={"layer_id": 0})
    a.add("attn_outt", X)
    a.add("other", X)
    b.add("attn_out", X, tags={"layer_id": 0})
    b.add("attn_out", X, tags={"layer_id": 1})
    code, out, _ = told(tmp_path)
    assert code == 0
    assert "only A has the point 'attn_outt' (step=0); nothing at B is called so; is it attn_out there?" in out
    assert "only A has the point 'other' (step=0); nothing at B is called so." in out
    assert (
        "only B has the point 'attn_out' (layer_id=1, step=0); A has that name with other tags, steps or counts, such "
        "as 'attn_out' (layer_id=0, step=0)."
    ) in out
    assert "3 points were skipped. (Why: the lines `skipped:` above.)" in out
    assert told(tmp_path, "--forbid-skips")[0] == 2


def test_nothing_in_common_is_not_agreement(tmp_path: Path) -> None:
    """Exit code 2."""
    a, b = sides(tmp_path)
    a.add("x", X)
    b.add("y", X)
    code, out, _ = told(tmp_path)
    assert code == 2 and "Nothing could be compared: A and B have no point in common." in out
    for expression, why in (
        ("name == 'z'", "--filter matched none of A's 1 and none of B's 1 points."),
        ("name == 'x'", "--filter chose 1 of A's 1 points and 0 of B's 1, and these have none in common."),
    ):
        code, out, _ = told(tmp_path, "--filter", expression)
        assert code == 2 and f"Nothing could be compared: {why}" in out


def test_a_filter_chooses_points(tmp_path: Path) -> None:
    """Over tags, name and step, as everywhere."""
    layers(tmp_path, {"l0.out"})
    lines, summary = json_told(tmp_path, "--filter", "name.startswith('l1')")
    assert [line.name for line in lines if isinstance(line, PointRecord)] == ["l1.in.x", "l1.out"]
    assert summary.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "*: rell <= 1"], "did you mean `rel`?"),
        (["--filter", "name = 3"], "compare with `==`"),
        (["--allow", "{"], "braces name one path segment"),
        (["--plan", "nowhere.yaml"], "cannot be read"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_read(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Exit code 2, one message, no traceback."""
    layers(tmp_path, set())
    code, out, err = told(tmp_path, *arguments)
    assert (code, out) == (2, "") and message in err


def test_a_directory_without_dumps_is_told(tmp_path: Path) -> None:
    """Exit code 2, with what is there instead."""
    code, _, err = told(tmp_path / "none")
    assert code == 2 and "there is no such directory" in err
    RankDumps(tmp_path / "baseline").add("x", X)
    code, _, err = told(tmp_path)
    assert code == 2 and "no dumps of the target" in err


def test_thresholds_of_a_plan_come_after_those_of_the_command(tmp_path: Path) -> None:
    """So that one can be tried without editing the file."""
    layers(tmp_path, {"l1.out"})
    plan = tmp_path / "plan.yaml"
    plan.write_text("timeout: 60\nthresholds:\n  - {match: '*', require: rel <= 1e-3}\n")
    assert told(tmp_path, "--plan", plan)[0] == 1
    lines, _ = json_told(tmp_path, "--plan", plan, "--threshold", "l1.*: rel <= 0.1")
    rules = {line.name: line.rule for line in lines if isinstance(line, PointRecord)}
    assert (rules["l0.out"], rules["l1.out"]) == ("*: rel <= 1e-3", "l1.*: rel <= 0.1")


# --- JSON


def test_json_lines_have_a_schema(tmp_path: Path) -> None:
    """A header, points, findings, a summary; every line is read back as what it was, infinities included."""
    a, b = sides(tmp_path)
    a.add("x", X * 0)
    b.add("x", X)
    b.add("only", X)
    lines, summary = json_told(tmp_path)
    assert [line.kind for line in lines] == ["comparison", "point", "finding", "summary"]
    point = lines[1]
    assert isinstance(point, PointRecord)
    assert point.values["rel_l2"] == float("inf") and point.values["cosine"] == 0
    measures = point.leaves[0].measures
    assert isinstance(measures, Measures) and sum(measures.magnitudes.values()) == X.numel()
    assert summary.first_divergence == "'x' (step=0)" and summary.bytes_read == 2 * X.numel() * 4
    names = json.dumps(json_schema())
    assert all(kind in names for kind in ("ComparisonHeader", "PointRecord", "FindingRecord", "SummaryRecord"))


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """Escape sequences and markup in a hostile record stay text."""
    for side in sides(tmp_path):
        record_of = side.record("x", {"": X})
        side.add("x", X, line=False)
        hostile = {**record_of, "name": "\x1b[2J[bold]x[/bold]", "file": None, "level": "checksum"}
        side.write_line(json.dumps(hostile))
    _, out, _ = told(tmp_path)
    assert "\x1b" not in out and "[bold]x[/bold]" in out


# --- size


def test_points_are_compared_by_several_threads_in_the_order_of_one(tmp_path: Path) -> None:
    """No record depends on the threads or the block, but for the seconds; each point is measured by one thread."""
    a, b = sides(tmp_path)
    for number in range(12):
        a.add(f"x{number}", X + number)
        b.add(f"x{number}", X + number * 1.001)
    before = threading.active_count()
    found = [
        [
            point.model_copy(update={"seconds": 0.0})
            for point in compared(tmp_path, threads=threads, block_bytes=size).points
        ]
        for threads, size in ((1, 1 << 20), (4, 1 << 20), (3, 16))
    ]
    assert found[0] == found[1] == found[2]
    assert threading.active_count() == before
