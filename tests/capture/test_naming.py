"""The names that points get from a module's path, and from the plan file's `names`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attach_parts import Tower, attach, some_input
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from grafter.capture.naming import Naming, default_name
from grafter.capture.parameters import named_weights
from grafter.config.names import NameRule, PointName
from grafter.config.settings.config import SETTING_FIELDS
from grafter.config.settings.plan_file import read_plan_file
from grafter.core.messages.announced_models import is_tensor_key
from grafter.core.points import OPTIONS, OWN_TAGS
from grafter.errors import ConfigError


def name_of(path: str, model: nn.Module | None = None) -> tuple[str, dict[str, Any]]:
    name = default_name(model if model is not None else nn.Module(), path)
    return name.name, name.tags


@pytest.mark.parametrize(
    ("path", "name", "tags"),
    [
        ("", "root", {}),
        ("head", "head", {}),
        ("model.layers.3.mlp", "model.layers.mlp", {"layer_id": 3}),
        ("model.layers.3", "model.layers", {"layer_id": 3}),
        ("layers.12.experts.5.up", "layers.experts.5.up", {"layer_id": 12}),
        ("0", "root", {"layer_id": 0}),
        ("0.attn", "attn", {"layer_id": 0}),
        ("block3.conv1", "block3.conv1", {}),
    ],
)
def test_the_first_number_of_a_path_becomes_layer_id(path: str, name: str, tags: dict[str, Any]) -> None:
    """Where no layer says its own number; of two numbers, the second stays in the name."""
    assert name_of(path) == (name, tags)


@pytest.mark.parametrize(
    ("attribute", "own", "layer_id"),
    [
        ("layer_number", 5, 4),  # Megatron counts from 1
        ("layer_idx", 5, 5),
        ("layer_id", 5, 5),
        ("layer_id", True, 0),  # no number
        ("layer_idx", None, 0),
        ("other", 5, 0),
    ],
)
def test_the_layers_own_number_wins(attribute: str, own: Any, layer_id: int) -> None:
    """A pipeline stage counts its layers from 0; each knows which one of the model it is."""
    model = Tower(1)
    setattr(model.layers[0], attribute, own)
    assert name_of("layers.0.up", model) == ("layers.up", {"layer_id": layer_id})


def test_the_layers_own_number_is_found_through_wrappers() -> None:
    model = Tower(1)
    model.layers[0].layer_number = 7  # type: ignore[assignment]
    model.layers[0] = checkpoint_wrapper(model.layers[0])  # type: ignore[assignment]
    assert name_of("layers.0.up", model) == ("layers.up", {"layer_id": 6})


def test_numbers_as_keys_of_a_module_dict_are_layers_and_words_are_not() -> None:
    """torchtitan keeps its layers in a ModuleDict with the keys "0", "1", ..."""
    model = nn.ModuleDict({"layers": nn.ModuleDict({"4": nn.Linear(1, 1), "norm": nn.LayerNorm(1)})})
    _, recorder = attach(model)
    model["layers"]["4"](some_input(width=1))  # type: ignore[index]
    model["layers"]["norm"](some_input(width=1))  # type: ignore[index]
    assert recorder.seen == [
        ("layers.in.input", {"layer_id": 4}),
        ("layers.out", {"layer_id": 4}),
        ("layers.norm.in.input", {}),
        ("layers.norm.out", {}),
    ]


def ruled(rules: list[dict[str, str]], path: str, suffix: str = "", model: nn.Module | None = None) -> PointName:
    naming = Naming([NameRule(**rule) for rule in rules], "target")
    module = naming.of_module(model if model is not None else nn.Module(), path)
    return naming.of_tensor(module, path, suffix) if suffix else module


def test_a_rule_names_a_module_and_its_tensors() -> None:
    """Captures become tags, unless the name uses them."""
    rules = [{"path": "decoder.layers.{layer_id}.{part}_attention", "name": "{part}_attn"}]
    assert ruled(rules, "decoder.layers.3.self_attention") == PointName("self_attn", {"layer_id": 3})
    assert ruled(rules, "decoder.layers.3.self_attention", ".out.0") == PointName("self_attn.out.0", {"layer_id": 3})
    assert ruled(rules, "decoder.norm") == PointName("decoder.norm", {})


def test_a_rule_names_one_tensor_of_a_module() -> None:
    """One program returns a tuple where the other returns a tensor."""
    rules = [
        {"path": "layers.{layer_id}.out.0", "name": "layer_out"},
        {"path": "layers.{layer_id}.in.{argument}", "name": "layer_in.{argument}"},
        {"path": "root.out", "name": "logits"},
    ]
    assert ruled(rules, "layers.3", ".out.0") == PointName("layer_out", {"layer_id": 3})
    assert ruled(rules, "layers.3", ".in.mask") == PointName("layer_in.mask", {"layer_id": 3})
    assert ruled(rules, "layers.3", ".out.1") == PointName("layers.out.1", {"layer_id": 3})
    assert ruled(rules, "", ".out") == PointName("logits", {})


def test_a_rule_for_modules_does_not_swallow_the_parts_of_their_tensors() -> None:
    """`*` in a module's pattern would match `.in.x` and `.out`, too, and give all of them one name."""
    rules = [{"path": "layers.{layer_id}.{part}", "name": "{part}"}, {"path": "enc.*", "name": "encoder"}]
    assert ruled(rules, "layers.3", ".out") == PointName("layers.out", {"layer_id": 3})
    assert ruled(rules, "layers.3.mlp", ".in.x") == PointName("mlp.in.x", {"layer_id": 3})
    assert ruled(rules, "enc.norm", ".in.x") == PointName("encoder.in.x", {})
    assert ruled(rules, "enc.norm", ".out") == PointName("encoder.out", {})


