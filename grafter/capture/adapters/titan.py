"""torchtitan: all axes of the trainer's ParallelDims.

`dp` is its axis `batch`, along which ranks read different data.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from grafter.core.layout.axes import Axes

_BY_OTHER_NAMES = {"dp": "batch"}


def axes(model: Any) -> Axes:
    """The axes of the last ParallelDims that the trainer has made."""
    kind = sys.modules["torchtitan.distributed.parallel_dims"].ParallelDims
    dims = [thing for thing in gc.get_objects() if type(thing) is kind]
    if not dims:
        return {}
    meshes = dims[-1]._meshes
    found: Axes = {name: (mesh.get_local_rank(), mesh.size()) for name, mesh in meshes.items() if mesh.ndim == 1}
    found.update({name: found[own] for name, own in _BY_OTHER_NAMES.items() if own in found})
    return found
