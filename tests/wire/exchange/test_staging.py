"""The memory that is received into: reused, never shared with who kept a view, refused rather than overcommitted."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

from grafter.wire.exchange import staging
from grafter.wire.exchange.staging import Staging, StagingRefused, as_tensor, is_sealed_block

MIB = 1 << 20


def test_a_block_serves_smaller_points_and_gives_way_to_a_larger_one() -> None:
    memory = Staging()
    grown = [memory.reserve(nbytes) for nbytes in (10, MIB, MIB + 1, 5, 2 * MIB, 2 * MIB + 1)]
    assert grown == [True, False, True, False, False, True]
    assert (memory.generation, memory.capacity) == (3, 3 * MIB)
    memory.release()


def test_nothing_needs_no_block() -> None:
    """A point of empty tensors, also as the first one, has an empty view."""
    memory = Staging()
    assert memory.reserve(0) is False
    assert memory.view(0, 0).numel() == 0
    assert as_tensor(memory.view(0, 0), torch.bfloat16, (3, 0)).shape == (3, 0)
    assert memory.prepare() == (0, 0)


def test_a_block_that_somebody_holds_a_view_of_is_left_to_them() -> None:
    memory = Staging()
    memory.reserve(100)
    kept = memory.view(0, 4)
    kept.copy_(torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    assert memory.prepare() == (1, 0)
    memory.reserve(100)
    memory.view(0, 4).zero_()
    assert memory.generation == 2
    assert kept.tolist() == [1, 2, 3, 4]
    memory.release()


def test_a_block_that_nobody_holds_is_announced_again() -> None:
    memory = Staging()
    memory.reserve(100)
    view = as_tensor(memory.view(64, 8), torch.float32, (2,))
    assert view.shape == (2,)
    del view
    assert memory.prepare() == (1, MIB)
    memory.release()


def test_what_is_announced_beyond_the_free_memory_is_refused_and_the_block_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Staging()
    memory.reserve(100)
    monkeypatch.setattr(staging, "_available_bytes", lambda: 5 * MIB)
    with pytest.raises(StagingRefused, match="6 MiB are announced for this rank and 5 MiB of memory are free"):
        memory.reserve(6 * MIB)
    assert memory.prepare() == (1, MIB)
    memory.release()


def test_absurd_sizes_are_refused_where_free_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_available_bytes", lambda: None)
    for nbytes in (1 << 62, 1 << 80):
        memory = Staging()
        with pytest.raises(StagingRefused, match="cannot be reserved"):
            memory.reserve(nbytes)
        assert (memory.capacity, memory.fd) == (0, -1)


def test_a_block_cannot_shrink_and_a_foreign_file_is_no_block() -> None:
    memory = Staging()
    memory.reserve(100)
    assert is_sealed_block(memory.fd, MIB)
    assert not is_sealed_block(memory.fd, MIB + 1)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(memory.fd, 10)
    memory.release()
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, MIB)
    assert not is_sealed_block(unsealed, MIB)
    os.close(unsealed)


def resident_bytes(block: mmap.mmap) -> int:
    """Of a memfd: what its pages take, whoever maps it."""
    fields = dict(
        line.split()[:2]
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":\t" in line and line.endswith("kB")
    )
    return int(fields["RssShmem:"]) * 1024


def test_a_released_block_costs_nothing_even_while_a_sender_has_it_mapped() -> None:
    memory = Staging()
    memory.reserve(16 * MIB)
    mapped = mmap.mmap(memory.fd, 16 * MIB)
    view = torch.frombuffer(mapped, dtype=torch.uint8)
    view.fill_(1)
    before = resident_bytes(mapped)
    memory.release()
    assert resident_bytes(mapped) <= before - 15 * MIB
    view.fill_(2)  # a late write harms nobody


def test_no_descriptor_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        memory = Staging()
        memory.reserve(100)
        memory.reserve(2 * MIB)
        memory.release()
    assert len(os.listdir("/proc/self/fd")) == before
