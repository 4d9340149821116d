"""Hooks of `attach` in compiled code: operators in one graph, with the values, the order and the gradients of eager
code."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from attach_parts import Tower, some_input
from compiled_parts import Taker, graphs_compiled
from torch import nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import grafter
from grafter.capture import compiled as compiled_points
from grafter.config.names import NameRule
from grafter.errors import UsageError


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def changed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.5


CHANGES = pytest.mark.parametrize("change", [None, changed], ids=["compare", "graft"])


def gradients_of(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def check_against_eager(
    taker: Taker, model: nn.Module, compiled: Callable[[torch.Tensor], Any], give: Callable[[], torch.Tensor]
) -> None:
    """`compiled` offers what `model` offers, the same values in the same order, at each of three calls."""
    expected = model(give())
    points, values = taker.seen, taker.values
    for _ in range(3):
        taker.seen, taker.values = [], []
        found = compiled(give())
        assert taker.seen == points
        torch.testing.assert_close(taker.values, values)
        torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected))


@pytest.mark.parametrize(
    ("backend", "change"),
    [("eager", changed), ("aot_eager", None), ("aot_eager", changed), ("inductor", changed)],
)
def test_hooks_on_every_module_are_in_one_graph(backend: str, change: Any) -> None:
    """The model itself, its layers, what is in them, inputs and outputs: one graph, compiled once, without a break."""
    model, taker = Tower(2), Taker(change)
    attachment = taker.attach(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    check_against_eager(taker, model, compiled, some_input)
    assert graphs_compiled() == 1
    assert attachment.never_fired() == []
    torch.testing.assert_close(gradients_of(model, compiled(some_input())), gradients_of(model, model(some_input())))
    assert set(taker.backward_passes) == {-1}, "the backward pass offers nothing again"


@CHANGES
def test_code_that_was_compiled_before_gets_the_hooks_and_loses_them(change: Any) -> None:
    model, taker = Tower(1), Taker(change)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = compiled(some_input())
    attachment = taker.attach(model)
    check_against_eager(taker, model, compiled, some_input)
    attachment.detach()
    taker.seen.clear()
    assert torch.equal(compiled(some_input()), plain)
    assert taker.seen == []


@pytest.mark.parametrize("how", ["compile()", "torch.compile"])
def test_layers_that_are_compiled_one_by_one_share_their_graphs(how: str) -> None:
    """Twelve layers, more than the compiler would compile one piece of code for: each has points of its own layer."""
    model, taker = Tower(12), Taker(changed)
    attachment = taker.attach(model)
    expected = model(some_input())
    points, values, taker.seen, taker.values = taker.seen, taker.values, [], []
    for number, layer in enumerate(model.layers):
        if how == "compile()":
            layer.compile(backend="aot_eager", fullgraph=True)
        else:
            model.layers[number] = torch.compile(layer, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    torch.testing.assert_close(model(some_input()), expected)
    assert taker.seen == points
    torch.testing.assert_close(taker.values, values)
    # The first layer's input requires no gradient.
    assert graphs_compiled() <= 3
    assert attachment.never_fired() == []


def test_one_layers_graph_is_not_run_for_a_module_of_another_name() -> None:
    """Two modules of one class and shape, whose points differ by more than tags."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    taker = Taker()
    taker.attach(model, rules=(NameRule(path="b.out", name="other"),))
    for module in model.values():
        module.compile(backend="aot_eager", fullgraph=True)
        module(some_input())
    assert taker.names == ["a.in.input", "a.out", "b.in.input", "other"]


# Containers.


class Pair(NamedTuple):
    p: torch.Tensor
    q: torch.Tensor


@dataclasses.dataclass
class Plain:
    a: torch.Tensor
    b: int = 3


def library_output(x: torch.Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=x * 2, hidden_states=(x, x + 1))  # type: ignore[arg-type]


CONTAINERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "tuple": (lambda x: (x, x + 1, None, 3), lambda o: o[0] * o[1] * o[3]),
    "list": (lambda x: [x * 2, (x + 1,)], lambda o: o[0] * o[1][0]),
    "dict": (lambda x: {"a": x * 2, "b": {"c": x + 1}}, lambda o: o["a"] * o["b"]["c"]),
    "ordered": (lambda x: collections.OrderedDict(a=x * 2, b=x + 1), lambda o: o["a"] * o["b"]),
    "named tuple": (lambda x: Pair(x * 2, x + 1), lambda o: o.p * o.q),
    "dataclass": (lambda x: Plain(x * 2), lambda o: o.a * o.b),
    "output class": (library_output, lambda o: o.last_hidden_state * o.hidden_states[1] * o[1][0]),
}
TENSORS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "transposed": (lambda x: x.T * 1, lambda o: o.T + 1),
    "expanded": (lambda x: x[:1].expand(5, 3, 4), lambda o: o.sum(0)),
    "with gaps": (lambda x: x[:, ::2], lambda o: o + 1),
    "its input, changed": (lambda x: x.add_(1), lambda o: o + 1),
    "whole numbers": (lambda x: (x * 10).long(), lambda o: o + 1),
    "complex": (lambda x: torch.complex(x, x), lambda o: o.abs()),
}


