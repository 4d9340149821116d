"""A tensor [b, s, h] from one number of shards to another, beside grafts that reshard nothing, and beside gathering.

    2->4 of h      rank 0 |      h/2      |      h/2      | rank 1        resharded: four pieces
                   rank 0 |  h/4  |  h/4  |  h/4  |  h/4  | rank 3

Beside it, the same global tensor 2->2 and 4->4: as many bytes cross in all, and each rank of the side that has as many
sends or receives just what it does when resharding. With h split the pieces are strided, with s split they are not.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.crew import Crew
from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.transfers import _available_bytes
from benchmarks.units import size_text
from benchmarks.ways import AllGatherObject, Ranks
from grafter.store import HostedStore, serve

DIMS = ("b", "s", "h")
RESHARDED, GATHERED = "resharded", "gather, then slice"
PLAIN = ("2->2", "4->4")
_MOST = 4
_WIDEST = 4096
_POINT = "sharded"
# Below 2**24, so that float32 holds every value; a prime, so that no shift by a shard or a row shows the same values.
_MODULUS = 16777213
_UNTOUCHED = -1.0
_SHARE_OF_MEMORY = 0.7
_TIMEOUT = timedelta(seconds=300)
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Crossing:
    """One way for the global tensor `[b, s, h]` (float32) to cross. `dim` is the one that is split on both sides."""

    way: str
    ranks: Ranks
    dim: str
    shape: tuple[int, int, int]

    def parts(self, role: str) -> int:
        return self.ranks.baseline if role == "baseline" else self.ranks.target

    def local_shape(self, role: str) -> list[int]:
        return [
            size // (self.parts(role) if name == self.dim else 1) for name, size in zip(DIMS, self.shape, strict=True)
        ]

    def shard(self, role: str, rank: int) -> torch.Tensor:
        """What this rank has of the global tensor: every place has its own number, but for the modulus."""
        own = self.local_shape(role)
        starts = [rank * size if name == self.dim else 0 for name, size in zip(DIMS, own, strict=True)]
        b, s, h = (
            torch.arange(start, start + size, dtype=torch.int32) for start, size in zip(starts, own, strict=True)
        )
        rows = (b[:, None] * self.shape[1] + s) * self.shape[2]
        return (rows[:, :, None] + h).remainder_(_MODULUS).float()


@dataclass(frozen=True)
class ReshardingEffort:
    """Rounds of one batch per way. Gathering takes seconds a call: one call in each of the first rounds."""

    rounds: int
    gathering_rounds: int
    batch_seconds: float


@dataclass(frozen=True)
class ReshardingStages:
    """Where a call spends its time, by the ledger: median seconds by stage, of one role's rank 0."""

    case: str
    role: str
    stages: dict[str, float]
    call_seconds: float

    def as_json(self) -> dict[str, Any]:
        return {"case": self.case, "role": self.role, "seconds": self.stages, "call_seconds": self.call_seconds}


@dataclass
class ReshardingResult:
    """One change of shards. Seconds per call, one value per round, by way; gathering only in the first rounds.

    bytes_received: what all receivers of one call took in together, by the ledger.
    """

    ranks: Ranks
    dim: str
    shape: tuple[int, int, int]
    nbytes: int
    seconds: dict[str, list[float]]
    calls_per_round: dict[str, int]
    bytes_received: int
    stages: list[ReshardingStages] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.ranks} of {self.dim}, {size_text(self.nbytes)}"

    def spread(self, way: str) -> Spread:
        return spread(self.seconds[way])

    def ratio(self, way: str, over: str) -> Spread | None:
        """Of the seconds of two ways, within the rounds that both have; None where one was left out."""
        if way not in self.seconds or over not in self.seconds:
            return None
        return ratio(*_same_rounds(self.seconds[way], self.seconds[over]))

    @property
    def over_plain(self) -> Spread:
        """Resharded, as a multiple of the faster of the grafts that reshard nothing, round by round."""
        faster = [min(pair) for pair in zip(*(self.seconds[way] for way in PLAIN), strict=True)]
        return ratio(self.seconds[RESHARDED], faster)

    def as_json(self) -> dict[str, Any]:
        return {
            "ranks": str(self.ranks),
            "dim": self.dim,
            "shape": list(self.shape),
            "bytes": self.nbytes,
            "bytes_received": self.bytes_received,
            "seconds": self.seconds,
            "median_seconds": {way: self.spread(way).median for way in self.seconds},
            "calls_per_round": self.calls_per_round,
            "over_plain": self.over_plain.median,
            "stages": [stage.as_json() for stage in self.stages],
            "left_out": self.left_out,
        }


