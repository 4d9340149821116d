"""The plan file that `grafter plan suggest` writes: it is read, and gives both programs' modules one name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from suggest_parts import (
    TITAN_NAMES,
    divided,
    llama,
    mixtral,
    module_names,
    node,
    renamed,
    suggested_plan,
    tree,
)
from torch import nn
from typer.testing import CliRunner, Result

from grafter.analysis.plan_suggest.matching import match_trees
from grafter.analysis.plan_suggest.names import default_pattern
from grafter.analysis.plan_suggest.wording import plan_text
from grafter.capture.module_tree import (
    ModuleNode,
    ModuleTree,
    merge_trees,
    read_role_trees,
    read_trees,
    tree_of,
    write_trees,
)
from grafter.capture.naming import Naming
from grafter.cli.main import app
from grafter.config.names import PointName
from grafter.errors import UsageError
from tests.analysis.plan_suggest.test_plan_suggest import COLUMNS, ROWS, trees


def rename_modules(module: nn.Module, names: dict[str, str]) -> nn.Module:
    """The model itself with other attributes; it cannot be called any more."""
    for child in module._modules.values():
        rename_modules(child, names)
    module._modules = {names.get(name, name): child for name, child in module._modules.items()}
    return module


@pytest.mark.parametrize("make", [llama, mixtral])
def test_a_suggested_plan_gives_both_programs_the_same_names(make: object, tmp_path: Path) -> None:
    """Every module of the one has the name and tags of its counterpart in the other; none has another's."""
    ours, theirs = make(), rename_modules(make(), TITAN_NAMES)  # type: ignore[operator]
    rules = suggested_plan(tree_of(ours), tree_of(theirs), tmp_path).names
    baseline, target = module_names(ours, rules, "baseline"), module_names(theirs, rules, "target")
    assert target == {
        ".".join(TITAN_NAMES.get(segment, segment) for segment in path.split(".")): key
        for path, key in baseline.items()
    }
    assert len(set(target.values())) == len(target)
    assert baseline == module_names(ours, (), "baseline"), "the baseline keeps the names it has by default"


def test_two_equal_programs_need_no_entry(tmp_path: Path) -> None:
    one = tree_of(llama())
    assert suggested_plan(one, one, tmp_path).names == ()
    assert "#   model.layers.{layer_id}.mlp: high: all in it is paired; names equal" in plan_text(match_trees(one, one))


def test_low_pairs_are_comments(tmp_path: Path) -> None:
    """And the plan is read without them."""
    ours, theirs = tree(node("up_proj", 8, 4), node("x", 3, 3)), tree(node("w3", 16, 5), node("y", 3, 3))
    text = plan_text(match_trees(ours, theirs))
    assert '  # - {role: target, path: "w3", name: "up_proj"}' in text.splitlines()
    assert [rule.path for rule in suggested_plan(ours, theirs, tmp_path).names] == ["x", "y"]


def test_what_is_left_is_listed_with_its_reason() -> None:
    text = plan_text(match_trees(tree(node("a", 8, 4), node("b", 3, 3)), tree(node("b", 3, 3), node("c", 7, 2))))
    assert "# Left out, of the baseline:\n#   a (Linear): no module there has weights of 8x4" in text
    assert "# Left out, of the target:\n#   c (Linear): no module there has weights of 7x2" in text


def test_no_name_stands_for_two_modules_of_a_job(tmp_path: Path) -> None:
    """`norm` of the baseline is `last` of the target, which has another `norm`: this one is set aside."""
    ours = tree(node("norm", 8, kind="RMSNorm"), node("a", 3, 3))
    theirs = tree(node("last", 8, kind="RMSNorm"), node("norm", 5, 7), node("a", 3, 3))
    naming = Naming(suggested_plan(ours, theirs, tmp_path).names, "target")
    root = nn.Module()
    assert naming.of_module(root, "last").name == "norm"
    assert naming.of_module(root, "norm").name == "target_only.norm"


def test_a_module_called_out_is_not_taken_for_an_output(tmp_path: Path) -> None:
    """The path `attn.out` is also how the output of `attn` is written; the plan names the module alone."""
    ours = tree(node("attn"), node("attn.o_proj", 4, 4))
    theirs = tree(node("attention"), node("attention.out", 4, 4))
    naming = Naming(suggested_plan(ours, theirs, tmp_path).names, "target")
    root = nn.Module()
    assert naming.of_module(root, "attention.out").name == "attn.o_proj"
    attention = naming.of_module(root, "attention")
    assert naming.of_tensor(attention, "attention", ".out").name == "attn.out"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees(), trees())
