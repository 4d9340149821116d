"""Inputs and outputs of every kind: which tensors are found, by which path, and what is put together again."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.tokenization_utils_base import BatchEncoding

from grafter.capture.containers import Arguments, Found, find_tensors, replace_tensors

A, B, C = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)


def found_in(value: Any) -> Found:
    found: Found = []
    find_tensors(value, ".out", found)
    return found


def doubled(value: Any) -> Any:
    return replace_tensors(value, iter([tensor * 2 for _, tensor in found_in(value)]))


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


class SubPair(Pair):
    pass


@dataclasses.dataclass
class Plain:
    hidden: torch.Tensor
    rest: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: torch.Tensor
    count: int = dataclasses.field(default=3, init=False)


@dataclasses.dataclass
class Counting:
    """What runs at its construction must not run again."""

    hidden: torch.Tensor
    made: int = 0

    def __post_init__(self) -> None:
        self.made += 1


@dataclasses.dataclass
class Slotted:
    __slots__ = ("hidden",)
    hidden: torch.Tensor


class OwnDict(dict):  # type: ignore[type-arg]
    extra = None


class OwnList(list):  # type: ignore[type-arg]
    pass


class Registered:
    def __init__(self, hidden: torch.Tensor, note: str) -> None:
        self.hidden, self.note = hidden, note


pytree.register_pytree_node(Registered, lambda v: ([v.hidden], v.note), lambda parts, note: Registered(*parts, note))


class Custom:
    def __init__(self) -> None:
        self.hidden = A


class OwnTuple(tuple):  # type: ignore[type-arg]
    pass


CASES: dict[str, tuple[Any, list[str]]] = {
    "tensor": (A, [".out"]),
    "tuple": ((A, B), [".out.0", ".out.1"]),
    "tuple with others": ((A, None, 3, "x", B), [".out.0", ".out.4"]),
    "empty tuple": ((), []),
    "list": ([A, [B]], [".out.0", ".out.1.0"]),
    "list subclass": (OwnList([A]), [".out.0"]),
    "deque": (collections.deque([A, B]), [".out.0", ".out.1"]),
    "dict": ({"a": A, 7: B}, [".out.a", ".out.7"]),
    "dict subclass": (OwnDict(a=A), [".out.a"]),
    "ordered dict": (collections.OrderedDict(a=A), [".out.a"]),
    "default dict": (collections.defaultdict(list, a=A), [".out.a"]),
    "batch encoding": (BatchEncoding({"input_ids": A}), [".out.input_ids"]),
    "named tuple": (Pair(A, (B,)), [".out.left", ".out.right.0"]),
    "named tuple subclass": (SubPair(A, None), [".out.left"]),
    "return type of torch": (torch.max(torch.ones(2, 2), 0), [".out.0", ".out.1"]),
    "dataclass": (Plain(A, {"k": B}), [".out.hidden", ".out.rest.k"]),
    "frozen dataclass": (Frozen(A), [".out.hidden"]),
    "dataclass that counts": (Counting(A), [".out.hidden"]),
    "dataclass with slots": (Slotted(A), [".out.hidden"]),
    "model output": (
        BaseModelOutputWithPast(last_hidden_state=A, hidden_states=(B, C)),
        [".out.last_hidden_state", ".out.hidden_states.0", ".out.hidden_states.1"],
    ),
    "registered": (Registered(A, "note"), [".out.0"]),
}
UNTOUCHED: dict[str, Any] = {
    "None": None,
    "number": 3,
    "text": "tensor",
    "object with a tensor": Custom(),
    "tuple subclass of unknown construction": OwnTuple((A,)),
    "class": Plain,
    "size": torch.Size([2]),
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_found_by_path(case: str) -> None:
    value, paths = CASES[case]
    assert [path for path, _ in found_in(value)] == paths


@pytest.mark.parametrize("case", CASES)
def test_what_is_rebuilt_is_of_the_same_class_with_the_same_parts(case: str) -> None:
    """Each tensor is the replacement, all else is what it was, and the original still has its own."""
    value, _ = CASES[case]
    before = found_in(value)
    new = doubled(value)
    assert type(new) is type(value)
    after = found_in(new)
    assert [path for path, _ in after] == [path for path, _ in before]
    for (_, old), (_, replaced) in zip(before, after, strict=True):
        assert torch.equal(replaced, old * 2)
    assert all(a is b for (_, a), (_, b) in zip(found_in(value), before, strict=True))


@pytest.mark.parametrize("case", [*CASES, *UNTOUCHED])
def test_where_nothing_changes_the_value_is_the_same_object(case: str) -> None:
    value = CASES[case][0] if case in CASES else UNTOUCHED[case]
    assert replace_tensors(value, iter([tensor for _, tensor in found_in(value)])) is value


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_cannot_be_looked_into_has_no_points_and_is_not_lost(case: str) -> None:
    value = UNTOUCHED[case]
    assert found_in(value) == []
    assert doubled(value) is value


def test_only_the_containers_around_a_change_are_copied() -> None:
    value = {"kept": [A], "changed": [B]}
    new = replace_tensors(value, iter([A, C]))
    assert new["kept"] is value["kept"]
    assert new["changed"] is not value["changed"] and new["changed"][0] is C


def test_what_belongs_to_a_container_besides_its_parts_stays() -> None:
    counting = Counting(A)
    counting.note = "n"  # type: ignore[attr-defined]
    assert (doubled(counting).made, doubled(counting).note) == (1, "n")
    assert doubled(Frozen(A)).count == 3
    assert doubled(collections.defaultdict(list, a=A)).default_factory is list
    assert doubled(collections.deque([A], maxlen=4)).maxlen == 4
    assert doubled(Registered(A, "note")).note == "note"
    output = doubled(BaseModelOutputWithPast(last_hidden_state=A))
    assert torch.equal(output.last_hidden_state, A * 2) and torch.equal(output[0], A * 2)
    assert output.past_key_values is None and list(output) == ["last_hidden_state"]


def test_a_container_in_itself_ends() -> None:
    cyclic: dict[str, Any] = {"a": A}
    cyclic["self"] = cyclic
    assert [path for path, _ in found_in(cyclic)] == [".out.a"]
    assert torch.equal(doubled(cyclic)["a"], A * 2)


class Module(nn.Module):
    def forward(self, hidden: Any, mask: Any = None, *more: Any, scale: Any = None, **others: Any) -> None: ...


def input_paths(*args: Any, **kwargs: Any) -> list[str]:
    return [path for path, _ in Arguments(Module()).find(args, kwargs)]


def test_an_input_has_one_name_by_position_and_by_keyword() -> None:
    assert input_paths(A, B) == input_paths(A, mask=B) == input_paths(hidden=A, mask=B) == [".in.hidden", ".in.mask"]


def test_further_inputs_are_numbered_or_named() -> None:
    assert input_paths(A, None, B, C) == [".in.hidden", ".in.more.0", ".in.more.1"]
    assert input_paths(hidden=A, scale=B, other={"k": C}) == [".in.hidden", ".in.scale", ".in.other.k"]


def test_a_forward_without_a_signature_numbers_its_inputs() -> None:
    module = nn.Module()
    module.forward = dict.fromkeys  # type: ignore[assignment,method-assign]
    assert [path for path, _ in Arguments(module).find((A,), {})] in ([".in.args.0"], [".in.iterable"])


def test_inputs_are_replaced_where_they_stand() -> None:
    args, kwargs = Arguments(Module()).replace((A, None), {"scale": (B, 2)}, iter([C, A]))
    assert args[0] is C and args[1] is None
    assert kwargs["scale"][0] is A and kwargs["scale"][1] == 2
