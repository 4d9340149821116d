"""Long copies, shared by two threads: the same bytes, whatever happens."""

from __future__ import annotations

import _thread
import ctypes
import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from grafter.core import copying

LONG = (copying._LONG_BYTES + 12_345) // 4


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    copying.share_long_copies(True)
    yield
    copying.share_long_copies(False)
    torch.set_num_threads(threads)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes the second thread was given, each time."""
    given: list[int] = []
    offer = copying._helper.offer

    def counted(part: Any) -> None:
        given.append(part[-1])
        offer(part)

    monkeypatch.setattr(copying._helper, "offer", counted)
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex64, torch.bool])
def test_every_byte_of_a_long_copy_arrives(dtype: torch.dtype, shared: list[int]) -> None:
    value = torch.randint(0, 2, (LONG * 4 // dtype.itemsize + 1,)).to(dtype)
    into = torch.empty_like(value)
    copying.copy(into, value)
    assert torch.equal(into, value)
    assert len(shared) == 1 and 0 < shared[0] < value.nbytes


@pytest.mark.parametrize(
    ("into", "value"),
    [
        (torch.empty(2, LONG).t(), torch.rand(LONG, 2)),
        (torch.empty(LONG, dtype=torch.float64), torch.rand(LONG)),
        (torch.empty(4, LONG), torch.rand(LONG)),
        (torch.empty(LONG, dtype=torch.complex64), torch.rand(LONG, dtype=torch.complex64).conj()),
        (torch.empty(100), torch.rand(100)),
    ],
    ids=["strides", "dtypes", "shapes", "conjugated", "short"],
)
def test_what_is_no_plain_long_copy_is_left_to_torch(
    into: torch.Tensor, value: torch.Tensor, shared: list[int]
) -> None:
    copying.copy(into, value)
    assert torch.equal(into, value.to(into.dtype).expand(into.shape)) and not shared


def test_torch_copies_alone_where_it_has_threads_or_the_ranks_have_no_core_each(shared: list[int]) -> None:
    value = torch.rand(LONG)
    torch.set_num_threads(2)
    copying.copy(into := torch.empty(LONG), value)
    torch.set_num_threads(1)
    copying.share_long_copies(False)
    copying.copy(into, value)
    assert torch.equal(into, value) and not shared


@pytest.mark.parametrize("step", ["offer", "first half", "wait"])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError], ids=["Ctrl-C", "of the program's handler"])
def test_an_interrupt_comes_once_all_is_copied(
    monkeypatch: pytest.MonkeyPatch, step: str, after: bool, kind: type[BaseException]
) -> None:
    """Whichever step it comes before or after: the second thread would else write into memory that the program believes
    to be its own again."""
    came: list[None] = []

    def interrupted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() or came:
                return function(*arguments)
            came.append(None)
            if after:
                function(*arguments)
            raise kind

        return call

    owner, name = {
        "offer": (copying._helper, "offer"), "first half": (ctypes, "memmove"), "wait": (Future, "result"),
    }[step]  # fmt: skip
    if step == "wait":
        # The other thread has begun, so there is something to wait for.
        monkeypatch.setattr(Future, "cancel", lambda future: not future.running() and not future.done())
        monkeypatch.setattr(copying._helper, "offer", offered_and_begun(copying._helper.offer))
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    value, into = torch.rand(LONG), torch.empty(LONG)
    with pytest.raises(kind):
        copying.copy(into, value)
    assert torch.equal(into, value) and came


def offered_and_begun(offer: Any) -> Any:
    def call(part: Any) -> None:
        offer(part)
        while not (part[0].running() or part[0].done()):
            time.sleep(0.001)

    return call


def test_where_no_thread_can_start_nothing_is_left_to_be_copied_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished by one thread is the program's from then on."""

    def fail(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(copying, "_helper", copying._Helper())
    copying.share_long_copies(True)
    first, value = torch.empty(LONG), torch.rand(LONG)
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", fail)
        copying.copy(first, value)
    assert torch.equal(first, value)
    first.zero_()
    copying.copy(torch.empty(LONG), value)
    assert not first.any()


def test_a_thread_that_has_no_memory_to_begin_in_keeps_no_copy_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system makes it, and it ends before it runs a line, as under a limit of address space."""
    monkeypatch.setattr(copying, "_helper", copying._Helper())
    copying.share_long_copies(True)
    into, value = torch.empty(LONG), torch.rand(LONG)
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", lambda run, arguments: 0)
        patch.setattr(threading, "_start_new_thread", lambda run, arguments: 0)
        copying.copy(into, value)
    assert torch.equal(into, value)


def test_a_tensor_that_is_made_of_others_is_left_to_torch(shared: list[int]) -> None:
    """At its own address there is nothing."""
    value = TwoTensor(torch.rand(LONG), torch.rand(LONG))  # type: ignore[no-untyped-call]
    into = TwoTensor(torch.empty(LONG), torch.empty(LONG))  # type: ignore[no-untyped-call]
    copying.copy(into, value)
    assert torch.equal(into.a, value.a) and not shared


def copy_in_a_child(pipe: Any) -> None:
    value, into = torch.rand(LONG), torch.zeros(LONG)
    copying.copy(into, value)
    pipe.send(torch.equal(into, value))


def test_a_forked_child_has_a_thread_of_its_own() -> None:
    """It inherits none of its parent's, which had one."""
    copying.copy(torch.empty(LONG), torch.rand(LONG))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=copy_in_a_child, args=(theirs,), daemon=True)
    child.start()
    assert ours.poll(250) and ours.recv()
    child.join(10)


