"""The ranks of a soak, and what they do."""

from __future__ import annotations

import resource
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.growth import Samples, sample_process
from benchmarks.units import KIB
from benchmarks.ways import Ranks
from benchmarks.workers import WorkerGroup, obey_commands, worker_names
from grafter.config.settings.config import GrafterConfig
from grafter.core.records import LedgerRecord
from grafter.rank.grafter import Grafter
from grafter.store.ledger import read_run
from grafter.wire.store_server import HostedStore

POINTS_A_STEP = 10


class SoakGroup(WorkerGroup):
    """All ranks of both jobs of a soak. They act in lockstep."""

    patience_seconds = 900.0
    closes_at_exit = False

    def __init__(self, ranks: Ranks, **settings: Any) -> None:
        store = HostedStore()
        super().__init__("soak", store)
        self._raw = store._client.raw
        sizes = {"baseline_world_size": ranks.baseline or None, "target_world_size": ranks.target or None}
        place = self._store.port, self._directory.name, {**sizes, **settings}
        self._start(_run_worker, {name: (*own, *place) for name, own in worker_names(ranks).items()})

    def do(self, action: str, *arguments: Any, of: str = "") -> list[Any]:
        """What each rank returns, or each whose name begins with `of`. Raises WorkerError."""
        chosen = [number for number, name in enumerate(self.names) if name.startswith(of)]
        return self._ask(action, *arguments, of=chosen)

    def sample(self) -> dict[str, dict[str, int]]:
        """The measures of each rank, and of the process that hosts the store, with the store's keys."""
        seen = dict(zip(self.names, self.do("sample"), strict=True))
        return {**seen, "store": {**sample_process(), "keys": self._raw.num_keys()}}

    def soak(self, action: str, seconds: float, batch: int, of: str = "") -> Samples:
        """Do it again and again, `batch` at a time, and sample about a hundred times."""
        samples, done, start, due = Samples(), 0, time.monotonic(), 0.0
        while (now := time.monotonic() - start) < seconds or len(samples.seconds) < 4:
            self.do(action, done, batch, of=of)
            done += batch
            if now >= due:
                samples.add(time.monotonic() - start, done, self.sample())
                due = now + seconds / 100
        return samples

    def records(self) -> dict[str, list[LedgerRecord]]:
        """By rank. For runs that are short."""
        return {f"{role} {rank}": lines for role, rank, lines in read_run(self.run_directory)}


def _run_worker(pipe: Connection, role: Any, rank: int, port: int, directory: str, settings: dict[str, Any]) -> None:
    given = {"b2t_filter": "True", "stats": "off", "log_level": "error", "timeout": 600.0, "join_timeout": 600.0}
    config = GrafterConfig(
        enable=True, role=role, rank=rank, master_port=port, store_host="launcher", dir=directory, run_name="run",
        **{**given, **settings},
    )  # fmt: skip
    obey_commands(pipe, lambda: SoakRank(Grafter(config), role == "baseline"))


class SoakRank:
    """The commands of a SoakGroup, as one rank carries them out."""

    def __init__(self, grafter: Grafter, sends: bool) -> None:
        self._grafter, self._sends = grafter, sends
        fill = 1.0 if sends else 0.0
        self._small = torch.full((1024,), fill)
        self._large = torch.full((1 << 18,), fill)
        self._tree = {"a": torch.full((64,), fill), "b": [torch.full((8, 8), fill), 3]}

    def sample(self) -> dict[str, int]:
        return sample_process()

    def join(self) -> float:
        start = time.monotonic()
        self._grafter.begin()
        assert self._grafter.session
        return time.monotonic() - start

    def points(self, first: int, count: int) -> None:
        """Points as a run has them: names and layers that recur at each step, of several kinds."""
        for number in range(first, first + count):
            kind = number % POINTS_A_STEP
            value: Any = self._large if number % 100 == 0 else self._tree if kind == 1 else self._small
            if number % 1000 == 500:
                value = self._grown(number)
            self._grafter.dump(f"kind{kind}", value, layer_id=kind % 4)
            self._end_step(number)

    def grow(self, first: int, count: int) -> None:
        """Pytrees like a cache that grows by a token: their shapes never recur."""
        for number in range(first, first + count):
            self._grafter.dump("grown", self._grown((1 << 40) + number))
            self._end_step(number)

    def _grown(self, number: int) -> list[torch.Tensor]:
        return [torch.empty(number + 1, 0) for _ in range(200)]

    def post(self, first: int, count: int) -> None:
        """Points that no rank takes, each with another key: a sender that does not wait."""
        for number in range(first, first + count):
            self._grafter.dump("left", self._small, number=number, wait="job")
            self._end_step(number)

    def post_large(self, nbytes: int) -> None:
        self._grafter.dump("large", torch.empty(nbytes // 4), wait="job")

    def pending(self) -> tuple[int, int]:
        pending = self._grafter.pending()
        return pending.entries, pending.bytes

    def post_after(self, first: int, count: int) -> None:
        """The same, with other numbers."""
        self.post(first + (1 << 40), count)

    def highest(self) -> int:
        """The highest resident size that this process has had."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB

    def tensor(self, nbytes: int, number: int) -> float:
        """Its seconds. Raises AssertionError where a value is wrong."""
        value = torch.full((nbytes // 4,), float(number + 1) if self._sends else 0.0)
        start = time.monotonic()
        self._grafter.dump("tensor", value, number=number)
        seconds = time.monotonic() - start
        wrong = sum(int((piece != number + 1).sum()) for piece in value.split(1 << 24))
        assert wrong == 0, f"{wrong} values are wrong"
        return seconds

    def tree(self, leaves: int, number: int) -> float:
        """Its seconds. All or none of the leaves are written: `was_written`. Raises AssertionError else."""
        fill = float(number + 1) if self._sends else 0.0
        value = {f"layer{n % 100}.leaf{n}": torch.full((4,), fill) for n in range(leaves)}
        start = time.monotonic()
        self._grafter.dump("tree", value, number=number)
        seconds = time.monotonic() - start
        right = sum(bool((leaf == number + 1).all()) for leaf in value.values())
        self.was_written = right == leaves
        assert right in (0, leaves), f"{right} of {leaves} leaves were written"
        return seconds

    def tree_was_written(self) -> bool:
        return self.was_written

    def save(self, first: int, count: int) -> None:
        """Points that are saved."""
        for number in range(first, first + count):
            self._grafter.dump(f"saved{number % 8}", self._small, number=number)
            self._end_step(number)
        self._grafter.tools.dumps.flush()

    def _end_step(self, number: int) -> None:
        # What is counted of a step's points is kept until it ends.
        if number % POINTS_A_STEP == POINTS_A_STEP - 1:
            self._grafter.step()

    def close(self) -> None:
        self._grafter.close()
