"""Answers that are remembered by what they follow from, where they come again from step to step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

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
