"""How grafter's own code is hidden from the program's compiler and from its dispatch modes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

# Returns a callback while the caller is compiled code, or code that is about to be compiled.
_compiled_caller = torch._C._dynamo.eval_frame.get_eval_frame_callback
_WHY = "grafter is on: this hook breaks the compiled graph."


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of positional arguments that compiled code calls without tracing it."""
    apart: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal apart
        if not _compiled_caller():
            return function(*args)
        if apart is None:
            apart = _disabled(function)
        return apart(*args)

    # The hooks of a copied model are recognised by their module.
    run.__module__ = function.__module__
    # As `torch.compiler.disable` sets them, which would import the compiler and cost more in eager code.
    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]
    return run


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def forget_compiled_code() -> None:
    """Drop all compiled code, which would never run a new hook, and would still run a removed one."""
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        # The compiler must not compile the frames between compiled code and a hook, either.
        compiler.eval_frame.skip_code(_RUN_CODE)
        compiler.eval_frame.skip_code(_disabled.__code__)
        compiler.reset()


_RUN_CODE = untraced(lambda: None).__code__


class unobserved:
    """A context in which the program's dispatch modes see no operation: selective checkpointing counts operations, and
    must not count ours.

    A class, since every point enters it, and a generator costs four times as much.
    """

    __slots__ = ("_modes",)

    def __enter__(self) -> None:
        self._modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else None
        if self._modes is not None:
            self._modes.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._modes is not None:
            self._modes.__exit__(*raised)