def test_a_capture_that_stands_for_module_and_tensor_must_be_one_text() -> None:
    rules = [{"path": "{part}.out.{part}", "name": "same"}]
    assert ruled(rules, "a", ".out.a").name == "same"
    assert ruled(rules, "a", ".out.b").name == "a.out.b"


def test_a_captured_layer_id_is_the_layers_own_number() -> None:
    """In a pipeline stage, the number in the path says nothing."""
    model = Tower(1)
    model.layers[0].layer_number = 9  # type: ignore[assignment]
    rules = [{"path": "layers.{layer_id}.up", "name": "up"}, {"path": "layers.{layer_id}.out.0", "name": "layer_out"}]
    assert ruled(rules, "layers.0.up", model=model) == PointName("up", {"layer_id": 8})
    assert ruled(rules, "layers.0", ".out.0", model=model) == PointName("layer_out", {"layer_id": 8})


def test_the_first_rule_of_this_job_wins() -> None:
    rules = [
        {"path": "a", "name": "theirs", "role": "baseline"},
        {"path": "a", "name": "ours", "role": "target"},
        {"path": "a", "name": "both"},
    ]
    assert ruled(rules, "a").name == "ours"
    assert ruled(rules[2:], "a").name == "both"


def test_weights_are_named_by_their_own_rule_else_by_their_modules() -> None:
    """A rule for a module is one for its own weights, too."""
    naming = Naming(
        [NameRule(path="layers.{layer_id}.up", name="up"), NameRule(path="*.up.bias", name="up_bias")], None
    )
    model = Tower(1)
    names = {path: naming.of_weight(model, path) for path, _ in named_weights(model)}
    assert names["layers.0.up.weight"] == PointName("up.weight", {"layer_id": 0})
    assert names["layers.0.up.bias"] == PointName("up_bias", {})
    assert names["layers.0.norm.bias"] == PointName("layers.norm.bias", {"layer_id": 0})


# The plan file.


def read_names(tmp_path: Path, text: str) -> tuple[NameRule, ...]:
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    return read_plan_file(plan, SETTING_FIELDS).names


def test_the_plan_file_holds_names(tmp_path: Path) -> None:
    text = """names:
  - {path: "model.layers.{layer_id}.self_attn", name: attn, role: baseline}
  - {path: "decoder.layers.{layer_id}.self_attention", name: attn, role: target}
"""
    assert read_names(tmp_path, text) == (
        NameRule(path="model.layers.{layer_id}.self_attn", name="attn", role="baseline"),
        NameRule(path="decoder.layers.{layer_id}.self_attention", name="attn", role="target"),
    )


