"""The cookbook: each transform, loaded as a user loads it, does what its first line says."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import grafter
from grafter.core.user_transform import load_transform
from grafter.errors import TransformError

ROOT = Path(__file__).parents[2]
COOKBOOK = ROOT / "transforms"
FILES = sorted(path.name for path in COOKBOOK.glob("*.py"))


def run(
    name: str,
    received: list[torch.Tensor],
    target: torch.Tensor,
    extras: list[dict[str, Any] | None] | None = None,
    tags: dict[str, Any] | None = None,
) -> torch.Tensor:
    loaded = load_transform(f"{COOKBOOK / name}.py:transform")
    return loaded(
        grafter.GraftTransformInput(
            tags=tags or {"name": "x", "step": 0},
            received_list=received,
            received_extras_list=extras or [None] * len(received),
            target=target,
            sender_ranks=list(range(len(received))),
        )
    )


def test_take_last_gives_the_last_senders_tensor() -> None:
    """Of three senders, the third one's values."""
    assert run("take_last", [torch.full((2,), float(i)) for i in range(3)], torch.zeros(2)).tolist() == [2, 2]


@pytest.mark.parametrize(("extras", "dim"), [(None, -1), ({"dim": 0}, 0), ({"other": 1}, -1)])
def test_concatenate_undoes_a_split(extras: dict[str, Any] | None, dim: int) -> None:
    """Uneven shards along the last dim, or along the one that the sender names, give the whole tensor."""
    whole = torch.arange(24.0).reshape(4, 6)
    shards = list(whole.split([1, 3] if dim == 0 else [1, 5], dim=dim))
    assert torch.equal(run("concatenate", shards, torch.zeros(4, 6), [extras, None]), whole)


def test_mean_is_taken_in_float32() -> None:
    """Values whose sum bfloat16 can't hold are averaged right, and what was received is unchanged."""
    received = [torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)]
    assert run("mean", received, torch.zeros(1, dtype=torch.bfloat16)).tolist() == [128.5]
    assert received[0].tolist() == [256]
    double = [torch.tensor([1.0 + 1e-12], dtype=torch.float64)] * 2
    assert torch.equal(run("mean", double, torch.zeros(1)), double[0])


def test_cast_gives_the_targets_dtype_where_grafter_refuses() -> None:
    """float32 into int64, truncated."""
    result = run("cast", [torch.tensor([1.9, -1.9])], torch.zeros(2, dtype=torch.int64))
    assert (result.dtype, result.tolist()) == (torch.int64, [1, -1])


def test_scale_multiplies_by_the_senders_factor() -> None:
    """Also an 8-bit float, which has no multiplication of its own: dequantisation."""
    received = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    assert run("scale", [received], torch.zeros(2), [{"scale": 0.5}]).tolist() == [0.5, -1]


@pytest.mark.parametrize("extras", [None, {"factor": 2}])
def test_scale_says_what_the_sender_must_write(extras: dict[str, Any] | None) -> None:
    """Without a scale the point fails with the dump call to write."""
    with pytest.raises(TransformError, match=re.escape("extras={'scale': <number>}")):
        run("scale", [torch.ones(2)], torch.zeros(2), [extras])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_add_noise_is_small_reproducible_and_different_at_every_point(dtype: torch.dtype) -> None:
    """Same tags, same noise; another step, other noise; its size is AMPLITUDE of the tensor's rms."""
    received = torch.full((10_000,), 4.0, dtype=dtype)
    first, again = (run("add_noise", [received], received, tags={"name": "x", "step": 1}) for _ in range(2))
    other = run("add_noise", [received], received, tags={"name": "x", "step": 2})
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if dtype != torch.bfloat16:  # where 4e-3 is less than half a last place at 4.0, it is rounded away or up
        assert (first - received).std().item() == pytest.approx(4e-3, rel=0.05)


@pytest.mark.parametrize(
    ("name", "receives"),
    [
        ("take_last", "all"),
        ("concatenate", "all"),
        ("mean", "all"),
        ("cast", "same_rank"),
        ("scale", "same_rank"),
        ("add_noise", "same_rank"),
    ],
)
def test_what_each_receives_is_what_the_readme_says(name: str, receives: str) -> None:
    """The declaration in the file and the table's column agree."""
    assert load_transform(f"{COOKBOOK / name}.py:transform").receives == receives
    (row,) = [line for line in (COOKBOOK / "README.md").read_text().splitlines() if f"({name}.py)" in line]
    assert f"| {receives} |" in row


@pytest.mark.parametrize("file", FILES)
def test_the_readme_lists_every_transform_with_its_command_line(file: str) -> None:
    """A file that the cookbook's table doesn't show, or one without a docstring with shapes, fails here."""
    assert f"`--transform transforms/{file}:transform`" in (COOKBOOK / "README.md").read_text()
    docstring = ast.get_docstring(ast.parse((COOKBOOK / file).read_text()))
    assert docstring is not None and "received:" in docstring and "Returns [" in docstring


def test_every_example_of_the_documentation_runs(tmp_path: Path) -> None:
    """The Python blocks of docs/transforms.md execute; the transforms in them give what they say."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "transforms.md").read_text(), flags=re.DOTALL)
    files = [tmp_path / f"example{i}.py" for i in range(len(blocks))]
    for file, block in zip(files, blocks, strict=True):
        file.write_text(block)
    heads, halve, testing = files
    received = torch.arange(24.0).reshape(3, 2, 4)
    graft_input = grafter.GraftTransformInput(
        tags={}, received_list=[received], received_extras_list=[None], target=torch.zeros(2, 3, 2, 2)
    )
    result = load_transform(f"{heads}:transform")(graft_input)
    assert torch.equal(result, received.transpose(0, 1).reshape(2, 3, 2, 2))
    loaded = load_transform(f"{halve}:halve")
    assert loaded.receives == "same_rank" and torch.equal(loaded(graft_input), received / 2)
    exec(compile(testing.read_text(), testing, "exec"), {})
