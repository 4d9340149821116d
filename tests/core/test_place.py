"""Which rank of which job a process is, and what is refused at once where two sources of it do not agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import Jobs, Rank

import grafter
from grafter.config.settings.config import GrafterConfig
from grafter.core.roles import Place
from grafter.errors import ConfigError
from grafter.runtime.rank_context import find_place


def config(**settings: Any) -> GrafterConfig:
    return GrafterConfig(**{"role": "target", "b2t_filter": "True", "master_port": 1, **settings})


@pytest.fixture
def one_rank_job() -> Iterator[None]:
    """torch.distributed with a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_torch_distributed_goes_before_the_variables(one_rank_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("RANK", "3")
    assert find_place(config()) == Place("target", 0, 1)
    assert find_place(config(target_world_size=1)) == Place("target", 0, 1)


def test_a_world_size_that_torch_distributed_does_not_have_is_refused(one_rank_job: None) -> None:
    with pytest.raises(ConfigError) as refused:
        find_place(config(target_world_size=3))
    assert "GRAFTER_TARGET_WORLD_SIZE=3" in str(refused.value)
    assert "torch.distributed says that this job has 1" in str(refused.value)
    # The other job's size is checked once both have joined.
    assert find_place(config(baseline_world_size=3)) == Place("target", 0, 1)


def test_a_world_size_that_the_launcher_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert find_place(config(target_world_size=2)) == Place("target", 1, 2)
    with pytest.raises(ConfigError, match=r"GRAFTER_TARGET_WORLD_SIZE=4 .* WORLD_SIZE=2 says"):
        find_place(config(target_world_size=4))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="this process sees only itself"):
        find_place(config(target_world_size=4))


def test_a_rank_that_is_configured_may_be_one_of_more_than_the_default_group_has(one_rank_job: None) -> None:
    assert find_place(config(rank=5, target_world_size=8)) == Place("target", 5, 8)


def dump_one(rank: Rank) -> None:
    grafter.dump("h", torch.ones(1))


def test_the_job_with_the_wrong_size_fails_at_its_first_call(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", join_timeout=100, hosted=False) as jobs:
        jobs.start("target", 1, dump_one, target_world_size=2)
        (target,) = jobs.wait()
    assert target.error_kind == "ConfigError"
    assert target.seconds < 20
