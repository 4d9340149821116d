"""What it costs one rank of two large jobs to decide on a point between two layouts and to plan its part of it.

No processes: the headers of both sides are there as objects, as `Pairing` hands them on. Seconds are processor time of
this thread, since planning waits for nobody and the machine is shared. Python's collector is left on, but does not look
at the headers of all other cases, which no rank would have.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from benchmarks.rounds import Spread, interleaved, spread
from grafter.core.layout.declared import DeclaredLayout
from grafter.core.layout.runs import split_in_order, whole
from grafter.core.leaves import TensorSpec
from grafter.core.messages.manifest import Header, Manifest, Pair, manifest_text
from grafter.core.messages.roster import Announcement, Roster
from grafter.core.plan.decision import decide
from grafter.core.plan.transfer_plan import make_plan
from grafter.core.process_identity import ProcessIdentity
from grafter.core.roles import RoleName

# One global tensor for all: b=1024 s=1024 h=1024 d=128, whose sizes all the meshes divide.
_SIZES = {"b": 1024, "s": 1024, "h": 1024, "d": 128}
LARGEST_WORLD = 1024
_RANKS_PER_HOST = 8
_MANIFESTS = TypeAdapter(tuple[Manifest, Manifest])
# Other programs and threads do not count.
_clock = time.thread_time


@dataclass(frozen=True)
class MeshSide:
    """One job: `dims` of each rank's tensor, and a mesh of two axes, outer first. DTensors say no dims in words."""

    dims: str
    axes: tuple[tuple[str, int], tuple[str, int]]
    is_dtensor: bool = False

    @property
    def world(self) -> int:
        return self.axes[0][1] * self.axes[1][1]

    def __str__(self) -> str:
        if self.is_dtensor:
            return f"DTensor of {self.dims}"
        return self.dims


@dataclass(frozen=True)
class PlanningCase:
    """A sender and a receiver, and in which table it stands: `layouts`, `pieces` or `world`."""

    name: str
    table: str
    sender: MeshSide
    receiver: MeshSide


@dataclass
class PlanningResult:
    """Of one rank in the middle of each job. Pieces: those that this rank sends or receives.

    sender, receiver: seconds of `decide` and `make_plan` together; decision: of `decide` alone. parsing: seconds to
    read both manifests from `message_bytes` of JSON; None where that was not measured.
    """

    name: str
    table: str
    layouts: str
    world: int
    pieces: dict[RoleName, int]
    seconds: dict[RoleName, Spread]
    decision: Spread
    parsing: Spread | None = None
    message_bytes: int = 0

    @property
    def slower_seconds(self) -> Spread:
        """Of the sender or of the receiver, whichever takes longer."""
        return max(self.seconds.values(), key=lambda own: own.median)

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.name,
            "table": self.table,
            "layouts": self.layouts,
            "ranks_per_job": self.world,
            "pieces": self.pieces,
            "median_seconds": {role: own.median for role, own in self.seconds.items()},
            "noise": self.slower_seconds.noise,
            "decision_seconds": self.decision.median,
            "parsing_seconds": self.parsing.median if self.parsing is not None else None,
            "message_bytes": self.message_bytes,
        }


def measure_planning(rounds: int) -> list[PlanningResult]:
    """All cases in every round."""
    cases = [*_layout_cases(), *_piece_cases(), *_world_cases()]
    plannings = {case: _Planning(case) for case in cases}
    measures: dict[str, Callable[[], float]] = {}
    for number, planning in enumerate(plannings.values()):
        measures[f"{number} baseline"] = partial(planning.run, "baseline")
        measures[f"{number} target"] = partial(planning.run, "target")
        if planning.case.table == "layouts":
            measures[f"{number} parsing"] = planning.parse
    gc.collect()
    gc.freeze()
    interleaved(measures, 1)
    for planning in plannings.values():
        planning.decisions.clear()
    seconds = interleaved(measures, rounds)
    gc.unfreeze()
    results = []
    for number, (case, planning) in enumerate(plannings.items()):
        parsed = seconds.get(f"{number} parsing")
        results.append(
            PlanningResult(
                case.name,
                case.table,
                f"{case.sender} -> {case.receiver}",
                case.sender.world,
                planning.pieces,
                {"baseline": spread(seconds[f"{number} baseline"]), "target": spread(seconds[f"{number} target"])},
                spread(planning.decisions),
                spread(parsed) if parsed is not None else None,
                len(planning.text) if parsed is not None else 0,
            )
        )
    return results