def test_the_names_that_the_docs_show_do_what_they_say(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "capture.md").read_text()
    rules = read_names(tmp_path, next(block for block in text.split("```") if block.startswith("yaml\nnames:"))[5:])
    baseline, target = Naming(rules, "baseline"), Naming(rules, "target")
    model = nn.Module()
    attention = PointName("attn", {"layer_id": 3})
    assert baseline.of_module(model, "model.layers.3.self_attn") == attention
    assert target.of_module(model, "decoder.layers.3.self_attention") == attention
    assert baseline.of_module(model, "model.layers.3.mlp.up_proj") == PointName("up", {"layer_id": 3})
    layer = target.of_module(model, "decoder.layers.3")
    assert target.of_tensor(layer, "decoder.layers.3", ".out.0") == PointName("layer.out", {"layer_id": 3})


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{path: a}", ":2:5: an entry of names needs `name`"),
        ("{name: a}", ":2:5: an entry of names needs `path`"),
        ("{path: a, name: b, rank: 0}", ":2:24: 'rank' is not a field"),
        ("{path: a, name: b, role: both}", ":2:30: role: "),
        ('{path: "a.{", name: b}', ":2:12: path: match 'a.{'"),
        ('{path: "a.{x}", name: "{y}"}', "which 'a.{x}' does not capture"),
        ('{path: "{step}.a", name: b}', "{step} would be a tag"),
        ('{path: "{dims}.a", name: b}', "{dims} would be a tag"),
        ("text", ":2:5: an entry of names is a list of"),
    ],
)
def test_a_bad_entry_is_told_with_its_line(tmp_path: Path, entry: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_names(tmp_path, f"names:\n  - {entry}\n")
    assert told in str(raised.value)
    assert "plan.yaml:2:" in str(raised.value)


@pytest.mark.parametrize("reserved", sorted(OPTIONS | OWN_TAGS))
def test_a_capture_with_a_reserved_name_may_stand_in_the_common_name(reserved: str) -> None:
    """It is no tag then."""
    rule = NameRule(path=f"a.{{{reserved}}}", name=f"a_{{{reserved}}}")
    assert rule.apply("a.x") == PointName("a_x", {})


# What both jobs have, compared before the first point.

LAYER = {"path": "decoder.layers.{layer_id}", "name": "layer"}
ITS_OUTPUT = {"path": "decoder.layers.{layer_id}.out.0", "name": "layer.out"}
OUTPUT = {"path": "model.layers.{layer_id}.out", "name": "layer.out"}
PROBABILITIES = ({"path": "*.{layer_id}.out.1", "name": "probs"}, {"path": "*.{layer_id}.out.0", "name": "probs"})
ANY = {"path": "decoder.layers.{layer_id}.{part}.0", "name": "layer.{part}"}


@pytest.mark.parametrize(
    ("rules", "others", "suffix", "other_suffix", "meet"),
    [
        ([ITS_OUTPUT], [OUTPUT], ".out.0", ".out", True),  # each names its tensor alone
        ([ITS_OUTPUT], [{**LAYER, "path": "model.layers.{layer_id}"}], ".out.0", ".out", True),  # or one its module
        ([ITS_OUTPUT, LAYER], [{**LAYER, "path": "model.layers.{layer_id}"}], ".out.0", ".out", True),
        ([PROBABILITIES[0]], [PROBABILITIES[1]], ".out.1", ".out.0", True),  # a name that is no module's
        ([LAYER], [{**LAYER, "path": "model.layers.{layer_id}"}], ".in.x", ".in.x", True),
        ([ITS_OUTPUT], [], ".out.0", ".out", False),
        ([ITS_OUTPUT], [OUTPUT], ".in.x", ".in.x", False),  # the module's other tensors have other names
        ([ANY], [OUTPUT], ".out.0", ".out", False),  # nobody knows before the call what it is for
        ([ANY, LAYER], [{**LAYER, "path": "model.layers.{layer_id}"}], ".out.0", ".out", True),
    ],
)
def test_an_entry_for_one_tensor_is_enough_for_it_to_be_known(
    rules: list[dict[str, str]], others: list[dict[str, str]], suffix: str, other_suffix: str, meet: bool
) -> None:
    """Both jobs come to the same: a point that one of them skips is not waited for by the other."""
    found = []
    for names, path, own_suffix in ((rules, "decoder.layers.3", suffix), (others, "model.layers.3", other_suffix)):
        naming = Naming([NameRule(**rule) for rule in names], "target")
        module = naming.of_module(nn.Module(), path)
        announced = {module.key, *(name.tensor_key for name in naming.known_tensors(module, path))}
        found.append((naming.announced_as(module, path, own_suffix).split("\n"), announced))
    (own, own_announced), (other, other_announced) = found
    assert other_announced.isdisjoint(own) is not meet
    assert own_announced.isdisjoint(other) is not meet
    assert not own_announced.isdisjoint(own) and not other_announced.isdisjoint(other)


def test_the_announcements_of_single_tensors_are_told_from_those_of_modules() -> None:
    """Modules that only one job has are reported; tensors with names of their own are not."""
    name = PointName("layer_out", {"layer_id": 3})
    assert is_tensor_key(name.tensor_key) and not is_tensor_key(name.key)
