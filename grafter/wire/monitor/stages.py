"""What a rank does at a point, for the board: the dump thread says it by one assignment, and nobody waits for that."""

from __future__ import annotations

from typing import Literal, Protocol

Stage = Literal[
    "pairing", "sending", "receiving", "transforming", "measuring", "voting", "deciding", "writing", "finishing"
]

_TEXTS: dict[str, str] = {
    "pairing": "describes its part of {}",
    "sending": "sends {}",
    "receiving": "receives {}",
    "transforming": "transforms and checks what it has received for {}",
    "measuring": "computes statistics of {}",
    "voting": "votes on {}",
    "deciding": "waits for the outcome of {}",
    "writing": "copies what it has received into {}",
    "finishing": "finishes {}",
}
# Of waits that are shown before the dump thread has said more.
_WAITS = {"exchange": "waits for the bytes of {}", "agreement": "waits for the outcome of {}"}


class Underway(Protocol):
    """A point that this rank is at. Read on the housekeeping thread, while the dump thread changes `stage`."""

    @property
    def stage(self) -> Stage: ...

    @property
    def point(self) -> object: ...

    @property
    def call_site(self) -> str: ...


def text_of_stage(stage: Stage, point: object) -> str:
    """What follows the rank's name on the board."""
    return _TEXTS[stage].format(point)


def text_of_wait(stage: str, what: object) -> str:
    """The same, of a wait."""
    return _WAITS.get(stage, "waits for {}").format(what)
