"""Heatmaps and histograms of dumped tensors, and the pages of comparisons that hold them."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dump_parts import RankDumps
from hypothesis import given, settings
from hypothesis import strategies as st
from report_parts import ALONE, layers, write_dumps, write_run

from grafter.analysis.compare.comparison import Choice, compare, open_both
from grafter.analysis.report import dumped_pictures, pictures
from grafter.analysis.report.pictures import BINS, Heatmap, draw_pair
from grafter.analysis.report.writing import make_page
from grafter.cli.compare_table import json_lines
from grafter.config.thresholds import parse_threshold
from grafter.core.layout.runs import whole
from grafter.core.layout.shares import RoleShares, Share
from grafter.errors import GrafterError


class InMemory:
    """A whole tensor as pictures read one, with no file behind it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype
        self.dim_names = None
        self.replicas = 1
        share = Share(tuple(whole(size) for size in self.shape))
        self.whole = RoleShares("a", "nothing declared", None, self.shape, {0: share})

    def read(self, offset: Any = None, size: Any = None) -> torch.Tensor:
        if offset is None:
            return self.tensor
        return self.tensor[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))]

    def copies(self, offset: Any = None, size: Any = None) -> Any:
        yield (0,), self.read(offset, size)


def cells(heatmap: Heatmap) -> np.ndarray[Any, Any]:
    """The largest |a - b| of each cell, as the page's script decodes it."""
    codes = np.frombuffer(base64.b64decode(heatmap.codes), "<u2").reshape(heatmap.rows, heatmap.columns)
    shares = np.minimum(codes.astype(float) - 1, 65533) / 65533
    decoded = 10.0 ** np.clip(heatmap.low + (heatmap.high - heatmap.low) * shares, -300, 300)
    return np.where(codes == 0, 0.0, np.where(codes == 65535, np.inf, decoded))


def draw(a: torch.Tensor, b: torch.Tensor) -> pictures.Picture:
    return draw_pair(0, "", InMemory(a), InMemory(b))


@settings(max_examples=60)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 100, 170]), max_size=3).filter(lambda s: np.prod(s, dtype=int) < 40000),
    block=st.sampled_from([1000, 5000, 1 << 21]),
    seed=st.integers(0, 2**16),
)
def test_every_cell_holds_the_largest_difference_within_it(shape: list[int], block: int, seed: int) -> None:
    """Whatever the shape and the blocks it is read in, each picture is the maximum over its cell and other dims."""
    torch.manual_seed(seed)
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    b = torch.where(torch.rand(shape) < 0.5, a, b)
    before, pictures._BLOCK_NUMEL = pictures._BLOCK_NUMEL, block
    try:
        drawn = draw(a, b)
    finally:
        pictures._BLOCK_NUMEL = before
    gap = (a - b).abs().numpy()
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    pairs = [(r, c) for r in wide for c in wide if r < c]
    assert len(drawn.heatmaps) == (len(pairs) if len(wide) > 1 else len(wide))
    for heatmap, (row, column) in zip(drawn.heatmaps, reversed(pairs), strict=False):
        flat = gap.max(axis=tuple(dim for dim in range(gap.ndim) if dim not in (row, column)))
        expected = np.zeros((heatmap.rows, heatmap.columns))
        for r in range(flat.shape[0]):
            for c in range(flat.shape[1]):
                place = r * heatmap.rows // flat.shape[0], c * heatmap.columns // flat.shape[1]
                expected[place] = max(expected[place], flat[r, c])
        np.testing.assert_allclose(cells(heatmap), expected, rtol=2e-3)
        assert heatmap.rows <= pictures.MOST_ROWS and heatmap.columns <= pictures.MOST_COLUMNS


