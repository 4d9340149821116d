"""Calls that may block for ever, such as one of a store whose process is stopped.

A thread of its own makes them, so that the caller can look up while a call lasts, and can stop waiting for it. The call
itself cannot be ended: until it has, no other can be made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from grafter.errors import RunError

Value = TypeVar("Value")

_LOOK_SECONDS = 0.25
# How long a wait lasts after an exception (Ctrl-C, or the end of the run), which lets the monitor thread end the call.
_LAST_SECONDS = 2.0


class Unanswered(Exception):
    """The call still blocks, and its caller waits no longer."""


class Patience(Protocol):
    """Asked four times a second while a call blocks."""

    @property
    def is_hopeless(self) -> bool:
        """Whether a call that the caller does not want any more will go on blocking."""

    def look(self, seconds: float) -> None:
        """The call has blocked for so long. Raises what ends the wait for it."""

    def interrupted(self, error: BaseException) -> None:
        """A signal's handler has raised this, so the caller wants the answer no more. The call is given two seconds to
        end, and this may help it to. Never waits."""

    def over(self) -> None:
        """The caller does not wait any more."""


class _Call:
    __slots__ = ("error", "is_done", "operation", "since", "value")

    def __init__(self, operation: Callable[[], Any]) -> None:
        self.operation = operation
        self.since = time.monotonic()
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_done = False


class BoundedCalls:
    """Used by one thread at a time. Its own thread ends with it; one that blocks then does not keep the process."""

    def __init__(self) -> None:
        self._requests: SimpleQueue[_Call | None] = SimpleQueue()
        self._answers: SimpleQueue[_Call] = SimpleQueue()
        self._last: _Call | None = None
        self._thread: threading.Thread | None = None

    @property
    def blocked_since(self) -> float | None:
        """When the call that still blocks began, on `time.monotonic`'s clock; None where none does."""
        last = self._last
        return None if last is None or last.is_done else last.since

    def call(
        self,
        operation: Callable[[], Value],
        seconds: float,
        patience: Patience | None = None,
        *,
        insists: bool = False,
    ) -> Value:
        """What the operation returns or raises. Raises Unanswered after `seconds`, or at once while an earlier call
        still blocks; and what `patience` raises, unless the answer comes all the same. insists: the end of the run does
        not end the call, and an earlier one that blocks, for which nobody waits any more, is waited for first, until
        its own `seconds` are up."""
        if self._thread is None:
            run, queues = _run, (self._requests, self._answers)
            self._thread = threading.Thread(target=run, args=queues, name="grafter-store", daemon=True)
            self._thread.start()
        try:
            if self.blocked_since is not None:
                if not insists:
                    raise Unanswered
                assert self._last is not None
                self._await(self._last, seconds, patience, insists)
            call = _Call(operation)
            # In this order: an interrupt in between leaves a call behind which the next one waits, and nothing worse.
            self._requests.put(call)
            self._last = call
            self._await(call, seconds, patience, insists)
        finally:
            if patience is not None:
                patience.over()
        if call.error is not None:
            raise call.error
        value: Value = call.value
        return value

    def _await(self, call: _Call, seconds: float, patience: Patience | None, insists: bool) -> None:
        held: BaseException | None = None
        is_interrupted = False
        until = call.since + seconds
        while not call.is_done:
            if held is not None and time.monotonic() >= until:
                break
            try:
                # That of an earlier call, perhaps, for which nobody waited any more.
                self._answers.get(timeout=_LOOK_SECONDS)
                continue
            except Empty:
                if held is None and time.monotonic() > until:
                    raise Unanswered from None
            except BaseException as error:
                # A signal's handler: Ctrl-C, say.
                if held is not None:
                    raise
                held, until, is_interrupted = error, min(until, _last_moment(patience)), True
                if patience is not None:
                    patience.interrupted(error)
            if patience is not None and held is None:
                try:
                    patience.look(time.monotonic() - call.since)
                except RunError as error:
                    if not insists:
                        held, until = error, min(until, _last_moment(patience))
                except BaseException as error:
                    held, until, is_interrupted = error, min(until, _last_moment(patience)), True
                    patience.interrupted(error)
        # An answer that came stands, also where the run has ended meanwhile.
        if held is not None and (is_interrupted or not call.is_done):
            raise held

    def close(self) -> None:
        """End the thread, once the call that blocks, if one does, has ended. Another call would start another."""
        if self._thread is not None:
            self._requests.put(None)
            self._thread = None

    def __del__(self) -> None:
        self.close()


def _last_moment(patience: Patience | None) -> float:
    now = time.monotonic()
    return now if patience is not None and patience.is_hopeless else now + _LAST_SECONDS


def _nothing() -> None:
    """What a call that is over still has to do."""


def _run(requests: SimpleQueue[_Call | None], answers: SimpleQueue[_Call]) -> None:
    while (call := requests.get()) is not None:
        try:
            call.value = call.operation()
        except BaseException as error:
            call.error = error
        # It may hold whoever holds the calls.
        call.operation = _nothing
        call.is_done = True
        answers.put(call)
        # Or the last one would be kept, with what it returned.
        del call
