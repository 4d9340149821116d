"""Refusals: manifests for which no point can be, of either side. Each ends the run for all ranks of both jobs."""

from __future__ import annotations

from grafter.core.messages.manifest import Header, Manifest, Pair
from grafter.core.messages.mismatch import two_leaders
from grafter.core.messages.states import GONE, MISSED
from grafter.core.messages.wire import Sealed
from grafter.core.points import PointKey
from grafter.errors import PairingError, ProtocolError
from grafter.wire.monitor.monitor_thread import MonitorThread
from grafter.wire.pairing.known_texts import KnownTexts, read_header
from grafter.wire.store_client import StoreClient


class Refusals:
    """One per rank, used by its dump thread. Each check raises what has ended the run, once it has ended it."""

    def __init__(self, client: StoreClient, monitor: MonitorThread, known: KnownTexts) -> None:
        self._client, self._monitor, self._known = client, monitor, known

    def check_pair(self, key: PointKey, pair: Pair) -> None:
        conflict = pair.baseline.conflict or pair.target.conflict
        if conflict is None and pair.baseline.role == pair.target.role:
            conflict = two_leaders(pair.baseline.headers[0], pair.target.headers[0])
        if conflict is not None:
            self._refuse(key, conflict)
        directions = {header.direction for header in pair.headers}
        if len(directions) != 1:
            error_text = f"the point {key} came with the directions {sorted(directions)}; the two jobs' filters differ."
            raise self._monitor.abort(ProtocolError(error_text), self._client)
        pair.memo["checked"] = True

    def check_own(self, key: PointKey, own: Manifest) -> None:
        if own.conflict is not None:
            self._refuse(key, own.conflict)

    def check_found(self, key: PointKey, header: Header, found: Sealed) -> None:
        """What lies at the meeting place must be the other side's, or tell that an entry of the own side is gone."""
        if found.kind == GONE or found.writer.partition("/")[0] != header.role:
            return
        if found.kind == MISSED:
            other = read_header(found.payload)
        else:
            other = self._known.manifest(found.payload).headers[0]
        self._refuse(key, two_leaders(other, header))

    def _refuse(self, key: PointKey, conflict: str) -> None:
        raise self._monitor.abort(PairingError(f"at the point {key}: {conflict}"), self._client)
