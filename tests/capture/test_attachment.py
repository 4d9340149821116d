"""What an attachment does to one model: its points, what replaces them, and that nothing is left of it."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_parts import Block, Recorder, Tower, attach, facts_of, some_input
from torch import nn

from grafter.capture.naming import Naming
from grafter.capture.parameters import watch_gradients
from grafter.config.names import NameRule
from grafter.config.settings.config import GrafterConfig
from grafter.rank.grafter import Grafter

BLOCK = ["in.hidden", "norm.in.input", "norm.out", "up.in.input", "up.out", "out.0"]


def layer_points(*names: str) -> list[str]:
    return [f"layers.{name}" for name in names]


def test_every_module_has_points_in_the_order_of_the_calls() -> None:
    """All modules, the model itself included; the layer's number is a tag."""
    model = Tower(2)
    _, recorder = attach(model)
    model(some_input())
    expected = ["root.in.hidden", *layer_points(*BLOCK) * 2, "head.in.input", "head.out", "root.out"]
    assert recorder.names == expected
    assert [tags for _, tags in recorder.seen] == [{}, *[{"layer_id": 0}] * 6, *[{"layer_id": 1}] * 6, {}, {}, {}]


def test_hooks_are_placed_on_what_is_selected_alone() -> None:
    """Two hooks a module, and none anywhere else."""
    model = Tower(3)
    attachment, _ = attach(model, "layers.*", "!*.norm")
    assert attachment.hook_count == 2 * 6
    hooked = [path for path, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooked == [path for path, _ in model.named_modules() if path.startswith("layers.") and "norm" not in path]
    assert "forward" not in model.__dict__
    assert [points.path for points in attachment.points] == hooked


@pytest.mark.parametrize(
    ("kinds", "expected"), [({"inputs": False}, ["layers.out.0"]), ({"outputs": False}, ["layers.in.hidden"])]
)
def test_inputs_or_outputs_alone(kinds: dict[str, bool], expected: list[str]) -> None:
    """Half the hooks; a module that was reached counts as reached either way."""
    model = Tower(1)
    attachment, recorder = attach(model, ":Block", "root", **kinds)
    assert attachment.hook_count == 1
    model(some_input())
    assert [name for name in recorder.names if name.startswith("layers")] == expected
    assert attachment.never_fired() == []


def test_an_input_by_position_or_by_name_is_one_point() -> None:
    for call in (lambda m, x, y: m(x, y), lambda m, x, y: m(x, mask=y), lambda m, x, y: m(mask=y, hidden=x)):
        model = nn.ModuleList([Block()])
        _, recorder = attach(model, ":Block")
        call(model[0], some_input(), torch.ones(4))
        assert recorder.names == ["root.in.hidden", "root.in.mask", "root.out.0"]


def test_tensors_that_come_together_are_offered_in_the_order_of_their_common_names() -> None:
    """Two programs whose arguments or keys stand in another order must meet at the same points one after the other."""

    class Out(nn.Module):
        def __init__(self, *keys: str) -> None:
            super().__init__()
            self.keys = keys

        def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {key: inputs[key] for key in self.keys}

    x, y = some_input(1), some_input(2)
    for keys in (("a", "b"), ("b", "a")):
        model = nn.ModuleDict({"m": Out(*keys)})
        _, recorder = attach(model)
        out = model["m"](**{key: {"a": x, "b": y}[key] for key in keys})
        assert recorder.names == ["m.in.a", "m.in.b", "m.out.a", "m.out.b"]
        assert list(out) == list(keys)

    rules = (NameRule(path="m.in.a", name="z"), NameRule(path="m.in.b", name="y"))
    model = nn.ModuleDict({"m": Out("a")})
    _, recorder = attach(model, rules=rules, outputs=False)
    model["m"](a=x, b=y)
    assert recorder.names == ["y", "z"]


def zero(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


def test_what_replaces_an_output_reaches_the_rest_of_the_model() -> None:
    model = Tower(2)
    expected = model.head(zero(some_input()))
    attach(model, ":Block", offer=Recorder(layers_out_0=zero))
    assert torch.equal(model(some_input()), expected)


def test_what_replaces_an_input_is_what_the_module_gets() -> None:
    """By position and by keyword; what is no tensor is passed on."""
    model = Tower(1)
    block = model.layers[0]
    expected, _ = block(zero(some_input()), scale=2.0)
    attach(model, ":Block", offer=Recorder(layers_in_hidden=zero))
    assert torch.equal(block(some_input(), scale=2.0)[0], expected)
    assert torch.equal(block(hidden=some_input(), scale=2.0)[0], expected)


def test_the_models_own_inputs_and_outputs_are_replaced_too() -> None:
    model = Tower(1)
    expected = model(zero(some_input()))
    attachment, _ = attach(model, "root", offer=Recorder(root_in_hidden=zero))
    assert torch.equal(model(some_input()), expected)
    attachment.detach()
    attach(model, "root", offer=Recorder(root_out=zero))
    assert not model(some_input()).any()


def test_a_module_that_changes_its_input_is_seen_before_it_does() -> None:
    """The point has the values from before the call, and the module changes what replaced them."""

    class Adds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    model = nn.ModuleDict({"adds": Adds()})
    _, recorder = attach(model)
    x = torch.ones(2)
    assert model["adds"](x) is x
    assert recorder.values["adds.in.x"].tolist() == [1, 1] and recorder.values["adds.out"].tolist() == [2, 2]

    model = nn.ModuleDict({"adds": Adds()})
    attach(model, offer=Recorder(adds_in_x=lambda x: x + 10))
    x = torch.ones(2)
    assert model["adds"](x).tolist() == [12, 12] and x.tolist() == [1, 1]


@pytest.mark.parametrize("module", [nn.Identity(), nn.ReLU(inplace=True)], ids=["Identity", "in-place ReLU"])
def test_an_output_that_is_the_input_is_replaced_alone(module: nn.Module) -> None:
    model = nn.ModuleDict({"m": module})
    attach(model, offer=Recorder(m_out=lambda x: x * 10))
    x = torch.tensor([1.0, 2.0])
    assert model["m"](x).tolist() == [10, 20]
    assert x.tolist() == [1, 2]


def test_one_tensor_in_several_places_stays_one() -> None:
    """Attention asks whether key is query. Replacements that are equal are handed on as one object."""

    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[bool, bool]:
            return q is k, k is v

    x, y = some_input(1), some_input(2)
    for replacement, expected in ((lambda t: t.clone(), (True, False)), (torch.rand_like, (False, False))):
        model = nn.ModuleDict({"m": Attention()})
        attach(
            model,
            offer=Recorder(m_in_q=replacement, m_in_k=replacement, m_in_v=replacement),
        )
        assert model["m"](x, x, y) == expected


def test_a_module_called_several_times_has_its_points_each_time() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    attachment, recorder = attach(model, ":Linear")
    model(some_input())
    assert recorder.names == ["root.in.input", "root.out"] * 2
    assert [tags for _, tags in recorder.seen] == [{"layer_id": 0}] * 4
    assert attachment.hook_count == 2


# The model's own forward.


def test_forward_called_directly_is_reached() -> None:
    model = Tower(1)
    _, recorder = attach(model, "root")
    model.forward(some_input())
    model(some_input())
    assert recorder.names == ["root.in.hidden", "root.out"] * 2


def test_the_models_signature_stays() -> None:
    """transformers' `generate` reads it to know what a model accepts."""
    model = Tower(1)
    before = inspect.signature(model.forward)
    attach(model, "root")
    assert inspect.signature(model.forward) == before
    instance = Tower(1)
    instance.forward = lambda hidden, flag=3: hidden  # type: ignore[assignment,method-assign]
    attach(instance, "root")
    assert list(inspect.signature(instance.forward).parameters) == ["hidden", "flag"]


def test_a_forward_of_the_instances_own_is_called_and_comes_back() -> None:
    """What accelerate and others put there."""
    model = Tower(1)

    def own(hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 7

    model.forward = own  # type: ignore[assignment,method-assign]
    attachment, recorder = attach(model, "root")
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 7.0))
    assert recorder.names == ["root.in.hidden", "root.out"]
    attachment.detach()
    assert model.__dict__["forward"] is own


def test_a_copy_of_the_model_runs_with_its_own_weights() -> None:
    """A wrapper bound to the first model would run that one's."""
    model = Tower(1)
    attach(model, "root")
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied.head.weight)
    nn.init.zeros_(copied.head.bias)
    assert not copied(some_input()).any()
    assert model(some_input()).any()


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.save": saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # type: ignore[no-any-return]
    "deepcopy": copy.deepcopy,
}


