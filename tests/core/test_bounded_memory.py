"""What is remembered stays within its bounds, whatever comes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from grafter.config.settings.config import GrafterConfig
from grafter.core.bounded_memory import BoundedMemory
from grafter.core.leaves import TensorSpec
from grafter.core.messages.manifest import Header
from grafter.core.points import PointKey
from grafter.rank.grafter import Grafter
from grafter.runtime.point_preparation import Point
from grafter.wire.pairing.manifest_cache import ManifestCache


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), max_size=200))
def test_neither_entries_nor_bytes_go_beyond_their_bounds(entries: list[tuple[int, int]]) -> None:
    """What was remembered last is found again, unless it alone is too large; all of it together is within bounds."""
    memory: BoundedMemory[int, int] = BoundedMemory(8, 30)
    for key, nbytes in entries:
        if key not in memory:
            memory.remember(key, nbytes, nbytes)
        assert memory.get(key) == nbytes or nbytes > 30 or key in memory
        assert len(memory) <= 8
        assert sum(memory.values()) <= 30


def header_of(role: str, leaves: int, length: int) -> Header:
    specs = tuple(TensorSpec(path=f"[{n}]", shape=(length, 8), dtype="float32", device="cpu") for n in range(leaves))
    return Header(role=role, role_rank=0, participants=(0,), direction="b2t", call_site="x", leaves=specs)  # type: ignore[arg-type]


def test_a_pytree_whose_shapes_are_others_in_each_step_is_not_remembered_for_ever() -> None:
    """As a cache of keys and values is, that grows by a token in each step: what is kept is bounded in bytes."""
    known = ManifestCache()
    for length in range(130):
        mine, theirs = (known.collected(header_of(role, 1000, length), ()) for role in ("baseline", "target"))
        known.manifest(theirs)
        known.pair(f"[{mine},{theirs}]")
    for memory in (known._pairs, known._manifests, known._read_manifests):
        assert 0 < len(memory) < 60


def test_headers_of_large_pytrees_are_bounded_in_bytes() -> None:
    """The same where a rank describes its own values; small ones are all remembered."""
    grafter = Grafter(GrafterConfig(enable=True, role="baseline", master_port=1, b2t_filter="True"))
    preparer, options = grafter.tools.preparer, grafter.context.rules.options.options_of("h", {})
    point = Point(PointKey("h", (), 0, "forward", 0), "b2t", options, {}, "x")

    def describe(value: Any) -> Header:
        return preparer.build_header(None, point, preparer.prepare(value, options))

    for length in range(1, 130):
        value = [torch.empty(length, 0) for _ in range(1000)]
        describe(value)
    assert 0 < len(preparer._headers) < 60
    small = [describe(torch.empty(n)) for n in range(3000)]
    again = [describe(torch.empty(n)) for n in range(3000)]
    assert all(one is other for one, other in zip(small, again, strict=True))
