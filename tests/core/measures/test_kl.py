"""KL of logits: right by high precision, never negative, undefined where a logit is no number. Costs under 1 s."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grafter.core.measures.rows import Divergence


def brute(a: list[float], b: list[float]) -> float:
    def logs(values: list[float]) -> list[float]:
        top = max(values)
        total = math.log(math.fsum(math.exp(value - top) for value in values)) + top
        return [value - total for value in values]

    return math.fsum(math.exp(p) * (p - q) for p, q in zip(logs(a), logs(b), strict=True))


@given(st.lists(st.tuples(*[st.floats(-30, 30)] * 2), min_size=1, max_size=30))
def test_the_divergence_of_one_row(pairs: list[tuple[float, float]]) -> None:
    """It is sum(p log(p/q)), in nats, and not below 0."""
    a, b = (list(column) for column in zip(*pairs, strict=True))
    found = Divergence()
    found.add(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))
    mean = found.mean()
    assert mean is not None and mean >= 0
    assert mean == pytest.approx(brute(a, b), rel=1e-9, abs=1e-12)


def test_rows_come_in_any_blocks() -> None:
    """The mean, the largest and its row do not depend on how rows are given."""
    a, b = torch.randn(2, 40, 1000, generator=torch.Generator().manual_seed(0))
    b[23] = a[23] + 3 * b[23]
    found = []
    for step in (1, 7, 40):
        one = Divergence()
        for start in range(0, 40, step):
            one.add(a[start : start + step], b[start : start + step])
        found.append((one.mean(), one.largest, one.worst_row))
    assert found[0] == found[1] == found[2]
    assert found[0][2] == 23


def test_masked_and_impossible_tokens() -> None:
    """-inf in both has no part; in B alone it makes the divergence infinite; in A alone it costs what q lost."""
    inf = math.inf
    masked = Divergence()
    masked.add(torch.tensor([[0.0, 1.0, -inf]]), torch.tensor([[0.0, 2.0, -inf]]))
    assert masked.mean() == pytest.approx(brute([0.0, 1.0], [0.0, 2.0]))
    impossible = Divergence()
    impossible.add(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -inf]]))
    assert impossible.mean() == inf and impossible.worst_row == 0
    spread = Divergence()
    spread.add(torch.tensor([[0.0, -inf]]), torch.tensor([[0.0, 0.0]]))
    assert spread.mean() == pytest.approx(math.log(2))


def test_rows_without_a_distribution_are_counted() -> None:
    """NaN makes a row undefined; it is left out of the mean, and told."""
    found = Divergence()
    found.add(torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert (found.mean(), found.undefined, found.rows) == (0.0, 1, 2)
    only = Divergence()
    only.add(torch.full((2, 3), math.nan), torch.zeros(2, 3))
    assert only.mean() is None and only.undefined == 2
