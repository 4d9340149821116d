"""Looking changes nothing: hooks everywhere and no match, and a graft of each point onto itself, are bitwise no-ops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs
from torch import nn

import grafter
from grafter.writing.write_back import WriteMode, apply_write

# Outputs and gradients of one program, without grafter's own tensors in them.
Results = dict[str, torch.Tensor]


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


def make_tokens() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) % 11


def train_mixed() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = Mixed()
    return model, lambda: model(make_tokens())


def train_llama() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_dropout=0.1,
        )
    )  # fmt: skip
    return model, lambda: model(make_tokens(), labels=make_tokens()).loss


PROGRAMS = {"mixed": train_mixed, "llama": train_llama}


def run_program(name: str, attached: bool) -> Results:
    """Two training steps with dropout: what came out, all gradients, all weights, and where the random numbers are."""
    model, compute = PROGRAMS[name]()
    if attached:
        assert grafter.attach(model) is not None
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results: Results = {}
    for step in range(2):
        optimizer.zero_grad()
        out = compute()
        (out**2).sum().backward()
        results[f"out {step}"] = out.detach().clone()
        for path, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[f"grad {step} {path}"] = parameter.grad.clone()
        optimizer.step()
        if attached:
            grafter.step()
    results |= {f"state {path}": tensor.clone() for path, tensor in model.state_dict().items()}
    results["random state"] = torch.get_rng_state()
    return results


def differing(a: Results, b: Results) -> list[str]:
    """Bitwise, NaN included."""
    assert a.keys() == b.keys() and len(a) > 20
    return [name for name in a if a[name].dtype != b[name].dtype or not bits_equal(a[name], b[name])]


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.shape == b.shape and bool((left == right).all())


def run_beside_itself(rank: Rank) -> Any:
    """The program with grafter against the same without, in one process."""
    name = rank.arguments[0] if rank.arguments else "mixed"
    attached = run_program(name, True)
    return differing(attached, run_program(name, False)), len(attached)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "settings",
    [
        {"compare_filter": "name == 'nothing'"},
        {"compare_filter": "True"},
        {"b2t_filter": "True"},
        {"b2t_filter": "name.endswith('.out')", "stats": "off"},
    ],
    ids=["no match", "compare", "self-graft", "self-graft of outputs"],
)
def test_nothing_changes_bitwise(tmp_path: Path, program: str, settings: dict[str, str]) -> None:
    """Outputs, gradients, updated weights, buffers and the random state, with dropout, in both jobs."""
    with Jobs(tmp_path, **settings) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, run_beside_itself, program)
        for changed, count in succeed(jobs.wait()):
            assert changed == [] and count > 20
    records = jobs.ledgers()["target", 0]
    if "nothing" in str(settings):
        assert records == []
    else:
        wanted = "compared" if "compare_filter" in settings else "grafted"
        assert len(records) > 40 and {r.outcome for r in records} == {wanted}


def run_in_place(rank: Rank) -> Any:
    return run_beside_itself(rank)


def test_a_self_graft_in_place_changes_nothing_either(tmp_path: Path) -> None:
    with two_jobs(tmp_path, run_in_place, run_in_place, b2t_filter="True", write="in_place") as jobs:
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
