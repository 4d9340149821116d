"""Claims: the receivers' leader takes an entry up, and says how it ended. Whoever changes its state first decides."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from pydantic import TypeAdapter

from grafter.core.messages.manifest import StoreKeys, store_keys
from grafter.core.messages.states import CLAIMED, NotMet, receivers_account
from grafter.core.messages.wire import Sealed, read_message
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")

_GRAFT_RANKS = TypeAdapter(list[int])


class Claims:
    """One per rank; used by its dump thread, where it leads the receivers of a point."""

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        self._held: dict[str, Sealed] = {}

    def claim(self, keys: StoreKeys, digest: str, posted: Sealed, receivers: Sequence[int]) -> NotMet | None:
        """None: the entry stays where it is until `settle`. Else what became of it.

        posted: its state as it was posted (`open_state`). receivers: graft ranks.
        """
        text = json.dumps(list(receivers))
        found = self._client.exchange(keys.state, posted, CLAIMED, text)
        if found == posted:
            # The state is deleted once all senders have dropped the entry: this rank was held up since it looked.
            return NotMet("missed", "the sender's entry went while the receivers were held up")
        if found is not None:
            return receivers_account(found.kind, found.payload)
        self._held[digest] = Sealed(CLAIMED, self._client.seal.writer, text)
        return None

    def settle(self, digest: str, state: str, reason: str | None) -> None:
        """All receivers are done with an entry that this rank has claimed; of any other, nothing happens."""
        mine = self._held.pop(digest, None)
        if mine is None:
            return
        place = store_keys(self._client.run_prefix, digest).state
        found = self._client.exchange(place, mine, state, reason or "")
        if found is not None:
            logger.warning("grafter: an entry is %s here, and its senders say that it is %s", state, found.kind)


def claimers(payload: str) -> list[int]:
    """The graft ranks of the receivers that a claim names. Raises ProtocolError."""
    return read_message(_GRAFT_RANKS.validate_json, payload, "a claim")
