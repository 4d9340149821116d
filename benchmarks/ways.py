"""The ways in which a tensor crosses from the baseline's ranks to the target's, one class each.

The k-th baseline rank's tensor replaces the k-th target rank's, in place. Where the counts differ, every target rank
takes in all of the baseline's and writes the last one.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

POINT = "h"
_TAKE_LAST = Path(__file__).parent.parent / "transforms" / "take_last.py"
_TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True)
class Ranks:
    """How many ranks send (the baseline) and how many receive (the target)."""

    baseline: int
    target: int

    @classmethod
    def parse(cls, text: str) -> Ranks:
        """`2-2` or `2->2`. Raises ValueError for anything else."""
        baseline, separator, target = text.replace("->", "-").partition("-")
        if not separator or not baseline.isdecimal() or not target.isdecimal() or not int(baseline) or not int(target):
            raise ValueError(f"{text!r} is not a number of senders and of receivers, such as 2-2")
        return cls(int(baseline), int(target))

    @property
    def total(self) -> int:
        return self.baseline + self.target

    @property
    def one_to_one(self) -> bool:
        return self.baseline == self.target

    @property
    def received_per_rank(self) -> int:
        """Tensors that one target rank takes in."""
        return 1 if self.one_to_one else self.baseline

    def __str__(self) -> str:
        return f"{self.baseline}->{self.target}"


@dataclass(frozen=True)
class WorkerRank:
    """Which rank a worker is, and what it needs to take part."""

    role: str
    role_rank: int
    ranks: Ranks
    store_port: int
    directory: str
    sglang: str | None = None
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def sends(self) -> bool:
        return self.role == "baseline"

    @property
    def global_rank(self) -> int:
        return self.role_rank if self.sends else self.ranks.baseline + self.role_rank

    @property
    def source(self) -> int:
        """The baseline rank whose value this rank holds after the exchange."""
        return self.role_rank if self.sends or self.ranks.one_to_one else self.ranks.baseline - 1


def import_grafter(role: str, role_rank: int, size: int, store_port: int, directory: str, **settings: str) -> Any:
    """The package, in the environment that `grafter run` and torchrun would set for this rank. `settings`: more."""
    own = {
        "enable": "1", "role": role, "master_port": str(store_port), "store_host": "launcher", "dir": directory,
        "run_name": "run", "log_level": "warning", "stats": "off",
    }  # fmt: skip
    os.environ.update({f"GRAFTER_{name.upper()}": value for name, value in {**own, **settings}.items()})
    os.environ.update({"RANK": str(role_rank), "WORLD_SIZE": str(size)})
    import grafter

    return grafter


class Way(ABC):
    """One rank's part of one way. All ranks of the group construct it, then call `exchange` equally often."""

    name: ClassVar[str]

    def __init__(self, rank: WorkerRank) -> None:
        self.rank = rank

    @abstractmethod
    def exchange(self, value: torch.Tensor) -> None:
        """Send `value`, or replace it by what arrives: float32 `[n]`, the same n on every rank."""

    def close(self) -> None:  # noqa: B027 - most have nothing to leave
        """Leave, so that the process can end."""

    @classmethod
    def bytes_needed(cls, ranks: Ranks, nbytes: int) -> int:
        """Memory of all processes of the group together, for tensors of `nbytes`."""
        return ranks.total * nbytes + 2 * ranks.target * ranks.received_per_rank * nbytes


class Grafter(Way):
    """This project, as a user's script has it."""

    name = "grafter"

    def __init__(self, rank: WorkerRank) -> None:
        super().__init__(rank)
        transform = {} if rank.ranks.one_to_one else {"transform_path": f"{_TAKE_LAST}:transform"}
        size = rank.ranks.baseline if rank.sends else rank.ranks.target
        settings = {"b2t_filter": f"name == '{POINT}'", **transform, **rank.settings}
        self._grafter = import_grafter(rank.role, rank.role_rank, size, rank.store_port, rank.directory, **settings)

    def exchange(self, value: torch.Tensor) -> None:
        # The tag distinguishes the sizes in the ledger.
        self._grafter.dump(POINT, value, nbytes=value.nbytes)

    def close(self) -> None:
        self._grafter.close()


@dataclass(frozen=True)
class ModelShape:
    """A Llama of transformers, with random weights, and the length of what it reads."""

    layers: int = 12
    hidden: int = 1024
    tokens: int = 16


