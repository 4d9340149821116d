"""The benchmark of hooks, which is about a model of transformers. The others: tests/project/test_benchmarks.py."""

from __future__ import annotations

from benchmarks.capture import ALONE, measure_capture
from benchmarks.targets import capture_targets
from benchmarks.ways import ModelShape


def test_capture_is_measured_with_hooks_everywhere() -> None:
    """A model of one layer: two hooks on each of its modules, a point for each tensor, and what a target is judged by.

    Its modules are the embedding, the rotary embedding, the norm, the head, the inner model, and 13 of the layer; the
    model itself has no hook, since its own forward is wrapped.
    """
    results = measure_capture(ModelShape(layers=1, hidden=64, tokens=4), rounds=2, passes=1)
    assert [r.case for r in results] == ["plain", ALONE, "plain, both jobs", "compared", "grafted"]
    assert [r.hooks for r in results] == [0, 36, 0, 36, 36]
    assert all(r.points > 36 for r in results if r.hooks)
    assert all(r.seconds.median > 0 and r.over_plain.median > 0 for r in results)
    (target,) = capture_targets(results)
    assert target.limit == 1.05 and target.measured == results[1].over_plain.median