@dataclass
class _Planning:
    """One case, with the headers of all ranks, made once."""

    case: PlanningCase
    decisions: list[float] = field(default_factory=list)
    pieces: dict[RoleName, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        headers = [_headers("baseline", self.case.sender), _headers("target", self.case.receiver)]
        self._manifests = [Manifest(role=own[0].role, headers=tuple(own)) for own in headers]
        self._roster = _roster(self.case.sender.world, self.case.receiver.world)

    @property
    def text(self) -> str:
        """Both manifests as they travel."""
        parts = [manifest_text(own.role, [header.text for header in own.headers], None) for own in self._manifests]
        return f"[{','.join(parts)}]"

    def run(self, role: RoleName) -> float:
        """What a rank in the middle of its job does with a pair of manifests that it has not seen before."""
        world = (self.case.sender if role == "baseline" else self.case.receiver).world
        me = self._roster.graft_rank(role, world // 2 + 1)
        # What is remembered is remembered with the pair.
        pair = Pair(self._manifests[0], self._manifests[1])
        start = _clock()
        decision = decide("b2t", pair)
        decided = _clock()
        plan = make_plan("0" * 24, "b2t", pair, decision, self._roster, me)
        end = _clock()
        if decision.outcome is not None or not plan.pieces:
            raise AssertionError(f"{self.case.name}: nothing is planned ({decision.reason})")
        self.decisions.append(decided - start)
        self.pieces[role] = len(plan.pieces)
        return end - start

    def parse(self) -> float:
        text = self.text
        start = _clock()
        Pair(*_MANIFESTS.validate_json(text))
        return _clock() - start


def _layout_cases() -> Iterator[PlanningCase]:
    """What people have: two axes on both sides, in 1024 + 1024 ranks."""
    dp_tp, cp_tp = (("dp", 32), ("tp", 32)), (("cp", 32), ("tp", 32))
    plain = MeshSide("b[dp] s h[tp] d", dp_tp)
    for name, sender, receiver in [
        ("dp x tp to cp x tp", plain, MeshSide("b s[cp] h[tp] d", cp_tp)),
        ("zigzag", plain, MeshSide("b s[cp:zigzag] h[tp] d", cp_tp)),
        ("replicated", MeshSide("b s h[tp] d # dp:replicated", dp_tp), MeshSide("b s[cp] h d # tp:replicated", cp_tp)),
        ("fused, other order", MeshSide("b[dp] s (h*d)[tp]", dp_tp), MeshSide("s[cp] b h[tp] d", cp_tp)),
        ("both axes on one dim", MeshSide("b s h[dp,tp] d", dp_tp), MeshSide("b s[cp] h[tp] d", cp_tp)),
        (
            "DTensors",
            MeshSide("b[dp] s h[tp] d", dp_tp, is_dtensor=True),
            MeshSide("b s[cp] h[tp] d", cp_tp, is_dtensor=True),
        ),
        ("no dim in common", plain, MeshSide("b s[cp] h d[tp]", cp_tp)),
    ]:
        yield PlanningCase(name, "layouts", sender, receiver)


def _piece_cases() -> Iterator[PlanningCase]:
    """One world, more and more pieces: as many as the sender's dp, since a receiver needs something of each."""
    for pieces in (32, 64, 128, 256, 512, 1024):
        yield _crossed(pieces, LARGEST_WORLD, "pieces")


def _world_cases() -> Iterator[PlanningCase]:
    """32 pieces, more and more ranks."""
    for world in (64, 128, 256, 512, LARGEST_WORLD):
        yield _crossed(32, world, "world")


def _crossed(pieces: int, world: int, table: str) -> PlanningCase:
    """Either side cuts one dim `pieces` times that the other has whole, and both cut h alike."""
    tp = ("tp", world // pieces)
    sender = MeshSide("b[dp] s h[tp] d", (("dp", pieces), tp))
    receiver = MeshSide("b s[cp] h[tp] d", (("cp", pieces), tp))
    return PlanningCase(f"{pieces} pieces, {world} + {world} ranks", table, sender, receiver)


# Headers, as a rank of either job would send them.


def _headers(role: RoleName, side: MeshSide) -> list[Header]:
    (outer, outer_size), (inner, inner_size) = side.axes
    participants = tuple(range(side.world))
    cuts, shape = _cuts(side)
    leaf = TensorSpec(path="", shape=shape, dtype="float32", device="cpu")
    said = DeclaredLayout(dims=side.dims)
    headers = []
    for rank in participants:
        place = {outer: rank // inner_size, inner: rank % inner_size}
        headers.append(
            Header(
                role=role,
                role_rank=rank,
                participants=participants,
                direction="b2t",
                call_site="model.py:120",
                leaves=(leaf,),
                structure="tensor",
                layouts=(_dtensor_layout(side, cuts, place) if side.is_dtensor else said,),
                axes=() if side.is_dtensor else ((outer, place[outer], outer_size), (inner, place[inner], inner_size)),
                staging=(1, leaf.nbytes),
            )
        )
    return headers


def _cuts(side: MeshSide) -> tuple[list[str], tuple[int, ...]]:
    """For each dim the axis that cuts it ("": none), and the local shape."""
    sizes = dict(side.axes)
    cuts, shape = [], []
    for word in side.dims.partition("#")[0].split():
        names, _, modifiers = word.partition("[")
        size = 1
        for name in names.strip("()").split("*"):
            size *= _SIZES[name]
        axes = [modifier.partition(":")[0] for modifier in modifiers.rstrip("]").split(",") if modifier]
        for axis in axes:
            size //= sizes[axis]
        cuts.append(axes[0] if axes else "")
        shape.append(size)
    return cuts, tuple(shape)


def _dtensor_layout(side: MeshSide, cuts: Sequence[str], place: dict[str, int]) -> DeclaredLayout:
    """What `read_dtensor` says of `Shard` on the dims that are cut; a real mesh of this size needs a real world."""
    sizes = dict(side.axes)
    runs = []
    for size, axis in zip(_SIZES.values(), cuts, strict=True):
        parts = sizes.get(axis, 1)
        runs.append(split_in_order(whole(size), [size // parts] * parts)[place.get(axis, 0)])
    return DeclaredLayout(
        global_shape=tuple(_SIZES.values()), runs=tuple(runs), place=tuple(place.values()), mesh="0123456789abcdef"
    )


def _roster(baseline: int, target: int) -> Roster:
    def side(role: RoleName, size: int) -> tuple[Announcement, ...]:
        return tuple(_announcement(role, rank, size) for rank in range(size))

    return Roster(side("baseline", baseline), side("target", target))


def _announcement(role: RoleName, rank: int, size: int) -> Announcement:
    host = f"{role} host {rank // _RANKS_PER_HOST}"
    return Announcement(
        protocol_version=1,
        grafter_version="0",
        role=role,
        role_rank=rank,
        role_world_size=size,
        process=ProcessIdentity(host=host, hostname=host, uid=0, pid=100 + rank, start_time=1),
        restart_count=0,
        shared_settings={},
        expected_world_sizes={},
    )
