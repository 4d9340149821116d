"""The keeper of one job: a small process between `grafter run` and the job, which leaves no process of the job behind.

    grafter run  --control pipe-->  keeper  --SIGTERM, SIGKILL-->  the job's process and all its descendants
                 <--status pipe---

The keeper is a child subreaper (prctl(2)): a process that the job starts, in whatever session, becomes the keeper's
child when its own parent ends. So the keeper can find it, and "no child is left" means that no process of the job is
left. A subreaper in the process of `grafter run` itself would also adopt processes that other code there has started,
and could not distinguish them. When `grafter run` dies, even by SIGKILL, the control pipe ends and the keeper ends the
job.

It is run by path with `python -I -S`, which takes 20 ms. It imports only the standard library, nothing of this package.

Control, one byte each: `t` end the job normally, `k` kill it now; end of file means `t`. Status, one JSON object per
line: {"started": pid}, {"not_started": text}, {"exit": code, negative for a signal}, {"killed": how many had to be
killed}, {"unkillable": [pids]}.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from types import FrameType

TERM_SECONDS = 5.0
# After a job's own end, the processes that it left behind have this long to end; the same again after SIGTERM.
SETTLE_SECONDS = 0.5
LEFTOVER_TERM_SECONDS = 2.0
# A process in uninterruptible sleep cannot be killed; after this time it is reported and abandoned.
GIVE_UP_SECONDS = 15.0
_KILL_EVERY_SECONDS = 0.02

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def parents_by_pid() -> dict[int, int]:
    """pid -> parent's pid of every process except zombies, from /proc."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as stat:
                # The program's name is in parentheses and may contain any byte.
                state, parent = stat.read().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it has ended since the listing
        if state not in (b"Z", b"X"):
            parents[int(entry)] = int(parent)
    return parents


def descendants(root: int, parents: dict[int, int]) -> list[int]:
    """All processes that `root` started, directly or indirectly, parents before children."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found = list(children.get(root, []))
    for pid in found:
        found += children.get(pid, [])
    return found


class JobKeeper:
    """The keeper of a job: `run` starts it, reaps all of its processes, and returns when none of them is left."""

    def __init__(self, status_fd: int, control_fd: int) -> None:
        self._status_fd = status_fd
        self._control_fd: int | None = control_fd
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        handled = (*_END_SIGNALS, signal.SIGCHLD)
        self._previous = {number: signal.signal(number, _do_nothing) for number in handled}
        self._job = 0
        self._job_lives = False
        self._ending = False
        self._terminate_leftovers_at = float("inf")
        self._kill_at = float("inf")
        self._killed: set[int] = set()

    def run(self, command: list[str]) -> None:
        self._start(command)
        while self._reap():
            now = time.monotonic()
            if now >= self._kill_at + GIVE_UP_SECONDS:
                self._report(unkillable=descendants(os.getpid(), parents_by_pid()))
                return
            if now >= self._kill_at:
                self._signal_descendants(signal.SIGKILL)
            elif now >= self._terminate_leftovers_at:
                self._terminate_leftovers_at = float("inf")
                self._signal_descendants(signal.SIGTERM)
            self._listen(now)
        if self._killed:
            self._report(killed=len(self._killed))

    def _start(self, command: list[str]) -> None:
        keeper = os.getpid()
        pid = os.fork()
        if pid:
            self._job, self._job_lives = pid, True
            self._report(started=pid)
            return
        try:
            # The job gets its own session: if it signals its process group, the signal must not reach the keeper.
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number, previous in self._previous.items():
                signal.signal(number, signal.SIG_IGN if previous is signal.SIG_IGN else signal.SIG_DFL)
            # Python ignores it, and ignored signals stay ignored after exec.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            # In case the keeper itself is killed.
            self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() == keeper:
                os.execvp(command[0], command)
        except OSError as error:
            self._report(not_started=f"{command[0]}: {error.strerror}")
        finally:
            os._exit(127)

    def _reap(self) -> bool:
        """Collect the processes that have ended. False when no process of the job is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._job and self._job_lives:
                self._job_lives = False
                self._report(exit=os.waitstatus_to_exitcode(status))
                self._terminate_leftovers_at = time.monotonic() + SETTLE_SECONDS
                self._kill_at = min(self._kill_at, self._terminate_leftovers_at + LEFTOVER_TERM_SECONDS)

    def _listen(self, now: float) -> None:
        """Sleep until a child ends, the launcher sends something, or a deadline is reached."""
        deadline = min(self._kill_at, self._terminate_leftovers_at)
        timeout = _KILL_EVERY_SECONDS if now >= self._kill_at else min(max(deadline - now, 0.0), 60.0)
        watched = [self._wake_read] + ([self._control_fd] if self._control_fd is not None else [])
        # Not `select`, which takes no descriptor above 1023.
        poll = select.poll()
        for fd in watched:
            poll.register(fd, select.POLLIN)
        readable = [fd for fd, _ in poll.poll(timeout * 1000)]
        if self._wake_read in readable and any(number in _END_SIGNALS for number in os.read(self._wake_read, 4096)):
            self._end()
        if self._control_fd is not None and self._control_fd in readable:
            orders = os.read(self._control_fd, 64)
            if b"k" in orders:
                self._kill_at = min(self._kill_at, time.monotonic())
            else:
                self._end()
            if not orders:
                self._control_fd = None

    def _end(self) -> None:
        if self._ending:
            return
        self._ending = True
        self._kill_at = min(self._kill_at, time.monotonic() + TERM_SECONDS)
        if self._job_lives:
            os.kill(self._job, signal.SIGTERM)
            os.kill(self._job, signal.SIGCONT)  # a stopped process would not see it

    def _signal_descendants(self, number: signal.Signals) -> None:
        for pid in descendants(os.getpid(), parents_by_pid()):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has ended since
            except PermissionError:
                continue  # it has changed its user; it is reported as unkillable at the end
            if number == signal.SIGKILL:
                self._killed.add(pid)

    def _report(self, **event: object) -> None:
        try:
            os.write(self._status_fd, json.dumps(event).encode() + b"\n")
        except BrokenPipeError:
            return  # the launcher is dead, which is why the job is being ended


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """A handler that does nothing; it makes the signal arrive in the wake-up pipe."""


def main() -> None:
    status_fd, control_fd = int(sys.argv[1]), int(sys.argv[2])
    for fd in (status_fd, control_fd):
        os.set_inheritable(fd, False)
    JobKeeper(status_fd, control_fd).run(sys.argv[3:])


if __name__ == "__main__":
    main()
