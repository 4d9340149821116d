"""What is remembered because it mostly comes again, within bounds: where it never does, memory must not grow."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class BoundedMemory(dict[_Key, _Value]):
    """A dict that forgets all of it where one more would go beyond a number of entries or of bytes."""

    def __init__(self, most: int, most_bytes: int) -> None:
        super().__init__()
        self._most, self._most_bytes = most, most_bytes
        self._bytes = 0

    def remember(self, key: _Key, value: _Value, nbytes: int) -> None:
        """nbytes: a measure of what the entry holds. One that is larger than all may be is not kept."""
        if len(self) >= self._most or self._bytes + nbytes > self._most_bytes:
            self.clear()
            self._bytes = 0
        if nbytes <= self._most_bytes:
            self[key] = value
            self._bytes += nbytes
