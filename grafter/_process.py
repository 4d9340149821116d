"""What a process has once: its `Grafter`, and the hint that graphs break. Imports nothing of the package."""

from __future__ import annotations

import logging
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
