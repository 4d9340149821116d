"""Packed sequences: their global lengths, which megatron-core passes to a model's forward as `packed_seq_params`.

Context parallelism cuts each packed sequence by itself, so for dims with `t[cp:zigzag]` the rows of a rank depend on
these lengths. A program's `dump` gives them as `seq_lens=`. For hooks they are read here.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from grafter.errors import UsageError

_ARGUMENT = "packed_seq_params"
# Tensors are cut by the padded lengths, if there are any.
_LENGTH_FIELDS = ("cu_seqlens_q_padded", "cu_seqlens_q")


class PackedSequences:
    """The packed sequences of the current call of a model.

    lengths: one number for each sequence; None outside of a call, and if the call has none.
    """

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] | None = None

    def follow(self, model: torch.nn.Module) -> list[RemovableHandle]:
        """Hooks on the model itself, which are called first and last."""
        before = model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        after = model.register_forward_hook(self._after, always_call=True)
        return [before, after]

    def _before(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lengths = packed_lengths(kwargs.get(_ARGUMENT))

    def _after(self, _: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.lengths = None


def packed_lengths(parameters: Any) -> tuple[int, ...] | None:
    """The lengths in megatron's PackedSeqParams; None if the call has none.

    Raises UsageError unless its cumulative lengths are one dim of integers that begin at 0 and do not decrease.
    """
    for field in _LENGTH_FIELDS:
        bounds = getattr(parameters, field, None)
        if bounds is None:
            continue
        ends = bounds.tolist()
        if bounds.ndim != 1 or bounds.is_floating_point() or ends[:1] != [0] or ends != sorted(ends):
            raise UsageError(
                f"{_ARGUMENT}.{field} of this call is {ends!r:.80}; it must be one dim of cumulative lengths from 0 "
                f"on, such as [0, 5, 12] for sequences of 5 and 7 tokens."
            )
        return tuple(end - start for start, end in itertools.pairwise(ends))
    return None
