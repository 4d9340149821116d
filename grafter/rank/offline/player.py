"""The player: `python -m grafter.rank.offline.player DIR` is a recorded job, with one process per recorded rank.

    the first process    reads the recording, forks the ranks (so that torch is imported once), waits for them
    each rank            a `PlayedGrafter` with the settings of its environment, like a rank of any job

The first process touches no tensor and starts no thread. When it ends, for whatever reason, the system kills its ranks.
If a live rank started it (`--parent`), it ends when that rank's process ends.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from types import FrameType

import torch

from grafter.config.settings.config import GrafterConfig
from grafter.core.roles import RoleName
from grafter.errors import ConfigError, DumpError, GrafterError
from grafter.rank.offline.played_rank import PlayedGrafter
from grafter.runtime.rank_report import set_up_logging
from grafter.store.recording import Recording, open_recording, settings_of

logger = logging.getLogger("grafter")

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_SECONDS = 0.1
_TERMINATE_SECONDS = 2.0
_EXIT_USAGE = 2


def main() -> int:
    """The exit code: 0 if all ranks ended normally, even if the live job left before them."""
    parser = argparse.ArgumentParser(prog="python -m grafter.rank.offline.player", description="Play a recorded role.")
    parser.add_argument("directory", metavar="DIR", help="the recording: a role's directory, or a run's")
    parser.add_argument("--parent", type=int, help="end when this process, which started the player, has ended")
    arguments = parser.parse_args()
    try:
        config = GrafterConfig.from_environment()
        set_up_logging(config.log_level)
        recording = _open(arguments.directory, config)
    except GrafterError as error:
        print(f"grafter: the recording cannot be played: {error}", file=sys.stderr, flush=True)
        return _EXIT_USAGE
    return _Ranks(recording, config, arguments.parent).run()


def _open(directory: str, config: GrafterConfig) -> Recording:
    if config.role is None:
        raise ConfigError("GRAFTER_ROLE is not set: set it to the recorded role. GRAFTER_PEER sets it automatically.")
    role: RoleName = config.role
    recording = open_recording(directory, role)
    _tell_what_is_missing(recording)
    here, there = settings_of(config), recording.shared_settings
    if here.get("key") != there.get("key"):
        raise DumpError(
            f"{recording.directory} was recorded with GRAFTER_KEY={there.get('key', 'unset')}, and here it is "
            f"{here.get('key', 'unset')}. What identifies a point must be the same; set it as it was."
        )
    if here != there:
        recorded = "; ".join(f"{name}: {text}" for name, text in sorted(there.items()))
        logger.info(
            "grafter: the filters differ from those with which %s was recorded (%s)", recording.directory, recorded
        )
    return recording


def _tell_what_is_missing(recording: Recording) -> None:
    for problem in recording.problems[:10]:
        logger.warning("grafter: in the recording %s: %s", recording.directory, problem)
    for rank in recording.ranks:
        who = f"{recording.role} rank {rank.role_rank} of the recording {recording.directory}"
        if rank.lost:
            logger.warning("grafter: %s lacks %d points, which could not be written", who, rank.lost)
        if rank.ended is not None:
            logger.warning("grafter: %s %s; it contains the points before that", who, rank.ended)


class _Ranks:
    """The processes of the played ranks."""

    def __init__(self, recording: Recording, config: GrafterConfig, parent: int | None) -> None:
        self._recording, self._config, self._parent = recording, config, parent
        self._pids: dict[int, int] = {}
        self._exit_code = 0
        self._kill_at = float("inf")

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._end)
        for rank in range(len(self._recording.ranks)):
            self._fork(rank)
        while self._pids:
            self._reap()
            if self._parent is not None and os.getppid() != self._parent:
                self._signal(signal.SIGKILL)
            if time.monotonic() > self._kill_at:
                self._signal(signal.SIGKILL)
            time.sleep(_LOOK_EVERY_SECONDS if self._pids else 0)
        return self._exit_code

    def _fork(self, rank: int) -> None:
        first = os.getpid()
        pid = os.fork()
        if pid:
            self._pids[pid] = rank
            return
        code = 1
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() == first:
                code = self._play(rank)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _play(self, rank: int) -> int:
        size = len(self._recording.ranks)
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)})
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        recorded = self._recording.ranks[rank]
        grafter = PlayedGrafter(self._config, recorded)
        try:
            with torch.no_grad():
                grafter.play()
        except GrafterError as error:
            # The live job reports the whole error, in its own words.
            first_line = str(error).splitlines()[0] if str(error) else ""
            print(
                f"grafter: {self._recording.role} rank {rank}, {recorded.played_from}, ends with "
                f"{type(error).__name__}: {first_line}", file=sys.stderr, flush=True,
            )  # fmt: skip
            return 1
        except BaseException as error:
            # As the interpreter would set it: whoever waits for this rank learns that it did not end normally.
            sys.last_value = error
            raise
        finally:
            grafter.close()
        return 0

    def _reap(self) -> None:
        while self._pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if self._pids.pop(pid, None) is not None:
                self._exit_code = self._exit_code or os.waitstatus_to_exitcode(status)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        self._exit_code = self._exit_code or -number
        self._kill_at = time.monotonic() + _TERMINATE_SECONDS
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for pid in list(self._pids):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


if __name__ == "__main__":
    code = main()
    # Negative for a signal, as a shell counts it.
    raise SystemExit(128 - code if code < 0 else code)
