"""What a server is asked, and what it is made to answer, so that another program can be given the same tokens.

A system prompt is shared by most; `follow-up` goes on where `first` ended, as the next turn of a conversation does.
"""

from __future__ import annotations

from dataclasses import dataclass

from common import VOCAB


@dataclass(frozen=True)
class Conversation:
    """Token ids. The answer is forced: whatever the model would have said, these are the tokens that go on."""

    name: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer


def _text(first: int, count: int) -> tuple[int, ...]:
    return tuple((first + 37 * place) % VOCAB for place in range(count))


SYSTEM_PROMPT = _text(1, 12)
FIRST = Conversation("first", SYSTEM_PROMPT + _text(100, 5), _text(110, 8))
CONVERSATIONS = (
    FIRST,
    Conversation("stranger", _text(200, 9), _text(210, 14)),
    Conversation("second", SYSTEM_PROMPT + _text(300, 3), _text(310, 9)),
    Conversation("long", _text(400, 30), _text(440, 6)),
    Conversation("follow-up", FIRST.tokens + _text(450, 6), _text(460, 4)),
    Conversation("third", SYSTEM_PROMPT + _text(470, 9), _text(490, 5)),
)


def of_session(number: int) -> list[Conversation]:
    """The same conversations under ids of their own, since a server never gives one id to two requests."""
    return [Conversation(f"{number}/{one.name}", one.prompt, one.answer) for one in CONVERSATIONS]