# In chunks.


def shapes() -> list[Any]:
    """(into, value) by how they lie; 1000 to 3000 elements of 4 or 8 bytes."""
    return [
        pytest.param(torch.empty(3000), torch.rand(3000), id="contiguous"),
        pytest.param(torch.empty(30, 100), torch.rand(100, 30).t(), id="transposed"),
        pytest.param(torch.empty(30, 100).t(), torch.rand(100, 30), id="into transposed"),
        pytest.param(torch.empty(40, 100)[::2, ::2], torch.rand(20, 50), id="into strides"),
        pytest.param(torch.empty(20, 50), torch.rand(40, 100)[::2, ::2], id="from strides"),
        pytest.param(torch.empty(2, 1, 1500), torch.rand(1500, 1, 2).permute(2, 1, 0), id="long rows"),
        pytest.param(torch.empty(2000), torch.rand(1).expand(2000), id="expanded"),
        pytest.param(torch.empty(50, 30, dtype=torch.complex64), torch.rand(50, 30, dtype=torch.complex64).conj(),
                     id="conjugated"),
        pytest.param(torch.empty(50, 30, dtype=torch.float64), torch.rand(50, 30), id="converted"),
    ]  # fmt: skip


@pytest.mark.parametrize(("into", "value"), shapes())
def test_a_copy_in_chunks_brings_every_element_and_asks_between_them(
    monkeypatch: pytest.MonkeyPatch, into: torch.Tensor, value: torch.Tensor
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", 500)
    monkeypatch.setattr(copying, "_MATRIX_BYTES", 500)
    monkeypatch.setattr(copying, "_MATRIX_CHUNK_BYTES", 500)
    asked: list[None] = []
    copying.copy(into, value, lambda: asked.append(None))
    assert torch.equal(into, value.to(into.dtype))
    nbytes = value.numel() * value.element_size()
    assert -(-nbytes // 500) - 1 <= len(asked) <= nbytes // 100


def test_a_copy_ends_with_what_the_question_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", 400)
    into, asked = torch.zeros(1000), []

    def ask() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise TimeoutError("no longer wanted")

    with pytest.raises(TimeoutError, match="no longer wanted"):
        copying.copy(into, torch.ones(1000), ask)
    assert int(into.sum()) == 300


def test_a_short_copy_asks_nothing() -> None:
    into = torch.empty(1000)
    copying.copy(into, torch.ones(1000), lambda: pytest.fail("asked"))
    assert float(into.sum()) == 1000.0


def test_a_transposed_matrix_is_left_whole_until_it_is_very_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is seven times as quick with a whole one as with its rows."""
    monkeypatch.setattr(copying, "CHUNK_BYTES", 500)
    into = torch.empty(30, 100)
    value = torch.rand(100, 30).t()
    copying.copy(into, value, lambda: pytest.fail("asked"))
    assert torch.equal(into, value)
