"""Mail between ranks of one host: places that one process takes, letters that are taken back."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Iterator

import pytest
from point_parts import roster

from grafter.errors import ProtocolError
from grafter.rendezvous.mailbox import RECALL, Mailbox, open_mailbox
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.wire import Seal
from grafter.watching.liveness import own_identity
from grafter.watching.watch import PeerGone


class NoEnd:
    def check(self) -> None:
        """A run that nothing ends."""


class EndedError(Exception):
    """What ended the run."""


class Ended:
    def check(self) -> None:
        raise EndedError


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
    assert second.wait(["other/2"], NoEnd())[0].payload == "kept"
    assert second.look("point/2") is None


def test_a_letter_that_has_come_is_seen_without_waiting(boxes: tuple[Mailbox, Mailbox]) -> None:
    first, second = boxes
    assert second.look("point/o") is None
    first.send(1, "point/o", "commit", "", NoEnd())
    found = second.look("point/o")
    assert found is not None and found.kind == "commit"


def test_a_short_wait_ends_without_the_letter(boxes: tuple[Mailbox, Mailbox]) -> None:
    """Letters for other points do not end the wait, and are kept."""
    first, second = boxes
    first.send(1, "other", "manifest", "kept", NoEnd())
    assert second.await_shortly(["point"]) is None
    kept = second.await_shortly(["other"])
    assert kept is not None and kept[0].payload == "kept"


def test_a_stranger_that_goes_on_writing_keeps_nobody_waiting(boxes: tuple[Mailbox, Mailbox]) -> None:
    """A short wait ends, a long one hears what ended the run, and a look is over."""
    first, second = boxes
    stranger = os.fork()
    if stranger == 0:
        while True:
            first.send(1, "point", "manifest", "{}", NoEnd())
    try:
        assert second.await_shortly(["point"]) is None
        with pytest.raises(EndedError):
            second.wait(["point"], Ended())
        assert second.look("point") is None
    finally:
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)


def test_a_letter_taken_back_while_it_is_waited_for_does_not_count(boxes: tuple[Mailbox, Mailbox]) -> None:
    first, second = boxes
    for key, kind, payload in (("a", "x", "1"), ("a", RECALL, ""), ("b", "x", "2")):
        first.send(1, key, kind, payload, NoEnd())
    assert second.await_shortly(["a", "b"]) is None
    first.send(1, "a", "x", "3", NoEnd())
    letters = second.wait(["a", "b"], NoEnd())
    assert [letter.payload for letter in letters] == ["3", "2"]


def test_a_full_mailbox_is_waited_for_until_it_is_read(boxes: tuple[Mailbox, Mailbox]) -> None:
    """More letters than the kernel keeps for one mailbox: none is lost, and they come in order."""
    first, second = boxes
    keys = [f"point/{number}" for number in range(2000)]
    writer = threading.Thread(target=lambda: [first.send(1, key, "vote", key, NoEnd()) for key in keys])
    writer.start()
    letters = second.wait(keys, NoEnd())
    writer.join()
    assert [letter.payload for letter in letters] == keys


def test_a_closed_mailbox_is_told_each_time(boxes: tuple[Mailbox, Mailbox]) -> None:
    first, second = boxes
    first.send(1, "point", "vote", "", NoEnd())
    second.close()
    for _ in range(3):
        with pytest.raises(PeerGone, match="mailbox is closed"):
            first.send(1, "point", "vote", "", NoEnd())


def test_a_letter_from_another_process_that_signs_as_a_rank_is_refused(boxes: tuple[Mailbox, Mailbox]) -> None:
    """The kernel says who wrote it. One from a process of the run ends the run; a stranger's is dropped."""
    first, second = boxes
    first._seal = Seal("baseline/7", None)
    first.send(1, "point", "vote", "", NoEnd())
    with pytest.raises(ProtocolError, match="signs as baseline/7"):
        second.wait(["point"], NoEnd())
    child = os.fork()
    if child == 0:
        first._seal = Seal("baseline/0", None)
        first.send(1, "point", "vote", "", NoEnd())
        os._exit(0)
    os.waitpid(child, 0)
    assert second.has_news(["point"])
    assert second.await_shortly(["point"]) is None
