"""The format of dumps: described field by field, read from files of each version, written and read alike. 2 s."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import grafter
from grafter.core.layout.declared import DeclaredLayout
from grafter.core.records import TensorStatistics
from grafter.core.rows.tokens import TokenRuns
from grafter.store.dumps.record import FORMAT_VERSION, DumpedLeaf, DumpRecord

PAGE = (Path(__file__).parents[3] / "docs" / "dump-format.md").read_text()
FIRST_VERSION = Path(__file__).parents[2] / "parts" / "data" / "dumps_v1"
WHOLE = torch.arange(24, dtype=torch.float32).view(4, 6)


@pytest.mark.parametrize(
    ("heading", "schema"),
    [("A record", DumpRecord), ("A leaf", DumpedLeaf), ("A layout", DeclaredLayout), ("Tokens", TokenRuns)],
)
def test_every_field_of_the_schema_stands_in_the_description(heading: str, schema: Any) -> None:
    """In its own table, once, with a type; and no field is described that there is not."""
    section = re.split(rf"^##+ {heading}$", PAGE, flags=re.MULTILINE)[1].split("\n#")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:3] == "| `"
    ]
    assert sorted(row[0].strip("`| ") for row in rows) == sorted(schema.model_fields)
    assert all(row[1] for row in rows)


def test_statistics_and_the_version_stand_in_the_description() -> None:
    """Each figure by name, and the version that is written now."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `statistics` |")]
    assert set(TensorStatistics.model_fields) <= set(re.findall(r"`(\w+)`", row))
    assert f"`format_version` is {FORMAT_VERSION}." in PAGE


def test_columns_of_the_table_stand_in_the_description() -> None:
    """Those of the statistics by their kind."""
    (row, *_) = grafter.open_dumps(FIRST_VERSION).table()
    described = PAGE.split("The columns of `table()`")[1]
    for column in row.keys() - {"layer_id", "tag_rank", "rank"}:
        if column.removeprefix("grafted_") not in TensorStatistics.model_fields:
            assert f"`{column}`" in described, column


def test_the_example_of_the_page_runs() -> None:
    """Line by line, on the files of the first version."""
    (example,) = re.findall(r"^## Reading them in Python\n\n((?:    .*\n)+)", PAGE, re.MULTILINE)
    example = example.replace("grafter_out/my-run", str(FIRST_VERSION)).replace("attn_out", "attn")
    names: dict[str, Any] = {"grafter": grafter, "pandas": pytest.importorskip("pandas")}
    exec("\n".join(line[4:] for line in example.splitlines()), names)
    assert torch.equal(names["point"].whole(), WHOLE + 1)


def test_dumps_of_the_first_version_open_and_say_what_they_said() -> None:
    """Written by grafter when the format was new (`model.py` there), and never written again."""
    dumps = grafter.open_dumps(FIRST_VERSION)
    assert not dumps.problems and not dumps.notes and not dumps.check()
    assert (dumps.role, dumps.ranks, dumps.world_size) == ("baseline", (0, 1), 2)
    assert [point.name for point in dumps] == ["attn", "mlp", "state", "norm", "sum"] * 2
    for step in range(2):
        attn = dumps.point("attn", step=step, layer_id=3)
        assert torch.equal(attn.whole(), WHOLE + step) and attn.reader().dim_names == ("t", "h")
        tokens = attn.tokens(1)
        assert tokens is not None and tokens.record().runs == (("a", 0, 3), (None, 0, 1)) and tokens.hashes
        assert dumps.point("mlp", step=step).whole().tolist() == [4.0, 4.0]
        state = dumps.point("state", step=step)
        assert state.whole("['phase']").tolist() == [1 + 2j] and state.first.others == {"['n']": 3}
        extras = state.extras(0)
        assert extras is not None and extras["k"].tolist() == [1, 1]
        statistics = dumps.point("norm", step=step).first.leaves[0].statistics
        assert statistics is not None and (statistics.mean, statistics.max) == (3.5, 4.0)
        expected = hashlib.sha256(torch.tensor([3.0, 4.0]).numpy().tobytes()).hexdigest()
        assert dumps.point("sum", step=step).first.leaves[0].checksum == expected


def test_what_the_writer_writes_is_read(tmp_path: Path) -> None:
    """Values, dtypes, layouts, tags, tokens and extras come back as they were when the program came to the point."""
    config = grafter.GrafterConfig(role="target", dump_filter="keep", dir=str(tmp_path), run_name="run")
    kept = {
        dtype: (torch.randn(3, 4) * 3).to(dtype)
        for dtype in (torch.bfloat16, torch.int16, torch.complex128, torch.bool)
    }
    tokens = grafter.Tokens.from_positions([7, 7, 8], [0, 1, 5])
    job = grafter.Grafter(config)
    try:
        for number, value in enumerate(kept.values()):
            changed = value.clone()
            job.dump("x", changed, keep=True, number=number, dims="t d", tokens=tokens, extras={"a": [value, "text"]})
            changed.zero_()
        job.dump("x", torch.ones(1))
        job.dump("views", {"row": torch.ones(1000, 8)[3], "n": None}, keep=True)
        job.step()
        job.dump("x", torch.ones(()), keep=True, number=0)
    finally:
        job.close()
    dumps = grafter.open_dumps(tmp_path / "run")
    assert not dumps.problems and not dumps.notes and not dumps.check() and dumps.run is not None
    for number, value in enumerate(kept.values()):
        point = dumps.point("x", number=number)
        assert point.whole().dtype == value.dtype and torch.equal(point.whole(), value)
        assert point.reader().dim_names == ("t", "d") and point.tokens(0) == tokens
        assert point.first.call_site.startswith(__file__)
    assert [(point.name, point.step) for point in dumps] == [("x", 0)] * 4 + [("views", 0), ("x", 1)]
    assert dumps.point("views").whole("['row']").tolist() == [1] * 8
    assert max(path.stat().st_size for path in tmp_path.glob("run/target/rank0/*")) < 4000
    assert dumps.point("x", step=1).whole().shape == ()


def test_other_readers_of_safetensors_read_the_files() -> None:
    """The library's own, with the record beside the tensors."""
    for path in FIRST_VERSION.glob("baseline/rank*/*.safetensors"):
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["grafter"])
            assert path.parent.parent / record["file"] == path
            names = [f"value{leaf['path']}" for leaf in record["leaves"]]
            assert set(names) <= set(file.keys())
            if record["name"] == "attn":
                rank, step = record["role_rank"], record["step"]
                assert torch.equal(file.get_tensor("value"), WHOLE[:, rank * 3 : rank * 3 + 3] + step)
