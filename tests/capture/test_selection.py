"""Which modules a pattern selects, and the paths that they have without wrappers."""

from __future__ import annotations

import pytest
import torch
from attach_parts import Block, Tower
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from grafter.capture.selection import clean_path, module_at, select_modules, walk
from grafter.core.patterns import read_patterns
from grafter.errors import UsageError

LAYERS = [f"layers.{n}{rest}" for n in range(3) for rest in ("", ".norm", ".up")]
EVERYTHING = ["", *LAYERS, "head"]


def paths(model: nn.Module, *patterns: str) -> list[str]:
    return [path for path, _ in select_modules(model, read_patterns(patterns))]


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        ((), EVERYTHING),
        (("*",), EVERYTHING),
        (("head",), ["head"]),
        (("root",), [""]),
        (("layers.?",), ["layers.0", "layers.1", "layers.2"]),
        (("layers.{layer_id}",), ["layers.0", "layers.1", "layers.2"]),
        (("layers.1.*",), ["layers.1.norm", "layers.1.up"]),
        (("*.up", "head"), ["layers.0.up", "layers.1.up", "layers.2.up", "head"]),
        (("*.up,head",), ["layers.0.up", "layers.1.up", "layers.2.up", "head"]),
        (("*.up head",), ["layers.0.up", "layers.1.up", "layers.2.up", "head"]),
        ((":Block",), ["layers.0", "layers.1", "layers.2"]),
        ((":*Norm",), ["layers.0.norm", "layers.1.norm", "layers.2.norm"]),
        (("layers.2.*:Linear",), ["layers.2.up"]),
        (("layers.*", "!*.norm", "!*.up"), ["layers.0", "layers.1", "layers.2"]),
        (("!*.norm", "layers.0*"), ["layers.0", "layers.0.up"]),
        (("!layers.*",), ["", "head"]),
        (("!:Linear", "!:LayerNorm"), ["", "layers.0", "layers.1", "layers.2"]),
        (("nothing",), []),
    ],
)
def test_patterns_select_by_path_and_class(patterns: tuple[str, ...], selected: list[str]) -> None:
    """`*`, `?`, `{name}`, classes, both, and exclusions in any order; several in one text."""
    assert paths(Tower(), *patterns) == selected


def test_a_class_pattern_sees_base_classes() -> None:
    class Special(Block):
        pass

    assert paths(nn.Sequential(Special(), nn.ReLU()), ":Block") == ["0"]


@pytest.mark.parametrize("text", [":", "!", "!:", "layers.{", "layers.{0}", ":{a b}", "a}"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        read_patterns([text])


def test_a_pattern_is_a_text() -> None:
    with pytest.raises(UsageError, match="as texts"):
        read_patterns([nn.Linear])  # type: ignore[list-item]


def test_containers_that_cannot_be_called_are_left_out() -> None:
    """A ModuleList or ModuleDict has no forward: a hook on it would never fire."""
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1)]), "b": nn.Sequential(nn.ReLU())})
    assert paths(model) == ["a.0", "b", "b.0"]


def test_a_module_with_two_paths_is_selected_once_by_the_first_selected_path() -> None:
    shared = nn.Linear(1, 1)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    assert paths(model) == ["first", "second"]
    assert paths(model, "second.*") == ["second.0"]
    assert [path for path, _ in walk(model)] == ["", "first", "second", "second.0"]


class DistributedDataParallel(nn.Module):
    """Named as torch's wrapper is, which would need a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class FullyShardedDataParallel(nn.Module):
    """As torch's FSDP1 keeps what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def wrapped_layers(model: Tower) -> nn.Module:
    for number in range(3):
        model.layers[number] = checkpoint_wrapper(model.layers[number])  # type: ignore[assignment]
    return model


def compiled_layer(model: Tower) -> nn.Module:
    model.layers[1] = torch.compile(model.layers[1])  # type: ignore[assignment]
    return model


WRAPPINGS = {
    "DDP": DistributedDataParallel,
    "torch.compile": torch.compile,
    "DDP of torch.compile": lambda model: DistributedDataParallel(torch.compile(model)),  # type: ignore[arg-type]
    "FSDP": FullyShardedDataParallel,
    "checkpoint wrapper": checkpoint_wrapper,
    "checkpoint wrapper of each layer": wrapped_layers,
    "a compiled layer": compiled_layer,
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_wrappers_are_seen_through(wrap: object) -> None:
    """The paths and modules are those of the model without them, however it is wrapped."""
    plain = Tower()
    modules = dict(walk(plain))
    wrapped = wrap(plain)  # type: ignore[operator]
    assert dict(walk(wrapped)) == modules
    assert paths(wrapped) == EVERYTHING
    for path, module in modules.items():
        assert module_at(wrapped, path) is module


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_raw_paths_lose_the_wrappers_segments(wrap: object) -> None:
    wrapped = wrap(Tower())  # type: ignore[operator]
    cleaned = {clean_path(wrapped, raw) for raw, _ in wrapped.named_modules()}
    assert cleaned == {*EVERYTHING, "layers"}


def test_a_module_of_ones_own_may_be_called_module() -> None:
    """`module` is a wrapper's segment only under a wrapper."""
    model = nn.ModuleDict({"module": nn.Linear(1, 1)})
    assert paths(model) == ["module"]
    assert module_at(model, "module") is model["module"]
    with pytest.raises(AttributeError, match="no module 'weight'"):
        module_at(model, "module.weight")