def _same_rounds(one: Sequence[float], other: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    rounds = min(len(one), len(other))
    return one[:rounds], other[:rounds]


def shape_of(nbytes: int) -> tuple[int, int, int]:
    """[2, s, h] of float32 in so many bytes, h at most 4096. Raises ValueError where four ranks cannot share s or h."""
    count = nbytes // 4
    h = 4
    while h < _WIDEST and (2 * h) ** 2 <= count:
        h *= 2
    if count % (2 * h * _MOST):
        raise ValueError(f"{nbytes} bytes are no [2, s, {h}] of float32 with s a multiple of {_MOST}")
    return 2, count // (2 * h), h


def measure_resharding(nbytes: int, effort: ReshardingEffort, say: Callable[[str], None]) -> list[ReshardingResult]:
    """2->4 and 4->2, of h and of s. All processes live side by side, and those of one way work at a time."""
    shape = shape_of(nbytes)
    results = []
    with ShardCrew("grafter") as grafts, ShardCrew("gather") as gathers:
        for ranks in (Ranks(2, 4), Ranks(4, 2)):
            for dim in ("h", "s"):
                say(f"resharding {ranks} of {dim}, {size_text(nbytes)}")
                results.append(_measure(grafts, gathers, ranks, dim, shape, effort))
    return results


def _measure(
    grafts: ShardCrew, gathers: ShardCrew, ranks: Ranks, dim: str, shape: tuple[int, int, int], effort: ReshardingEffort
) -> ReshardingResult:
    ways = {RESHARDED: ranks, **{way: Ranks.parse(way) for way in PLAIN}}
    crossings = {way: Crossing(way, own, dim, shape) for way, own in ways.items()}
    measures, calls = {}, {}
    for way, crossing in crossings.items():
        grafts.prepare_crossing(crossing)
        calls[way] = max(2, int(effort.batch_seconds / grafts.seconds_of(crossing, 1, lead_in=1)))
        measures[way] = partial(grafts.seconds_of, crossing, calls[way], 1)
    gathering, left_out = Crossing(GATHERED, ranks, dim, shape), {}
    reason = _why_left_out(gathering)
    if reason is None:
        gathers.prepare_crossing(gathering)
        calls[GATHERED] = 1
        both = {**measures, GATHERED: partial(gathers.seconds_of, gathering, 1, 0)}
        seconds = interleaved(both, min(effort.rounds, effort.gathering_rounds))
        gathers.forget_tensors()
    else:
        left_out[GATHERED] = reason
        seconds = {way: [] for way in measures}
    more = interleaved(measures, effort.rounds - len(seconds[RESHARDED]))
    seconds = {way: own + more.get(way, []) for way, own in seconds.items()}
    grafts.forget_tensors()
    stages, received = _read_ledger(grafts.ledger_directory(), crossings, seconds)
    nbytes = 4 * shape[0] * shape[1] * shape[2]
    return ReshardingResult(ranks, dim, shape, nbytes, seconds, calls, received, stages, left_out)


def _why_left_out(crossing: Crossing) -> str | None:
    nbytes = 4 * crossing.shape[0] * crossing.shape[1] * crossing.shape[2]
    # Beside what gathering itself takes, each receiver puts the global tensor together.
    needed = AllGatherObject.bytes_needed(crossing.ranks, nbytes // crossing.ranks.baseline)
    needed += crossing.ranks.target * nbytes
    available = _available_bytes()
    if needed <= _SHARE_OF_MEMORY * available:
        return None
    return f"{crossing.way} needs {needed / 2**30:.1f} GiB in all, and {available / 2**30:.1f} GiB are free"


def _read_ledger(
    directory: Path, crossings: dict[str, Crossing], seconds: dict[str, list[float]]
) -> tuple[list[ReshardingStages], int]:
    from grafter.ledger import read_run

    stages, received = [], 0
    for role, role_rank, records in read_run(directory):
        for way, crossing in crossings.items():
            own = [record for record in records if record.tags["case"] == _case(crossing)]
            if way == RESHARDED and own:
                received += own[-1].bytes_received
            if role_rank == 0:
                # Not the first two, which also make room and map it.
                later = [record.seconds for record in own[2:]]
                names = sorted({stage for record in later for stage in record})
                medians = {name: statistics.median(record.get(name, 0.0) for record in later) for name in names}
                stages.append(ReshardingStages(f"{way} of {crossing.dim}", role, medians, spread(seconds[way]).median))
    return stages, received


def _case(crossing: Crossing) -> str:
    return f"{crossing.way} {crossing.ranks} {crossing.dim} {crossing.shape}"


class ShardCrew(Crew):
    """Four ranks of each job. Only those of a crossing take part in it. `way` is grafter or gather."""

    def __init__(self, way: str) -> None:
        self.way, self.ranks = way, Ranks(_MOST, _MOST)
        self._directory = tempfile.TemporaryDirectory()
        self._store: Any = HostedStore() if way == "grafter" else serve("127.0.0.1", 0)
        self._processes, self._pipes = [], []
        for number in range(self.ranks.total):
            role = "baseline" if number < _MOST else "target"
            ours, theirs = _CONTEXT.Pipe()
            arguments = (theirs, way, role, number % _MOST, self._store.port, self._directory.name)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            self._hear()
        except BaseException:
            self._kill()
            raise

    def prepare_crossing(self, crossing: Crossing) -> None:
        """The tensors of a crossing on its ranks, one exchange, and a check of every value that came."""
        self._ask("prepare", crossing, of=self._members(crossing))

    def seconds_of(self, crossing: Crossing, count: int, lead_in: int) -> float:
        """The median of `count` exchanges after `lead_in` uncounted ones, as the slowest rank sees it."""
        answers = self._ask("exchange", crossing, count + lead_in, of=self._members(crossing))
        return float(max(statistics.median(seconds[lead_in:]) for seconds in answers))

    def forget_tensors(self) -> None:
        self._ask("forget")

    @staticmethod
    def _members(crossing: Crossing) -> list[int]:
        return [*range(crossing.ranks.baseline), *range(_MOST, _MOST + crossing.ranks.target)]


# In a rank's process.


def _serve(pipe: Connection, way: str, role: str, role_rank: int, port: int, directory: str) -> None:
    """Obey commands until `close`; an error is told and ends the process."""
    for name in [name for name in os.environ if name.startswith(("GRAFTER_", "DUMPER_GRAFTER_"))]:
        del os.environ[name]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        kind: type[_Rank] = _GraftingRank if way == "grafter" else _GatheringRank
        rank = kind(role, role_rank, port, directory)
        pipe.send((True, None))
        while True:
            command, arguments = pipe.recv()
            pipe.send((True, getattr(rank, command)(*arguments)))
            if command == "close":
                return
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))


