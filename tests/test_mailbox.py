"""Mail between ranks of one host: places that one process takes, letters that are taken back."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
from point_parts import roster

from grafter.liveness import own_identity
from grafter.mailbox import RECALL, Mailbox, open_mailbox
from grafter.roster import Roster
from grafter.wire import Seal


class NoEnd:
    def check(self) -> None:
        """A run that nothing ends."""


@pytest.fixture
def boxes() -> Iterator[tuple[Mailbox, Mailbox]]:
    """The mailboxes of baseline rank 0 and target rank 0, both in this process."""
    names = [f"grafter-test-{uuid.uuid4().hex}" for _ in range(2)]
    members = [
        member.model_copy(update={"process": own_identity(), "socket_name": name})
        for member, name in zip(roster(1, 1).all, names, strict=True)
    ]
    everyone = Roster((members[0],), (members[1],))
    both = tuple(
        Mailbox(open_mailbox(name), everyone, Seal(f"{member.role}/0", None))
        for name, member in zip(names, members, strict=True)
    )
    yield both[0], both[1]
    for box in both:
        box.close()


def test_however_many_ask_for_a_taken_place_each_is_told_who_has_it(boxes: tuple[Mailbox, Mailbox]) -> None:
    """Nobody accepts on a place, so each that asks stays in its queue: a short queue would turn the third away."""
    first, second = boxes
    place = uuid.uuid4().hex
    assert first.claim(place) is None
    assert [second.claim(place) for _ in range(20)] == [os.getpid()] * 20


def test_a_place_is_free_once_its_holder_has_closed(boxes: tuple[Mailbox, Mailbox]) -> None:
    first, second = boxes
    place = uuid.uuid4().hex
    assert first.claim(place) is None
    first.close()
    assert second.claim(place) is None


def test_a_letter_to_the_wrong_rank_can_be_taken_back(boxes: tuple[Mailbox, Mailbox]) -> None:
    """A leader that guessed wrong leaves nothing in the other's mailbox."""
    first, second = boxes
    first.send(1, "point/2", "manifest", "{}", NoEnd())
    first.send(1, "point/2", RECALL, "", NoEnd())
    first.send(1, "other/2", "manifest", "kept", NoEnd())
    assert second.look("point/2") is None
    letters = second.wait(["other/2"], NoEnd(), patience=5)
    assert letters is not None
    assert letters[0].payload == "kept"
    assert second.look("point/2") is None


def test_a_letter_that_has_come_is_seen_without_waiting(boxes: tuple[Mailbox, Mailbox]) -> None:
    first, second = boxes
    assert second.look("point/o") is None
    first.send(1, "point/o", "commit", "", NoEnd())
    found = second.look("point/o")
    assert found is not None and found.kind == "commit"
