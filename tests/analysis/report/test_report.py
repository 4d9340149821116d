"""What a page says of a run, of `grafter locate`, of a comparison; and what hostile files do to it: nothing."""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from dump_parts import RankDumps
from hypothesis import given, settings
from hypothesis import strategies as st
from report_parts import ADDED, ALONE, FLOOR, LAYERS, layers, record, summary, write_dumps, write_locate, write_run
from typer.testing import CliRunner

from grafter.analysis.report import html
from grafter.analysis.report.html import MissingExtra, encode_page, render_page
from grafter.analysis.report.page_data import PageData, PageFinding, PagePoint
from grafter.analysis.report.run_page import describe_divergence, find_layer, flatten_facts
from grafter.analysis.report.writing import can_show, make_page, page_directory, write_page
from grafter.cli.main import app
from grafter.config.settings.config import GrafterConfig
from grafter.core.records import Difference, LedgerRecord
from grafter.core.roles import RankIdentity
from grafter.errors import GrafterError, UsageError
from grafter.store.ledger import LedgerWriter
from grafter.store.run_files import write_run_facts


def page(**changes: Any) -> PageData:
    fields: dict[str, Any] = {"kind": "run", "title": "t", "source": "s", "sides": ("baseline", "target"), "points": ()}
    return PageData(**{**fields, **changes})


def point(order: int = 0, **changes: Any) -> PagePoint:
    fields: dict[str, Any] = {"order": order, "label": f"p {order}", "name": "p", "tags": {}, "step": 0}
    return PagePoint(**{**fields, "phase": "forward", "outcome": "compared", **changes})


def problems(of: PageData) -> list[str]:
    return [finding.text for finding in of.findings if finding.level == "problem"]


def data_of(html: str) -> dict[str, Any]:
    """What the page's script will read."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


# A live run.


def test_a_run_becomes_its_points_with_all_that_ledgers_say(tmp_path: Path) -> None:
    """Each row of `grafter show` is a point, with every measure, timings by stage, and the layer it is of."""
    made = make_page([write_run(tmp_path / "run", layers(ALONE))])
    assert [one.difference["rel"] for one in made.points] == ALONE * 2
    assert [one.layer for one in made.points] == [0, 1, 2, 3] * 2
    assert [one.step for one in made.points] == [0] * 4 + [1] * 4
    worst = made.points[2]
    assert worst.label == "layers.out layer_id=2"
    assert set(worst.difference) == {"rel", "rel_l2", "max_abs", "mean_abs", "cosine"}
    assert worst.seconds == {"pairing": 0.003, "exchange": 0.002}
    assert (worst.shape, worst.dtype, worst.size_bytes) == ((2, 8, 16), "float32", 2048)
    assert worst.call_site == "model.py:7 in forward"
    assert problems(made) == []
    assert made.title == "Live pair: 8 compared of 8 matched points"


def test_a_compared_run_is_told_where_it_first_and_most_differs(tmp_path: Path) -> None:
    """Nobody said what is too much, so the verdict judges nothing: it names the first, the largest, the jump."""
    verdict = make_page([write_run(tmp_path / "run", layers(ALONE))]).verdict
    assert verdict is not None and verdict.tone == "open" and verdict.order == 2
    assert "first difference is at layers.out layer_id=1, step 0 (rel 2.0e-14)" in verdict.sentence
    assert "largest at layers.out layer_id=2, step 0 (rel 1.8e-06)" in verdict.sentence
    assert "from layers.out layer_id=1 to layers.out layer_id=2" in verdict.details[0]
    equal = make_page([write_run(tmp_path / "equal", layers([0.0] * 4))]).verdict
    assert equal is not None and (equal.tone, equal.sentence) == ("good", "All 8 compared points are equal.")


def test_a_grafted_run_shows_what_each_point_adds_and_names_the_one_that_stands_out(tmp_path: Path) -> None:
    """A grafted point's own difference is what it adds, judged as `grafter locate` judges without a floor."""
    made = make_page([write_run(tmp_path / "run", layers(ADDED, direction="b2t"))])
    assert [one.added for one in made.points] == ADDED * 2
    assert made.verdict is not None and made.verdict.tone == "bad"
    assert "layers.out layer_id=2" in made.verdict.sentence
    assert made.points[made.verdict.order or 0].layer == 2
    assert [one.order for one in made.points if one.guilty] == [2, 6]
    assert made.adds_note == ""


