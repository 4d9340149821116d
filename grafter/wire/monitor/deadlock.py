"""Deadlock: which ranks wait for each other without end, how sure of it one must be, and the error that says so.

The check is sound: a rank is called stuck only if no order of events could free it. It is not complete: a rank that
hangs in its own job's collectives looks like one that runs, and then only the timeout ends the wait.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from grafter.core.messages.roster import Announcement, Roster
from grafter.core.roles import Role
from grafter.errors import PairingError, PeerLostError, RunError
from grafter.wire.monitor.status_board import BoardLine
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

_SKIP_THEM = (
    "Where it is right that one job comes to points that the other does not (another routing of experts, say), set "
    "GRAFTER_ONE_SIDED=skip in both jobs (`grafter run --set one_sided=skip`): such points are then skipped and listed."
)
_NAMES_SHOWN = 8

_ROLES: tuple[Role, ...] = ("baseline", "target")


def find_stuck(lines: Sequence[BoardLine], gone: Collection[int] = ()) -> list[BoardLine]:
    """The lines of the waiting ranks that can never continue. Pure. gone: graft ranks whose process has ended.

    A waiting rank may run again once every participant that is missing may run: those of its own side, and those of the
    other side. Ranks of the other side that wait at the same point name their participants; if none waits there, any
    rank of the other side may still arrive. A point that does not wait for the other side needs only its own.
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
        # A rank of its own side that waits here but declares other participants does not wait for this rank.
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


def find_conflict(stuck: Sequence[BoardLine]) -> str | None:
    """The sentence that says that ranks of one job declare different participants for one point; None if none do."""
    for first in stuck:
        for second in stuck:
            if (first.role, first.digest) == (second.role, second.digest) and first.participants != second.participants:
                return (
                    f"ranks of one job declare different participants for {first.point}: {first.who} (at "
                    f"{first.call_site}) and {second.who} (at {second.call_site}). Give the same `ranks=` on all ranks "
                    "that share a point, and another tag (such as `pp_stage=...`) to ranks that do not share it."
                )
    return None


class DeadlockConfirmation:
    """Confirms that ranks that look stuck are stuck. One per rank, used by its monitor thread.

    Each waiting rank confirms, about twice a second, that it still waits and that nothing has arrived that could end
    its wait. A rank is called stuck once it, and all that are stuck with it, have confirmed twice since this rank
    suspected them. The second confirmation began after the suspicion. What could end one of these waits would have to
    be sent by another of these ranks. If one had sent it before, it would have arrived and been seen.
    """

    def __init__(self, roster: Roster, graft_rank: int) -> None:
        self._roster, self._own = roster, roster.all[graft_rank]
        self._confirmations = 0
        # Graft rank -> (sequence of its line, number of its confirmations) when it was suspected.
        self._suspected: dict[int, tuple[int, int]] = {}

    def confirm_idle(self, client: StoreClient, wait: Wait, sequence: int) -> None:
        """Confirm this rank's own wait, whose line on the board has this sequence, unless something has arrived."""
        if wait.has_news is not None and wait.has_news():
            return
        if any(client.exists(key) for key in wait.awaits):
            return
        if not wait.over:
            self._confirmations += 1
            client.set(_idle_key(client, self._own), "idle", f"{sequence} {self._confirmations}")

    def find_stuck(self, client: StoreClient, lines: Sequence[BoardLine], gone: Mapping[int, str]) -> list[BoardLine]:
        """The lines of the ranks that are certainly stuck; empty if there are none, or while it is not certain."""
        stuck = find_stuck(lines, gone)
        confirmed = {line.graft_rank: self._confirmation(client, line) for line in stuck}
        if not stuck or None in confirmed.values():
            self._suspected = {}
            return []
        known = {rank: found for rank, found in confirmed.items() if found is not None}
        suspected = self._suspected
        if {rank: sequence for rank, (sequence, _) in suspected.items()} != {r: s for r, (s, _) in known.items()}:
            self._suspected = known
            return []
        return stuck if all(count >= suspected[rank][1] + 2 for rank, (_, count) in known.items()) else []

    def _confirmation(self, client: StoreClient, line: BoardLine) -> tuple[int, int] | None:
        """(sequence of the rank's line, how often it has confirmed that wait); None if it has not yet."""
        sealed = client.peek(_idle_key(client, self._roster.all[line.graft_rank]))
        if sealed is None:
            return None
        sequence, _, count = sealed.payload.partition(" ")
        return (line.sequence, int(count)) if int(sequence) == line.sequence else None


def _idle_key(client: StoreClient, member: Announcement) -> str:
    return f"{client.run_prefix}/idle/{member.role}/{member.role_rank}"


