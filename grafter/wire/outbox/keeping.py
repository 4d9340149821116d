"""Keeping: what a sender that does not wait offers is snapshotted before anything is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from grafter.core.messages.local_value import LocalValue
from grafter.core.processes import is_from_signal_handler
from grafter.wire.outbox.memory import Slot, offsets_of, snapshot


class OutboxFull(Exception):
    """There is no memory for a snapshot; the text says how much was asked for and how much there is."""


@dataclass(frozen=True)
class Kept:
    """An offer, and where its snapshot lies: nowhere, if it has no bytes, or could not be kept, as it then says."""

    offer: LocalValue
    slot: Slot | None = None
    nbytes: int = 0


def keep(
    offer: LocalValue,
    make_room: Callable[[int], tuple[Slot | None, str | None]],
    give_back: Callable[[Slot | None], None],
) -> Kept:
    """Copy all tensors of an offer, which may be changed once this returns. make_room: memory for so many bytes, or why
    there is none."""
    if offer.leaves is None:
        return Kept(offer)
    tensors, specs = offer.leaves.tensors + offer.extras, offer.specs
    slot, why_not = make_room(offsets_of(specs)[1])
    if why_not is not None:
        return Kept(_failed(offer, OutboxFull(why_not)))
    try:
        if slot is not None:
            with torch.no_grad():
                snapshot(slot, specs, tensors)
    except BaseException as error:
        give_back(slot)
        if not isinstance(error, Exception) or is_from_signal_handler(error):
            raise
        # The device's, say: it costs the point, and all ranks must hear of it.
        return Kept(_failed(offer, error))
    return Kept(offer, slot, sum(spec.nbytes for spec in specs))


def _failed(offer: LocalValue, error: Exception) -> LocalValue:
    return replace(offer, leaves=None, extras_text=None, extras=[], failure=error)