def test_what_failed_and_what_the_summaries_say_is_found_first(tmp_path: Path) -> None:
    """Failed points, ranks that left with an error, and notes, as `grafter show` has them."""
    failed = [record(role, 0, layer=0, outcome="failed", reason="shape [2] does not fit") for role in ("target",)]
    run = write_run(tmp_path / "run", [*layers(ALONE, steps=1)[2:], *failed])
    writer = LedgerWriter(run / "target", 0)
    writer.write_summary(summary("target", error="the peer is gone", error_kind="PeerLostError"))
    writer.close()
    made = make_page([run])
    assert any("1 point failed" in text for text in problems(made))
    assert any("target 0 left with PeerLostError: the peer is gone" in text for text in problems(made))
    assert [one.reason for one in made.points if one.is_trouble] == ["shape [2] does not fit"]


def test_points_that_only_one_job_came_to_are_on_the_page(tmp_path: Path) -> None:
    """Each with its reason, and all of them counted in a note; they are no problem of the run."""
    told = {"outcome": "skipped", "reason": "only the target reached this point", "only_in": "target"}
    alone = record("target", 50, layer=3, name="layers.experts.1.out", participants={"target": [0]}, **told)
    made = make_page([write_run(tmp_path / "run", [*layers(ALONE, steps=1), alone])])
    assert [one.reason for one in made.points if one.is_trouble] == ["only the target reached this point"]
    texts = [finding.text for finding in made.findings]
    assert "1 point was only in the target, and not judged: layers.experts.*.out (1 call)" in texts
    assert problems(made) == []


def test_values_that_are_not_finite_are_worse_than_any_number(tmp_path: Path) -> None:
    """NaN on one side is counted, drawn apart, and adds infinitely much."""
    bad = Difference(rel=0.0, nan=3)
    records = layers(ADDED, steps=1, direction="b2t")
    records[-1] = record("target", 3, layer=3, direction="b2t", difference=bad, leaves=[])
    made = make_page([write_run(tmp_path / "run", records)])
    last = made.points[3]
    assert (last.nonfinite, last.added) == (3, math.inf)
    assert max(made.points, key=lambda one: one.badness) is last


def test_a_modules_output_is_set_against_the_worst_of_its_inputs(tmp_path: Path) -> None:
    """By the names of `grafter.attach`; of gradients the other way round."""
    names = [("mlp.in.x", 1e-12), ("mlp.in.mask", 1e-10), ("mlp.out", 1e-6)]
    records = [record("target", n, rel, layer=1, name=name) for n, (name, rel) in enumerate(names)]
    back = [("mlp.out", 1e-3), ("mlp.in.x", 1e-2)]
    records += [
        record("target", 3 + n, rel, layer=1, name=name, phase="backward") for n, (name, rel) in enumerate(back)
    ]
    made = make_page([write_run(tmp_path / "run", records)])
    assert [one.inputs_rel for one in made.points] == [None, None, 1e-10, None, 1e-3]


@pytest.mark.parametrize(
    ("name", "tags", "layer"),
    [
        ("out", {"layer_id": 3}, 3),
        ("out", {"block_idx": 5}, 5),
        ("model.layers.12.mlp", {}, 12),
        ("transformer.h.4.attn", {}, 4),
        ("out", {"layer_id": True}, None),
        ("out", {"player_id": 3}, None),
        ("width.4", {}, None),
        ("layers." + "9" * 5000, {}, None),
    ],
)
def test_the_layer_is_found_in_tags_or_name(name: str, tags: dict[str, Any], layer: int | None) -> None:
    """A tag that says layer or block, else a number after layers, blocks or h."""
    assert find_layer(name, tags) == layer