def test_any_suggestion_is_a_plan_file_and_gives_no_name_twice(
    tmp_path: Path, ours: ModuleTree, theirs: ModuleTree
) -> None:
    """In one job, two modules never get one name and tags, even with the entries of middling pairs."""
    rules = suggested_plan(ours, theirs, tmp_path).names
    root = nn.Module()
    for role, one in (("baseline", ours), ("target", theirs)):
        naming = Naming(rules, role)
        paths = [n.path for n in one.modules if n.can_be_called and n.path]
        keys = [naming.of_module(root, path).key for path in paths]
        assert len(set(keys)) == len(keys), sorted(zip(keys, paths, strict=True))


# Tensors of modules.


def names_of(plan_names: tuple, path: str, suffix: str) -> str:
    naming = Naming(plan_names, "target")
    return naming.of_tensor(naming.of_module(nn.Module(), path), path, suffix).name


def test_the_first_input_gets_one_name(tmp_path: Path) -> None:
    """Where the two programs call it otherwise, and neither knows the other's word."""
    ours = tree(node("mlp", 4, 4, arguments=("hidden_states",)), node("f", 5, 4, arguments=("x", "mask")))
    theirs = tree(node("ffn", 4, 4, arguments=("x",)), node("f", 5, 4, arguments=("mask", "x")))
    names = suggested_plan(ours, theirs, tmp_path).names
    assert names_of(names, "ffn", ".in.x") == "mlp.in.hidden_states"
    assert names_of(names, "f", ".in.mask") == "f.in.mask"


def test_the_input_of_what_holds_less_is_not_the_same(tmp_path: Path) -> None:
    """transformers' `model` begins with the embedding, Megatron's `decoder` after it."""
    layer = [node("layers", kind="ModuleList"), node("layers.0"), node("layers.0.up", 4, 4), node("norm", 4)]
    ours = tree(
        node("model", arguments=("input_ids",)),
        *(n.model_copy(update={"path": f"model.{n.path}"}) for n in (node("wte", 9, 4), *layer)),
    )
    theirs = tree(
        node("wte", 9, 4),
        node("decoder", arguments=("hidden",)),
        *(n.model_copy(update={"path": f"decoder.{n.path}"}) for n in layer),
    )
    names = suggested_plan(ours, theirs, tmp_path).names
    assert names_of(names, "decoder", ".out") == "model.out"
    assert names_of(names, "decoder", ".in.hidden") == "model.in.hidden"


@pytest.mark.parametrize(
    ("ours", "theirs", "suffix", "expected"),
    [
        ((".out",), (".out.0", ".out.1"), ".out.0", "a.out"),
        ((".out.0", ".out.1"), (".out",), ".out", "a.out.0"),
        ((".out.logits",), (".out",), ".out", "a.out.logits"),
        ((".out",), (".out",), ".out", "a.out"),
        ((), (".out.0",), ".out.0", "a.out.0"),  # nothing is known of the baseline's
        ((".out.a", ".out.b"), (".out",), ".out", "a.out"),  # which of them, nobody can tell
    ],
)
def test_outputs_that_were_seen_get_one_name(
    ours: tuple[str, ...], theirs: tuple[str, ...], suffix: str, expected: str, tmp_path: Path
) -> None:
    """A tensor on one side and the first of a tuple on the other; only where hooks saw both."""
    names = suggested_plan(tree(node("a", 4, 4, tensors=ours)), tree(node("b", 4, 4, tensors=theirs)), tmp_path).names
    assert names_of(names, "b", suffix) == expected


def test_weights_that_are_divided_get_dims(tmp_path: Path) -> None:
    """For `dump_model`, by the axis tp; what is not divided is a copy on each rank of it."""
    ours = tree_of(llama())
    plan = suggested_plan(ours, renamed(divided(ours, 2, {**COLUMNS, **ROWS}), TITAN_NAMES), tmp_path)
    dims = {rule.match: rule.dims for rule in plan.rules}
    assert dims["model.layers.self_attn.q_proj.weight"] == "o[tp] i"
    assert dims["model.layers.mlp.down_proj.weight"] == "o i[tp]"
    assert dims["model.norm.weight"] == "h # tp:replicated"
    assert suggested_plan(ours, ours, tmp_path).rules == ()