def explain_stuck(
    stuck: Sequence[BoardLine], gone: dict[int, str], board: str, lines: Sequence[BoardLine] = ()
) -> RunError:
    """The error that every rank raises. Pure.

    stuck: the lines of at least one rank. gone: graft rank -> how its process ended, without those that left normally.
    board: the board as text. lines: the whole board.
    """
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
    waits = f"{'; '.join(points[:4])}{'; ...' if len(points) > 4 else ''}"
    has_points = any(line.last_points for line in (*lines, *stuck))
    recorded = [line for line in lines if line.played_from is not None]
    if recorded:
        return _explain_recording(recorded, waits, board, has_points)
    hints = "".join(f"{hint}\n" for hint in find_hints(lines))
    compare = (
        "Compare the two lists of last points. Where they first differ, one job dumps a point that the other does not "
        "(another name, another tag, another count, one more step). "
        if has_points
        else ""
    )
    return PairingError(
        "the two jobs ask for different points. Every rank is now waiting, so these points can never be paired: "
        f"{waits}.\n{board}\n"
        f"{hints}{compare}Make the two programs dump the same points in the same order, or narrow the filters "
        f"to points that both have. {_SKIP_THEM}"
    )


def _explain_recording(recorded: Sequence[BoardLine], waits: str, board: str, has_points: bool) -> PairingError:
    """The same where one of the two jobs is a recording, which cannot be changed."""
    first = max(recorded, key=lambda line: (line.played_from and line.played_from.last_step) or 0)
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


def find_hints(lines: Sequence[BoardLine]) -> list[str]:
    """Why the points of both jobs differ, as far as their models say so: sentences. lines: the board, of both jobs."""
    hints = [*_of_models(lines), *_of_passes(lines), *_of_gradients(lines)]
    return [*hints, *(hint for role in _ROLES if (hint := _of_bypassed(role, lines)))]


def _of_models(lines: Sequence[BoardLine]) -> list[str]:
    """Both jobs wait, at points of different models."""
    waiting = [next((ln for ln in lines if ln.role == role and ln.state == "waiting"), None) for role in _ROLES]
    own, other = waiting
    if own is None or other is None:
        return []
    names = [_model_of(line) for line in (own, other)]
    if names[0] == names[1] or not all(name in line.hooks.models for name in names for line in (own, other)):
        return []
    shown = [f"the model {name!r}" if name else "the model with plain names" for name in names]
    return [
        f"Both jobs have several models, and call them in another order: the baseline is in {shown[0]}, and the target "
        f"in {shown[1]}. Points of both cannot meet in one run then. Compare one model in a run: "
        f'--compare "{_filter_for(names[0], names)}" --set step=manual, and then the other: '
        f'--compare "{_filter_for(names[1], names)}" --set step=manual.'
    ]


def _model_of(line: BoardLine) -> str:
    """The model that the line's point belongs to: the text of a point begins with its name, in quotes."""
    named = (model for model in line.hooks.models if model and line.point[1:].startswith(f"{model}."))
    return max(named, key=len, default="")


def _filter_for(name: str, names: Sequence[str]) -> str:
    if name:
        return f"name.startswith('{name}.')"
    return f"not name.startswith('{next(other for other in names if other)}.')"


def _of_passes(lines: Sequence[BoardLine]) -> list[str]:
    """The models of one job have begun more forward passes."""
    passes = {role: max((line.hooks.passes for line in lines if line.role == role), default=0) for role in _ROLES}
    if not all(passes.values()) or passes["baseline"] == passes["target"]:
        return []
    more, less = sorted(_ROLES, key=lambda role: passes[role], reverse=True)
    return [
        f"The {more} has begun {_counted(passes[more])} of its models, the {less} {passes[less]}. If the first ones of "
        f"the {more} only warm it up (profiling, dummy tokens), leave them out: --set {more}_warm_up=N "
        f"(GRAFTER_{more.upper()}_WARM_UP), where N is how many they are."
    ]


def _counted(passes: int) -> str:
    return f"{passes} forward pass{'es' * (passes != 1)}"


def _of_gradients(lines: Sequence[BoardLine]) -> list[str]:
    """A job waits at the gradient of a weight."""
    if not any(line.state == "waiting" and line.call_site.startswith("the parameter ") for line in lines):
        return []
    return [
        "A weight's gradient is a point at each backward pass. If one job accumulates gradients over more backward "
        "passes than the other, take them when the optimizer steps: --set weight_gradients=optimizer_step "
        "(GRAFTER_WEIGHT_GRADIENTS)."
    ]


def _of_bypassed(role: Role, lines: Sequence[BoardLine]) -> str | None:
    """Modules of one job whose hooks did not run."""
    names = list(dict.fromkeys(name for line in lines if line.role == role for name in line.hooks.bypassed))
    if not names:
        return None
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return (
        f"These modules of the {role} have no points, though parts of them were called: "
        f"{', '.join(names[:_NAMES_SHOWN])}{more}. A module that is called as module.forward(...) runs no hooks; "
        "call module(...), or leave these names out of the filters."
    )
