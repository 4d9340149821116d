"""A cache within bounds: memory must not grow in a program whose values never repeat."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")

# A point's header takes some 500 bytes; only one of a large pytree, or of a list of tokens, takes more.
_LONG_BYTES = 4096


def cost(text: str, headers: int = 1) -> int:
    """The bytes that a text of so many headers counts for; 0 if they are short, when their number is bound enough."""
    return len(text) if len(text) > _LONG_BYTES * headers else 0


class BoundedMemory(dict[_Key, _Value]):
    """A dict that is emptied when one more entry would exceed a number of entries or of bytes."""

    def __init__(self, most: int, most_bytes: int = sys.maxsize) -> None:
        super().__init__()
        self._most, self._most_bytes = most, most_bytes
        self._bytes = 0

    def remember(self, key: _Key, value: _Value, nbytes: int = 0) -> None:
        """Keep an entry, unless it alone exceeds the bound.

        nbytes: a measure of its size; 0 where the number of entries is bound enough (see `cost`).
        """
        if len(self) >= self._most or self._bytes + nbytes > self._most_bytes:
            self.clear()
            self._bytes = 0
        if nbytes <= self._most_bytes:
            self[key] = value
            self._bytes += nbytes

    def answer(self, key: _Key, compute: Callable[[], _Value]) -> _Value:
        """The value of `key`, computed if it is not known. key: everything that the value follows from."""
        known = self.get(key)
        if known is None:
            known = compute()
            self.remember(key, known)
        return known