class WithState(Tower):
    """One that pickles itself in its own way."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "noted": True}


@pytest.mark.parametrize("make", [Tower, WithState])
@pytest.mark.parametrize("how", COPIES)
def test_what_is_saved_or_copied_has_no_hooks_and_the_model_keeps_its_own(how: str, make: type[Tower]) -> None:
    """No point of a copy, nothing of grafter in it, and hooks of others are in it, as they were."""
    model = make(2)
    model.head.register_forward_hook(hook_of_somebody_else)
    before, expected = facts_of(COPIES[how](model)), model(some_input())
    attachment, recorder = attach(model)
    attachment.keep(watch_gradients(model, ["head"], Naming((), "target"), lambda name, tensor: None))
    copied = COPIES[how](model)
    assert facts_of(copied) == before
    assert torch.equal(copied(some_input()), expected) and recorder.seen == []
    assert b"grafter" not in pickle.dumps(model)
    model(some_input())
    offered = len(recorder.seen)
    attachment.detach()
    assert offered and facts_of(model) == facts_of(make_hooked(make))


def hook_of_somebody_else(*_: Any) -> None:
    return None


def make_hooked(make: type[Tower]) -> nn.Module:
    model = make(2)
    model.head.register_forward_hook(hook_of_somebody_else)
    return model


def test_a_copy_of_a_model_with_a_forward_of_its_own_has_that() -> None:
    model = Tower(1)
    model.forward = torch.sigmoid  # type: ignore[assignment,method-assign]
    attach(model, "root")
    assert copy.deepcopy(model).forward is torch.sigmoid


def test_two_attachments_leave_hooks_out_until_both_are_gone() -> None:
    model = Tower(1)
    first, second = attach(model)[0], attach(model, "head")[0]
    first.detach()
    pickle.dumps(model)
    second.detach()
    assert facts_of(model) == facts_of(Tower(1))


def test_a_forward_that_was_replaced_meanwhile_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = Tower(1)
    attachment, _ = attach(model, "root")

    def other(hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    model.forward = other  # type: ignore[assignment,method-assign]
    with caplog.at_level(logging.WARNING, "grafter"):
        attachment.detach()
    assert model.__dict__["forward"] is other
    assert "forward was replaced since attach" in caplog.text


# Detaching.


def test_detaching_leaves_the_model_as_it_was() -> None:
    model = Tower()
    before, expected = facts_of(model), model(some_input())
    attachment, recorder = attach(model, offer=Recorder(layers_out_0=zero))
    assert facts_of(model) != before
    attachment.detach()
    attachment.detach()
    assert facts_of(model) == before
    assert torch.equal(model(some_input()), expected)
    assert recorder.seen == []


def test_the_end_of_a_block_detaches_also_after_an_error() -> None:
    model = Tower(1)
    before = facts_of(model)
    with pytest.raises(ZeroDivisionError), attach(model)[0]:
        raise ZeroDivisionError
    assert facts_of(model) == before


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_two_attachments_end_in_any_order(first_to_go: int) -> None:
    """Each has its own points, and what is left is that of the other."""
    model = Tower(1)
    before = facts_of(model)
    made = [attach(model, "root", "layers.*"), attach(model, "root", "head")]
    model(some_input())
    assert [recorder.names[0] for _, recorder in made] == ["root.in.hidden"] * 2
    gone, left = made[first_to_go], made[1 - first_to_go]
    gone[0].detach()
    counts = [len(gone[1].seen), len(left[1].seen)]
    model(some_input())
    assert [len(gone[1].seen), len(left[1].seen)] == [counts[0], 2 * counts[1]]
    left[0].detach()
    assert facts_of(model) == before


def test_an_attachment_within_another_has_names_of_its_own() -> None:
    model = Tower(1)
    before = facts_of(model)
    outer, outer_seen = attach(model, ":Block")
    inner, inner_seen = attach(model.layers[0])
    model(some_input())
    assert outer_seen.names == ["layers.in.hidden", "layers.out.0"]
    assert inner_seen.names == ["root.in.hidden", *BLOCK[1:-1], "root.out.0"]
    outer.detach()
    inner.detach()
    assert facts_of(model) == before


def test_hooks_of_others_stay() -> None:
    model = Tower(1)
    seen: list[Any] = []
    model.head.register_forward_hook(lambda *_: seen.append("hook"))
    attachment, _ = attach(model)
    attachment.detach()
    model(some_input())
    assert seen == ["hook"]


def test_modules_that_no_call_reached_are_known() -> None:
    model = Tower(2)
    attachment, _ = attach(model, "root", "layers.*:Block", "head")
    assert attachment.never_fired() == ["", "layers.0", "layers.1", "head"]
    model.layers[1](some_input())
    assert attachment.never_fired() == ["", "layers.0", "head"]


# torch.compile.


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compiled_layers(model: Tower) -> nn.Module:
    for number, layer in enumerate(model.layers):
        model.layers[number] = torch.compile(layer, backend="aot_eager")  # type: ignore[assignment]
    return model


COMPILING = {
    "the model": lambda model: torch.compile(model, backend="aot_eager"),
    "in place": compiled_in_place,
    "each layer": compiled_layers,
    "a function around it": lambda model: torch.compile(lambda x: model(x), backend="aot_eager"),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", COMPILING)
def test_hooks_fire_in_compiled_code(how: str, when: str) -> None:
    """However it was compiled, and whether it had run before attach or was compiled after it: every hook fires at every
    call, values are those of eager code, what is replaced reaches the rest, and after detaching no hook fires."""
    eager = Tower(2)
    _, expected = attach(eager)
    want = eager(some_input())
    model = Tower(2)
    if when == "before":
        call = COMPILING[how](model)
        torch.testing.assert_close(call(some_input()), want)
        attachment, recorder = attach(model)
    else:
        attachment, recorder = attach(model)
        call = COMPILING[how](model)
    for times in (1, 2):
        torch.testing.assert_close(call(some_input()), want)
        assert recorder.names == expected.names * times
    assert attachment.never_fired() == []
    for name, value in recorder.values.items():
        torch.testing.assert_close(value, expected.values[name])
    attachment.detach()
    call(some_input())
    assert len(recorder.names) == 2 * len(expected.names)
    replacing, _ = attach(model, ":Block", offer=Recorder(layers_out_0=zero))
    torch.testing.assert_close(call(some_input()), model.head(zero(some_input())))
    replacing.detach()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_wrapped_compiled_model_is_attached_as_a_whole() -> None:
    """`attach(torch.compile(model))`: names without the wrapper's segments."""
    model = torch.compile(Tower(1), backend="aot_eager")
    model(some_input())
    attachment, recorder = attach(model, "root", "head")
    model(some_input())
    assert recorder.names == ["root.in.hidden", "head.in.input", "head.out", "root.out"]
    attachment.detach()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_gradients_agree_with_eager_ones() -> None:
    def gradients(compile_it: bool) -> list[torch.Tensor]:
        model = Tower(2)
        attach(model, offer=Recorder(layers_out_0=lambda x: x * 2))
        call = torch.compile(model, backend="aot_eager") if compile_it else model
        call(some_input()).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    eager, compiled = gradients(False), gradients(True)
    assert len(eager) == len(compiled) == len(list(Tower(2).parameters()))
    torch.testing.assert_close(compiled, eager)


def test_a_pattern_that_matches_nothing_is_told_beside_the_classes_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the pattern is the setting's and not the call's."""
    config = GrafterConfig(
        enable=True, role="baseline", dump_filter="True", dir=str(tmp_path), run_name="one", attach=":*DecoderLayer"
    )
    grafter = Grafter(config)
    grafter.attach(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), ())
    grafter.close()
    assert "no module of Sequential matches ':*DecoderLayer'; its classes are LayerNorm, Linear, Seq" in caplog.text
