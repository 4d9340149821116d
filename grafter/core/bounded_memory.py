"""What is remembered because it mostly comes again, within bounds: where it never does, memory must not grow."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


# A point's header says some 500 bytes; only a large pytree, or a list of tokens, says more.
_LONG_BYTES = 4096


def cost(text: str, headers: int = 1) -> int:
    """What a text of so many headers counts: nothing where they are short, since their number is bound enough."""
    return len(text) if len(text) > _LONG_BYTES * headers else 0


class BoundedMemory(dict[_Key, _Value]):
    """A dict that forgets all of it where one more would go beyond a number of entries or of bytes."""

    def __init__(self, most: int, most_bytes: int) -> None:
        super().__init__()
        self._most, self._most_bytes = most, most_bytes
        self._bytes = 0

    def remember(self, key: _Key, value: _Value, nbytes: int) -> None:
        """nbytes: a measure of what the entry holds; 0 where its number is bound enough (`cost`). One that is larger
        than all may be is not kept."""
        if len(self) >= self._most or self._bytes + nbytes > self._most_bytes:
            self.clear()
            self._bytes = 0
        if nbytes <= self._most_bytes:
            self[key] = value
            self._bytes += nbytes


# Answers that are remembered by what they follow from, where they come again from step to step.

_Answer = TypeVar("_Answer")


class Remembered(Generic[_Answer]):
    """At most `most` answers. What raises is not remembered."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._answers: dict[Hashable, _Answer] = {}

    def answer(self, key: Hashable, work_out: Callable[[], _Answer]) -> _Answer:
        """key: all that the answer follows from. work_out: called where it was not asked before."""
        known = self._answers.get(key)
        if known is None:
            known = work_out()
            if len(self._answers) >= self._most:
                self._answers.clear()
            self._answers[key] = known
        return known
