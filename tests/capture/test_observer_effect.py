"""Looking changes nothing: hooks everywhere and no match, and a graft of each point onto itself, are bitwise no-ops.

The same with a model of transformers: tests/e2e/test_observer_effect_llama.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import Jobs, succeed
from observer_parts import check_that_nothing_changes, each_setting, make_tokens, run_beside_itself
from torch import nn

from grafter.core.writing.write_back import WriteMode, apply_write


class Mixed(nn.Module):
    """Several consumers of one tensor, in-place operations, dropout, batch norm, views, a shared module, attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.2, batch_first=True)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True) for _ in range(2))
        self.conv = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        self.identity, self.drop = nn.Identity(), nn.Dropout(0.3)
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        y = self.identity(x)
        x = x + self.drop(torch.softmax(self.q(y) @ self.k(y).transpose(1, 2), -1) @ self.v(y))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for layer in self.layers:
            x = layer(x)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x, _ = self.rnn(x)
        return self.head(self.drop(x))


def train_mixed() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = Mixed()
    return model, lambda: model(make_tokens())


@each_setting
def test_nothing_changes_bitwise(tmp_path: Path, settings: dict[str, str]) -> None:
    """Outputs, gradients, updated weights, buffers and the random state, with dropout, in both jobs."""
    check_that_nothing_changes(tmp_path, train_mixed, settings)


def test_a_self_graft_in_place_changes_nothing_either(tmp_path: Path) -> None:
    with Jobs(tmp_path, compiler=True, b2t_filter="True", write="in_place") as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, run_beside_itself, train_mixed)
        for changed, _ in succeed(jobs.wait()):
            assert changed == []


@pytest.mark.parametrize(
    ("own", "came", "same"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.ones(2, 3, dtype=torch.bfloat16).t(), torch.ones(3, 2, dtype=torch.bfloat16), True),
        (torch.ones(1).expand(3), torch.ones(3), True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j]), True),
        (torch.tensor([True, False]), torch.tensor([True, False]), True),
        (torch.tensor(3), torch.tensor(4), False),
        (torch.empty(0), torch.empty(0), True),
    ],
)
def test_a_value_that_is_there_already_is_not_replaced(own: torch.Tensor, came: torch.Tensor, same: bool) -> None:
    """Bit by bit; a node more in the graph would change the order in which gradients are added up."""
    returned = apply_write(own, came, WriteMode("return", "straight_through")).value
    assert (returned is own) is same


def test_a_cut_cuts_also_where_nothing_changes() -> None:
    own = torch.ones(2, requires_grad=True) * 1
    assert not apply_write(own, torch.ones(2), WriteMode("return", "cut")).value.requires_grad
