"""A model checker for the commit protocol: it drives the generators that also run, through every order of their steps.

A world is the vote log, the letters, and each receiver's generator. In every state, any receiver may do its next step,
or have an exception arrive before or after that step took effect, or be killed there; a receiver that waits may have
its time run out at any moment. A receiver that is stopped and resumed is one whose next step is long in coming, so
that every such case is among these orders.

Nothing is sampled. Two things keep the number of states small, and leave no end out. A generator's state is what is in
its frames, so histories that lead to one state are explored once. And steps that no other receiver can see (PREPARE,
OPEN, WRITE) are done as soon as they can be: their place among others' steps changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, NamedTuple

from grafter.core import commit_protocol
from grafter.core.commit_protocol import APPEND, EXCUSE, WAKE, YES, Ballot, Course, Outcome, Step, outcome_of

# What a letter says.
DECIDED, GIVE_UP = "decided", "give up"
# What a generator is of: the part of a receiver, or its leaving, also because a step has failed.
_TAKES_PART, _LEFT, _FAILED = "takes part", "left", "failed"
_LOCAL = ("prepare", "open", "write")


class Violation(AssertionError):
    """The steps that led to an end that breaks a promise."""


class Node(NamedTuple):
    """One receiver's place in the protocol: its next step, or its outcome."""

    number: int
    step: Step | None
    outcome: Outcome | None


class Receiver(NamedTuple):
    """has_written: also once it has ended. is_killed: counts as neither."""

    node: Node
    has_opened: bool = False
    has_written: bool = False
    is_killed: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_killed or self.node.step is None


class World(NamedTuple):
    """letters: of each receiver; in the store, `decided` is the one key that all wait for."""

    log: tuple[Ballot, ...]
    letters: tuple[tuple[str, ...], ...]
    decided: bool
    receivers: tuple[Receiver, ...]
    interrupts: int
    kills: int
    lost_logs: int
    failures: int
    # Whether all voted yes and nothing went wrong.
    is_smooth: bool


@dataclass(frozen=True)
class Bounds:
    """How many exceptions may arrive, receivers be killed, logs fail to open, and reads and appends raise an error
    though the log lives, in one run."""

    interrupts: int = 0
    kills: int = 0
    lost_logs: int = 0
    failures: int = 0


Part = Callable[[int, Collection[int]], Course]
Leaving = Callable[[int, Collection[int], str], Course]


class Program:
    """The generators of all receivers. A node is made by running a generator anew up to it."""

    def __init__(self, size: int, take_part: Part, leave: Leaving, leave_failed: Leaving) -> None:
        self._receivers = tuple(range(size))
        self._take_part, self._leaves = take_part, {_LEFT: leave, _FAILED: leave_failed}
        self._nodes: dict[Any, Node] = {}
        self._ways: dict[int, tuple[str, int, tuple[Any, ...]]] = {}
        self._sent: dict[tuple[int, Any], Node] = {}
        self._renamed: dict[tuple[int, tuple[int, ...]], Node] = {}

    def begin(self, role_rank: int) -> Node:
        return self._node(_TAKES_PART, role_rank, ())

    def leave(self, role_rank: int, why: str) -> Node:
        return self._node(why, role_rank, ())

    def send(self, node: Node, result: Any) -> Node:
        known = self._sent.get((node.number, result))
        if known is None:
            part, role_rank, results = self._ways[node.number]
            known = self._sent[node.number, result] = self._node(part, role_rank, (*results, result))
        return known

    def renamed(self, node: Node, names: tuple[int, ...]) -> Node:
        """The same place of another receiver, where each role rank r is called names[r]."""
        known = self._renamed.get((node.number, names))
        if known is None:
            part, role_rank, results = self._ways[node.number]
            known = self._node(part, names[role_rank], tuple(_renamed(result, names) for result in results))
            assert (known.step and known.step.name) == (node.step and node.step.name)
            self._renamed[node.number, names] = known
        return known

    def _node(self, part: str, role_rank: int, results: tuple[Any, ...]) -> Node:
        if part == _TAKES_PART:
            course = self._take_part(role_rank, self._receivers)
        else:
            course = self._leaves[part](role_rank, self._receivers, "it left")
        step, outcome = None, None
        try:
            step = next(course)
            for result in results:
                step = course.send(result)
        except StopIteration as end:
            step, outcome = None, end.value
        key = (part, role_rank, step, outcome, tuple(_frames(course)))
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(len(self._nodes), step, outcome)
            self._ways[node.number] = (part, role_rank, results)
        return node


