"""What a process has once: its `Grafter`, the hint that graphs break, and a compiler that may be tracing.

Imports nothing of the package.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

# The `Grafter` made from the environment (`grafter.rank.autoattach.active`); None before the first call that needs it.
grafter: Any = None
_hinted = False

IN_GRAPHS = "grafter is on: each of its calls breaks the compiled graph and runs between the two parts."
_WHAT_IT_COSTS = "Less is fused, so speed suffers and last digits may change. To see where: TORCH_LOGS=graph_breaks."


def hint_once() -> None:
    """Warn, once in this process, that calls of grafter break compiled graphs."""
    global _hinted
    if not _hinted:
        _hinted = True
        logging.getLogger("grafter").warning("%s %s", IN_GRAPHS, _WHAT_IT_COSTS)


def is_being_traced() -> bool:
    """Whether the compiler traces the code that runs. Does not import it."""
    guards = sys.modules.get("torch._guards")
    return guards is not None and guards.CompileContext.try_get() is not None


def is_traced() -> bool:
    """The same as a constant of the graph, in code that is being compiled."""
    return is_being_traced()


# What `torch.compiler.assume_constant_result` sets; setting it here does not import the compiler.
is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
