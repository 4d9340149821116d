"""Channels between the ranks of one host: letters, descriptors, full channels, closed ones, and handlers of signals."""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from channel_parts import Ended, EndedError, NoEnd, connected_channels, in_a_child

from grafter.core.messages.wire import Seal, Sealed
from grafter.core.processes import PeerGone
from grafter.errors import ProtocolError, RunError
from grafter.wire.rendezvous import unread_letters as module
from grafter.wire.rendezvous.channels import LONGEST_MAIL_BYTES, Channels
from grafter.wire.rendezvous.courier import Courier
from grafter.wire.rendezvous.unread_letters import RECALL, UnreadLetters

SMALL = 4608  # the least that Linux gives
LETTER = "x" * 1000


@pytest.fixture
def pair() -> Iterator[tuple[Channels, Channels]]:
    """Those of baseline rank 0 and target rank 0."""
    first, second = connected_channels(1, 1)
    yield first, second
    first.close()
    second.close()


@pytest.fixture
def narrow() -> Iterator[tuple[Channels, Channels]]:
    """The same, where a few letters fill a channel."""
    first, second = connected_channels(1, 1, send_buffer_bytes=SMALL)
    yield first, second
    first.close()
    second.close()


def fill(sender: Channels, receiver: int) -> int:
    """Send until there is no room; how many letters that took."""
    count = 0
    while sender.try_to_send(receiver, f"filling/{count}", "x", LETTER):
        count += 1
    return count


# Letters.


def test_a_letter_to_the_wrong_rank_can_be_taken_back(pair: tuple[Channels, Channels]) -> None:
    """A leader that guessed wrong leaves nothing at the other rank."""
    first, second = pair
    first.send(1, "point/2", "manifest", "{}", NoEnd())
    first.send(1, "point/2", RECALL, "", NoEnd())
    first.send(1, "other/2", "manifest", "kept", NoEnd())
    assert second.look("point/2") is None
    assert second.wait(["other/2"], NoEnd())[0].payload == "kept"
    assert second.look("point/2") is None


