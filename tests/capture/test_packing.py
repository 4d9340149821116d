"""Packed sequences under context parallelism: hooks find the lengths that the layout of a point needs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grafter.capture.packing import packed_lengths
from grafter.config.settings.config import GrafterConfig
from grafter.core.layout.axes import set_axes
from grafter.errors import UsageError
from grafter.rank.grafter import Grafter
from grafter.store.dumps.record import DumpRecord


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, x: torch.Tensor, packed_seq_params: Any = None) -> torch.Tensor:
        if packed_seq_params == "fail":
            raise RuntimeError("failed")
        out: torch.Tensor = self.norm(self.up(x))
        return out


def packed(*ends: int, **more: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(cu_seqlens_q=torch.tensor(ends, dtype=torch.int32), **more)


def seq_lens_by_name(directory: Path, *calls: Any) -> dict[str, list[Any]]:
    """Of a rank with cp=2 that calls an attached model; its points' seq_lens, call by call."""
    (directory / "plan.yaml").write_text("rules: [{match: 'up.*', dims: 't[cp:zigzag] h'}]\n")
    set_axes(cp=(0, 2))
    grafter = Grafter(
        GrafterConfig(
            enable=True, role="baseline", dir=str(directory), run_name="run", dump_filter="True", log_level="error",
            plan=str(directory / "plan.yaml"),
        )
    )  # fmt: skip
    try:
        model = Model()
        grafter.attach(model, ("up", "norm"), inputs=False)
        for parameters in calls:
            try:
                model(torch.ones(6, 4), packed_seq_params=parameters)
            except RuntimeError:
                continue
    finally:
        grafter.close()
        set_axes(cp=None)
    found: dict[str, list[Any]] = {}
    for line in (directory / "run" / "baseline" / "rank0.dumps.jsonl").read_text().splitlines():
        record = DumpRecord.model_validate_json(line)
        layout = record.leaves[0].layout
        found.setdefault(record.name, []).append(layout.seq_lens if layout is not None else None)
    return found


def test_points_with_a_zigzag_get_the_lengths_of_the_call_that_runs(tmp_path: Path) -> None:
    """Also after a call that failed; a call without packing has none, and neither have points without a zigzag."""
    calls = (packed(0, 4, 12), packed(0, 12), "fail", None)
    assert seq_lens_by_name(tmp_path, *calls) == {
        "up.out": [(4, 8), (12,), None],
        "norm.out": [None, None, None],
    }


def test_padded_lengths_count_where_there_are_any() -> None:
    """The tensors are cut by them."""
    assert packed_lengths(packed(0, 3, 5, cu_seqlens_q_padded=torch.tensor([0, 4, 8]))) == (4, 4)
    assert packed_lengths(SimpleNamespace(cu_seqlens_q=None)) is None


@pytest.mark.parametrize("bounds", [[3, 5], [0, 5, 4], [[0, 5]], [0.0, 5.0], []])
def test_what_is_no_cumulative_length_is_refused(bounds: list[Any]) -> None:
    """In the words of the call."""
    with pytest.raises(UsageError, match=r"packed_seq_params\.cu_seqlens_q of this call .* cumulative lengths"):
        packed_lengths(SimpleNamespace(cu_seqlens_q=torch.tensor(bounds)))
