"""Adapters: where a rank stands on its framework's mesh, read from what the process has imported already.

One small file a framework, each with `axes(model)`. None of them imports its framework. Later ones know better.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from grafter.core.layout.axes import Axes
from grafter.core.processes import is_from_signal_handler

logger = logging.getLogger("grafter")

# (what the process must have imported, the file here)
_ADAPTERS = (
    ("torch.distributed.tensor", "device_mesh"),
    ("torch.distributed.fsdp", "fully_shard"),
    ("transformers.modeling_utils", "transformers_mesh"),
    ("torchtitan.distributed.parallel_dims", "titan"),
    ("megatron.core.parallel_state", "megatron"),
)


def mesh_axes(model: Any) -> Axes:
    """(coordinate, size) by axis, for this rank; empty where no framework is in use that has a mesh.

    Nothing is communicated. A framework that cannot be read is told of and left out.
    """
    found: Axes = {}
    for framework, file in _ADAPTERS:
        if framework not in sys.modules:
            continue
        adapter = importlib.import_module(f"{__name__}.{file}")
        try:
            found.update(adapter.axes(model))
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            logger.warning("grafter: the mesh of %s cannot be read (%s); say it with set_axes", framework, error)
    return found
