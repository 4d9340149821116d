"""Chunks of the flattened index: the same values, and so the same digits, whatever the strides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grafter.core.measures.flat_chunks import FlatReader
from grafter.core.measures.stats import compare, summarize


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(st.data())
def test_any_range_of_any_strided_tensor_is_read_in_flattened_order(data: st.DataObject) -> None:
    """FlatReader.read equals a slice of reshape(-1) for permuted and sliced tensors of up to 5 dimensions."""
    shape = data.draw(st.lists(st.integers(1, 5), max_size=5))
    tensor = torch.arange(math.prod(shape)).view(shape).permute(data.draw(st.permutations(range(len(shape)))))
    for dim, size in enumerate(tensor.shape):
        tensor = tensor.narrow(dim, size // 2, size - size // 2)
    stop = data.draw(st.integers(0, tensor.numel()))
    start = data.draw(st.integers(0, stop))
    assert torch.equal(FlatReader(tensor).read(start, stop), tensor.reshape(-1)[start:stop])


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other strides."""
    padded = torch.zeros(*x.shape[:-1], x.shape[-1] + 3)
    padded[..., 1:-2] = x
    doubled = torch.zeros(2 * x.shape[0], *x.shape[1:])
    doubled[::2] = x
    return {
        "transposed": x.transpose(0, 2).contiguous().transpose(0, 2),
        "permuted": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "padded rows": padded[..., 1:-2],
        "every other": doubled[::2],
        "offset": torch.cat([torch.zeros(5), x.reshape(-1)])[5:].view(x.shape),
    }


@pytest.mark.parametrize("layout", sorted(_layouts(torch.zeros(2, 2, 2))))
def test_strides_do_not_change_a_digit(layout: str) -> None:
    """Every strided view gives the digits of the contiguous tensor: the chunks lie on the flattened index."""
    x, y = random(30, 41, 59), random(30, 41, 59, seed=1)
    strided = _layouts(x)[layout]
    assert torch.equal(strided, x)
    assert compare(strided, y, "full") == compare(x, y, "full")
    assert compare(y, strided, "light") == compare(y, x, "light")
    assert summarize(strided, "full") == summarize(x, "full")
