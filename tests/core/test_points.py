"""Tags, keys, steps and occurrences: what identifies a point. Pure."""

from __future__ import annotations

import contextlib
import enum
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grafter.config.settings.field_types import Gradient, WaitFor, Write
from grafter.core.points import LEGAL_OPTIONS, OPTIONS, OWN_TAGS, StepCounter, call_site, check_tags, split_options
from grafter.errors import UsageError

tag_names = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda n: n not in OPTIONS | OWN_TAGS)
tag_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
tag_sets = st.dictionaries(tag_names, tag_values, max_size=4)


def key_of(tags: dict[str, Any], identifying: frozenset[str] | None = None) -> Any:
    return StepCounter().next_key({**tags, "name": "h"}, identifying)


def checked(value: Any) -> Any:
    tags = {"t": value}
    check_tags(tags)
    return tags["t"]


class Phase(enum.IntEnum):
    PREFILL = 3


class Kind(str, enum.Enum):
    MLP = "mlp"


# Tags.


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (Phase.PREFILL, 3),
        (Kind.MLP, "mlp"),
    ],
    ids=repr,
)
def test_scalars_of_other_types_become_pythons_own(value: Any, plain: Any) -> None:
    """NumPy scalars and enums of str and int are the same tag as the plain value, type included."""
    assert checked(value) == plain
    assert type(checked(value)) is type(plain)


@given(tag_sets)
def test_plain_scalars_stay_what_they_are(tags: dict[str, Any]) -> None:
    before = dict(tags)
    check_tags(tags)
    assert tags == before


@pytest.mark.parametrize("value", [torch.tensor(3), torch.ones(2), np.array(3), np.ones(2)], ids=repr)
def test_tensors_and_arrays_are_no_tags_and_the_message_says_what_to_do(value: Any) -> None:
    with pytest.raises(UsageError, match=r"(?s)tag t is a (Tensor|ndarray) of shape.*\.item\(\).*extras="):
        checked(value)


@pytest.mark.parametrize(
    "value", [[1], (1,), {"a": 1}, object(), b"x", 1j, torch.float32, print], ids=lambda value: type(value).__name__
)
def test_other_objects_are_no_tags(value: Any) -> None:
    with pytest.raises(UsageError, match=r"tag t=.* is a .*Tags are scalars"):
        checked(value)


def test_a_huge_tag_does_not_fill_the_message() -> None:
    with pytest.raises(UsageError) as caught:
        checked(list(range(10_000)))
    assert len(str(caught.value)) < 400


# Names that are taken.


@pytest.mark.parametrize("name", sorted(OWN_TAGS))
def test_what_grafter_sets_is_refused_with_what_sets_it(name: str) -> None:
    setter = {"name": "first argument", "step": r"grafter\.step\(\)", "phase": "every point", "occurrence": "counts"}[
        name
    ]
    with pytest.raises(UsageError, match=rf"`{name}` is .*{setter}.*needs another name"):
        split_options({name: 1})


def test_the_reserved_names_are_those_that_were_announced() -> None:
    """Programs are written against this list: a name added later would break their tags."""
    announced = [
        "extras",
        "dims",
        "layout",
        "axes",
        "seq_lens",
        "ranks",
        "tokens",
        "start",
        "new_rows_only",
        "wait",
        "transform",
        "gradient",
        "write",
        "save",
    ]
    assert frozenset(announced) == OPTIONS


def test_options_are_no_tags() -> None:
    assert split_options({"extras": {"a": 1}, "layer_id": 3, "ranks": [0], "write": "return"}) == (
        {"layer_id": 3},
        {"extras": {"a": 1}, "ranks": [0], "write": "return"},
    )


@pytest.mark.parametrize(("option", "value"), [("write", "inplace"), ("gradient", "none"), ("write", 1)])
def test_an_option_with_an_unknown_value_is_refused_with_the_legal_ones(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"`{option}=.*legal values are {LEGAL_OPTIONS[option][0]}"):
        split_options({option: value})