def test_both_environments_are_shown_fact_by_fact(tmp_path: Path) -> None:
    """Command, host, versions and settings of both jobs; a job without run.json says so."""
    run = write_run(tmp_path / "run", layers(ALONE), hostname="node2", configuration={"timeout": 30.0, "plan": None})
    one, other = make_page([run]).environments
    assert (one.facts["host"], other.facts["host"]) == ("node1", "node2")
    assert other.facts["command"] == "python target.py"
    assert other.facts["GRAFTER_TIMEOUT"] == "30.0" and "GRAFTER_PLAN" not in other.facts
    assert other.facts["torch"] == "2.13.0+cpu"
    assert set(data_of(render_page(make_page([run])))["own_facts"]) >= {"time", "run_id", "dumps", "GRAFTER_ROLE"}
    (run / "baseline" / "run.json").unlink()
    assert "missing (the job ran" in make_page([run]).environments[0].facts["run.json"]


@pytest.mark.parametrize(
    ("time", "shown"),
    [(1795276498.9368813, "2026-11-21 15:54:58 UTC"), (1e300, "1e+300"), ("soon", "soon"), ([1], "[1]"), (None, None)],
)
def test_the_time_of_a_run_is_a_date(time: object, shown: str | None) -> None:
    """In UTC; what is none in a damaged file is shown as it is."""
    assert flatten_facts("target", {"time": time}).get("time") == shown


def test_the_command_of_a_run_is_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the interpreter and its options, which `sys.argv` has not."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train", "--lr=1"])
    config = GrafterConfig(role="target")
    write_run_facts(tmp_path, config, RankIdentity("target", 0, 1), "run", "id", {"target": 1})
    facts = json.loads((tmp_path / "run.json").read_text())
    assert flatten_facts("target", facts)["command"] == "python -m train --lr=1"


def test_a_long_verdict_is_not_set_smaller_than_a_short_one() -> None:
    """It may be lighter and wider; and figures below the facts of a point keep their distance."""
    html = render_page(page())
    (long,) = re.findall(r"\.verdict\.long \{(.*?)\}", html)
    assert "font-size" not in long
    assert re.search(r"\.pair \{[^}]*margin-top", html)


def test_the_newest_run_of_an_out_directory_is_taken(tmp_path: Path) -> None:
    """As `grafter show` takes it, and the page lies beside its ledgers."""
    run = write_run(tmp_path / "out" / "run", layers(ALONE))
    assert make_page([tmp_path / "out"]).source == str(run)
    assert page_directory(tmp_path / "out") == run
    with pytest.raises(GrafterError, match="no such file"):
        make_page([tmp_path / "nothing"])
    with pytest.raises(UsageError, match="3 places"):
        make_page([run, run, run])


# `grafter locate`.


def test_the_newest_of_runs_and_locates_is_taken(tmp_path: Path) -> None:
    """A directory that holds both kinds has one that is the newest."""
    run, located = write_run(tmp_path / "run", layers(ALONE)), write_locate(tmp_path / "locate-1")
    for role in ("baseline", "target"):
        os.utime(run / role, (1e9, 1e9))
    assert make_page([tmp_path]).source == str(located)
    for role in ("baseline", "target"):
        os.utime(run / role, (3e9, 3e9))
    assert make_page([tmp_path]).source == str(run) and page_directory(tmp_path) == run


def test_locates_page_has_the_lines_left_alone_and_the_bars_grafted(tmp_path: Path) -> None:
    """Points of the run left alone, each with what it adds and its floor; the culprit is marked."""
    made = make_page([write_locate(tmp_path)])
    assert made.kind == "locate"
    assert [one.difference["rel"] for one in made.points] == ALONE * 2
    assert [one.added for one in made.points] == ADDED * 2
    assert [one.floor for one in made.points] == FLOOR * 2
    assert [one.order for one in made.points if one.guilty] == [2, 6]
    assert made.verdict is not None and made.verdict.tone == "bad"
    assert "goes wrong in layers.out layer_id=2" in made.verdict.sentence
    assert any("verdict.json" in finding.text for finding in made.findings)


