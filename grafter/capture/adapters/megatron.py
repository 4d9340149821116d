"""megatron-core: the parallel state. `dp` is without context parallelism, as in its own `get_data_parallel_rank()`."""

from __future__ import annotations

import sys
from typing import Any

from grafter.core.layout.axes import Axes

# Our axis -> the words in the names of megatron's functions.
_AXES = {
    "tp": "tensor_model_parallel",
    "cp": "context_parallel",
    "dp": "data_parallel",
    "pp": "pipeline_model_parallel",
    "ep": "expert_model_parallel",
    "etp": "expert_tensor_parallel",
}


def axes(model: Any) -> Axes:
    """The axes that are initialised."""
    state = sys.modules["megatron.core.parallel_state"]
    if not state.model_parallel_is_initialized():
        return {}
    return {
        axis: (getattr(state, f"get_{words}_rank")(), getattr(state, f"get_{words}_world_size")())
        for axis, words in _AXES.items()
        if hasattr(state, f"get_{words}_rank")
    }
