"""The recipe for serving engines: its plan is one that grafter accepts, and says what the page says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grafter.layout.dims import parse_dims
from grafter.settings.config import SETTING_FIELDS, GrafterConfig
from grafter.settings.plan_file import PlanFile, read_plan_file

PAGE = (Path(__file__).parent.parent / "docs" / "serving-engines.md").read_text()
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


@pytest.mark.parametrize("engine", ENGINES)
def test_layouts_of_the_rules_can_be_read(tmp_path: Path, engine: str) -> None:
    texts = [rule.dims for rule in read(tmp_path, engine).rules]
    assert len(texts) == 3
    for text in texts:
        assert text is not None
        parse_dims(text)
