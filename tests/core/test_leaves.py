"""A value taken apart into leaves and put together again; extras as data. Pure."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from grafter.core.leaves import NothingToOffer, TensorSpec, decode_extras, encode_extras, take_apart
from grafter.errors import UsageError

ONE, TWO = torch.ones(2), torch.zeros(3, dtype=torch.int64)


class Routed(NamedTuple):
    ids: Any
    weights: Any


@dataclasses.dataclass
class Output:
    ids: Any


class Numbered(list[Any]):
    """Registered as a library may: without names for its parts."""


pytree.register_pytree_node(Numbered, lambda value: (list(value), None), lambda parts, _: Numbered(parts))


def test_a_tensor_is_one_leaf_without_a_path() -> None:
    leaves = take_apart(ONE)
    assert leaves.specs == (TensorSpec(path="", shape=(2,), dtype="float32", device="cpu"),)
    assert leaves.rebuilt([ONE]) is ONE
    assert leaves.rebuilt([TWO]) is TWO


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        ({"b": ONE, "a": TWO}, ["['a']", "['b']"]),
        ([ONE, TWO], ["[0]", "[1]"]),
        ((ONE, TWO), ["[0]", "[1]"]),
        ({"kv": [ONE, (TWO, None)], "scale": 0.5}, ["['kv'][0]", "['kv'][1][0]"]),
        (Routed(ONE, TWO), [".ids", ".weights"]),
        (collections.OrderedDict(b=ONE, a=TWO), ["['a']", "['b']"]),
        (collections.defaultdict(list, b=ONE), ["['b']"]),
        (collections.deque([ONE, TWO]), ["[0]", "[1]"]),
        (Numbered([ONE, TWO]), ["[0]", "[1]"]),
        ({1: ONE, "1": TWO}, ["['1']", "[1]"]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_leaves_are_named_by_path_and_come_back_in_their_containers(value: Any, paths: list[str]) -> None:
    leaves = take_apart(value)
    assert [spec.path for spec in leaves.specs] == paths
    assert leaves.rebuilt(leaves.originals) is value, "nothing replaced: the very object"
    replaced = [tensor.clone() for tensor in leaves.originals]
    rebuilt = leaves.rebuilt(replaced)
    assert type(rebuilt) is type(value)
    again = take_apart(rebuilt)
    assert all(new is expected for new, expected in zip(again.originals, replaced, strict=True))
    assert (again.structure, again.others) == (leaves.structure, leaves.others)


def test_the_order_of_insertion_does_not_matter() -> None:
    first, second = take_apart({"a": ONE, "b": TWO, "n": 3}), take_apart({"n": 3, "b": TWO, "a": ONE})
    assert (first.specs, first.structure, first.others) == (second.specs, second.structure, second.others)


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (1, 1.0), (1, "1"), (None, "None"), (0.0, -0.0), ("a", "b")], ids=repr
)
def test_leaves_that_are_no_tensors_differ_where_python_tells_them_apart(one: Any, other: Any) -> None:
    assert take_apart([ONE, one]).others != take_apart([ONE, other]).others
    assert take_apart([ONE, one]).others == take_apart([ONE, one]).others


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "a str"),
        (None, "the value is None, not a tensor"),
        (3, "an int"),
        ([], "a list and holds no tensor"),
        ({"a": 1}, "a dict and holds no tensor"),
        (object(), "an object, not a tensor"),
        (np.ones(2), "a ndarray, not a tensor"),
        (Output(ONE), "an Output, not a tensor"),
        ({"out": Output(ONE), "x": ONE}, r"the leaf \['out'\] is an Output"),
        (torch.ones(2).to_sparse(), "torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on the meta device"),
        (torch.nested.nested_tensor([ONE, ONE]), "nested"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
        ([ONE, torch.ones(2).to_sparse()], r"\[1\] is a tensor without plain memory"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else v[:12],
)
def test_what_cannot_be_a_point_says_why(value: Any, reason: str) -> None:
    with pytest.raises(NothingToOffer, match=reason):
        take_apart(value)


def test_a_tensor_inside_vmap_cannot_be_a_point() -> None:
    reasons = []

    def function(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(NothingToOffer) as caught:
            take_apart(x)
        reasons.append(str(caught.value))
        return x

    torch.vmap(function)(torch.ones(2, 2))
    assert "torch.func" in reasons[0]


def test_a_dtype_that_this_torch_does_not_have_is_an_error_that_names_it() -> None:
    for dtype in ("float9", "nn", "__doc__"):
        with pytest.raises(ValueError, match=f"does not have: '{dtype}'"):
            _ = TensorSpec(path="", shape=(1,), dtype=dtype, device="cpu").nbytes


# Extras.


def round_trip(extras: Any) -> Any:
    text, tensors = encode_extras(extras)
    return decode_extras(text, tensors)


def test_extras_arrive_as_they_were_given() -> None:
    extras = {
        "none": None,
        "flag": True,
        "n": 2**70,
        "x": 1e-300,
        "inf": float("inf"),
        "text": "\u00e9\ud800",
        "list": [1, [2, {"deep": ONE}]],
        "tensor": TWO,
        "empty": {},
    }
    came = round_trip(extras)
    assert came["list"][1][1]["deep"] is ONE
    assert came["tensor"] is TWO
    del came["list"], came["tensor"], extras["list"], extras["tensor"]
    assert came == extras
    assert [type(came[name]) for name in came] == [type(extras[name]) for name in extras]


def test_tuples_arrive_as_lists_and_numpy_scalars_as_pythons() -> None:
    assert round_trip({"shape": (1, 2), "n": np.int64(3)}) == {"shape": [1, 2], "n": 3}


def test_one_tensor_given_twice_arrives_twice() -> None:
    assert all(value is ONE for value in round_trip({"a": ONE, "b": ONE}).values())


@pytest.mark.parametrize(
    ("extras", "reason"),
    [
        ([1], "extras must be a dict, not a list"),
        (ONE, "extras must be a dict, not a Tensor"),
        ({"f": print}, r"extras\['f'\] is a builtin_function_or_method\. Extras are data"),
        ({"deep": [1, {"x": object()}]}, r"extras\['deep'\]\[1\]\['x'\] is an object"),
        ({"b": b"raw"}, r"extras\['b'\] is a bytes"),
        ({"a": np.ones(2)}, r"extras\['a'\] is a ndarray"),
        ({1: 2}, "has the key 1; keys must be strings"),
        ({"t": torch.ones(2).to_sparse()}, r"extras\['t'\] is a tensor without plain memory"),
        ({"__grafter_tensor__": 0}, "has the key '__grafter_tensor__'"),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_extras_that_are_no_data_are_refused_with_their_place(extras: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        encode_extras(extras)
