"""`grafter locate` with the demo's real jobs: the planted fault is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from grafter.analysis.report.writing import make_page
from grafter.tools import locate_runner as runner

DEMO = Path(__file__).parents[2] / "launch" / "demo"


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, str(DEMO / "make_model.py"), str(directory)], check=True, capture_output=True)
    return directory


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "layer", "named"), [("rope", "1", "model.layers.out layer_id=1"), ("none", "2", None)]
)
def test_the_demo_names_the_faulty_layer_or_none(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, layer: str, named: str | None
) -> None:
    """Two real jobs that never heard of grafter, the target tensor parallel under torchrun: the planted layer is named,
    wherever it is."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    verdict = runner.locate(
        [sys.executable, str(DEMO / "baseline.py"), str(demo_model)],
        [*torchrun, str(DEMO / "target.py"), str(demo_model), "--fault", fault, "--layer", layer],
        out=tmp_path / "out",
        points="name.endswith('.out')",
        settings={
            "timeout": "120",
            "attach": "model.embed_tokens,:LlamaDecoderLayer",
            "dump_filter": "name.endswith('.out')",
        },
        console=Console(quiet=True),
        quiet=True,
    )
    assert verdict.named == named
    assert verdict.guilty == (() if named is None else (named,))
    assert verdict.inputs.startswith("Inputs: equal; the first point, model.embed_tokens.out, is the same in both jobs")
    page = make_page([tmp_path / "out"])
    assert page.verdict is not None and page.verdict.sentence == verdict.sentence
    assert {point.label for point in page.points if point.guilty} == set(verdict.guilty)
    assert page.pictures and all(picture.heatmaps for picture in page.pictures)
    layers = [f"model.layers.out layer_id={i}" for i in range(4)]
    assert [point.point for point in verdict.points] == ["model.embed_tokens.out", *layers]
    assert all(point.judged for point in verdict.points)
