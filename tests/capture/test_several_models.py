"""Several models in a program: which of them is which, in both jobs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from attach_parts import Tower, attach
from pair_runs import run_program

from grafter.capture.naming import Naming
from grafter.config.names import NameRule
from grafter.config.settings.field_types import read_model_names
from grafter.core.messages.announced_models import AnnouncedModel, find_confused_models

OUTPUTS = ("--attach", "*", "--compare", "name.endswith('.out')")
# A policy and a reference of one class; what the jobs differ in, is the order.
TWO_MODELS = """
    import copy, sys, torch
    torch.manual_seed(0)
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x
    made_first, called_first = sys.argv[1].split(",")
    weights = Net().state_dict(), {name: value + 0.1 for name, value in Net().state_dict().items()}
    def make(which):
        model = Net()
        model.load_state_dict(weights[which])
        return model
    if made_first == "policy":
        policy, ref = make(0), make(1)
    else:
        ref, policy = make(1), make(0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if called_first == "policy":
            policy(x), ref(x)
        else:
            ref(x), policy(x)
"""


def model(name: str, *variables: str, **fields: Any) -> AnnouncedModel:
    return AnnouncedModel(name=name, variables=variables, **{"class_name": "Net", **fields})


def confused(baseline: list[AnnouncedModel], target: list[AnnouncedModel]) -> str | None:
    return find_confused_models([baseline], [target])


def test_one_model_each_is_a_pair_whatever_holds_it() -> None:
    assert confused([model("", "a", class_name="Llama")], [model("", "b", class_name="Other")]) is None


def test_models_with_the_same_variables_are_pairs() -> None:
    both = [model("", "policy"), model("ref", "ref")]
    assert confused(both, both) is None
    assert confused(both, both[:1]) is None
    three = [*both, model("critic", "critic")]
    assert confused(three, both) is None


@pytest.mark.parametrize("swapped", [False, True])
def test_models_whose_variables_say_otherwise_are_refused_with_what_to_set(swapped: bool) -> None:
    """Also where one job has one model alone; both are named, with the lines at which they were first called."""
    crossed = [model("", "ref", first_call="b.py:7 in main"), model("policy", "policy")]
    own = [model("", "policy", first_call="a.py:3 in main")]
    text = confused(crossed, own) if swapped else confused(own, crossed)
    assert text is not None
    for part in ("a.py:3", "b.py:7", "'policy'", "'ref'", "baseline_models=", "target_models="):
        assert part in text


def test_weights_tell_models_apart_where_variables_do_not() -> None:
    own = [model("", "a", weights="1"), model("b", "b", weights="2")]
    assert confused(own, [model("", "c", weights="1"), model("d", "d", weights="2")]) is None
    assert confused(own, [model("", "c", weights="2"), model("d", "d", weights="1")]) is not None
    # A copy has the weights of what it was made of: they say nothing.
    alike = [model("", "c", weights="1"), model("d", "d", weights="1")]
    assert confused(own, alike) is not None


def test_variables_count_more_than_weights() -> None:
    """The wrong weights in the right model are what a user looks for."""
    own = [model("", "policy", weights="1"), model("ref", "ref", weights="2")]
    assert confused(own, [model("", "policy", weights="2"), model("ref", "ref", weights="2")]) is None


def test_models_of_two_classes_in_another_order_are_refused() -> None:
    net, reward = {"class_name": "Net"}, {"class_name": "Reward"}
    own = [model("", "a", **net), model("Reward", "b", **reward)]
    assert confused(own, [model("", "c", **reward), model("Net", "d", **net)]) is not None
    assert confused(own, [model("", "c", class_name="OtherNet"), model("Reward", "d", **reward)]) is None


def test_what_the_user_has_named_is_not_asked_again() -> None:
    own = [model("", "a", is_given=True), model("ref", "b", is_given=True)]
    assert confused(own, [model("", "c"), model("ref", "d")]) is None


def test_other_ranks_of_a_job_are_compared_with_those_of_the_other() -> None:
    """Where both have as many; of others, weights are cut otherwise and ranks hold other parts."""
    fine, crossed = [model("", "policy")], [model("", "ref"), model("policy", "policy")]
    assert find_confused_models([fine, fine], [fine, crossed]) is not None
    assert find_confused_models([fine], [fine, crossed]) is None


@pytest.mark.parametrize(
    ("text", "names"),
    [("policy=policy,ref_model=ref", {"policy": "policy", "ref_model": "ref"}), ("actor=", {"actor": ""}), ("", {})],
)
def test_names_of_models_are_read(text: str, names: dict[str, str]) -> None:
    assert read_model_names(text) == names


@pytest.mark.parametrize("text", ["policy", "a=b,a=c", "a=x,b=x", "1=a", "a=b.c", "a=b=c"])
def test_what_names_no_model_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"variable=name|twice|both"):
        read_model_names(text)


def test_two_models_that_the_program_attaches_are_told_to_share_names() -> None:
    """Not where a model is attached twice, nor after a detach, nor parts of one model with layers of their own."""
    one, two = Tower(2), Tower(2)
    first, _ = attach(one)
    second, _ = attach(two)
    again, _ = attach(one)
    assert second.takes_names_of(first)
    assert not again.takes_names_of(first)
    for number, layer in enumerate(two.layers):
        layer.layer_idx = 2 + number
    chunk, _ = attach(two)
    assert not chunk.takes_names_of(first)
    first.detach()
    assert not second.takes_names_of(first)


def test_a_name_stands_before_all_names_of_a_model() -> None:
    """Before a rule's names, and those of weights, too."""
    rule = NameRule(path="layers.{layer_id}", name="block")
    naming, model = Naming((rule,), "target").under("policy"), Tower(2)
    module = naming.of_module(model, "layers.1")
    assert (module.name, module.tags) == ("policy.block", {"layer_id": 1})
    assert naming.of_tensor(module, "layers.1", ".out.0").name == "policy.block.out.0"
    assert naming.of_weight(model, "head.weight").name == "policy.head.weight"
    assert naming.under("") is naming


def test_models_made_in_another_order_are_refused_and_compared_once_they_are_named(tmp_path: Path) -> None:
    """Both jobs end before a point, with one text; names by variable make them pairs."""
    refused = run_program(tmp_path, TWO_MODELS, "policy,policy", "ref,policy", *OUTPUTS)
    assert refused.code == 1
    assert refused.rel == {}
    assert "it is not clear which of them are the same" in refused.output
    named = ("--set", "baseline_models=policy=policy,ref=ref", "--set", "target_models=policy=policy,ref=ref")
    assert named[1] in refused.output
    run = run_program(tmp_path, TWO_MODELS, "policy,policy", "ref,policy", *OUTPUTS, *named)
    assert run.code == 0, run.output
    assert len(run.rel) == 6
    assert set(run.rel.values()) == {0.0}
    assert any("policy.layers.out" in point for point in run.rel)


def test_models_called_in_another_order_are_never_compared_crosswise(tmp_path: Path) -> None:
    """The error says so, and the filter that it gives compares one of them."""
    refused = run_program(tmp_path, TWO_MODELS, "policy,policy", "policy,ref", *OUTPUTS)
    assert refused.code == 1
    assert refused.rel == {}
    assert "call them in another order" in refused.output
    one = "name.startswith('ref.')"
    assert f'--compare "{one}" --set step=manual' in refused.output
    options = ("--attach", "*", "--compare", f"{one} and name.endswith('.out')", "--set", "step=manual")
    run = run_program(tmp_path, TWO_MODELS, "policy,policy", "policy,ref", *options)
    assert run.code == 0, run.output
    assert len(run.rel) == 3
    assert set(run.rel.values()) == {0.0}


def test_a_recording_knows_its_models(tmp_path: Path) -> None:
    """A job that made its models in another order is refused by one that is only played."""
    recording, filters = tmp_path / "recording", ("--compare", "name.endswith('.out')")
    (tmp_path / "program.py").write_text(textwrap.dedent(TWO_MODELS))
    program = [sys.executable, str(tmp_path / "program.py")]
    base = [sys.executable, "-m", "grafter.cli.main", "run", "--attach", "*", *filters]
    recorded = ["--role", "baseline", "--record", str(recording), "--", *program, "policy,policy"]
    done = subprocess.run([*base, *recorded], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for order, code, said in (("policy,policy", 0, "6 compared"), ("ref,policy", 1, "it is not clear which of them")):
        target = ["--peer", str(recording), "--target", " ".join([*program, order]), "--out", str(tmp_path / "out")]
        done = subprocess.run([*base, *target], capture_output=True, text=True, timeout=280)
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout
