"""What tells an exception of a program's signal handler from one of the call that it interrupted."""

from __future__ import annotations

import ast
import fcntl
import functools
import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vote_log_parts import MessageRouter, Post, Roster

import grafter
from grafter.core.messages.wire import Seal
from grafter.core.processes import is_from_signal_handler
from grafter.core.roles import RankIdentity
from grafter.core.user_transform import GraftTransformInput, transform_of
from grafter.runtime import leaf_figures
from grafter.runtime.point_ledger import PointLedger
from grafter.runtime.point_receiver import ReceivedPoint
from grafter.store.written_files import LineFile
from grafter.wire.pairing import shared_ballots
from grafter.wire.pairing.host_votes import HostLogs
from grafter.wire.store_client import StoreClient


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


# What grafter does with it: it leaves `dump` as it is, wherever it arrived.


class OwnError(TimeoutError, RuntimeError, ValueError):
    """What the program's handler raises: of every class that grafter handles in some place."""


def raise_own(number: int, frame: Any) -> None:
    raise OwnError("mine")


@pytest.fixture
def alarm() -> Callable[..., Any]:
    """Called in the place of a function, in which the signal arrives."""
    signal.signal(signal.SIGUSR1, raise_own)
    return lambda *_, **__: signal.raise_signal(signal.SIGUSR1)


def test_of_a_transform_it_is_not_called_the_transforms(alarm: Callable[..., Any]) -> None:
    def transform(graft_input: Any) -> torch.Tensor:
        alarm()
        return torch.zeros(1)

    with pytest.raises(OwnError, match=r"^mine$"):
        transform_of(transform)(GraftTransformInput({}, [], [], torch.zeros(1)))