def _renamed(result: Any, names: tuple[int, ...]) -> Any:
    """What a step has given, where each role rank r is called names[r]."""
    return tuple(Ballot(names[rank], kind) for rank, kind in result) if isinstance(result, tuple) else result


def _frames(course: Any) -> Iterator[Any]:
    """Where a generator is, and what its variables hold, also in those that it yields from."""
    while isinstance(course, GeneratorType) and course.gi_frame is not None:
        frame = course.gi_frame
        yield (course.__qualname__, frame.f_lasti, tuple(sorted((n, repr(v)) for n, v in frame.f_locals.items())))
        course = course.gi_yieldfrom


@dataclass
class Explorer:
    """All ends of one number of receivers. `explore` raises Violation, with the steps, at the first bad one.

    take_part, leave, and leave_failed behind a read or append that has failed: the protocol, or a mutant of it.
    forgets: a log that loses the ballots of whoever has ended. renames: whether receivers' names are left out of
    account. judges_waits: whether a wait that nothing but its timeout ends is bad, unless somebody was killed.
    """

    size: int
    in_store: bool
    bounds: Bounds
    take_part: Part = commit_protocol.take_part
    leave: Leaving = commit_protocol.leave
    leave_failed: Leaving = commit_protocol.leave
    forgets: bool = False
    renames: bool = True
    judges_waits: bool = True
    states: int = 0
    ends: dict[str, int] = field(default_factory=dict)

    def explore(self) -> Explorer:
        self._program = Program(self.size, self.take_part, self.leave, self.leave_failed)
        receivers = tuple(Receiver(self._program.begin(rank)) for rank in range(self.size))
        first = World((), ((),) * self.size, False, receivers, 0, 0, 0, 0, True)
        first = self._sorted(first)
        came_from: dict[World, tuple[World | None, str]] = {first: (None, "")}
        stack = [first]
        while stack:
            world = stack.pop()
            moves = list(self._moves(world))
            if not any(is_progress for _, _, is_progress in moves):
                self._judge(world, bool(moves), came_from)
            for then, what, _ in moves:
                then = self._sorted(then)
                if then not in came_from:
                    came_from[then] = (world, what)
                    stack.append(then)
        self.states = len(came_from)
        return self

    def _sorted(self, world: World) -> World:
        """One world for all that differ in the receivers' names only: the protocol treats all receivers alike."""
        if not self.renames:
            return world
        own = dict(reversed(world.log))
        keys = [
            (r.node.step and r.node.step.name, r.has_written, r.is_killed, r.has_opened, world.letters[rank],
             own.get(rank, 0), r.node.outcome is not None and r.node.outcome.decided_by == rank)
            for rank, r in enumerate(world.receivers)
        ]  # fmt: skip
        order = sorted(range(self.size), key=lambda rank: (str(keys[rank]), world.receivers[rank].node.number))
        if order == list(range(self.size)):
            return world
        names = tuple(order.index(rank) for rank in range(self.size))
        return world._replace(
            log=shortened(_renamed(world.log, names), range(self.size)),
            letters=tuple(world.letters[rank] for rank in order),
            receivers=tuple(
                world.receivers[rank]._replace(node=self._program.renamed(world.receivers[rank].node, names))
                for rank in order
            ),
        )

    def _moves(self, world: World) -> Iterator[tuple[World, str, bool]]:
        """(what comes then, what was done, whether that is bound to happen: no timeout, exception or kill is)"""
        waiting = [rank for rank, receiver in enumerate(world.receivers) if not receiver.is_over]
        local = next((rank for rank in waiting if self._step(world, rank).name in _LOCAL), None)
        for rank in waiting if local is None else [local]:
            yield from self._moves_of(world, rank)

    def _step(self, world: World, rank: int) -> Step:
        step = world.receivers[rank].node.step
        assert step is not None
        return step

    def _moves_of(self, world: World, rank: int) -> Iterator[tuple[World, str, bool]]:
        step = self._step(world, rank)
        effects = list(self._effects(world, rank, step))
        for then, result in effects:
            yield self._went_on(then, rank, result), f"{rank} does {step.name} {step.kind or ''} -> {result}", True
        if step.name == "await":
            yield self._left(world, rank), f"{rank} has waited for too long", False
        if step.name in (APPEND, "read") and world.failures < self.bounds.failures:
            # What was to be appended may be there all the same.
            for then in [world, *(then for then, _ in effects)]:
                then = self._left(then, rank, _FAILED)._replace(failures=world.failures + 1)
                yield then, f"{rank} fails to {step.name} once", False
        if world.kills < self.bounds.kills:
            for then in [world, *self._halves(world, rank, step)]:
                killed = then.receivers[rank]._replace(is_killed=True)
                then = _with(then, rank, killed)._replace(kills=world.kills + 1, is_smooth=False)
                yield then, f"{rank} is killed at {step.name}", False
        if world.interrupts < self.bounds.interrupts:
            after = [then for then, _ in effects]
            for then in [world, *self._halves(world, rank, step), *after]:
                then = self._left(then, rank)._replace(interrupts=world.interrupts + 1)
                yield then, f"{rank} is interrupted at {step.name}", False

    def _effects(self, world: World, rank: int, step: Step) -> Iterator[tuple[World, Any]]:
        """(the world after a step, the step's result), for each result that is possible."""
        if step.name == "prepare":
            yield world, None
            yield world._replace(is_smooth=False), "refused"
        elif step.name == "open":
            receiver = world.receivers[rank]
            yield _with(world, rank, receiver._replace(has_opened=True)), None
            # What is open stays open.
            if world.lost_logs < self.bounds.lost_logs and not receiver.has_opened:
                yield world._replace(lost_logs=world.lost_logs + 1, is_smooth=False), "no log"
        elif step.name == APPEND:
            log = (*world.log, Ballot(rank, step.kind))
            yield world._replace(log=log if self.forgets else shortened(log, range(self.size))), None
        elif step.name == "read":
            yield world, world.log
        elif step.name == "await":
            if self.in_store:
                if world.decided:
                    yield world, None
            elif world.letters[rank]:
                letter = world.letters[rank][0]
                yield self._mailed(world, [rank], None), "asked to" if letter == GIVE_UP else None
        elif step.name == WAKE:
            yield self._woken(world, rank, step, self._others(rank)), None
        elif step.name == EXCUSE:
            yield self._mailed(world, self._others(rank), GIVE_UP), None
        else:
            yield _with(world, rank, world.receivers[rank]._replace(has_written=True)), None

    def _halves(self, world: World, rank: int, step: Step) -> Iterator[World]:
        """A step of several letters may be ended between two of them."""
        if step.name in (WAKE, EXCUSE) and not self.in_store:
            others = self._others(rank)
            for count in range(1, len(others)):
                for some in map(list, itertools.combinations(others, count)):
                    if step.name == WAKE:
                        yield self._woken(world, rank, step, some)
                    else:
                        yield self._mailed(world, some, GIVE_UP)

    def _others(self, rank: int) -> list[int]:
        return [other for other in range(self.size) if other != rank]

    def _woken(self, world: World, rank: int, step: Step, others: list[int]) -> World:
        assert step.outcome is not None
        if self.in_store:
            return world._replace(decided=True)
        return self._mailed(world, others, DECIDED) if step.outcome.decided_by == rank else world

    def _mailed(self, world: World, ranks: list[int], letter: str | None) -> World:
        """None: the first letter is taken out."""
        letters = list(world.letters)
        for rank in ranks:
            if letter is None:
                letters[rank] = letters[rank][1:]
            elif not world.receivers[rank].is_over and letter not in letters[rank]:
                letters[rank] = (*letters[rank], letter)
        return world._replace(letters=tuple(letters))

    def _went_on(self, world: World, rank: int, result: Any) -> World:
        receiver = world.receivers[rank]
        return self._tidied(_with(world, rank, receiver._replace(node=self._program.send(receiver.node, result))), rank)

    def _left(self, world: World, rank: int, why: str = _LEFT) -> World:
        """An exception has arrived: the driver begins to leave."""
        node = self._program.leave(rank, why)
        then = _with(world, rank, world.receivers[rank]._replace(node=node))
        return self._tidied(then._replace(is_smooth=False), rank)

    def _tidied(self, world: World, rank: int) -> World:
        """Nobody reads the letters of a receiver that has ended."""
        if not world.receivers[rank].is_over:
            return world
        if self.forgets:
            world = world._replace(log=tuple(ballot for ballot in world.log if ballot.role_rank != rank))
        letters = tuple(() if other == rank else mail for other, mail in enumerate(world.letters))
        return world._replace(letters=letters)

    def _judge(self, world: World, is_waiting: bool, came_from: dict[World, tuple[World | None, str]]) -> None:
        """At each end, and where nothing but time moves the world on."""
        if is_waiting and not self.judges_waits:
            return
        fault = _fault_of_wait(world) if is_waiting else _fault_of_end(world)
        if fault is not None:
            steps, at = [], world
            while (before := came_from[at])[0] is not None:
                at, what = before[0], before[1]  # type: ignore[assignment]
                steps.append(what)
            raise Violation("\n".join([fault, *reversed(steps)]))
        if not is_waiting:
            live = [receiver for receiver in world.receivers if not receiver.is_killed]
            name = "nobody left" if not live else "written" if live[0].has_written else "refused"
            self.ends[name] = self.ends.get(name, 0) + 1