def test_one_bad_row_in_a_thousand_stays_visible() -> None:
    """Cells hold maxima, no averages: a single row that differs is the only one that is not flat."""
    a = torch.ones(4096, 512)
    b = a.clone()
    b[1234] += 1e-3
    heatmap = draw(a, b).heatmaps[0]
    bad = np.nonzero(cells(heatmap).any(axis=1))[0]
    assert bad.tolist() == [1234 * heatmap.rows // 4096]
    assert (heatmap.rows, heatmap.columns) == (pictures.MOST_ROWS, pictures.MOST_COLUMNS)


def test_values_that_are_not_finite_on_one_side_are_marked() -> None:
    """NaN against a number is a cell of its own kind; NaN against NaN and Inf against Inf are equal."""
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([[nan, 1.0, inf, 1.0], [inf, 2.0, 3.0, 1.0]])
    b = torch.tensor([[nan, nan, inf, 1.0], [-inf, 2.0, 3.5, inf]])
    drawn = draw(a, b)
    expected = np.array([[0, np.inf, 0, 0], [np.inf, 0, 0.5, np.inf]])
    np.testing.assert_allclose(cells(drawn.heatmaps[0]), expected)
    assert drawn.histogram is not None
    assert (drawn.histogram.nonfinite_a, drawn.histogram.nonfinite_b) == (3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_both_sides_are_counted_in_the_same_bins(dtype: torch.dtype) -> None:
    """Every finite value is in one bin of its side, whatever the dtype; complex ones as their magnitude."""
    torch.manual_seed(3)
    a, b = (torch.randn(50, 40) * 10).int().to(dtype), (torch.randn(50, 40) * 9).int().to(dtype)
    histogram = draw(a, b).histogram
    assert histogram is not None
    assert sum(histogram.a) == sum(histogram.b) == 2000 and len(histogram.a) == BINS
    both = torch.stack([a, b])
    both = (both.abs() if both.is_complex() else both).double()
    assert (histogram.low, histogram.high) == (float(both.min()), float(both.max()))


@pytest.mark.parametrize("shape", [(), (0, 4), (1, 1), (5,)])
def test_shapes_without_two_dims_are_drawn_as_far_as_they_go(shape: tuple[int, ...]) -> None:
    """A single number has a histogram alone, a vector one row, and nothing at all is no error."""
    drawn = draw(torch.ones(shape), torch.zeros(shape))
    assert len(drawn.heatmaps) == (1 if shape == (5,) else 0)
    assert (drawn.histogram is None) == (shape == (0, 4)) == bool(drawn.why_none)


# Pages with pictures.


def test_a_live_run_that_also_dumped_has_pictures_of_its_worst_points(tmp_path: Path) -> None:
    """The worst first; each with a heatmap of every two dims, the last two first, by the names that were declared."""
    run = write_dumps(write_run(tmp_path / "run", layers(ALONE, steps=1)))
    made = make_page([run])
    assert made.kind == "run"
    assert [picture.order for picture in made.pictures] == [2, 3, 1, 0]
    worst = made.pictures[0]
    assert [(one.row_dim, one.column_dim) for one in worst.heatmaps] == [("s", "h"), ("b", "h"), ("b", "s")]
    shown = cells(worst.heatmaps[0])
    assert np.unravel_index(shown.argmax(), shown.shape) == (3, 5)
    assert np.count_nonzero(shown) == 16
    assert made.pictures_note == ""


def test_a_page_has_no_more_pictures_than_it_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by count nor by bytes, and it says of how many they are the worst."""
    run = write_dumps(write_run(tmp_path / "run", layers(ALONE, steps=1)))
    monkeypatch.setattr(dumped_pictures, "MOST_BYTES", 100)
    made = make_page([run])
    assert [picture.order for picture in made.pictures] == [2]
    assert made.pictures_note == "The page draws the point that differs most, of 4 that both jobs dumped."


def test_without_dumps_the_page_says_how_to_get_them(tmp_path: Path) -> None:
    """Of neither job, or of one alone."""
    run = write_run(tmp_path / "run", layers(ALONE))
    assert "--dump" in make_page([run]).pictures_note
    write_dumps(run)
    shutil.rmtree(run / "target" / "rank0")
    (run / "target" / "rank0.dumps.jsonl").unlink()
    assert "--dump" in make_page([run]).pictures_note


def test_a_damaged_dump_costs_its_own_picture(tmp_path: Path) -> None:
    """What is wrong with a file is told where its picture would be; the others are drawn."""
    run = write_dumps(write_run(tmp_path / "run", layers(ALONE, steps=1)))
    broken = next((run / "target" / "rank0").glob("000002-*"))
    broken.write_bytes(broken.read_bytes()[:-100])
    (run / "baseline" / "rank0.dumps.jsonl").open("a").write("{}\n")
    made = make_page([run])
    by_order = {picture.order: picture for picture in made.pictures}
    assert "cannot be drawn" in by_order[2].why_none and not by_order[2].heatmaps
    assert by_order[3].heatmaps
    assert any("dumps of the baseline" in finding.text for finding in made.findings)


def comparison_lines(run: Path, *thresholds: str) -> list[str]:
    a, b = open_both(run, None)
    return list(json_lines(compare(a, b, Choice(thresholds=[parse_threshold(text) for text in thresholds]))))


def test_two_directories_of_dumps_are_compared(tmp_path: Path) -> None:
    """`grafter report A B`: verdicts, measures, pictures, the sizes of differences, both environments."""
    run = write_dumps(tmp_path / "run")
    (run / "baseline" / "run.json").write_text(json.dumps({"hostname": "node1", "command": ["python", "a.py"]}))
    made = make_page([run / "baseline", run / "target"])
    assert [one.outcome for one in made.points] == ["passed", "passed", "failed", "passed"]
    assert made.sides == ("A (baseline)", "B (target)")
    worst = made.points[2]
    assert worst.difference["max_abs"] == pytest.approx(2.001, rel=1e-3) and worst.worst_index == (1, 3, 5)
    assert "worst_row_rel" in worst.difference and worst.shape == (2, 8, 16)
    assert made.pictures[0].order == 2
    assert sum(number for _, number in made.pictures[0].magnitudes) == 2 * 8 * 16
    assert made.pictures[0].magnitudes[0] == (None, 2 * 8 * 16 - 16)
    assert made.verdict is not None and (made.verdict.tone, made.verdict.order) == ("bad", 2)
    assert made.environments[0].facts["host"] == "node1"


def test_a_saved_comparison_is_shown_as_it_was_judged(tmp_path: Path) -> None:
    """Its thresholds hold; and where the dumps are gone, there are still the sizes of the differences."""
    run = write_dumps(tmp_path / "run")
    saved = tmp_path / "c.jsonl"
    saved.write_text("\n".join(comparison_lines(run, "*: max_abs <= 5")) + "\n")
    made = make_page([saved])
    assert [one.outcome for one in made.points] == ["passed"] * 4
    assert made.verdict is not None and made.verdict.tone == "good"
    assert made.pictures[0].heatmaps
    shutil.rmtree(run)
    without = make_page([saved])
    assert not without.pictures[0].heatmaps and without.pictures[0].magnitudes
    assert "not where they were" in without.pictures_note


def test_damaged_lines_of_a_comparison_are_findings(tmp_path: Path) -> None:
    """What can be read is shown; a file without any line of a comparison is an error."""
    lines = comparison_lines(write_dumps(tmp_path / "run"))
    saved = tmp_path / "c.jsonl"
    saved.write_bytes("\n".join([lines[0], "{}", *lines[1:3]]).encode() + b"\n\xff\xff\n" + b"[" * 100_000)
    made = make_page([saved])
    assert len(made.points) == 2 and made.verdict is None
    told = [finding.text for finding in made.findings]
    assert any("line 2 is not a line of a comparison" in text for text in told)
    assert any("interrupted" in text for text in told)
    (tmp_path / "no.txt").write_text("hello\n")
    with pytest.raises(GrafterError, match="no line of the file belongs to a comparison"):
        make_page([tmp_path / "no.txt"])


def test_rows_paired_by_token_are_drawn_as_they_were_compared(tmp_path: Path) -> None:
    """One packed batch against prefill and decode: the one picture has A's rows, whatever call of B had them."""
    batch = torch.randn(8, 6)
    rows = {"a": batch[:5], "b": batch[5:]}
    runs = [("a", 0, 5), ("b", 0, 3)]
    RankDumps(tmp_path / "baseline").add("x", batch, "t h", tokens={"runs": runs})
    engine = RankDumps(tmp_path / "target", role="target")
    for step, call in enumerate(([("b", 0, 2), ("a", 0, 3)], [("a", 3, 1), ("b", 2, 1)], [("a", 4, 1)])):
        value = torch.cat([rows[name][start : start + count] for name, start, count in call])
        if step == 1:
            value[1] += 1.0
        engine.add("x", value, "t h", step=step, tokens={"runs": call})
    made = make_page([tmp_path])
    (drawn,) = made.pictures
    assert np.nonzero(cells(drawn.heatmaps[0]).any(axis=1))[0].tolist() == [7]
    assert any("8 rows paired by token" in note for note in made.points[0].notes)


def test_what_only_one_side_has_is_found_first(tmp_path: Path) -> None:
    """Points of one side alone are no rows, and so they are findings."""
    run = write_dumps(tmp_path / "run")
    lines_file = run / "target" / "rank0.dumps.jsonl"
    first = next((run / "target" / "rank0").glob("000000-*"))
    first.unlink()
    lines_file.write_text("".join(lines_file.read_text().splitlines(keepends=True)[1:]))
    made = make_page([run / "baseline", run / "target"])
    assert any("only A has" in finding.text for finding in made.findings if finding.level == "problem")
