"""The monitor thread of a rank: it diagnoses waits, wakes the dump thread, watches processes, and tidies the store.

The dump thread blocks in one place at a time: in the store, in its channels, or in a transfer. Everything that can end
that wait early happens on this thread, which has its own client of the store: it puts an abort under the awaited key,
or sets `aborted`, which the other waits read four times a second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from grafter.core.messages.roster import Roster
from grafter.errors import PeerLostError, RunError
from grafter.wire.monitor.absence import StepEnds
from grafter.wire.monitor.members import Members, StoreHost
from grafter.wire.monitor.status_board import BoardLine, BoardWriter, Underway
from grafter.wire.monitor.store_silence import StoreLink
from grafter.wire.monitor.wait_monitor import LOOK_EVERY_SECONDS, WaitMonitor
from grafter.wire.monitor.waits import ABSENT, GivenUp, Wait, WatchedWait
from grafter.wire.store_client import ABORT, StoreClient, decode_abort

logger = logging.getLogger("grafter")

_TICK_SECONDS = 0.25
_CHORES_EVERY_SECONDS = 1.0
# How many keys are deleted between two looks, at 60 us each: at least 256, and at least an eighth of those that are
# left, so that their number stays bounded at any rate of points. They delay a diagnosis by 15 ms, or by more at a
# thousand deletions a second.
_DELETIONS_PER_TICK, _PART_PER_TICK = 256, 8


class MonitorThread:
    """The monitor thread of one rank, started by the constructor and stopped by `close`.

    Its methods are called by the dump thread, unless they say otherwise. Those that take a client use it in place of
    the monitor thread's own.
    """

    def __init__(self, client: StoreClient, board: BoardWriter, who: str, host: StoreHost) -> None:
        """client: used by this thread alone. host: the process that hosts the store."""
        self.board = board
        self._who = who
        self._members = Members(host)
        self._wait_monitor = WaitMonitor(board, self._members, who)
        self._link = StoreLink(client, self._members, who, lambda: self._wait_monitor.warn_of_stopped(self._wait))
        self._wait: Wait | None = None
        # The point that the dump thread is at, which sets it; None between two points.
        self.underway: Underway | None = None
        self._deletions: deque[str] = deque()
        self._closing = False
        self._to_abort: RunError | None = None
        self._faults: set[type[Exception]] = set()
        self._next_chores = 0.0
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Called on this thread: once a second, and at each look in between.
        self.on_second: Callable[[StoreClient], None] | None = None
        self.on_tick: Callable[[StoreClient], None] | None = None
        # What ended the run.
        self.aborted: RunError | None = None
        self._thread = threading.Thread(target=self._run, name="grafter-monitor", daemon=True)
        self._thread.start()

    # What the dump thread calls.

    def joined(self, roster: Roster, graft_rank: int, host_rank: int | None) -> None:
        """Watch the processes of all ranks from here on. host_rank: the graft rank that hosts the store, if one
        does."""
        self._wait_monitor.joined(roster, graft_rank)
        self._members.joined(roster, graft_rank, host_rank)

    def ask_while_joining(self, question: Callable[[StoreClient], RunError | None]) -> None:
        """question: returns why the other ranks will not join; asked on this thread, about twice a second."""
        self._wait_monitor.check_join = question

    def waiting(self, wait: Wait) -> WatchedWait:
        """A `with` block around a blocking `get` or transfer, which this thread looks after."""
        return WatchedWait(self, wait)

    def begin(self, wait: Wait) -> None:
        """The dump thread waits from here on. Raises what ended the run."""
        if self.aborted is not None:
            raise self.aborted
        self._wait = wait

    def end(self, wait: Wait) -> None:
        """The wait of the dump thread is over."""
        wait.over = True
        self._wait = None

    def look_for_absent(self, wait: Wait, client: StoreClient) -> None:
        """Called before a wait begins: raises GivenUp if the ranks that a one-sided point waits for will not reach
        it."""
        if wait.one_sided:
            reason = self._wait_monitor.find_absent(client, wait)
            if reason is not None:
                raise GivenUp(reason)

    def check(self) -> None:
        """Raise what ended the run, if it has ended. For loops that move bytes."""
        if self.aborted is not None:
            raise self.aborted

    @property
    def step_ends(self) -> StepEnds:
        """The step ends, once this rank has joined."""
        assert self._wait_monitor.step_ends is not None
        return self._wait_monitor.step_ends

    @property
    def current_wait(self) -> Wait | None:
        """What the dump thread waits for now."""
        return self._wait

    @property
    def store_is_silent(self) -> bool:
        """Whether this thread continues without the store, which has not answered it."""
        return self._link.is_down

    def last_seen(self, role: str) -> list[BoardLine]:
        """The lines of a job, as this rank has last read them; empty until it has read all of them."""
        return self._members.last_seen(role)

    def read_board(self, client: StoreClient, ranks: Sequence[int] | None = None) -> list[BoardLine]:
        """The lines of these graft ranks (None: of all), in their order. Called on any thread, with its own client."""
        return self._members.read_board(client, ranks)

    def gone(self) -> dict[int, str]:
        """Graft rank -> how its process ended, on all hosts. Called on this thread, as `on_second` is."""
        return self._members.gone(self._link.client, all_hosts=True)

    def gone_here(self) -> dict[int, str]:
        """The same for this host alone, without asking the store."""
        return self._members.gone_here()

    def delete_later(self, keys: Sequence[str]) -> None:
        """Delete these keys of the store soon. Called on any thread; never waits."""
        self._deletions.extend(keys)

    def close(self, note: str | None = None) -> None:
        """End the thread, which first deletes what is left to delete. Called by any thread but this one.

        note: if it is given, the board says that this rank has left, with this error; empty if it ends normally.
        """
        self._closing = True
        os.write(self._wake_write, b"\0")
        self._thread.join(timeout=10)
        if note is not None and not self._link.is_down and not self._thread.is_alive():
            self.board.left(self._link.client, note)
        if not self._thread.is_alive():
            self._link.client.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    # The thread.

    def _run(self) -> None:
        while not self._closing:
            try:
                self._tick()
            except Exception as error:
                # A fault of grafter must not end this thread: no wait would be diagnosed any more.
                self._note_fault(error)
                time.sleep(_TICK_SECONDS)
        if not self._link.is_down:
            try:
                self._delete(len(self._deletions))
            except RunError as error:
                logger.debug("grafter: the store was gone before %s had tidied it: %s", self._who, error)

    def _tick(self) -> None:
        self._sleep()
        if self._closing:
            return
        self._wait_monitor.warn_of_stopped(self._wait)
        if self._link.is_down and not self._store_has_answered():
            return
        try:
            self._look()
        except PeerLostError as error:
            self._store_lost(error)
        except RunError as error:
            self._end_locally(error)

    def _look(self) -> None:
        if self._to_abort is not None and self.aborted is None:
            self.abort(self._to_abort)
        self._do_chores()
        wait = self._wait
        self._wait_monitor.update_board(self._link.client, wait, self.underway)
        if wait is None:
            return
        if wait.one_sided:
            absent = self._wait_monitor.find_absent(self._link.client, wait)
            if absent is not None:
                self._give_up(wait, absent)
        if wait.seconds >= LOOK_EVERY_SECONDS and time.monotonic() >= wait.next_look:
            wait.next_look = time.monotonic() + LOOK_EVERY_SECONDS
            self._look_after(wait)

    def _note_fault(self, error: Exception) -> None:
        """Log each type of error once: it may recur four times a second."""
        if type(error) not in self._faults:
            self._faults.add(type(error))
            logger.error(
                "grafter: the monitor thread of %s met an unexpected error and continues. It says so once for "
                "each kind of error",
                self._who,
                exc_info=error,
            )

    def _sleep(self) -> None:
        # Not `select`, which takes no descriptor above 1023.
        waker = select.poll()
        waker.register(self._wake_read, select.POLLIN)
        if waker.poll(_TICK_SECONDS * 1000):
            os.read(self._wake_read, 256)

    def _do_chores(self) -> None:
        waiting = len(self._deletions)
        self._delete(min(waiting, max(_DELETIONS_PER_TICK, waiting // _PART_PER_TICK)))
        if time.monotonic() < self._next_chores:
            if self.on_tick is not None:
                self.on_tick(self._link.client)
            return
        self._next_chores = time.monotonic() + _CHORES_EVERY_SECONDS
        self._members.beat(self._link.client)
        if self.aborted is None:
            record = self._link.client.peek(self._link.client.job_keys.abort)
            if record is not None:
                self._wake_self(decode_abort(record.payload))
        self._members.keep_up(self._link.client)
        self._wait_monitor.refresh_board(self._link.client)
        if self.on_second is not None:
            self.on_second(self._link.client)

    def _delete(self, count: int) -> None:
        for _ in range(count):
            self._link.client.delete(self._deletions.popleft())

    def _look_after(self, wait: Wait) -> None:
        if wait.stage == "join":
            error = self._wait_monitor.look_after_join(self._link.client, wait)
            if error is not None:
                self._wake_self(error)
            return
        error = self._wait_monitor.look_after(self._link.client, wait)
        if error is not None:
            self.abort(error)
        elif wait.given_up is not None:
            self._give_up(wait, wait.given_up)
        is_over = self.aborted is not None or wait.abandoned is not None or wait.given_up is not None
        is_over = is_over or wait is not self._wait
        if not is_over and wait.seconds > wait.timeout:
            self.abort(self._wait_monitor.time_is_up(self._link.client, wait))

    def _give_up(self, wait: Wait, reason: str) -> None:
        """End this wait of a one-sided point, unless what it waits for has arrived by now."""
        wait.given_up = reason
        for key in wait.awaits:
            self._link.client.put_if_absent(key, ABSENT, reason)

    # Ending the run.

    def abort(self, error: RunError, client: StoreClient | None = None) -> RunError:
        """End the run for all ranks, and wake every rank that waits. Called on any thread, with its own client.

        Returns the error that ended the run: the one that was put first. Raises PeerLostError if the store is lost.
        """
        client = client or self._link.client
        key = client.job_keys.abort
        client.wake(key, error)
        record = client.peek(key)
        first = decode_abort(record.payload) if record is not None and record.kind == ABORT else error
        self.aborted = first
        self._members.wake_waiting(client, first)
        self._wake_self(first, client)
        return first

    def abort_soon(self, error: RunError) -> None:
        """The same at the next look of this thread, within a quarter of a second. Never waits."""
        self._to_abort = error
        os.write(self._wake_write, b"\0")

    def interrupted(self, wait: Wait, error: BaseException) -> None:
        """End the run: a signal handler has ended this wait of the dump thread, whose call of the store still
        blocks."""
        self.abort_soon(
            PeerLostError(
                f"{self._who} was interrupted ({type(error).__name__}) while it waited for {wait.what}, so the run is "
                f"over for both jobs."
            )
        )

    def _wake_self(self, error: RunError, client: StoreClient | None = None) -> None:
        self.aborted = self.aborted or error
        wait = self._wait
        if wait is not None:
            for key in wait.awaits:
                (client or self._link.client).wake(key, self.aborted)

    def _end_locally(self, error: RunError) -> None:
        """End the run with what this thread has found, such as a message that is not valid, for all ranks if
        possible."""
        self.aborted = self.aborted or error
        try:
            self.abort(error)
        except RunError as another:
            logger.debug("grafter: %s could not report the end of the run to the other ranks: %s", self._who, another)
            with contextlib.suppress(RunError):
                self._wake_self(error)

    def _store_lost(self, error: RunError) -> None:
        if self.aborted is not None or self._closing:
            self._link.is_down = True
            return
        self.aborted = self._link.lose(error) or self.aborted

    def _store_has_answered(self) -> bool:
        error = self._link.look_again(self._wait)
        if error is not None and self.aborted is None and not self._closing:
            self.aborted = error
        return not self._link.is_down

    def explain(self, error: RunError) -> RunError:
        """The error that the dump thread raises if its own client has lost the store: this thread's, if it has one.

        Waits up to two seconds for it.
        """
        deadline = time.monotonic() + 2.0
        while self.aborted is None and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.aborted or error
