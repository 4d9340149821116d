"""`grafter.context`: tags of the points inside, as a block and as a decorator, when grafting is on. No process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import Rank, succeed, two_jobs

import grafter
from grafter.core.points import NO_CONTEXT, point_context
from grafter.errors import UsageError


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grafter._calls, "_off", False)


def tags() -> dict[str, Any]:
    return point_context.get().tags


pytestmark = pytest.mark.usefixtures("on")


def test_blocks_nest_inner_tags_win_and_the_outer_ones_come_back() -> None:
    with grafter.context(a=1, b=1):
        with grafter.context(b=2, c=3):
            assert tags() == {"a": 1, "b": 2, "c": 3}
        assert tags() == {"a": 1, "b": 1}
    assert point_context.get() is NO_CONTEXT


def test_an_exception_restores_what_was_before() -> None:
    with grafter.context(a=1):
        with pytest.raises(ZeroDivisionError), grafter.context(a=2):
            raise ZeroDivisionError
        assert tags() == {"a": 1}


def test_a_refused_block_changes_nothing() -> None:
    with grafter.context(a=1):
        with pytest.raises(UsageError), grafter.context(b=torch.ones(2)):
            pass
        assert tags() == {"a": 1}


def test_one_object_may_be_entered_again_inside_of_itself() -> None:
    layer = grafter.context(a=1)
    with layer:
        with grafter.context(b=2), layer:
            assert tags() == {"a": 1, "b": 2}
        assert tags() == {"a": 1}
    assert tags() == {}
    with layer:
        assert tags() == {"a": 1}


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(10)
    return found[0]


def test_a_thread_starts_without_context_and_leaves_others_alone() -> None:
    def inner() -> dict[str, Any]:
        before = tags()
        with grafter.context(b=1):
            return {"before": before, "inside": tags()}

    with grafter.context(a=1):
        assert in_thread(inner) == {"before": {}, "inside": {"b": 1}}
        assert tags() == {"a": 1}


def test_one_object_may_be_shared_by_threads() -> None:
    """Entered here, entered and left in another thread meanwhile, left here."""
    shared = grafter.context(a=1)

    def inner() -> dict[str, Any]:
        with shared:
            return tags()

    with shared:
        assert in_thread(inner) == {"a": 1}
        assert tags() == {"a": 1}
    assert tags() == {}


# As a decorator.


@grafter.context(kind="mlp")
def decorated(fail: bool = False) -> dict[str, Any]:
    """Its docstring."""
    if fail:
        raise ZeroDivisionError
    return tags()


def test_a_decorated_function_runs_inside_and_keeps_its_name() -> None:
    with grafter.context(layer_id=3):
        assert decorated() == {"kind": "mlp", "layer_id": 3}
        with pytest.raises(ZeroDivisionError):
            decorated(fail=True)
        assert tags() == {"layer_id": 3}
    assert (decorated.__name__, decorated.__doc__) == ("decorated", "Its docstring.")


class Layer:
    def __init__(self, layer_id: int) -> None:
        self.layer_id = layer_id

    @grafter.context(lambda self: {"layer_id": self.layer_id}, kind="attn")
    def forward(self, inner: Layer | None = None) -> list[dict[str, Any]]:
        return [tags(), *(inner.forward() if inner else []), tags()]

    @classmethod
    @grafter.context(kind="class")
    def of_class(cls) -> dict[str, Any]:
        return tags()

    @staticmethod
    @grafter.context(kind="static")
    def without_self() -> dict[str, Any]:
        return tags()


def test_a_function_of_self_gives_the_tags_of_each_instance_and_recursion_restores() -> None:
    three, four = ({"layer_id": i, "kind": "attn"} for i in (3, 4))
    assert Layer(3).forward(Layer(4)) == [three, four, four, three]
    assert Layer.of_class() == {"kind": "class"}
    assert Layer.without_self() == {"kind": "static"}
    assert tags() == {}


def test_numpy_scalars_become_pythons() -> None:
    import numpy as np

    with grafter.context(layer_id=np.int64(3)):
        assert type(tags()["layer_id"]) is int


# What is refused.


def test_options_of_a_single_dump_are_refused() -> None:
    with pytest.raises(UsageError, match="`extras=` belongs to a single dump"), grafter.context(extras={}):
        pass


@pytest.mark.parametrize("name", ["name", "step", "phase", "occurrence", "dims"])
def test_taken_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"`{name}"), grafter.context(**{name: 1}):
        pass


def test_a_function_of_self_has_no_self_in_a_block() -> None:
    with pytest.raises(UsageError, match="no self"), grafter.context(lambda self: {}):
        pass


def test_a_positional_argument_that_is_no_function_is_refused() -> None:
    with pytest.raises(UsageError, match="keyword arguments"):
        grafter.context(3)  # type: ignore[arg-type]


def test_a_function_of_self_that_gives_no_tags_is_refused() -> None:
    @grafter.context(lambda self: self)
    def call(self: Any) -> None: ...

    with pytest.raises(UsageError, match="must return a dict of tags"):
        call(3)
    with pytest.raises(UsageError, match="without a positional argument"):
        call()  # type: ignore[call-arg]


async def coroutine() -> None: ...


def generator() -> Any:
    yield


async def async_generator() -> Any:
    yield


@pytest.mark.parametrize("function", [coroutine, generator, async_generator])
def test_what_runs_after_its_call_is_refused(function: Any) -> None:
    """The block would be left before the body runs, so its points would have no tags: refused at the decoration."""
    with pytest.raises(UsageError, match=r"would leave it before it runs.*`with grafter\.context"):
        grafter.context(a=1)(function)


@pytest.mark.parametrize("what", [Layer, classmethod(lambda cls: None)], ids=["a class", "a classmethod"])
def test_what_is_no_function_is_refused(what: Any) -> None:
    with pytest.raises(UsageError, match="it is not a function"):
        grafter.context(a=1)(what)


# Live.


def dump_inside(rank: Rank) -> None:
    model = Layers([0, 1])
    for _ in range(2):
        with grafter.context(microbatch=1):
            model.forward(torch.ones(2))
        grafter.step()


class Layers:
    def __init__(self, layer_ids: list[int]) -> None:
        self.layer_ids = layer_ids

    def forward(self, x: torch.Tensor) -> None:
        for layer_id in self.layer_ids:
            with grafter.context(layer_id=layer_id):
                for _ in range(2):
                    grafter.dump("h", x, part="mlp")


def test_tags_step_and_occurrence_reach_the_ledger(tmp_path: Any) -> None:
    with two_jobs(tmp_path, dump_inside, dump_inside, compare_filter="layer_id == 1 and microbatch == 1") as jobs:
        succeed(jobs.wait())
        ledger = jobs.ledgers()["target", 0]
    expected = {"microbatch": 1, "layer_id": 1, "part": "mlp"}
    assert [(r.tags, r.step, r.occurrence) for r in ledger] == [(expected, s, o) for s in (0, 1) for o in (0, 1)]


def dump_argument_names(rank: Rank) -> None:
    grafter.dump("h", torch.ones(1), value=1, arguments=2, self=3, function=4)


def test_arguments_of_dump_are_positional_so_their_names_are_free_as_tags(tmp_path: Any) -> None:
    with two_jobs(tmp_path, dump_argument_names, dump_argument_names, compare_filter="value == 1") as jobs:
        succeed(jobs.wait())
        assert [r.tags for r in jobs.ledgers()["target", 0]] == [{"value": 1, "arguments": 2, "self": 3, "function": 4}]