def test_a_letter_that_has_come_is_seen_without_waiting(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    assert second.look("point/o") is None
    first.send(1, "point/o", "commit", "", NoEnd())
    assert second.has("point/o")
    found = second.look("point/o")
    assert found is not None and (found.kind, found.writer, found.payload) == ("commit", "baseline/0", "")
    assert not second.has("point/o")


def test_a_short_wait_ends_without_the_letter_and_keeps_others(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    first.send(1, "other", "manifest", "kept", NoEnd())
    assert second.await_shortly(["point"]) is None
    kept = second.await_shortly(["other"])
    assert kept is not None and kept[0].payload == "kept"


def test_letters_of_several_ranks_are_waited_for_together() -> None:
    everyone = connected_channels(2, 2)
    for number in (0, 1, 3):
        everyone[number].send(2, f"vote/{number}", "vote", str(number), NoEnd())
    letters = everyone[2].wait([f"vote/{number}" for number in (3, 0, 1)], NoEnd())
    assert [letter.payload for letter in letters] == ["3", "0", "1"]
    for one in everyone:
        one.close()


def test_a_rank_that_goes_on_writing_keeps_nobody_waiting(pair: tuple[Channels, Channels]) -> None:
    """A short wait ends, a long one learns what ended the run, and a look returns."""
    first, second = pair
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            first.try_to_send(1, "point", "manifest", "{}")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert second.await_shortly(["other"]) is None
        with pytest.raises(EndedError):
            second.wait(["other"], Ended())
        assert second.look("other") is None
    finally:
        is_over.set()
        writer.join()


def test_a_letter_taken_back_while_it_is_waited_for_does_not_count(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    for key, kind, payload in (("a", "x", "1"), ("a", RECALL, ""), ("b", "x", "2")):
        first.send(1, key, kind, payload, NoEnd())
    assert second.await_shortly(["a", "b"]) is None
    first.send(1, "a", "x", "3", NoEnd())
    letters = second.wait(["a", "b"], NoEnd())
    assert [letter.payload for letter in letters] == ["3", "2"]


def test_a_letter_that_is_discarded_before_it_comes_is_dropped_once(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    second.discard("point")
    first.send(1, "point", "x", "dropped", NoEnd())
    assert second.look("point") is None
    first.send(1, "point", "x", "kept", NoEnd())
    found = second.look("point")
    assert found is not None and found.payload == "kept"


def test_the_longest_letter_fits(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    first.send(1, "long", "x", "y" * LONGEST_MAIL_BYTES, NoEnd())
    assert len(second.wait(["long"], NoEnd())[0].payload) == LONGEST_MAIL_BYTES


def test_a_rank_that_signs_as_another_ends_the_run(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    first._seal = Seal("baseline/7", None)
    first.send(1, "point", "vote", "", NoEnd())
    with pytest.raises(ProtocolError, match="baseline rank 0 signs a message to target rank 0 as baseline/7"):
        second.wait(["point"], NoEnd())


def test_a_message_that_is_no_letter_ends_the_run(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    first._channels[1].connection.send(b"garbage")
    with pytest.raises(ProtocolError, match="not written by grafter"):
        second.look("point")


def test_a_message_that_is_too_long_ends_the_run(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    first._channels[1].connection.send(b"x" * (LONGEST_MAIL_BYTES * 2))
    with pytest.raises(ProtocolError, match="too long"):
        second.look("point")


@pytest.mark.parametrize(
    ("limit", "value", "payload"), [("_MOST_LETTERS", 50, ""), ("_MOST_BYTES", 99_000, "x" * 9000)]
)
def test_what_waits_unread_is_bounded(
    pair: tuple[Channels, Channels], monkeypatch: pytest.MonkeyPatch, limit: str, value: int, payload: str
) -> None:
    first, second = pair
    monkeypatch.setattr(module, limit, value)
    with pytest.raises(ProtocolError, match=r"wait at target rank 0 for points that it does not come to"):
        for number in range(60):
            first.send(1, f"point/{number}", "x", payload, NoEnd())
            assert second.look("other") is None
    assert len(second._unread) <= 50


# Full channels.


def test_a_full_channel_is_waited_for_until_it_is_read(pair: tuple[Channels, Channels]) -> None:
    """More letters than the kernel keeps: none is lost, and they come in order."""
    first, second = pair
    keys = [f"point/{number}" for number in range(2000)]
    writer = threading.Thread(target=lambda: [first.send(1, key, "vote", key + LETTER, NoEnd()) for key in keys])
    writer.start()
    letters = second.wait(keys, NoEnd())
    writer.join()
    assert [letter.payload for letter in letters] == [key + LETTER for key in keys]


def test_two_ranks_that_send_at_once_into_full_channels_do_not_block_each_other(
    narrow: tuple[Channels, Channels],
) -> None:
    """Each reads what arrives while it waits for room, before it comes to read anything itself."""
    first, second = narrow
    fill(first, 1)
    fill(second, 0)
    keys = [f"key/{number}" for number in range(300)]
    came: list[int] = []

    def send_and_then_read(own: Channels, other: int) -> None:
        for key in keys:
            own.send(other, key, "x", LETTER, NoEnd())
        came.append(len(own.wait(keys, NoEnd())))

    both = [threading.Thread(target=send_and_then_read, args=given, daemon=True) for given in ((first, 1), (second, 0))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert came == [len(keys)] * 2, "both wait for room"


def test_a_send_into_a_full_channel_ends_with_what_ends_the_run(narrow: tuple[Channels, Channels]) -> None:
    first, _ = narrow
    assert fill(first, 1) > 0
    with pytest.raises(EndedError):
        first.send(1, "one more", "x", LETTER, Ended())


def test_a_rank_that_leaves_while_another_waits_for_room_is_gone(narrow: tuple[Channels, Channels]) -> None:
    first, second = narrow
    fill(first, 1)

    class Leave:
        def check(self) -> None:
            second.close()

    with pytest.raises(PeerGone, match="channel is closed"):
        first.send(1, "one more", "x", LETTER, Leave())


class Keeper:
    """A housekeeping that notes the waits that it is given, and ends them at once."""

    def __init__(self) -> None:
        self.waits: list[Any] = []
        self.ended: list[Any] = []
        self.aborted: RunError | None = None

    def begin(self, wait: Any) -> None:
        self.waits.append(wait)
        self.aborted = RunError(f"waited in vain for {wait.what}")

    def end(self, wait: Any) -> None:
        self.ended.append(wait)

    def check(self) -> None:
        if self.aborted is not None:
            raise self.aborted


def courier_of(one: Channels, keeper: Keeper) -> Courier:
    client: Any = None
    housekeeping: Any = keeper
    return Courier(client, housekeeping, one._roster, 0, one, 7.0)


def test_a_wait_for_room_explains_itself_and_has_a_deadline(narrow: tuple[Channels, Channels]) -> None:
    """The housekeeping thread is told whose channel is full, and by when it must have room."""
    first, _ = narrow
    keeper = Keeper()
    courier = courier_of(first, keeper)
    fill(first, 1)
    with pytest.raises(RunError, match="waited in vain for room in the channel to target rank 0"):
        courier.bring([1], "one more", "x", LETTER, by_mail=True)
    (wait,) = keeper.waits
    assert (wait.stage, wait.timeout, wait.needs) == ("sending", 7.0, frozenset([1]))
    assert keeper.ended == keeper.waits


def test_a_letter_that_has_room_begins_no_wait(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    keeper = Keeper()
    courier_of(first, keeper).bring([1], "point", "x", "y", by_mail=True)
    assert second.look("point") is not None
    assert not keeper.waits


# Closed channels.


def test_a_closed_channel_is_told_each_time(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    first.send(1, "point", "vote", "", NoEnd())
    second.close()
    for _ in range(3):
        with pytest.raises(PeerGone, match="channel is closed"):
            first.send(1, "point", "vote", "", NoEnd())


@pytest.mark.parametrize("with_unread", [True, False])
def test_what_was_sent_before_the_end_is_read_and_then_the_rank_is_gone(
    pair: tuple[Channels, Channels], with_unread: bool
) -> None:
    """Also where it left something unread, for which the kernel resets the connection."""
    first, second = pair
    if with_unread:
        first.send(1, "unread", "x", "", NoEnd())
    second.send(0, "last word", "done", "", NoEnd())
    second.close()
    assert first.wait(["last word"], NoEnd(), [1])[0].kind == "done"
    with pytest.raises(PeerGone) as gone:
        first.wait(["another"], NoEnd(), [1])
    assert gone.value.graft_rank == 1
    with pytest.raises(PeerGone):
        first.look_at(1)


def test_a_rank_that_is_killed_is_gone_at_once(pair: tuple[Channels, Channels]) -> None:
    """The kernel closes the sockets of a process that dies."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    everyone = pair[0]._roster
    with in_a_child(signal.pause) as pid:
        theirs.close()
        first = Channels(0, everyone, Seal("baseline/0", None), {1: ours})
        first.look_at(1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerGone):
            first.wait(["word"], NoEnd(), [1])
    first.close()


def test_only_a_rank_that_still_has_to_write_is_missed() -> None:
    """One that has written and left keeps nobody from waiting for another."""
    everyone = connected_channels(2, 1)
    everyone[0].send(2, "word/0", "done", "", NoEnd())
    everyone[0].close()

    class Late:
        def check(self) -> None:
            with contextlib.suppress(PeerGone):
                everyone[1].send(2, "word/1", "done", "", NoEnd())

    letters = everyone[2].wait(["word/0", "word/1"], Late(), [0, 1])
    assert [letter.writer for letter in letters] == ["baseline/0", "baseline/1"]
    everyone[1].close()
    with pytest.raises(PeerGone) as gone:
        everyone[2].wait(["word/2"], NoEnd(), [1])
    assert gone.value.graft_rank == 1
    everyone[2].close()


def test_a_rank_without_a_channel_is_gone() -> None:
    """Its process ended while the others connected."""
    (lonely,) = [Channels(0, connected_channels(1, 1)[0]._roster, Seal("baseline/0", None), {})]
    with pytest.raises(PeerGone):
        lonely.send(1, "point", "x", "", NoEnd())
    with pytest.raises(PeerGone):
        lonely.wait(["point"], NoEnd(), [1])
    assert lonely.await_shortly(["point"]) is None
    lonely.close()


def test_a_forked_child_that_closes_takes_no_channel_with_it(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    with in_a_child(first.close) as pid:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        first.send(1, "point", "x", "", NoEnd())
        assert second.look("point") is not None


# Descriptors.


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def send_a_file(sender: Channels, receiver: int, key: str, content: bytes = b"") -> None:
    descriptor = os.memfd_create("test")
    os.write(descriptor, content)
    sender.send(receiver, key, "file", "", NoEnd(), descriptor)
    os.close(descriptor)


def test_a_letter_brings_a_descriptor_that_no_program_inherits(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    send_a_file(first, 1, "file", b"content")
    descriptor = second.wait(["file"], NoEnd())[0].descriptor
    assert descriptor is not None
    assert os.pread(descriptor, 10, 0) == b"content"
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    first.send(1, "plain", "x", "", NoEnd())
    assert second.wait(["plain"], NoEnd())[0].descriptor is None


def end_by_closing(first: Channels, second: Channels) -> None:
    second.close()


def end_by_discarding(first: Channels, second: Channels) -> None:
    second.discard("file")
    second.look("nothing")


def end_by_recalling(first: Channels, second: Channels) -> None:
    first.send(1, "file", RECALL, "", NoEnd())
    second.look("nothing")


def end_by_replacing(first: Channels, second: Channels) -> None:
    first.send(1, "file", "x", "", NoEnd())
    second.look("nothing")
    send_a_file(first, 1, "file", b"newer")
    letter = second.look("file")
    assert letter is not None and letter.descriptor is not None
    os.close(letter.descriptor)


@pytest.mark.parametrize("end", [end_by_closing, end_by_discarding, end_by_recalling, end_by_replacing])
@pytest.mark.parametrize("is_early", [True, False], ids=["before it is read", "once it is read"])
def test_the_descriptor_of_a_letter_that_nobody_takes_is_closed(
    end: Callable[[Channels, Channels], None], is_early: bool
) -> None:
    before = open_descriptors()
    first, second = connected_channels(1, 1)
    send_a_file(first, 1, "file")
    if not is_early:
        assert second.has("file")
    end(first, second)
    first.close()
    second.close()
    assert open_descriptors() == before


def test_descriptors_that_nobody_takes_are_bounded(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    before = len(open_descriptors())
    with pytest.raises(ProtocolError, match=r"wait at target rank 0 .* baseline/0, which has sent 4 file descriptors"):
        for number in range(100):
            send_a_file(first, 1, f"file/{number}")
            second.look("other")
    assert len(open_descriptors()) - before <= 4


def test_a_sender_may_have_a_block_of_each_of_many_receivers() -> None:
    """The bound is of each writer's: however many ranks a host has, each may have sent its own."""
    before = open_descriptors()
    letters = UnreadLetters("baseline rank 0")
    for rank in range(200):
        letters.put(f"block/{rank}", Sealed("block", f"target/{rank}", "1 1", os.open("/dev/null", os.O_RDONLY)), 50)
    assert len(letters.by_key) == 200
    letters.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("count", [2, 5])
def test_a_message_with_several_descriptors_ends_the_run_and_leaves_none_open(
    pair: tuple[Channels, Channels], count: int
) -> None:
    first, second = pair
    letter = first._seal.seal("file", "file", "").encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * count))]
    before = open_descriptors()
    first._channels[1].connection.sendmsg([letter], rights)
    with pytest.raises(ProtocolError, match="more file descriptors"):
        second.look("file")
    assert open_descriptors() == before


# The housekeeping thread, and handlers of signals.


def test_another_thread_sees_what_has_come(pair: tuple[Channels, Channels]) -> None:
    first, second = pair
    assert not second.has_news(["point"])
    first.send(1, "point", "x", "", NoEnd())
    assert second.has_news(["point"]), "it is in the socket"
    assert second.look("other") is None
    assert second.has_news(["point"]), "it is among the unread letters"
    assert not second.has_news(["point", "other"])


def test_a_closed_channel_is_no_news(pair: tuple[Channels, Channels]) -> None:
    """It is readable for ever, and ends no wait."""
    first, second = pair
    first.close()
    assert second.look("point") is None
    assert not second.has_news(["point"])


def test_an_interrupt_while_a_letter_is_read_does_not_lose_it(
    pair: tuple[Channels, Channels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it overlooked meanwhile by the thread that looks for news."""
    first, second = pair
    open_letter, interrupts = second._seal.open_letter, [KeyboardInterrupt()]

    def interrupted(letter: bytes) -> Any:
        if interrupts:
            raise interrupts.pop()
        return open_letter(letter)

    monkeypatch.setattr(second._seal, "open_letter", interrupted)
    first.send(1, "point", "x", "kept", NoEnd())
    with pytest.raises(KeyboardInterrupt):
        second.look("point")
    assert second.has_news(["point"])
    found = second.look("point")
    assert found is not None and found.payload == "kept"
    assert not second.has_news(["point"])


class OwnBlockingError(BlockingIOError):
    """What a program's handler raises, of a kind that means something else around a socket."""


@contextlib.contextmanager
def alarm(error: BaseException) -> Iterator[None]:
    """SIGALRM again and again, until it has been handled; its handler raises this."""

    def handle(number: int, frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise error

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


HANDLED = [TimeoutError("mine"), OwnBlockingError("mine"), ConnectionResetError("mine"), RuntimeError("mine")]


@pytest.mark.parametrize("error", HANDLED, ids=lambda error: type(error).__name__)
def test_an_exception_of_the_programs_handler_ends_a_wait_as_it_is(
    pair: tuple[Channels, Channels], error: Exception
) -> None:
    _, second = pair
    with pytest.raises(type(error)) as raised, alarm(error):
        second.wait(["never"], NoEnd(), [0])
    assert raised.value is error


@pytest.mark.parametrize("error", HANDLED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("is_full", [True, False])
def test_an_exception_of_the_programs_handler_ends_a_send_as_it_is(
    narrow: tuple[Channels, Channels], error: Exception, is_full: bool
) -> None:
    """While it waits for room; and between two sends that have room, wherever it strikes."""
    first, second = narrow
    if is_full:
        fill(first, 1)
    with pytest.raises(type(error)) as raised, alarm(error):
        while True:
            first.send(1, "point", "x", LETTER, NoEnd())
            if not is_full:
                second.look("other")
    assert raised.value is error
