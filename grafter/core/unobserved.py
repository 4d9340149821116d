"""Operations of our own that the program's dispatch modes do not see."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes


class unobserved:
    """Our own operations are not the program's: selective checkpointing, which counts operations, must not see them.

    A class, since it stands in every point and a generator costs four times as much."""

    __slots__ = ("_modes",)

    def __enter__(self) -> None:
        self._modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else None
        if self._modes is not None:
            self._modes.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._modes is not None:
            self._modes.__exit__(*raised)
