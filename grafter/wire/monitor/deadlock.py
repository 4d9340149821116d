"""Who can never go on: the check for mutual waits, as a pure function over the state board.

Sound: a rank is called stuck only if no order of events could free it. Not complete: a rank that hangs in its own
job's collectives looks as if it ran, and then only the timeout tells.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from grafter.errors import PairingError, PeerLostError, RunError
from grafter.wire.monitor.hints import find_hints
from grafter.wire.monitor.status_board import BoardLine

_SKIP_THEM = (
    "Where it is right that one job comes to points that the other does not (another routing of experts, say), set "
    "GRAFTER_ONE_SIDED=skip in both jobs (`grafter run --set one_sided=skip`): such points are then skipped and listed."
)


def find_stuck(lines: Sequence[BoardLine], gone: Collection[int] = ()) -> list[BoardLine]:
    """The waiting ranks that can never go on. `gone`: graft ranks whose process has ended.

    A waiting rank may run once every participant that is still missing may: on its own side, and on the other side,
    where those who have come to the same point say who must still come; where nobody has, anyone there still may. A
    point that does not wait for the other side needs its own alone.
    """
    gone_ranks = set(gone) | {line.graft_rank for line in lines if line.state == "left"}
    waiting = [line for line in lines if line.state == "waiting" and line.graft_rank not in gone_ranks]
    may_run = {line.graft_rank for line in lines if line.state == "running"} - gone_ranks
    at_point: dict[str, set[int]] = {}
    for line in waiting:
        at_point.setdefault(line.digest, set()).add(line.graft_rank)

    declared = {line.graft_rank: line.participants for line in waiting}

    def can_come(line: BoardLine) -> bool:
        here = at_point[line.digest]
        # A rank of the own side that is here with other participants in mind does not wait for this rank.
        for rank in line.participants:
            if rank not in may_run and not (rank in here and declared[rank] == line.participants):
                return False
        if line.own_side:
            return True
        others_here = [other for other in waiting if other.role != line.role and other.digest == line.digest]
        if others_here:
            return all(rank in here or rank in may_run for other in others_here for rank in other.participants)
        return any(other.graft_rank in may_run for other in lines if other.role != line.role)

    while True:
        freed = {line.graft_rank for line in waiting if line.graft_rank not in may_run and can_come(line)}
        if not freed:
            return [line for line in waiting if line.graft_rank not in may_run]
        may_run |= freed


def same_state(first: Sequence[BoardLine], second: Sequence[BoardLine]) -> bool:
    """Whether nothing moved between two readings of the board."""
    return [line.sequence for line in first] == [line.sequence for line in second]


def explain_stuck(
    stuck: Sequence[BoardLine], gone: dict[int, str], board: str, lines: Sequence[BoardLine] = ()
) -> RunError:
    """The error that every rank raises. `gone`: graft rank -> how its process ended, without those that left in good
    order. lines: the whole board."""
    points = sorted({f"{line.role} waits for {line.point}" for line in stuck})
    if gone:
        return PeerLostError(
            "a process of the run is gone, and other ranks wait for it.\n"
            f"{board}\n"
            "Look at the end of that process's output first: the cause is there."
        )
    conflict = find_conflict(stuck)
    if conflict is not None:
        return PairingError(f"{conflict}\n{board}")
    has_points = any(line.last_points for line in (*lines, *stuck))
    recorded = [line for line in lines if line.played_from is not None]
    if recorded:
        return _explain_recording(recorded, points, board, has_points)
    compare = (
        "Compare the two lists of last points. Where they first differ, one job dumps a point that the other does not "
        "(another name, another tag, another count, one more step). "
        if has_points
        else ""
    )
    return PairingError(
        "the two jobs ask for different points. Every rank is now waiting, so these points can never be paired: "
        f"{'; '.join(points[:4])}{'; ...' if len(points) > 4 else ''}.\n"
        f"{board}\n"
        f"{_hints(lines)}{compare}Make the two programs dump the same points in the same order, or narrow the filters "
        f"to points that both have. {_SKIP_THEM}"
    )


def _hints(lines: Sequence[BoardLine]) -> str:
    return "".join(f"{hint}\n" for hint in find_hints(lines))


def _explain_recording(
    recorded: Sequence[BoardLine], points: Sequence[str], board: str, has_points: bool
) -> PairingError:
    """One of the two jobs cannot be changed: it is a recording."""
    first = max(recorded, key=lambda line: (line.played_from and line.played_from.last_step) or 0)
    waits = f"{'; '.join(points[:4])}{'; ...' if len(points) > 4 else ''}"
    if all(line.state == "left" for line in recorded) and first.played_from is not None:
        head = f"the {first.role} is a recording, and {first.played_from.end}: {waits}."
    else:
        head = (
            f"the {first.role} is a recording, and this job asks for points that it lacks, or asks in another order: "
            f"{waits}."
        )
    compare = (
        "Compare the two lists of last points. Where they first differ, this job dumps a point that the recording "
        "lacks (another name, another tag, another count, one more step), or leaves one out. "
        if has_points
        else ""
    )
    return PairingError(
        f"{head}\n{board}\n"
        f"{compare}A point that the filters of the recording did not match is not in it. Narrow the filters to points "
        f"that it has, or record again. {_SKIP_THEM}"
    )


def find_conflict(stuck: Sequence[BoardLine]) -> str | None:
    """Whether ranks of one job wait at one point with other participants in mind; the sentence says so."""
    for first in stuck:
        for second in stuck:
            if (first.role, first.digest) == (second.role, second.digest) and first.participants != second.participants:
                return (
                    f"ranks of one job declare different participants for {first.point}: {first.who} (at "
                    f"{first.call_site}) and {second.who} (at {second.call_site}). Give the same `ranks=` on all ranks "
                    "that share a point, and another tag (such as `pp_stage=...`) to ranks that do not share it."
                )
    return None