def test_locates_page_without_the_grafted_run_says_so(tmp_path: Path) -> None:
    """A locate that was ended early still has a page, which does not pretend to a verdict."""
    write_run(tmp_path / "alone", layers(ALONE))
    made = make_page([tmp_path])
    assert made.verdict is None
    assert "`grafted` does not exist" in problems(made)[0]
    assert all(one.added is None for one in made.points)


# Hostile files.


def test_damaged_files_are_findings_and_the_rest_is_shown(tmp_path: Path) -> None:
    """No line, summary or run.json of a run, however bad, keeps the page from being written."""
    run = write_run(tmp_path / "run", layers(ALONE))
    ledger = run / "target" / "rank0.ledger.jsonl"
    ledger.write_bytes(b'{"not": "a record"}\n\xff\xfe\x00\n' + b"[" * 100_000 + b"\n" + ledger.read_bytes() + b'{"cut')
    (run / "target" / "rank0.summary.json").write_text("[]")
    (run / "target" / "run.json").write_text("{" * 100_000)
    (run / "baseline" / "run.json").write_text("[1, 2]")
    os.mkfifo(run / "target" / "rank1.ledger.jsonl")
    (run / "target" / "rank²7.ledger.jsonl").write_text("")
    (run / "baseline" / "rank0.summary.json").unlink()
    (run / "baseline" / "rank0.summary.json").mkdir()
    made = make_page([run])
    assert len(made.points) == 2 * LAYERS
    told = "\n".join(finding.text for finding in made.findings)
    for what in (
        "line 1 is not a record",
        "line 2 is not a record",
        "line 3 is not a record",
        "rank1.ledger.jsonl cannot be",
    ):
        assert what in told
    assert "target/run.json is not JSON" in told and "baseline/run.json is not a JSON object" in told
    assert "target/rank0.summary.json is not a summary" in told and "does not have a rank's name" in told
    assert data_of(render_page(made))["columns"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(
    changes=st.lists(st.tuples(st.sampled_from(sorted(LedgerRecord.model_fields)), _JSON), max_size=4),
    junk=st.binary(max_size=40),
    facts=_JSON,
)
def test_whatever_a_ledger_holds_a_page_is_made(changes: list[tuple[str, Any]], junk: bytes, facts: Any) -> None:
    """Records with any field replaced by anything, and bytes that are nothing at all."""
    with tempfile.TemporaryDirectory() as directory:
        run = write_run(Path(directory) / "run", layers(ADDED, steps=1, direction="b2t"))
        changed = [{**json.loads(one.model_dump_json()), **dict(changes)} for one in layers(ALONE, steps=1)]
        with (run / "target" / "rank0.ledger.jsonl").open("ab") as file:
            file.write(b"\n".join([junk, *(json.dumps(one).encode() for one in changed), junk]))
        (run / "target" / "run.json").write_text(json.dumps(facts))
        (run / "target" / "rank0.summary.json").write_bytes(junk)
        made = make_page([run])
        assert len(made.points) >= 1
        json.loads(encode_page(made))


def test_hostile_numbers_and_texts_are_bounded(tmp_path: Path) -> None:
    """Infinities, huge shapes and endless names cost neither the page nor the browser."""
    huge = record("target", 0, layer=0, name="n" * 10**6, outcome="failed", reason="r" * 10**6)
    odd = record("target", 1, layer=1, seconds={"pairing": math.inf, "exchange": math.nan})
    wide = odd.model_copy(update={"sequence": 2, "leaves": [odd.leaves[0].model_copy(update={"shape": [1] * 10**5})]})
    wide = wide.model_copy(update={"difference": Difference(rel=math.nan, max_abs=math.inf, cosine=-math.inf)})
    html = render_page(make_page([write_run(tmp_path / "run", [huge, odd, wide])]))
    assert len(html) < 2_200_000
    rows = data_of(html)["rows"]
    assert len(rows) == 2 or len(rows) == 3


@given(text=st.text(max_size=60), value=st.floats())
def test_no_text_can_leave_its_element_and_every_value_comes_back(text: str, value: float) -> None:
    """Whatever a name holds, `</script>` too, the JSON in the page has no markup and reads back as it was."""
    name = f"{text}</script><script>alert(1)</script><!--{text}"
    encoded = encode_page(page(points=(point(label=name, name=name, difference={"rel": value}, tags={text: value}),)))
    assert not set(encoded) & set("<>&") and encoded.isascii()
    content = json.loads(encoded)
    row = dict(zip(content["columns"], content["rows"][0], strict=True))
    assert row["name"] == name
    back = float(row["difference"]["rel"])
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_too_many_points_keep_those_in_trouble_and_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page stays usable: it has at most so many points, in their order, and says what it leaves out."""
    monkeypatch.setattr(html, "MOST_POINTS", 3)
    points = [point(n, difference={"rel": n / 10}) for n in range(6)] + [point(6, outcome="failed")]
    bounded = html.bound_page(page(points=tuple(points)))
    assert [one.order for one in bounded.points] == [4, 5, 6]
    assert "3 of 7 points" in bounded.findings[0].text
    many = tuple(PageFinding("note", str(n)) for n in range(1000))
    assert len(html.bound_page(page(findings=many)).findings) == html.MOST_FINDINGS + 1


# The page itself.


def test_the_page_lets_nothing_be_fetched_and_runs_only_its_own_scripts() -> None:
    """The policy names the hash of the one inline script and of the unpacked library, and forbids every request."""
    html = render_page(page())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert rules["base-uri"] == "'none'" and rules["form-action"] == "'none'"
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in rules["script-src"] and rules["script-src"].count("sha256") == 2
    assert "unsafe" not in rules["script-src"]
    outside = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", outside) and "url(" not in outside


def test_a_title_with_html_in_it_stays_text() -> None:
    """What the template itself shows is escaped, too."""
    html = render_page(page(title="<img src=x onerror=alert(1)>"))
    assert "<img" not in html.split("<body>")[0]


def test_the_same_data_is_the_same_page() -> None:
    """Nothing in it depends on when or where it is written, but for the time that it shows."""
    assert render_page(page(), made_at=0.0) == render_page(page(), made_at=0.0)


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_a_missing_package_is_told_with_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, for either of the two."""
    from grafter.analysis.report import html

    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **more)

    html._plotly_script.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=rf"needs {package}.*pip install 'jinja2>=3\.1' 'plotly>=6'"):
        render_page(page())
    html._plotly_script.cache_clear()


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """An earlier page is replaced at once; where it cannot be written, nothing is left behind, and nothing made."""
    path = tmp_path / "here" / "report.html"
    with pytest.raises(GrafterError, match="cannot be written"):
        write_page(page(), path)
    path.parent.mkdir()
    write_page(page(), path)
    write_page(page(title="again"), path)
    assert "again" in path.read_text() and os.listdir(path.parent) == ["report.html"]
    assert path.stat().st_mode & 0o777 == 0o644
    (tmp_path / "file").write_text("")
    with pytest.raises(GrafterError, match="cannot be written"):
        write_page(page(), tmp_path / "file" / "report.html")