def shortened(log: tuple[Ballot, ...], receivers: Collection[int]) -> tuple[Ballot, ...]:
    """A log that decides the same, now and whatever is appended: nothing stands behind the ballot that decided, nothing
    but YES before it, and the order of those makes no difference."""
    for end in range(1, len(log) + 1):
        outcome = outcome_of(log[:end], receivers)
        if outcome is not None:
            yes = set(receivers) - {outcome.decided_by} if outcome.is_committed else set()
            return (*(Ballot(rank, YES) for rank in sorted(yes)), log[end - 1])
    return tuple(sorted(set(log)))


def _with(world: World, rank: int, receiver: Receiver) -> World:
    receivers = (*world.receivers[:rank], receiver, *world.receivers[rank + 1 :])
    return world._replace(receivers=receivers)


def _fault_of_wait(world: World) -> str | None:
    """Whoever is killed may leave others waiting until they notice, or their time is up; nothing else may."""
    return "receivers wait for nothing" if not world.kills else None


def _fault_of_end(world: World) -> str | None:
    live = [receiver for receiver in world.receivers if not receiver.is_killed]
    if len({receiver.has_written for receiver in live}) > 1:
        return "some have written, and some have not"
    for receiver in live:
        assert receiver.node.outcome is not None
        if receiver.node.outcome.is_committed != receiver.has_written:
            return "a receiver says another outcome than what it did"
    if world.is_smooth and not all(receiver.has_written for receiver in live):
        return "all voted yes, nothing went wrong, and nobody has written"
    return None
