"""Live grafts between real processes: what arrives, what is written, what the ledger says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jobs import Rank, succeed, two_jobs

import grafter


def dump_filled(rank: Rank) -> list[Any]:
    value = torch.full((4,), 1.0 if rank.is_baseline else 2.0)
    return [grafter.dump("h", value, layer_id=i).tolist() for i in range(3)]


def test_b2t_writes_the_baselines_value_into_the_target(tmp_path: Path) -> None:
    """After a b2t point the target holds the baseline's values, and both ledgers say so."""
    with two_jobs(tmp_path, dump_filled, dump_filled, b2t_filter="name == 'h'") as jobs:
        baseline, target = succeed(jobs.wait())
        assert baseline == [[1.0] * 4] * 3
        assert target == [[1.0] * 4] * 3
        ledgers = jobs.ledgers()
    assert [r.outcome for r in ledgers["baseline", 0]] == ["sent"] * 3
    assert [r.outcome for r in ledgers["target", 0]] == ["grafted"] * 3


def test_t2b_writes_the_targets_value_into_the_baseline(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_filled, dump_filled, t2b_filter="name == 'h'") as jobs:
        baseline, target = succeed(jobs.wait())
    assert baseline == [[2.0] * 4] * 3
    assert target == [[2.0] * 4] * 3


def test_k_th_sender_serves_k_th_receiver(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_rank, dump_rank, ranks=(2, 2), b2t_filter="True") as jobs:
        values = succeed(jobs.wait())
    assert values == [0, 1, 0, 1]


def dump_rank(rank: Rank) -> int:
    return int(grafter.dump("r", torch.tensor(rank.role_rank if rank.is_baseline else 7)))