class Model(Grafter):
    """A forward pass of a model: without hooks, and with hooks on every module and what a filter makes of it."""

    name = "model"

    def __init__(self, rank: WorkerRank) -> None:
        self.shape = ModelShape(*(int(rank.settings[name.name]) for name in fields(ModelShape)))
        filters = {f"{way}_filter": f"mode == '{mode}'" for way, mode in (("compare", "compare"), ("b2t", "graft"))}
        super().__init__(replace(rank, settings={**filters, "stats": "full"}))
        self._plain = self._make()
        # The same weights, so that neither model has more of them in the cache.
        self._hooked = copy.deepcopy(self._plain, {id(weight): weight for weight in self._plain.parameters()})
        self._attachment = self._grafter.attach(self._hooked)
        self._tokens = torch.arange(self.shape.tokens)[None] % self._plain.config.vocab_size

    def _make(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        hidden = self.shape.hidden
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
        return LlamaForCausalLM(config).eval()

    def exchange(self, value: torch.Tensor) -> None:
        self.run("graft")

    def run(self, mode: str) -> None:
        """One forward pass: `plain`, `unmatched`, `compare` or `graft`."""
        with torch.no_grad():
            if mode == "plain":
                self._plain(self._tokens, use_cache=False)
                return
            with self._grafter.context(mode=mode):
                self._hooked(self._tokens, use_cache=False)
            # What one rank does alone is no step of the other job.
            if mode != "unmatched":
                self._grafter.step()

    def facts(self) -> tuple[int, int]:
        """Hooks, and points of one pass."""
        grafter = self._grafter._process.grafter
        before = sum(grafter._unmatched.values())
        self.run("unmatched")
        return self._attachment.hook_count, sum(grafter._unmatched.values()) - before


class _Gloo(Way):
    """A gloo group of both jobs' ranks, the baseline's first."""

    def __init__(self, rank: WorkerRank) -> None:
        super().__init__(rank)
        store = dist.TCPStore("127.0.0.1", rank.store_port, is_master=False, timeout=_TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank.global_rank, world_size=rank.ranks.total)

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()


class AllGatherObject(_Gloo):
    """The senders' tensors are gathered as objects, and receivers, which have nothing to say, give None."""

    name = "all_gather_object"
    receivers_give_tensors: ClassVar[bool] = False

    def exchange(self, value: torch.Tensor) -> None:
        gathered: list[Any] = [None] * self.rank.ranks.total
        dist.all_gather_object(gathered, value if self.rank.sends or self.receivers_give_tensors else None)
        if not self.rank.sends:
            value.copy_(gathered[self.rank.source])

    @classmethod
    def bytes_needed(cls, ranks: Ranks, nbytes: int) -> int:
        # Each rank has its tensor, its pickle twice, every rank's pickle padded to the longest, and each tensor again.
        givers = ranks.total if cls.receivers_give_tensors else ranks.baseline
        return ranks.total * (3 + ranks.total + givers) * nbytes


class AllGatherObjectOfAll(AllGatherObject):
    """What one writes first: every rank gives its tensor, wanted or not."""

    name = "gathered from all"
    receivers_give_tensors = True


class RawGloo(_Gloo):
    """Send and receive, sizes known beforehand, nothing agreed on, checked or recorded."""

    name = "gloo send/recv"

    def __init__(self, rank: WorkerRank) -> None:
        super().__init__(rank)
        self._buffers: list[torch.Tensor] = []

    def exchange(self, value: torch.Tensor) -> None:
        ranks, rank = self.rank.ranks, self.rank
        if ranks.one_to_one:
            if rank.sends:
                dist.send(value, ranks.baseline + rank.role_rank)
            else:
                dist.recv(value, rank.source)
            return
        if rank.sends:
            works = [dist.isend(value, ranks.baseline + receiver) for receiver in range(ranks.target)]
        else:
            if not self._buffers or self._buffers[0].shape != value.shape:
                self._buffers = [torch.empty_like(value) for _ in range(ranks.baseline)]
            works = [dist.irecv(buffer, sender) for sender, buffer in enumerate(self._buffers)]
        for work in works:
            assert work is not None
            work.wait()
        if not rank.sends:
            value.copy_(self._buffers[rank.source])


class Memcpy(Way):
    """What one receiver takes in, copied within one process by one thread: the floor."""

    name = "memcpy"

    def __init__(self, rank: WorkerRank) -> None:
        super().__init__(rank)
        self._sources: list[torch.Tensor] = []

    def exchange(self, value: torch.Tensor) -> None:
        if not self._sources or self._sources[0].shape != value.shape:
            senders = [self.rank.role_rank] if self.rank.ranks.one_to_one else range(self.rank.ranks.baseline)
            self._sources = [torch.full_like(value, sender + 1.0) for sender in senders]
        for source in self._sources:
            value.copy_(source)


class Sglang(Way):
    """The grafter inside sglang. Its log lines, which it always writes, go nowhere."""

    name = "sglang"

    def __init__(self, rank: WorkerRank) -> None:
        super().__init__(rank)
        from benchmarks.sglang_grafter import load_dumper_module

        assert rank.sglang is not None
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        # Otherwise its rank 0 would host the store on a port that must be chosen before it is free for sure.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        store = dist.TCPStore("127.0.0.1", rank.store_port, is_master=False, timeout=_TIMEOUT)
        size = rank.ranks.baseline if rank.sends else rank.ranks.target
        # It wants the job's own group as the default one.
        dist.init_process_group("gloo", store=dist.PrefixStore(rank.role, store), rank=rank.role_rank, world_size=size)
        module = load_dumper_module(Path(rank.sglang))
        config = module.DumperConfig(
            enable=True,
            exp_name="benchmark",
            dir=rank.directory,
            enable_output_file=False,
            enable_output_console=False,
            grafter_enable=True,
            grafter_role=rank.role,
            grafter_b2t_filter=f"name == '{POINT}'",
            grafter_master_address="127.0.0.1",
            grafter_master_port=rank.store_port,
            grafter_baseline_world_size=rank.ranks.baseline,
            grafter_target_world_size=rank.ranks.target,
            grafter_backend="gloo",
        )
        self.dumper = module._Dumper(config=config)
        self.disabled_dumper = module._Dumper(config=module.DumperConfig())

    def exchange(self, value: torch.Tensor) -> None:
        self.dumper.dump(POINT, value, nbytes=value.nbytes)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    @classmethod
    def bytes_needed(cls, ranks: Ranks, nbytes: int) -> int:
        return AllGatherObject.bytes_needed(ranks, nbytes) + ranks.total * 8 * nbytes


class Off(Way):
    """grafter imported and not enabled: only its calls are measured."""

    name = "off"

    def exchange(self, value: torch.Tensor) -> None:
        import grafter

        grafter.dump(POINT, value)


WAYS: dict[str, type[Way]] = {
    way.name: way for way in (Grafter, AllGatherObject, AllGatherObjectOfAll, RawGloo, Memcpy, Sglang, Off, Model)
}
# Those that one process does alone.
SOLITARY = (Memcpy.name, Off.name)