# The command.


def test_the_command_writes_the_page_beside_the_ledgers(tmp_path: Path) -> None:
    """It names the page, and --out puts it elsewhere."""
    run = write_run(tmp_path / "run", layers(ALONE))
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == f"report: {run / 'report.html'}"
    assert len(data_of((run / "report.html").read_text())["rows"]) == 2 * LAYERS
    elsewhere = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(run), "--out", str(elsewhere)]).exit_code == 0
    assert elsewhere.is_file()


def test_wrong_usage_of_the_command(tmp_path: Path) -> None:
    """What is no run is an error of one line; a directory is no --out, and none is made for it."""
    missing = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "no such file" in missing.output and "Traceback" not in missing.output
    run = write_run(tmp_path / "run", layers(ALONE))
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path)])
    assert result.exit_code == 2 and "is a directory" in result.output
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "misspelt" / "x.html")])
    assert result.exit_code == 2 and "there is no directory" in result.output
    assert not (tmp_path / "misspelt").exists()


def test_a_browser_is_opened_only_where_somebody_can_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a build, not without a display, and never unasked."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    monkeypatch.setattr("sys.platform", "linux")
    for variable in ("CI", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    run = str(write_run(tmp_path / "run", layers(ALONE)))
    assert not can_show()
    told = CliRunner().invoke(app, ["report", run, "--open"])
    assert told.exit_code == 0 and "no display" in told.output
    monkeypatch.setenv("DISPLAY", ":0")
    CliRunner().invoke(app, ["report", run])
    assert opened == []
    CliRunner().invoke(app, ["report", run, "--open"])
    assert opened == [(Path(run) / "report.html").resolve().as_uri()]
    monkeypatch.setenv("CI", "true")
    assert not can_show()


def test_tensorboard_gets_a_curve_per_point(tmp_path: Path) -> None:
    """Every measure, step by step, under names that group by measure."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    run = write_run(tmp_path / "run", layers(ADDED, steps=3, direction="b2t"))
    result = CliRunner().invoke(app, ["report", str(run), "--tensorboard", str(tmp_path / "tb")])
    assert result.exit_code == 0, result.output
    events = loading.EventAccumulator(str(tmp_path / "tb")).Reload()
    tags = events.Tags()["scalars"]
    assert len(tags) == 3 * LAYERS
    curve = events.Scalars("adds/layers.out.layer_id=2")
    assert [event.step for event in curve] == [0, 1, 2]
    assert [event.value for event in curve] == pytest.approx([1.8e-6] * 3)


def test_dumps_without_a_common_point_have_a_title_that_says_so(tmp_path: Path) -> None:
    """And not that no point of none was compared."""
    for role, name in (("baseline", "x"), ("target", "y")):
        RankDumps(tmp_path / role, role=role).add(name, torch.zeros(2))
    assert make_page([tmp_path / "baseline", tmp_path / "target"]).title == "Dumps compared: nothing in common"


def test_a_run_that_only_dumped_is_compared(tmp_path: Path) -> None:
    """Its ledgers are empty, its dumps are not: the page is that of `grafter compare RUN`."""
    run = write_run(tmp_path / "run", [])
    write_dumps(run)
    made = make_page([run])
    assert made.kind == "comparison"
    assert [one.outcome for one in made.points] == ["passed", "passed", "failed", "passed"]


EQUAL, OTHER_BITS = {"rel": 0.0, "mismatched_fraction": 0.0}, {"mismatched_fraction": 0.25}


@pytest.mark.parametrize(
    ("figures", "sentence", "tone"),
    [
        ([EQUAL] * 2, "All 2 compared points are equal.", "good"),
        ([EQUAL, {}], "All 1 compared points are equal; 1 of 2 were not compared.", "open"),
        ([EQUAL | OTHER_BITS], "The first difference is at p 0, step 0 (other bits in 0.25", "open"),
        ([OTHER_BITS], "The first difference is at p 0, step 0 (other bits in 0.25", "open"),
    ],
)
def test_a_page_says_equal_only_of_what_was_compared(figures: list[dict[str, float]], sentence: str, tone: str) -> None:
    """-0.0 against 0.0 differs, though rel is 0; what has no figures was not compared."""
    found = describe_divergence([point(number, difference=own) for number, own in enumerate(figures)])
    assert found is not None and found.sentence.startswith(sentence) and found.tone == tone