def test_legal_values_are_those_of_the_configuration() -> None:
    """They stand in two places, because one of them costs an import of pydantic."""
    legal = {"write": get_args(Write), "gradient": get_args(Gradient), "wait": get_args(WaitFor)}
    assert legal == LEGAL_OPTIONS


# Keys.


@given(st.lists(tag_values, min_size=2, max_size=2))
def test_two_values_are_one_point_only_if_type_and_value_are_equal(values: list[Any]) -> None:
    """True, 1, 1.0 and '1' are four tags, though three of them are equal in Python."""
    first, second = values
    same = type(first) is type(second) and repr(first) == repr(second)
    assert (key_of({"t": first}).digest == key_of({"t": second}).digest) == same


def test_true_one_and_the_text_one_are_four_points() -> None:
    assert len({key_of({"t": value}).digest for value in (True, 1, 1.0, "1")}) == 4


def test_equal_tags_of_other_types_are_counted_apart() -> None:
    counter = StepCounter()
    keys = [counter.next_key({"name": "h", "t": value}, None) for value in (True, 1, 1.0, "1")]
    assert [key.occurrence for key in keys] == [0, 0, 0, 0]


@given(tag_sets)
def test_the_order_of_tags_does_not_matter(tags: dict[str, Any]) -> None:
    assert key_of(tags).digest == key_of(dict(reversed(list(tags.items())))).digest


@pytest.mark.parametrize("tag", ["rank", "local_rank", "tp_rank", "role_rank"])
def test_rank_tags_do_not_identify(tag: str) -> None:
    assert key_of({"t": 1, tag: 0}).digest == key_of({"t": 1, tag: 5}).digest == key_of({"t": 1}).digest


def test_a_tag_that_only_contains_rank_identifies() -> None:
    assert key_of({"ranking": 0}).digest != key_of({"ranking": 1}).digest


@given(tag_sets, tag_sets)
def test_key_narrows_identity_to_the_tags_that_it_lists(first: dict[str, Any], second: dict[str, Any]) -> None:
    only = frozenset({"layer"})
    assert key_of({**first, "layer": 3}, only).digest == key_of({**second, "layer": 3}, only).digest


def test_an_empty_key_leaves_the_name() -> None:
    assert key_of({"a": 1}, frozenset()).digest == key_of({}, frozenset()).digest


def test_occurrence_counts_calls_of_one_key_within_a_step() -> None:
    counter = StepCounter()

    def occurrence(**tags: Any) -> int:
        return counter.next_key({"name": "h", **tags}, None).occurrence

    assert [occurrence(a=1), occurrence(a=1), occurrence(a=2), occurrence(a=1)] == [0, 1, 0, 2]
    assert occurrence(a=1, tp_rank=3) == 3, "rank tags do not make another key"
    counter.next_step()
    assert counter.step == 1
    assert occurrence(a=1) == 0


def test_steps_and_occurrences_are_other_points() -> None:
    counter = StepCounter()
    digests = set()
    for _ in range(3):
        digests |= {counter.next_key({"name": "h"}, None).digest for _ in range(3)}
        counter.next_step()
    assert len(digests) == 9


def test_a_key_reads_as_its_call() -> None:
    counter = StepCounter()
    tags = {"name": "h", "layer_id": 3, "kind": "mlp"}
    assert str(counter.next_key(tags, None)) == "'h' (kind='mlp', layer_id=3, step=0)"
    assert str(counter.next_key(tags, None)) == "'h' (kind='mlp', layer_id=3, step=0, occurrence=1)"


# The call site.


def test_the_call_site_is_the_users_line() -> None:
    site = call_site()
    assert site.startswith(f"{__file__}:")
    assert site.endswith(" in test_the_call_site_is_the_users_line")


@contextlib.contextmanager
def around() -> Any:
    yield call_site()


def test_a_call_in_a_users_context_manager_is_told_there() -> None:
    with around() as site:
        assert site.endswith(" in around")