class _Rank:
    """The commands, as one rank carries them out."""

    def __init__(self, role: str, role_rank: int, port: int, directory: str) -> None:
        self._role, self._role_rank = role, role_rank
        self._values: dict[str, torch.Tensor] = {}

    @property
    def _sends(self) -> bool:
        return self._role == "baseline"

    def _cross(self, crossing: Crossing, value: torch.Tensor) -> None:
        raise NotImplementedError

    def prepare(self, crossing: Crossing) -> None:
        expected = crossing.shard(self._role, self._role_rank)
        value = expected if self._sends else torch.full_like(expected, _UNTOUCHED)
        self._values[crossing.way] = value
        self._cross(crossing, value)
        if not torch.equal(value, expected):
            raise AssertionError(f"{crossing} brought something else to {self._role} rank {self._role_rank}")

    def exchange(self, crossing: Crossing, count: int) -> list[float]:
        value, clock = self._values[crossing.way], time.perf_counter
        seconds = []
        for _ in range(count):
            start = clock()
            self._cross(crossing, value)
            seconds.append(clock() - start)
        return seconds

    def forget(self) -> None:
        self._values.clear()

    def close(self) -> None:
        raise NotImplementedError


class _GraftingRank(_Rank):
    def __init__(self, role: str, role_rank: int, port: int, directory: str) -> None:
        super().__init__(role, role_rank, port, directory)
        settings = {
            "enable": "1",
            "role": role,
            "master_port": str(port),
            "store_host": "launcher",
            "b2t_filter": f"name == '{_POINT}'",
            "dir": directory,
            "run_name": "run",
            "log_level": "warning",
            "stats": "off",
        }
        os.environ.update({f"GRAFTER_{name.upper()}": value for name, value in settings.items()})
        os.environ.update({"RANK": str(role_rank), "WORLD_SIZE": str(_MOST)})
        import grafter

        self._grafter = grafter
        # Joins: a run begins once all ranks of both jobs are there, also those that the first crossings leave out.
        grafter.step()

    def _cross(self, crossing: Crossing, value: torch.Tensor) -> None:
        parts = crossing.parts(self._role)
        layout: dict[str, Any] = {}
        if crossing.way == RESHARDED:
            dims = " ".join(f"{name}[tp]" if name == crossing.dim else name for name in DIMS)
            layout = {"dims": dims, "axes": {"tp": (self._role_rank, parts)}}
        self._grafter.dump(_POINT, value, case=_case(crossing), ranks=range(parts), **layout)

    def close(self) -> None:
        self._grafter.close()


class _GatheringRank(_Rank):
    """What one writes without grafter: everybody gathers all shards, puts them together and takes its own."""

    def __init__(self, role: str, role_rank: int, port: int, directory: str) -> None:
        super().__init__(role, role_rank, port, directory)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
        number = role_rank if self._sends else _MOST + role_rank
        dist.init_process_group("gloo", store=store, rank=number, world_size=2 * _MOST)
        self._groups: dict[Ranks, Any] = {}
        for ranks in (Ranks(2, 4), Ranks(4, 2)):
            members = [*range(ranks.baseline), *range(_MOST, _MOST + ranks.target)]
            self._groups[ranks] = dist.new_group(members, backend="gloo")

    def _cross(self, crossing: Crossing, value: torch.Tensor) -> None:
        gathered: list[Any] = [None] * crossing.ranks.total
        dist.all_gather_object(gathered, value if self._sends else None, group=self._groups[crossing.ranks])
        if not self._sends:
            dim = DIMS.index(crossing.dim)
            whole = torch.cat(gathered[: crossing.ranks.baseline], dim)
            value.copy_(whole.chunk(crossing.ranks.target, dim)[self._role_rank])

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()
