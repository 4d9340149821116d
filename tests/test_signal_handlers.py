"""What tells an exception of a program's signal handler from one of the call that it interrupted."""

from __future__ import annotations

import functools
import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from grafter.core.signal_handlers import is_from_signal_handler


@pytest.fixture(autouse=True)
def handler_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def plain(number: int, frame: Any) -> None:
    raise TimeoutError("mine")


def any_arguments(*_: Any) -> None:
    raise TimeoutError("mine")


def that_restores_the_old_one(number: int, frame: Any) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    plain(number, frame)


def that_raises_deeper(number: int, frame: Any) -> None:
    with_extra("x", number, frame)


def with_extra(extra: str, number: int, frame: Any) -> None:
    raise TimeoutError(extra)


class Handler:
    def method(self, number: int, frame: Any) -> None:
        raise TimeoutError("mine")

    def __call__(self, number: int, frame: Any) -> None:
        raise TimeoutError("mine")


def capturing(number: int, frame: Any) -> None:
    def raise_with(text: str) -> None:
        raise TimeoutError(f"{text} {frame.f_lineno}")

    raise_with("mine")


@pytest.mark.parametrize(
    "handler",
    [
        plain, any_arguments, that_restores_the_old_one, that_raises_deeper, Handler(), Handler().method, capturing,
        functools.partial(with_extra, "x"),
    ],
    ids=["function", "*args", "removes itself", "calls another", "callable", "method", "closure", "partial"],
)  # fmt: skip
def test_the_exception_of_any_handler_is_recognised(handler: Callable[..., Any]) -> None:
    signal.signal(signal.SIGUSR1, handler)
    with pytest.raises(TimeoutError) as raised:
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(1000):
            pass
    assert is_from_signal_handler(raised.value)


def fail_in_a_call() -> None:
    os.open("/nowhere/at/all", os.O_RDONLY)


def fail_in_torch() -> None:
    torch.empty(2).copy_(torch.empty(3))


def fail_by_itself() -> None:
    raise RuntimeError("plain")


def fail_with_arguments() -> None:
    with_extra("x", 10, None)


@pytest.mark.parametrize("function", [fail_in_a_call, fail_in_torch, fail_by_itself, fail_with_arguments])
def test_other_exceptions_are_not(function: Callable[[], None]) -> None:
    with pytest.raises((OSError, RuntimeError)) as raised:
        function()
    assert not is_from_signal_handler(raised.value)


class Large:
    """What must be freed as soon as nobody needs it: memory that tensors are received into."""


def look_at_an_error(large: Large) -> None:
    try:
        os.open("/nowhere/at/all", os.O_RDONLY)
    except OSError as error:
        assert not is_from_signal_handler(error)


def test_the_question_keeps_nothing_alive() -> None:
    """Not until the garbage collector runs, either."""
    gc.disable()
    try:
        large = Large()
        is_alive = weakref.ref(large)
        look_at_an_error(large)
        del large
        assert is_alive() is None
    finally:
        gc.enable()
