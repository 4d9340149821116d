"""Calls that may block for ever, such as a call of a store whose process is stopped.

A helper thread makes them, so that the caller can do other things while a call lasts, and can stop waiting for it. The
call itself cannot be ended: until it has returned, no other call can be made.
"""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from grafter.errors import RunError

Value = TypeVar("Value")

_LOOK_SECONDS = 0.25
# How long a wait lasts after an exception (Ctrl-C, or the end of the run): the monitor thread may end the call.
_LAST_SECONDS = 2.0


class Unanswered(Exception):
    """The call still blocks, and its caller has stopped waiting for it."""


class CallMonitor(Protocol):
    """What the caller does, four times a second, while a call blocks."""

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing will end a call whose result the caller does not need any more."""

    def look(self, seconds: float) -> None:
        """seconds: how long the call has blocked. Raises what ends the wait for it."""

    def interrupted(self, error: BaseException) -> None:
        """A signal handler has raised this, so the caller does not need the result any more. The call has two more
        seconds, and this may make it end. Never waits."""

    def over(self) -> None:
        """The caller has stopped waiting."""


class _BlockingCall:
    """One call, and its result once it has returned."""

    __slots__ = ("error", "is_done", "operation", "since", "value")

    def __init__(self, operation: Callable[[], Any]) -> None:
        self.operation = operation
        self.since = time.monotonic()
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_done = False


class BoundedCalls:
    """The blocking calls of one client, made one after the other by a helper thread. Used by one thread at a time.

    The helper thread ends with this object. If it blocks then, it does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._requests: SimpleQueue[_BlockingCall | None] = SimpleQueue()
        self._answers: SimpleQueue[_BlockingCall] = SimpleQueue()
        self._last: _BlockingCall | None = None
        self._has_thread = False

    @property
    def blocked_since(self) -> float | None:
        """When the call that still blocks began, on `time.monotonic`'s clock; None if none does."""
        last = self._last
        return None if last is None or last.is_done else last.since

    def call(
        self,
        operation: Callable[[], Value],
        seconds: float,
        call_monitor: CallMonitor | None = None,
        *,
        insists: bool = False,
    ) -> Value:
        """Make a call; return what it returns, or raise what it raises.

        seconds: after that it raises Unanswered, as it does at once while an earlier call still blocks. call_monitor:
        what its `look` raises ends the wait, unless the call returns within two seconds. insists: the end of the run
        does not end the wait; and if an earlier call still blocks, it is waited for first, until its own `seconds` are
        up.
        """
        if not self._has_thread:
            # `threading.Thread.start` never returns if the new thread has no memory to start in.
            _thread.start_new_thread(_run, (self._requests, self._answers))
            self._has_thread = True
        try:
            if self.blocked_since is not None:
                if not insists:
                    raise Unanswered
                assert self._last is not None
                self._await(self._last, seconds, call_monitor, insists)
            call = _BlockingCall(operation)
            # In this order: after an interrupt in between, the next call waits for this one, and nothing worse happens.
            self._requests.put(call)
            self._last = call
            self._await(call, seconds, call_monitor, insists)
        finally:
            if call_monitor is not None:
                call_monitor.over()
        if call.error is not None:
            raise call.error
        value: Value = call.value
        return value

    def _await(self, call: _BlockingCall, seconds: float, call_monitor: CallMonitor | None, insists: bool) -> None:
        held: BaseException | None = None
        is_interrupted = False
        until = call.since + seconds
        while not call.is_done:
            if held is not None and time.monotonic() >= until:
                break
            try:
                # It may be that of an earlier call, whose caller had stopped waiting.
                self._answers.get(timeout=_LOOK_SECONDS)
                continue
            except Empty:
                if held is None and time.monotonic() > until:
                    raise Unanswered from None
            except BaseException as error:
                # A signal handler has raised it, for Ctrl-C, say.
                if held is not None:
                    raise
                held, until, is_interrupted = error, min(until, _last_moment(call_monitor)), True
                if call_monitor is not None:
                    call_monitor.interrupted(error)
            if call_monitor is not None and held is None:
                try:
                    call_monitor.look(time.monotonic() - call.since)
                except RunError as error:
                    if not insists:
                        held, until = error, min(until, _last_moment(call_monitor))
                except BaseException as error:
                    held, until, is_interrupted = error, min(until, _last_moment(call_monitor)), True
                    call_monitor.interrupted(error)
        # A result that has arrived is valid, even if the run has ended meanwhile.
        if held is not None and (is_interrupted or not call.is_done):
            raise held

    def close(self) -> None:
        """End the helper thread once a call that blocks has ended. A later call starts another one."""
        if self._has_thread:
            self._requests.put(None)
            self._has_thread = False

    def __del__(self) -> None:
        self.close()


def _last_moment(call_monitor: CallMonitor | None) -> float:
    now = time.monotonic()
    return now if call_monitor is not None and call_monitor.is_hopeless else now + _LAST_SECONDS


def _nothing() -> None:
    """The operation of a call that is over."""


def _run(requests: SimpleQueue[_BlockingCall | None], answers: SimpleQueue[_BlockingCall]) -> None:
    while (call := requests.get()) is not None:
        try:
            call.value = call.operation()
        except BaseException as error:
            call.error = error
        # It may refer to the owner of this object, which would then never be freed.
        call.operation = _nothing
        call.is_done = True
        answers.put(call)
        # Else the last call would be kept, with its result.
        del call
