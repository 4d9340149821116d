"""The execution order of a job, from what each of its ranks saw."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def in_execution_order(sequences: Sequence[Sequence[str]], times: Mapping[str, float]) -> list[str]:
    """One order of all points that is that of each rank. `sequences`: each rank's points, each once.

    Where no rank saw two points (stages of a pipeline), the earlier by time comes first. Where two ranks saw them in
    another order (autograd's threads), no order is that of both, and the earlier by time comes first, too.
    """
    before: dict[str, int] = {}
    after: dict[str, list[str]] = {}
    lowest: dict[str, tuple[int, int]] = {}
    for number, sequence in enumerate(sequences):
        for place, point in enumerate(sequence):
            before[point] = before.get(point, 0) + (place > 0)
            lowest.setdefault(point, (number, place))
            if place:
                after.setdefault(sequence[place - 1], []).append(point)

    def priority(point: str) -> tuple[float, tuple[int, int], str]:
        time = times[point]
        # What is no number (a damaged file) sorts last.
        return (time if time == time else float("inf")), lowest[point], point

    waiting = sorted(map(priority, before))
    ready = [entry for entry in waiting if not before[entry[2]]]
    heapq.heapify(ready)
    ordered: dict[str, None] = {}
    for breaker in waiting:
        # Nothing is ready while points remain only where ranks disagree: the earliest of what remains goes on.
        if not ready and breaker[2] not in ordered:
            ready.append(breaker)
        while ready:
            point = heapq.heappop(ready)[2]
            if point in ordered:
                continue
            ordered[point] = None
            for follower in after.get(point, ()):
                before[follower] -= 1
                if not before[follower] and follower not in ordered:
                    heapq.heappush(ready, priority(follower))
    return list(ordered)
