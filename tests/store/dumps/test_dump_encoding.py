"""Metadata of a dump: whatever it is, it becomes JSON that is read back, and is named where it became its repr."""

from __future__ import annotations

import enum
import json
import math
import socket
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grafter.store.dumps.record import MAX_REPR, TENSOR_MARK, DumpRecord, MetadataEncoder, safe_repr


class Hostile:
    """Its repr, its length, its iteration and its comparison all fail."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


class HostileDict(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("no items")


class Colour(enum.IntEnum):
    RED = 3


def made_at_run_time() -> Any:
    return type("Made", (), {"__module__": "nowhere.at.all"})()


def record_with(encoder: MetadataEncoder, extras: Any) -> DumpRecord:
    """A record as the saver makes it, written and read."""
    record = DumpRecord(
        order=0, time=0.0, name="x", tags={}, step=0, phase="forward", occurrence=0, role="baseline", role_rank=0,
        role_world_size=1, participants=(0,), call_site="", level="full", extras={"it": extras},
        not_encoded=encoder.not_encoded, excluded=tuple(encoder.excluded),
    )  # fmt: skip
    return DumpRecord.model_validate_json(record.model_dump_json())


plain = st.none() | st.booleans() | st.integers(-(2**1023), 2**1023) | st.floats(allow_nan=False) | st.text()
data = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(data)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    """None, bool, int, float, str, and lists and dicts of them: nothing is replaced, except what no text can hold."""
    encoder = MetadataEncoder()
    encoded = encoder.encode(value, "extras.it")
    assert record_with(encoder, encoded).extras == {"it": value}
    assert encoder.not_encoded == {}
    assert encoder.excluded == []


OBJECTS: list[Any] = [
    Hostile(),
    HostileDict(a=1),
    made_at_run_time(),
    lambda: 1,
    b"bytes",
    {1, 2},
    object,
    1 << 5000,
    "\ud800 lone surrogate",
    {"\udfff": 1},
    {1: "a", None: "b", (1, 2): "c"},
    Colour.RED,
    np.float32(1.5),
    np.arange(3),
    np.datetime64("2026-01-01"),
    torch.ones(2),
    torch.float32,
    math.nan,
    math.inf,
]
# By number, since hypothesis itself looks at what it samples from.
objects = st.integers(0, len(OBJECTS) - 1).map(lambda number: OBJECTS[number])
anything = st.recursive(plain | objects, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(anything)
def test_whatever_it_is_it_is_encoded_and_read_back(value: Any) -> None:
    """No object makes the encoder raise, and the record that holds the result is always read again."""
    encoder = MetadataEncoder()
    encoded = encoder.encode(value, "extras.it")
    again = record_with(encoder, encoded)
    assert json.dumps(again.extras) == json.dumps({"it": encoded})
    assert again.not_encoded == encoder.not_encoded


@pytest.mark.parametrize("value", [Hostile(), made_at_run_time(), lambda: 1, b"x", {1}, 1 << 5000])
def test_what_cannot_be_encoded_is_its_repr_and_named(value: Any) -> None:
    """The repr stands in its place, and the path to it is in not_encoded; its neighbours stay."""
    encoder = MetadataEncoder()
    encoded = encoder.encode({"deep": [1, value], "other": 2.5}, "extras")
    assert encoded == {"deep": [1, safe_repr(value)], "other": 2.5}
    assert encoder.not_encoded == {"extras.deep[1]": safe_repr(value)}


def test_a_socket_is_its_repr() -> None:
    """Open handles of the system are no data."""
    with socket.socket() as handle:
        encoder = MetadataEncoder()
        assert encoder.encode(handle, "extras.s") == repr(handle)
        assert list(encoder.not_encoded) == ["extras.s"]


def test_a_repr_is_bounded_and_its_failure_is_told() -> None:
    """A huge repr is cut; one that raises is replaced by what is known of the object."""
    assert len(safe_repr("x" * 10_000)) == MAX_REPR
    assert safe_repr(Hostile()) == "<a Hostile whose repr raises RuntimeError>"


def test_a_container_in_itself_ends() -> None:
    """A list that holds itself is followed so far and no further."""
    endless: list[Any] = [1]
    endless.append(endless)
    encoder = MetadataEncoder()
    json.dumps(encoder.encode(endless, "extras"))
    assert len(encoder.not_encoded) == 1


def test_excluded_keys_are_left_out_of_a_copy() -> None:
    """At any depth, named by their paths; the caller's object keeps them."""
    given_extras = {"scale": 2, "routed_experts": [1] * 100, "inner": {"hidden_states": torch.ones(3), "n": 1}}
    encoder = MetadataEncoder(frozenset({"routed_experts", "hidden_states"}))
    assert encoder.encode(given_extras, "extras") == {"scale": 2, "inner": {"n": 1}}
    assert encoder.excluded == ["extras.routed_experts", "extras.inner.hidden_states"]
    assert encoder.tensors == []
    assert set(given_extras) == {"scale", "routed_experts", "inner"}
    assert set(given_extras["inner"]) == {"hidden_states", "n"}  # type: ignore[call-overload]


def test_tensors_and_arrays_are_numbered() -> None:
    """A tensor, or a NumPy array, is stored beside the value, and its number stands in its place."""
    encoder = MetadataEncoder()
    encoded = encoder.encode({"a": torch.ones(2), "b": [np.arange(3)]}, "extras")
    assert encoded == {"a": {TENSOR_MARK: 0}, "b": [{TENSOR_MARK: 1}]}
    assert [tensor.tolist() for tensor in encoder.tensors] == [[1.0, 1.0], [0, 1, 2]]


def test_subclasses_of_plain_data_are_what_they_are_made_of() -> None:
    """Enums and NumPy scalars lose their class and keep their value."""
    encoder = MetadataEncoder()
    assert encoder.encode([Colour.RED, np.float32(1.5), np.int64(7), np.bool_(True)], "x") == [3, 1.5, 7, True]
    assert encoder.not_encoded == {}
