"""The ranks between which a sharded tensor crosses: by grafts, resharded or not, or gathered and sliced.

Four ranks of each job, started once. In a crossing between fewer, the others take no part.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ways import Ranks, import_grafter
from benchmarks.workers import WorkerGroup, obey_commands, worker_names
from grafter.wire.store_server import HostedStore, serve

DIMS = ("b", "s", "h")
RESHARDED, GATHERED = "resharded", "gather, then slice"
MOST_RANKS = 4
_POINT = "sharded"
# Below 2**24, so that float32 holds every value; a prime, so that no shift by a shard or a row shows the same values.
_MODULUS = 16777213
_UNTOUCHED = -1.0
_TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True)
class Crossing:
    """One way for the global tensor `[b, s, h]` (float32) to cross. `dim` is the one that is split on both sides."""

    way: str
    ranks: Ranks
    dim: str
    shape: tuple[int, int, int]

    @property
    def case(self) -> str:
        """The tag that distinguishes crossings in the ledger."""
        return f"{self.way} {self.ranks} {self.dim} {self.shape}"

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


class ShardGroup(WorkerGroup):
    """Four ranks of each job. Only those of a crossing take part in it. `way` is grafter or gather."""

    def __init__(self, way: str) -> None:
        super().__init__(f"{way} of shards", HostedStore() if way == "grafter" else serve("127.0.0.1", 0))
        places = worker_names(Ranks(MOST_RANKS, MOST_RANKS))
        port, directory = self._store.port, self._directory.name
        self._start(_run_worker, {name: (way, *place, port, directory) for name, place in places.items()})

    def prepare_crossing(self, crossing: Crossing) -> None:
        """Make the tensors of a crossing on its ranks, exchange them once, and check every value that arrived."""
        self._ask("prepare", crossing, of=self._members(crossing))

    def seconds_of(self, crossing: Crossing, count: int, lead_in: int) -> float:
        """The median of `count` exchanges after `lead_in` uncounted ones, as the slowest rank sees it."""
        answers = self._ask("exchange", crossing, count + lead_in, of=self._members(crossing))
        return float(max(statistics.median(seconds[lead_in:]) for seconds in answers))

    def forget_tensors(self) -> None:
        self._ask("forget")

    @staticmethod
    def _members(crossing: Crossing) -> list[int]:
        return [*range(crossing.ranks.baseline), *range(MOST_RANKS, MOST_RANKS + crossing.ranks.target)]


def _run_worker(pipe: Connection, way: str, role: str, role_rank: int, port: int, directory: str) -> None:
    kind: type[_Rank] = _GraftingRank if way == "grafter" else _GatheringRank
    obey_commands(pipe, lambda: kind(role, role_rank, port, directory))


class _Rank(ABC):
    """The commands of a ShardGroup, as one rank carries them out."""

    def __init__(self, role: str, role_rank: int, port: int, directory: str) -> None:
        self._role, self._role_rank = role, role_rank
        self._values: dict[str, torch.Tensor] = {}

    @property
    def _sends(self) -> bool:
        return self._role == "baseline"

    @abstractmethod
    def _cross(self, crossing: Crossing, value: torch.Tensor) -> None: ...

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

    @abstractmethod
    def close(self) -> None: ...


class _GraftingRank(_Rank):
    """A rank that grafts its shard, which grafter reshards."""

    def __init__(self, role: str, role_rank: int, port: int, directory: str) -> None:
        super().__init__(role, role_rank, port, directory)
        settings = {"b2t_filter": f"name == '{_POINT}'"}
        self._grafter = import_grafter(role, role_rank, MOST_RANKS, port, directory, **settings)
        # Joins: a run begins once all ranks of both jobs are there, also those that the first crossings leave out.
        self._grafter.step()

    def _cross(self, crossing: Crossing, value: torch.Tensor) -> None:
        parts = crossing.parts(self._role)
        layout: dict[str, Any] = {}
        if crossing.way == RESHARDED:
            dims = " ".join(f"{name}[tp]" if name == crossing.dim else name for name in DIMS)
            layout = {"dims": dims, "axes": {"tp": (self._role_rank, parts)}}
        self._grafter.dump(_POINT, value, case=crossing.case, ranks=range(parts), **layout)

    def close(self) -> None:
        self._grafter.close()


class _GatheringRank(_Rank):
    """A rank without grafter: it gathers all shards, puts them together and takes its own."""

    def __init__(self, role: str, role_rank: int, port: int, directory: str) -> None:
        super().__init__(role, role_rank, port, directory)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
        number = role_rank if self._sends else MOST_RANKS + role_rank
        dist.init_process_group("gloo", store=store, rank=number, world_size=2 * MOST_RANKS)
        self._groups: dict[Ranks, Any] = {}
        for ranks in (Ranks(2, 4), Ranks(4, 2)):
            members = [*range(ranks.baseline), *range(MOST_RANKS, MOST_RANKS + ranks.target)]
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