@pytest.mark.parametrize("path", ["", "a", "a.b", "layers.3", "layers.3.mlp", "a.3.b.5.c", "3", "3.a"])
def test_default_names_are_known_here_as_they_are_given(path: str) -> None:
    """`default_pattern` says what `capture.naming` does to a path without an entry."""
    name: PointName = Naming((), "target").of_module(nn.Module(), path)
    own, number = default_pattern(path)
    assert (own, number) == (name.name, str(name.tags.get("layer_id", "")))


# Files.


class Stage(nn.Module):
    """A pipeline stage, in which each layer has its own number, from 1 as Megatron counts."""

    def __init__(self, numbers: list[int], *, first: bool) -> None:
        super().__init__()
        if first:
            self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in numbers)
        for layer, number in zip(self.layers, numbers, strict=True):
            layer.layer_number = number  # type: ignore[assignment]
        if not first:
            self.norm = nn.LayerNorm(4)


def test_pipeline_stages_are_put_together(tmp_path: Path) -> None:
    """Layers by the numbers that they have, however each stage counts its own; from files of several ranks."""
    write_trees(tmp_path / "modules.json", [tree_of(Stage([1, 2], first=True))])
    write_trees(tmp_path / "modules.rank4.json", [tree_of(Stage([3, 4], first=False))], role_rank=4)
    (whole,) = read_role_trees(tmp_path)
    paths = [n.path for n in whole.modules]
    assert paths == ["", "embedding", "layers", *(f"layers.{n}" for n in range(4)), "norm"]


def test_a_tree_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Shapes, dtypes, arguments, what can be called; a model on the meta device will do."""
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(3, 2, dtype=torch.bfloat16), "b": nn.ReLU()})
    write_trees(tmp_path / "modules.json", [tree_of(model)])
    (read,) = read_trees(tmp_path / "modules.json")
    root, linear, relu = read.modules
    assert (root.can_be_called, linear.can_be_called) == (False, True)
    assert {name: (w.shape, w.dtype) for name, w in linear.weights.items()} == {
        "weight": ((2, 3), "bfloat16"),
        "bias": ((2,), "bfloat16"),
    }
    assert linear.arguments == relu.arguments == ("input",)


def test_of_two_copies_of_a_model_one_counts() -> None:
    """What one of them has seen is kept."""
    seen = ModuleTree(modules=(ModuleNode(path="", class_name="M", tensors=(".out",)),))
    blank = ModuleTree(modules=(ModuleNode(path="", class_name="M"),))
    assert merge_trees([blank, seen]).modules == seen.modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no module tree"),
        ("{}", "schema_version: Field required"),
        ('{"schema_version": 9, "role": "baseline", "role_rank": 0, "models": []}', "has version 9"),
        ('{"schema_version": 1, "role": "baseline", "role_rank": 0, "models": []}', "it has no model"),
    ],
)
def test_a_file_that_is_no_tree_is_told(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_trees(tmp_path / "modules.json")


# The command.


def suggest(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", "suggest", *map(str, arguments)])


def a_run(directory: Path) -> Path:
    for role, one in (("baseline", tree_of(llama())), ("target", renamed(tree_of(llama()), TITAN_NAMES))):
        (directory / role).mkdir(parents=True)
        write_trees(directory / role / "modules.json", [one], role)
    return directory


def test_the_command_writes_the_plan(tmp_path: Path) -> None:
    """To stdout, or to a file that is not replaced by accident; from a run, or from two files."""
    run = a_run(tmp_path / "run")
    result = suggest(run)
    assert result.exit_code == 0
    assert result.stdout.startswith("# A plan file that")
    plan = tmp_path / "plan.yaml"
    assert suggest(run, "--out", plan).exit_code == 0
    assert plan.read_text() == result.stdout
    assert suggest(run, "--out", plan).exit_code == 2
    assert suggest(run, "--out", plan, "--force").exit_code == 0
    files = suggest(run / "baseline" / "modules.json", run / "target" / "modules.json")
    assert files.stdout == result.stdout


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "target" / "modules.json").unlink()
    result = suggest(run)
    assert result.exit_code == 2
    assert "target has no modules.json" in result.stderr
    assert "grafter run --attach" in result.stderr
    assert suggest(run, run, run).exit_code == 2
    assert suggest(tmp_path / "none").exit_code == 2


def test_programs_with_nothing_in_common_are_told_by_the_exit_code(tmp_path: Path) -> None:
    for name, one in (("a", tree(node("x", 3, 3))), ("b", tree(node("y", 5, 7)))):
        write_trees(tmp_path / f"{name}.json", [one])
    assert suggest(tmp_path / "a.json", tmp_path / "b.json").exit_code == 1