class Gives(nn.Module):
    """Inputs of many kinds, and an output as the test wants it."""

    def __init__(self, make: Callable[[torch.Tensor], Any], use: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.inner.forward = lambda x, *rest, opt, **more: make(x)  # type: ignore[method-assign,assignment]
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.inner(x.relu(), x, (x, {"z": x + 1}), opt=[x * 2], more=x.T))


@pytest.mark.parametrize("kind", [*CONTAINERS, *TENSORS])
def test_tensors_in_containers_and_of_any_strides_are_points_in_the_graph(kind: str) -> None:
    """By position, by name, nested; of outputs of each kind. What replaces them is put together to the same kind."""
    make, use = {**CONTAINERS, **TENSORS}[kind]
    model, taker = Gives(make, use), Taker(changed)
    taker.attach(model)
    check_against_eager(taker, model, torch.compile(model, backend="aot_eager", fullgraph=True), some_input)
    assert graphs_compiled() == 1


def test_a_point_that_no_filter_can_match_leaves_nothing_in_the_graph() -> None:
    """And its modules count as reached."""
    model, taker = Tower(2), Taker(verdict="nothing")
    attachment = taker.attach(model)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(model, backend=keep, fullgraph=True)(some_input())
    assert "grafter" not in str(graphs[0].graph)
    assert attachment.never_fired() == []


def test_a_layer_that_was_not_called_is_known_though_it_shares_the_graph_of_others() -> None:
    model, taker = Tower(3), Taker(verdict=lambda name: "operator" if name.endswith(".out.0") else "nothing")
    attachment = taker.attach(model, ":Block")
    compiled = torch.compile(lambda layer, x: layer(x), backend="aot_eager", fullgraph=True)
    for layer in (model.layers[0], model.layers[2]):
        compiled(layer, some_input())
    assert taker.seen == [("layers.out.0", 0), ("layers.out.0", 2)]
    assert attachment.never_fired() == ["layers.1"]


def test_what_cannot_be_in_a_graph_breaks_it_and_fires_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That is told once; where the graph must not break, torch says why it would."""
    monkeypatch.setattr(grafter._process, "_hinted", False)
    model, taker = Tower(1), Taker(changed, verdict="break")
    taker.attach(model, ":Block")
    with caplog.at_level(logging.WARNING, "grafter"):
        check_against_eager(taker, model, torch.compile(model, backend="aot_eager"), some_input)
    assert [r.name for r in caplog.records if "breaks the compiled graph" in r.getMessage()] == ["grafter"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="this hook breaks the compiled graph"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(some_input())


# Checkpointed regions inside of compiled code.


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.reentrant = Tower(2), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.inner.layers:
            x, _ = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.inner.head(x)


@pytest.mark.parametrize(
    ("backend", "reentrant", "change"),
    [("aot_eager", False, None), ("aot_eager", True, changed), ("inductor", False, changed)],
)
def test_a_recomputed_region_gets_what_was_written_in_it(backend: str, reentrant: bool, change: Any) -> None:
    """Gradients are those of the same grafts without a region; no point is offered again. Two forward passes come
    before their backward passes."""
    model, taker = Checkpointed(reentrant), Taker(change)
    taker.attach(model, "inner.*")
    inputs = [some_input(seed) for seed in (1, 2)]
    expected = gradients_of(model, torch.cat([model.inner(x) for x in inputs]))
    offered = len(taker.seen)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    losses = torch.cat([compiled(x) for x in inputs])
    torch.testing.assert_close(gradients_of(model, losses), expected)
    assert len(taker.seen) == 2 * offered
    assert set(taker.backward_passes) == {-1}


# What the operators say of themselves.


def test_the_operators_tell_inductor_that_no_cuda_graph_may_hold_them() -> None:
    for name in ("compare", "point", "gradient", "notice"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.grafter, name).default.tags


def test_a_point_in_a_cuda_graph_capture_is_an_error_whether_it_matches_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taker = Taker()
    dump = taker.dump()
    compiled = torch.compile(lambda x: dump("h", x), backend="eager")
    compiled(some_input())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UsageError, match=r"'h' at .* is in a CUDA graph capture"):
        compiled(some_input())
    assert taker.names == ["h"]


def test_the_operators_are_what_they_say() -> None:
    """torch's own checks of a custom operator: its schema, its fake, and what autograd and the tracer make of it."""
    taker = Taker(changed)
    dump = taker.dump()
    torch.compile(lambda x: dump("h", x), backend="eager")(some_input())
    sites = [number for number, site in enumerate(compiled_points._sites) if site.grafter is taker]
    for value in (some_input(), some_input().T, some_input()[:, ::2], torch.empty(0)):
        torch.library.opcheck(
            torch.ops.grafter.point.default,
            (value, torch.zeros(0), torch.tensor(-1), sites[0]),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
