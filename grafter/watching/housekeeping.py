"""The housekeeping thread of a rank: it diagnoses waits, wakes the waiter, watches processes, and tidies the store.

The dump thread blocks in one place at a time: in the store, in its mailbox, or in a transfer. Everything that could end
that wait early happens here, on a store client of its own: an abort is put under the awaited key, or `aborted` is set,
which the other waits look at four times a second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from grafter.errors import PeerLostError, PointTimeoutError, RunError
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.store import ABORT, StoreClient, decode_abort
from grafter.watching.board import BoardLine, BoardWriter, board_key, describe_board, read_line
from grafter.watching.diagnosis import explain_stuck
from grafter.watching.processes import ProcessWatch
from grafter.watching.suspicion import Suspicion
from grafter.watching.waits import Wait, Watched

logger = logging.getLogger("grafter")

_TICK_SECONDS = 0.25
_LOOK_EVERY_SECONDS = 0.5
_CHORES_EVERY_SECONDS = 1.0
# So many deletions between two looks, at 60 us each: tidying never delays a diagnosis by more than 15 ms.
_DELETIONS_PER_TICK = 256


class Housekeeping:
    """One thread per rank; started when the store is reached, stopped by `close`."""

    def __init__(self, client: StoreClient, reconnect: Callable[[], StoreClient], board: BoardWriter, who: str) -> None:
        self._client = client
        self.board = board
        self._reconnect = reconnect
        self._who = who
        # From joining on: the roster, and those who watch it.
        self._roster: Roster | None = None
        self._processes: ProcessWatch | None = None
        self._suspicion: Suspicion | None = None
        self._wait: Wait | None = None
        self._wait_on_board: Wait | None = None
        self._deletions: deque[str] = deque()
        self._told_stopped: set[int] = set()
        self._last_lines: dict[int, BoardLine] = {}
        self._store_down = False
        self._closing = False
        self._next_chores = 0.0
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.on_second: Callable[[StoreClient], None] | None = None
        # At every look between two seconds, too, while something is due soon.
        self.on_tick: Callable[[StoreClient], None] | None = None
        self.aborted: RunError | None = None
        self._thread = threading.Thread(target=self._run, name="grafter-housekeeping", daemon=True)
        self._thread.start()

    # What the dump thread calls.

    def joined(self, roster: Roster, graft_rank: int, host_rank: int | None) -> None:
        """From here on processes are watched. `host_rank`: the graft rank that hosts the store, if one does."""
        self._processes = ProcessWatch(roster, graft_rank, host_rank)
        self._suspicion = Suspicion(roster, graft_rank)
        self._roster = roster

    def waiting(self, wait: Wait) -> Watched:
        """Around a blocking `get` or transfer: while the `with` block lasts, this thread looks after it."""
        return Watched(self, wait)

    def begin(self, wait: Wait) -> None:
        if self.aborted is not None:
            raise self.aborted
        # Mail and sockets are waited for in Python, which sees to signals by itself. In the store the main thread is
        # blocked, and a signal that arrives would be seen only after the wait.
        if wait.awaits and threading.current_thread() is threading.main_thread():
            wait.signal_fd = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
            wait.interruptible = True
        self._wait = wait

    def end(self, wait: Wait) -> None:
        wait.over = True
        self._wait = None
        if wait.interruptible:
            signal.set_wakeup_fd(wait.signal_fd)

    def check(self) -> None:
        """Raise what ended the run, if something did. For loops that move bytes."""
        if self.aborted is not None:
            raise self.aborted

    @property
    def current_wait(self) -> Wait | None:
        """What the dump thread waits for now."""
        return self._wait

    def last_seen(self, role: str) -> list[BoardLine]:
        """The lines of a job, as this rank has last read them; empty until it has read all of them."""
        side = self._roster.side("baseline" if role == "baseline" else "target") if self._roster is not None else ()
        lines = [line for line in list(self._last_lines.values()) if line.role == role]
        return lines if len(lines) == len(side) else []

    def gone(self) -> dict[int, str]:
        """Graft rank -> how its process went, of all hosts. Called on this object's thread, as `on_second` is."""
        return self._gone(leader=True)

    def delete_later(self, keys: Sequence[str]) -> None:
        self._deletions.extend(keys)

    def close(self, note: str | None = None) -> None:
        """End the thread, delete what is left to delete, and say on the board that this rank has left (with `note`)."""
        self._closing = True
        os.write(self._wake_write, b"\0")
        self._thread.join(timeout=10)
        if note is not None and not self._store_down and not self._thread.is_alive():
            self.board.left(self._client, note)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    # The thread.

    def _run(self) -> None:
        while not self._closing:
            self._handle_signals(self._sleep())
            if self._closing:
                break
            self._warn_of_stopped()
            if self._store_down and not self._revive_client():
                continue
            try:
                self._do_chores()
                wait = self._wait
                self._update_board(wait)
                if wait is not None and wait.seconds >= _LOOK_EVERY_SECONDS and time.monotonic() >= wait.next_look:
                    wait.next_look = time.monotonic() + _LOOK_EVERY_SECONDS
                    self._look_after(wait)
            except PeerLostError as error:
                self._store_lost(error)
            except RunError as error:
                self._end_locally(error)
            except Exception:
                # A fault of our own must not end the watch silently: the run would lose its safety net.
                logger.exception(
                    "grafter: the housekeeping thread of %s met an unexpected error and goes on", self._who
                )
        if not self._store_down:
            try:
                self._delete(len(self._deletions))
            except RunError as error:
                logger.debug("grafter: the store was gone before %s had tidied it: %s", self._who, error)

    def _sleep(self) -> bytes:
        readable, _, _ = select.select([self._wake_read], [], [], _TICK_SECONDS)
        return os.read(self._wake_read, 256) if readable else b""

    def _handle_signals(self, numbers: bytes) -> None:
        """Ctrl-C, or a SIGTERM that the program handles: end the wait, so that Python can run the handler."""
        wait = self._wait
        if wait is not None and wait.signal_fd >= 0 and numbers:
            os.write(wait.signal_fd, numbers)
        for number in numbers:
            if wait is not None and wait.interruptible and number in (signal.SIGINT, signal.SIGTERM):
                name = signal.Signals(number).name
                try:
                    self.abort(
                        PeerLostError(
                            f"{self._who} was interrupted ({name}) while it waited for {wait.what}, so the run is over "
                            f"for both jobs."
                        )
                    )
                except RunError as error:
                    self._store_lost(error)

    def _update_board(self, wait: Wait | None) -> None:
        """Put a pairing wait that lasts on the board, and take it off once it is over."""
        if self._wait_on_board is not None and wait is not self._wait_on_board:
            self.board.running(self._client)
            self._wait_on_board = None
        if wait is None or wait.stage not in ("pairing", "control") or self._wait_on_board is not None:
            return
        if wait.seconds >= _TICK_SECONDS and wait.stage == "control":
            # It goes on by itself, so whoever waits for it waits for one that runs.
            self.board.running(self._client, f"waits for {wait.what}")
            self._wait_on_board = wait
        elif wait.seconds >= _TICK_SECONDS:
            self.board.waiting(
                self._client,
                digest=wait.digest,
                point=str(wait.what),
                participants=wait.participants,
                awaits=wait.awaits,
                call_site=wait.call_site,
                since=time.time() - wait.seconds,
                own_side=wait.own_side,
            )
            self._wait_on_board = wait

    def _do_chores(self) -> None:
        self._delete(min(len(self._deletions), _DELETIONS_PER_TICK))
        if time.monotonic() < self._next_chores:
            if self.on_tick is not None:
                self.on_tick(self._client)
            return
        self._next_chores = time.monotonic() + _CHORES_EVERY_SECONDS
        if self._processes is not None:
            self._processes.beat(self._client)
        if self.aborted is None:
            record = self._client.peek(f"{self._client.lobby}/abort")
            if record is not None:
                self._wake_self(decode_abort(record.payload))
        if self._processes is not None and self._processes.host_rank is not None:
            # The last word of the store's host, for when the store is gone with it.
            self.read_board(self._client, [self._processes.host_rank])
        if self.on_second is not None:
            self.on_second(self._client)

    def _delete(self, count: int) -> None:
        for _ in range(count):
            self._client.delete(self._deletions.popleft())

    # Looking after a wait.

    def _look_after(self, wait: Wait) -> None:
        if wait.stage == "join":
            self._look_after_join(wait)
            return
        if wait.outcome_key is not None:
            outcome = self._client.peek(wait.outcome_key)
            if outcome is not None and outcome.kind == "refuse":
                wait.abandoned = outcome.payload
                return
        gone = self._gone(wait.leader)
        if wait.stage == "pairing":
            assert self._suspicion is not None
            if wait is self._wait_on_board:
                self._suspicion.confirm_idle(self._client, wait, self.board.sequence)
            if wait.leader or gone or self._leader_has_left(wait):
                self._look_for_stuck(gone)
        elif any(rank in wait.needs for rank in gone) or self._outcome_will_not_come(wait):
            board = describe_board(self.read_board(self._client), gone)
            self.abort(
                PeerLostError(
                    f"a process of the run is gone in the middle of {wait.what} ({wait.stage}); nothing of it was "
                    f"written where the outcome was not decided yet.\n{board}\nLook at the end of its output first."
                )
            )
        if self.aborted is None and wait is self._wait and wait.seconds > wait.timeout:
            self._time_out(wait, gone)

    def _leader_has_left(self, wait: Wait) -> bool:
        """Leaders look for mutual waits; where the own one has left, this rank must."""
        assert self._roster is not None
        leader = self._roster.graft_rank(self.board.role, min(wait.participants))
        return self.read_board(self._client, [leader])[0].state == "left"

    def _outcome_will_not_come(self, wait: Wait) -> bool:
        """In agreement: a rank that was needed has left, and nothing of it has come. What it sent would be here."""
        if wait.stage != "agreement":
            return False
        left = any(line.state == "left" for line in self.read_board(self._client, sorted(wait.needs)))
        news = wait.has_news is not None and wait.has_news()
        return left and not news and not any(self._client.exists(key) for key in wait.awaits) and not wait.over

    def _look_after_join(self, wait: Wait) -> None:
        for role in ("baseline", "target"):
            record = self._client.peek(f"{self._client.lobby}/exit/{role}")
            if record is not None:
                self._wake_self(
                    PeerLostError(
                        f"the {role} job {record.payload}, and {self._who} was still waiting for the two jobs to join. "
                        f"Look at the end of that job's output: it ended before its first call of grafter took effect."
                    )
                )
                return
        if wait.seconds > wait.timeout:
            self._wake_self(
                PointTimeoutError(
                    f"{self._who} waited {wait.timeout:.0f} s for {wait.what} in vain. Check that the other job was "
                    f"started, has GRAFTER_ENABLE=1, the same master address, port and group_name, and calls grafter "
                    f"in every rank; raise GRAFTER_JOIN_TIMEOUT if it only needs longer to load."
                )
            )

    def _look_for_stuck(self, gone: dict[int, str]) -> None:
        assert self._suspicion is not None
        lines = self.read_board(self._client)
        stuck = self._suspicion.find_stuck(self._client, lines, gone)
        if stuck:
            crashed = {
                line.graft_rank: f"has left with {line.note}" for line in lines if line.state == "left" and line.note
            }
            board = describe_board(lines, gone, self._stopped())
            self.abort(explain_stuck(stuck, gone | crashed, board, lines))

    def _time_out(self, wait: Wait, gone: dict[int, str]) -> None:
        board = describe_board(self.read_board(self._client), gone, self._stopped())
        self.abort(
            PointTimeoutError(
                f"{self._who} waited {wait.timeout:.0f} s for {wait.what} ({wait.stage}), and the time is "
                f"up.\n{board}\n"
                f"No process is known to be gone and the waits do not exclude each other, so a rank that seems to run "
                f"is probably slow, stopped, or stuck in its own job's collectives (py-spy dump --pid tells). "
                f"Raise GRAFTER_TIMEOUT if it only needs longer."
            )
        )

    def _gone(self, leader: bool) -> dict[int, str]:
        """Graft rank -> how its process went, without those that left in good order."""
        assert self._processes is not None
        gone = self._processes.gone(self._client, all_hosts=leader)
        for line in self.read_board(self._client, list(gone)):
            if line.state == "left":
                del gone[line.graft_rank]
        return gone

    def gone_here(self) -> dict[int, str]:
        """The same for this host alone, without asking the store."""
        if self._processes is None:
            return {}
        left = {line.graft_rank for line in self._last_lines.values() if line.state == "left"}
        return {rank: how for rank, how in self._processes.gone_here().items() if rank not in left}

    def _stopped(self) -> dict[int, str]:
        return self._processes.stopped() if self._processes is not None else {}

    def _warn_of_stopped(self) -> None:
        wait = self._wait
        if wait is None or wait.seconds < _LOOK_EVERY_SECONDS or self._roster is None:
            return
        for rank, remark in self._stopped().items():
            if rank not in self._told_stopped:
                self._told_stopped.add(rank)
                logger.warning(
                    "grafter: %s waits for %s, and %s cannot answer: %s. The point fails after %.0f s.",
                    self._who, wait.what, self._roster.who(rank), remark, wait.timeout,
                )  # fmt: skip

    def read_board(self, client: StoreClient, ranks: Sequence[int] | None = None) -> list[BoardLine]:
        assert self._roster is not None
        wanted = range(len(self._roster.all)) if ranks is None else ranks
        members = [self._roster.all[rank] for rank in wanted]
        sealed_lines = client.get_all([board_key(client, member.role, member.role_rank) for member in members])
        lines = [read_line(sealed.payload, self._roster) for sealed in sealed_lines]
        self._last_lines.update((line.graft_rank, line) for line in lines)
        return lines

    # Ending the run.

    def abort(self, error: RunError, client: StoreClient | None = None) -> RunError:
        """End the run for all ranks: the first error put stands, and every rank that waits is woken with it."""
        client = client or self._client
        key = f"{client.lobby}/abort"
        client.wake(key, error)
        record = client.peek(key)
        standing = decode_abort(record.payload) if record is not None and record.kind == ABORT else error
        self.aborted = standing
        if self._roster is not None:
            for line in self.read_board(client):
                if line.state == "waiting":
                    for awaited in line.awaits:
                        client.wake(awaited, standing)
        self._wake_self(standing, client)
        return standing

    def _wake_self(self, error: RunError, client: StoreClient | None = None) -> None:
        self.aborted = self.aborted or error
        wait = self._wait
        if wait is not None:
            for key in wait.awaits:
                (client or self._client).wake(key, self.aborted)

    def _end_locally(self, error: RunError) -> None:
        """What this thread met by itself, such as a message it cannot trust; the others are told if they can be."""
        self.aborted = self.aborted or error
        try:
            self.abort(error)
        except RunError as another:
            logger.debug("grafter: %s could not tell the others: %s", self._who, another)
            with contextlib.suppress(RunError):
                self._wake_self(error)

    def _store_lost(self, error: RunError) -> None:
        """The store does not answer. Its host may be stopped (wait for it), or gone (the run is over)."""
        if self.aborted is not None or self._closing:
            self._store_down = True
            return
        if self._store_host_stopped():
            self._store_down = True
            return
        board = describe_board(list(self._last_lines.values()), self.gone_here()) if self._last_lines else ""
        self.aborted = PeerLostError(
            f"{error}\nThe last board that {self._who} has seen:\n{board}" if board else str(error)
        )
        self._store_down = True

    def _store_host_stopped(self) -> bool:
        return self._processes is not None and self._processes.store_host_stopped()

    def _revive_client(self) -> bool:
        """A client that timed out has lost its place in the conversation: make a new one once its host runs again."""
        if self.aborted is not None:
            return False
        if self._store_host_stopped():
            self._time_out_without_store()
            return False
        try:
            self._client = self._reconnect()
        except RunError as error:
            self._store_lost(error)
            return False
        self._store_down = False
        return True

    def _time_out_without_store(self) -> None:
        wait = self._wait
        if wait is not None and wait.seconds > wait.timeout:
            board = describe_board(list(self._last_lines.values()), self.gone_here(), self._stopped())
            self.aborted = PointTimeoutError(
                f"{self._who} waited {wait.timeout:.0f} s for {wait.what} ({wait.stage}), and the rendezvous store "
                f"does not answer: {self._client.hosted_by} hosts it, and is stopped. The last that was seen:\n{board}"
            )

    def fuller_story(self, error: RunError) -> RunError:
        """What the dump thread should raise when its own client lost the store: this thread's account, if any."""
        deadline = time.monotonic() + 2.0
        while self.aborted is None and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.aborted or error