@pytest.mark.parametrize("arrives", ["before", "after"])
def test_the_ledger_has_its_line_once_and_the_program_its_exception(
    arrives: str, alarm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor: Any = SimpleNamespace(aborted=None)
    ledger = PointLedger(RankIdentity("baseline", 0, 1), tmp_path, "run", monitor)
    write = os.write

    def interrupted(descriptor: int, line: bytes) -> int:
        monkeypatch.undo()
        if arrives == "before":
            alarm()
        written = write(descriptor, line)
        if arrives == "after":
            alarm()
        return written

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(OwnError) as raised:
        ledger.record({"name": "a"})  # type: ignore[typeddict-item]
    assert raised.value.filename is None, "the exception says something of the ledger"
    ledger.record({"name": "b"})  # type: ignore[typeddict-item]
    assert ledger.path.read_text() == '{"name":"a"}\n{"name":"b"}\n'


def test_a_line_whose_end_a_handler_kept_from_being_noted_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    lines = LineFile(tmp_path / "lines")
    lines.append(b"a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write = os.write
        patch.setattr(os, "write", lambda *arguments: (write(*arguments), signal.raise_signal(signal.SIGUSR1)))
        lines.append(b"b")
    lines.append(b"c")
    assert lines.path.read_text() == "a\nc\n"


def test_while_a_value_is_made_it_refuses_no_point_by_itself(alarm: Callable[..., Any]) -> None:
    """`write="return"`: the critical section holds it and leaves the point; the reason is not a failed transform."""
    stub = SimpleNamespace(
        _take_in=lambda *_: None, _figures=SimpleNamespace(measure=lambda *_: None), _end_stage=lambda *_: None,
        _paired=SimpleNamespace(leaves=None), _incoming=[], _write_all=alarm, _writes=True,
        _options=SimpleNamespace(write="return"), _explain=str,
    )  # fmt: skip
    with pytest.raises(OwnError):
        ReceivedPoint.prepare(stub)  # type: ignore[arg-type]


def test_while_a_checksum_is_taken(alarm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf_figures, "checksum_of_values", alarm)
    resharding = SimpleNamespace(copies_with=lambda rank: (0, 1))
    unused: Any = None
    header: Any = SimpleNamespace(role_rank=0)
    figures = leaf_figures.LeafFigures(unused, header, unused, "full")
    with pytest.raises(OwnError):
        figures._copy(resharding, torch.zeros(1))  # type: ignore[arg-type]


def test_while_a_vote_log_is_made_nobody_hears_that_there_is_none(
    alarm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    post = Post()
    logs = HostLogs(MessageRouter(post, 0), Roster(), "target", 0, f"run{os.getpid()}")  # type: ignore[arg-type]
    with monkeypatch.context() as patch, pytest.raises(OwnError):
        patch.setattr(shared_ballots, "create", alarm)
        logs.offer((0, 1))
    assert not post.boxes[1]
    assert logs.offer((0, 1)) is None
    assert [message.kind for message in post.boxes[1].values()] == ["here"]
    logs.close()


@pytest.mark.parametrize("function", ["listdir", "readlink", "open", "fcntl"])
def test_while_a_vote_log_is_looked_for(
    function: str, alarm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    post, run = Post(), f"look{os.getpid()}"
    first, second = (HostLogs(MessageRouter(post, rank), Roster(), "target", rank, run) for rank in (0, 1))  # type: ignore[arg-type]
    first.offer((0, 1))
    with monkeypatch.context() as patch, pytest.raises(OwnError):
        patch.setattr(fcntl if function == "fcntl" else os, function, alarm)
        second._find((0, 1))
    assert second._find((0, 1)) is None
    first.close()
    second.close()


def test_during_a_call_of_the_store_it_is_not_the_stores_end(alarm: Callable[..., Any]) -> None:
    client = StoreClient.__new__(StoreClient)
    client._calls = None
    client.seal = Seal("target/0", None)
    with pytest.raises(OwnError):
        client._guard(alarm)


# Where the program's thread goes in `dump`. Those of other threads, in which no handler runs, are named.
DUMP_PATH = [
    "core", "runtime", "wire/exchange", "wire/outbox", "wire/pairing", "wire/store_client.py",
    "wire/rendezvous/channels.py",     "store/ledger.py", "store/written_files.py", "capture",
    *(f"store/dumps/{name}.py" for name in ("saver", "pending_record", "rank_dumps", "snapshot")),
]  # fmt: skip
BROAD = {"OSError", "Exception", "RuntimeError", "ValueError", "TimeoutError", "FileNotFoundError"}
ELSEWHERE = {
    # The thread of the exchange, or that of the join.
    ("gloo.py", "_group"), ("gloo_messages.py", "_readable_chunks"), ("gloo_messages.py", "_read_into"),
    # The monitor thread's thread.
    ("rank_control.py", "_judge"),
    # The thread that writes dumps.
    ("saver.py", "_write"), ("saver.py", "_write_point"), ("pending_record.py", "leaf_of"),
    # Before the first point, or after the last.
    ("expression.py", "_parse_expression"), ("module_tree.py", "read_trees"), ("attached_models.py", "write_trees"),
    ("lifecycle.py", "_write_last"), ("lifecycle.py", "_write_facts"),
    # It holds whatever comes, which is raised afterwards.
    ("critical_section.py", "_attempt"),
}  # fmt: skip


def broad_names(handler: ast.ExceptHandler) -> set[str]:
    return {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} & BROAD if handler.type else set()


def unguarded(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or (path.name, function.name) in ELSEWHERE:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.ExceptHandler) and broad_names(node):
                text = ast.unparse(node)
                asks = "is_from_signal_handler(" in text or "_raise_unless_full(" in text
                if not asks and text.splitlines()[-1].strip() != "raise":
                    yield f"{path.name}:{node.lineno} in {function.name}: {text.splitlines()[0]}"


def test_every_place_in_dump_that_handles_an_error_asks_whose_it_is() -> None:
    root = Path(grafter.__file__).parent
    paths = [root / name for name in DUMP_PATH]
    files = [file for path in paths for file in ([path] if path.suffix else sorted(path.rglob("*.py")))]
    assert len(files) > 60
    assert [place for file in files for place in unguarded(file)] == []
