"""Long copies, shared by two threads: the same bytes, whatever happens."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from grafter import copying

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
    to_helper = copying._helper.copy

    def counted(into: int, value: int, nbytes: int) -> Future[object] | None:
        given.append(nbytes)
        return to_helper(into, value, nbytes)

    monkeypatch.setattr(copying._helper, "copy", counted)
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


def test_an_interrupt_comes_once_all_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread would else write into memory that the program believes to be its own again."""
    waits: list[None] = []
    wait = Future.result

    def interrupted(future: Future[Any], timeout: float | None = None) -> Any:
        waits.append(None)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return wait(future, timeout)

    monkeypatch.setattr(Future, "result", interrupted)
    value, into = torch.rand(LONG), torch.empty(LONG)
    with pytest.raises(KeyboardInterrupt):
        copying.copy(into, value)
    assert torch.equal(into, value) and len(waits) == 2


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
    assert ours.poll(30) and ours.recv()
    child.join(10)
