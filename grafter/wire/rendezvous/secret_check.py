"""Whether the other job has another secret, or none: the two would else wait for each other until the join times out.

What is not signed with this job's secret is ignored, since a stranger may have written it. So the first ranks of both
jobs each leave a number that nobody could have known before, and repeat the other's, which anybody can read. Whoever
finds its number repeated in a message that it cannot trust knows that somebody writes it now. That is the other job, or
a stranger who could overwrite the join's messages as well, and keep the jobs apart that way.
"""

from __future__ import annotations

import json
import os

from grafter.core.messages.roster import other_role
from grafter.core.messages.wire import Sealed
from grafter.core.roles import RoleName
from grafter.errors import ProtocolError, RunError
from grafter.wire.store_client import StoreClient

_LONGEST = 200


class SecretCheck:
    """Of one rank, while it joins. `look` is called on one thread at a time."""

    def __init__(self, role: RoleName, role_rank: int) -> None:
        self._role, self._leads = role, role_rank == 0
        self._number = os.urandom(16).hex()
        self._repeated = ""

    def hail(self, client: StoreClient) -> None:
        """Before anything that the other job could fail to read."""
        if self._leads:
            client.set(_place(client, self._role), "hail", json.dumps([self._number, self._repeated]))

    def look(self, client: StoreClient) -> RunError | None:
        """The error where the secrets differ. A few round trips; never waits."""
        theirs = client.peek_at_other(_place(client, other_role(self._role)))
        if theirs is None:
            return None
        number, repeated = _read(theirs)
        if self._leads and number != self._repeated:
            self._repeated = number
            self.hail(client)
        own = self._number
        if not self._leads:
            first = client.peek(_place(client, self._role))
            own = _read(first)[0] if first is not None else ""
        if not own or repeated != own:
            return None
        return ProtocolError(
            f"the {other_role(self._role)} job has another secret than this one, or only one of the two has any: "
            "neither can read the other's messages. Set GRAFTER_SECRET to the same value in both jobs."
        )


def _place(client: StoreClient, role: RoleName) -> str:
    return f"{client.job_prefix}/hail/{role}"


def _read(message: Sealed) -> tuple[str, str]:
    """(its number, the one that it repeats); empty where it says something else."""
    try:
        number, repeated = json.loads(message.payload)
    except ValueError:
        return "", ""
    if not isinstance(number, str) or not isinstance(repeated, str) or len(number + repeated) > _LONGEST:
        return "", ""
    return number, repeated
