"""Code of grafter's that the program's compiler and its dispatch modes do not see."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

# Set while code that torch.compile has made, or is about to make, calls us.
_compiled_caller = torch._C._dynamo.eval_frame.get_eval_frame_callback
_WHY = "grafter is on: this hook breaks the compiled graph."


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for positional arguments, as compiled code may call it."""
    apart: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal apart
        if not _compiled_caller():
            return function(*args)
        if apart is None:
            apart = _disabled(function)
        return apart(*args)

    # A copied model's hooks are known by it.
    run.__module__ = function.__module__
    # What `torch.compiler.disable` sets, which would import the compiler, and would cost more in eager code.
    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]
    return run


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def forget_compiled_code() -> None:
    """Code that was compiled without a hook never runs it, nor loses one that it was compiled with."""
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        # The frames between compiled code and a hook's own work are not for it, either.
        compiler.eval_frame.skip_code(_RUN_CODE)
        compiler.eval_frame.skip_code(_disabled.__code__)
        compiler.reset()


_RUN_CODE = untraced(lambda: None).__code__


# Operations of our own that the program's dispatch modes do not see.


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
