"""The recipe for serving engines: its plan is one that grafter accepts, and says what the page says of it."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grafter
from grafter.config.settings.config import SETTING_FIELDS, GrafterConfig
from grafter.config.settings.plan_file import PlanFile, read_plan_file
from grafter.core.layout.dims import parse_dims
from grafter.core.points import surroundings

PAGE = (Path(__file__).parents[2] / "docs" / "serving-engines.md").read_text()
VLLM = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
ENGINES = {
    "vllm": VLLM,
    # As the page says: two lines changed.
    "sglang": VLLM.replace("step == 2", "step == 0").replace("self_attn.attn.in.value", "self_attn.attn.in.v"),
}


def read(folder: Path, engine: str) -> PlanFile:
    path = folder / f"{engine}.yaml"
    path.write_text(ENGINES[engine])
    return read_plan_file(path, SETTING_FIELDS)


def test_the_two_plans_differ_in_the_two_lines_that_the_page_names() -> None:
    pairs = zip(ENGINES["vllm"].splitlines(), ENGINES["sglang"].splitlines(), strict=True)
    assert sum(one != other for one, other in pairs) == 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("role", ["baseline", "target"])
def test_plan_is_accepted_by_both_jobs(tmp_path: Path, engine: str, role: str) -> None:
    """The file is read, and its settings make a configuration."""
    read(tmp_path, engine)
    settings = {"ENABLE": "1", "ROLE": role, "MASTER_PORT": "29400", "PLAN": str(tmp_path / f"{engine}.yaml")}
    config = GrafterConfig.from_environment({f"GRAFTER_{name}": value for name, value in settings.items()})
    assert config.step == "forward"
    assert config.target_axes
    assert config.compare_filter


@pytest.mark.parametrize("engine", ENGINES)
def test_every_compared_name_is_one_of_both_jobs(tmp_path: Path, engine: str) -> None:
    """A name in the filter comes from an entry for each role, or from one for both."""
    plan = read(tmp_path, engine)
    compared = re.findall(r"'([^']+)'", plan.fields["compare_filter"].text)
    assert len(compared) == 6
    for name in compared:
        roles = {rule.role for rule in plan.names if rule.name in (name, name.split(".")[0])}
        assert roles in ({None}, {"baseline", "target"}), name


# --- rows by token: the recipes' own lines, on batches as the engines make them


class Mode:
    """A forward mode of SGLang."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_idle(self) -> bool:
        return self.name == "idle"

    def is_decode(self) -> bool:
        return self.name == "decode"


def recipe(engine: str, monkeypatch: pytest.MonkeyPatch, runner: type) -> dict[str, Any]:
    """Runs the page's lines for an engine, whose runner is this class."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"from {engine}." in block]
    module = re.findall(rf"from ({engine}\.[\w.]+) import (\w+)", code)[0]
    for count in range(module[0].count(".") + 1):
        name = module[0].rsplit(".", count)[0] if count else module[0]
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules[module[0]], module[1], runner)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace


def rows_of(tokens: Any) -> list[tuple[Any, int]]:
    return [(own, start + n) for own, start, count in tokens.record().runs for n in range(count)]


def test_tokens_of_a_vllm_batch_are_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request's rows, from where its cached tokens end; inside of the forward pass, and not in a warm-up."""
    seen: list[Any] = []

    class GPUModelRunner:
        def __init__(self) -> None:
            computed = np.array([5, 0, 2, 9, 9], dtype=np.int32)
            self.input_batch = types.SimpleNamespace(
                num_reqs=3, req_ids=["0", "1", "2"], num_computed_tokens_cpu=computed
            )

        def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
            return "prepared"

        def _model_forward(self, input_ids: Any, positions: Any) -> None:
            seen.append(surroundings.get().options["tokens"])

    monkeypatch.setattr(grafter._calls, "_off", False)
    recipe("vllm", monkeypatch, GPUModelRunner)
    runner = GPUModelRunner()
    runner._model_forward(None, None)
    assert runner._prepare_inputs(None, np.array([2, 3, 1], dtype=np.int32)) == "prepared"
    runner._model_forward(None, positions=None)
    assert seen[0] is None
    assert rows_of(seen[1]) == [("0", 5), ("0", 6), ("1", 0), ("1", 1), ("1", 2), ("2", 2)]


def test_tokens_of_an_sglang_batch_are_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extend pass begins after the cached prefix; a decode pass has one row of each request."""

    class ModelRunner:
        def forward(self, forward_batch: Any) -> Any:
            return surroundings.get().options["tokens"]

    monkeypatch.setattr(grafter._calls, "_off", False)
    recipe("sglang", monkeypatch, ModelRunner)
    extend = types.SimpleNamespace(
        forward_mode=Mode("extend"),
        rids=["a", "b"],
        extend_seq_lens=torch.tensor([3, 2], dtype=torch.int32),
        extend_prefix_lens=torch.tensor([0, 4], dtype=torch.int32),
    )
    assert rows_of(ModelRunner().forward(extend)) == [("a", 0), ("a", 1), ("a", 2), ("b", 4), ("b", 5)]
    decode = types.SimpleNamespace(forward_mode=Mode("decode"), rids=["a", "b"], seq_lens=torch.tensor([4, 7]))
    assert rows_of(ModelRunner().forward(decode)) == [("a", 3), ("b", 6)]
    assert ModelRunner().forward(forward_batch=types.SimpleNamespace(forward_mode=Mode("idle"), rids=["a"])) is None
    assert ModelRunner().forward(types.SimpleNamespace(forward_mode=Mode("decode"), rids=None)) is None


@pytest.mark.parametrize("engine", ENGINES)
def test_layouts_of_the_rules_can_be_read(tmp_path: Path, engine: str) -> None:
    texts = [rule.dims for rule in read(tmp_path, engine).rules]
    assert len(texts) == 3
    for text in texts:
        assert text is not None
        parse_dims(text)
