"""What stands for a Grafter in compiled code, and one-line ways to attach and to compile, without a run behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from grafter.capture.attachment import Attachment
from grafter.capture.compiled import find_site, offer_traced
from grafter.capture.naming import Naming
from grafter.config.control.in_force import Verdict
from grafter.config.names import NameRule, PointName
from grafter.core.patterns import read_patterns


class Taker:
    """Keeps what is offered, in order, with the number of the backward pass that it came in (-1: none)."""

    gradients = None
    is_warming_up = False

    def __init__(
        self,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
        verdict: str | Callable[[str], str] = "operator",
    ) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.values: list[torch.Tensor] = []
        self.backward_passes: list[int] = []
        self._change, self._verdict = change, verdict

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]

    # As a Grafter.

    def trace(self, name: str, arguments: dict[str, Any]) -> Verdict:
        kind = self._verdict if isinstance(self._verdict, str) else self._verdict(name)
        return Verdict(kind, only_compares=self._change is None)  # type: ignore[arg-type]

    def dump_point(self, name: str, value: torch.Tensor, arguments: dict[str, Any], module: str | None = None) -> Any:
        self.seen.append((name, arguments.get("layer_id")))
        self.values.append(value.detach().clone())
        self.backward_passes.append(torch._C._current_graph_task_id())
        if self._change is None or not value.is_floating_point():
            return value
        return _Through.apply(value, self._change)

    # As an attachment asks it.

    def offer(self, name: PointName, module: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.dump_point(name.name, tensor, name.tags, module)

    def find_site(self, name: str, suffix: str, is_differentiated: bool) -> int:
        return find_site(self, name, (), has_gradient=False, suffix=suffix)  # type: ignore[arg-type]

    def attach(self, model: nn.Module, *patterns: str, rules: tuple[NameRule, ...] = ()) -> Attachment:
        return Attachment(model, read_patterns(patterns), Naming(rules, "target"), self.offer, self.find_site)

    # As traced code calls `dump`.

    def dump(self) -> Callable[[str, torch.Tensor], torch.Tensor]:
        def site(name: str) -> int:
            return find_site(self, name, (), has_gradient=False)  # type: ignore[arg-type]

        site._dynamo_marked_constant = True  # type: ignore[attr-defined]
        return lambda name, value: offer_traced(value, site(name))


class _Through(torch.autograd.Function):
    """A graft that returns: other values, and the same gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return change(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def graphs_compiled() -> int:
    """How many graphs were made since the compiler was reset."""
    return int(counters["stats"]["unique_graphs"])
