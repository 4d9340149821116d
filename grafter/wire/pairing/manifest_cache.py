"""Manifests and pairs: read once for each text, and checked whether they make a point.

Most points have the same manifests in every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import TypeAdapter

from grafter.core.bounded_memory import BoundedMemory, cost
from grafter.core.messages.manifest import Header, Manifest, Pair, manifest_text, with_tokens_told_once
from grafter.core.messages.mismatch import find_conflict, two_leaders
from grafter.core.messages.states import GONE, MISSED
from grafter.core.messages.wire import Sealed, read_message
from grafter.core.points import PointKey
from grafter.errors import PairingError, ProtocolError
from grafter.wire.monitor.monitor_thread import MonitorThread
from grafter.wire.store_client import StoreClient

_MOST_REMEMBERED = 4096
# Manifests with tokens are long, and differ in each step: few are kept, for the next layers.
_MOST_REMEMBERED_WITH_TOKENS = 16
# The limit for long texts, such as those of large pytrees, whose shapes may differ in each step. The objects that are
# read from a text need at most ten times its memory.
_MOST_REMEMBERED_BYTES = 1 << 22
_MANIFESTS = TypeAdapter(tuple[Manifest, Manifest])


def read_header(text: str) -> Header:
    """A header from its text. Raises ProtocolError."""
    return read_message(Header.model_validate_json, text, "a header")


class ManifestCache:
    """The manifests and pairs that a rank has read or made, by their texts. One per rank, used by its dump thread.

    Its methods raise ProtocolError for a text that is not valid.
    """

    def __init__(self) -> None:
        few, many = _MOST_REMEMBERED_WITH_TOKENS, _MOST_REMEMBERED
        self._pairs: BoundedMemory[str, Pair] = BoundedMemory(many, _MOST_REMEMBERED_BYTES)
        self._pairs_of_tokens: BoundedMemory[str, Pair] = BoundedMemory(few, _MOST_REMEMBERED_BYTES)
        # By the texts of their headers.
        self._manifests: BoundedMemory[tuple[str, ...], str] = BoundedMemory(many, _MOST_REMEMBERED_BYTES)
        self._manifests_of_tokens: BoundedMemory[tuple[str, ...], str] = BoundedMemory(few, _MOST_REMEMBERED_BYTES)
        self._read_manifests: BoundedMemory[str, Manifest] = BoundedMemory(many, _MOST_REMEMBERED_BYTES)
        self._read_manifests_of_tokens: BoundedMemory[str, Manifest] = BoundedMemory(few, _MOST_REMEMBERED_BYTES)

    def collected(self, header: Header, came: Sequence[str]) -> str:
        """The manifest of one role, as text, from its leader's header and the texts of the other headers."""
        texts = (header.text, *came)
        manifest = self._manifests.get(texts) or self._manifests_of_tokens.get(texts)
        if manifest is None:
            headers, own_texts = [header, *map(read_header, came)], texts
            has_tokens = any(own.tokens is not None for own in headers)
            if has_tokens:
                own_texts = tuple(own.text for own in with_tokens_told_once(headers))
            manifest = manifest_text(header.role, own_texts, find_conflict(headers))
            known = self._manifests_of_tokens if has_tokens else self._manifests
            known.remember(texts, manifest, cost(manifest, len(texts)))
        return manifest

    def manifest(self, text: str) -> Manifest:
        """A manifest from its text."""
        found = self._read_manifests.get(text) or self._read_manifests_of_tokens.get(text)
        if found is None:
            found = read_message(Manifest.model_validate_json, text, "a manifest")
            has_tokens = found.headers[0].tokens is not None
            known = self._read_manifests_of_tokens if has_tokens else self._read_manifests
            known.remember(text, found, cost(text, len(found.headers)))
        return found

    def pair(self, text: str) -> Pair:
        """Both manifests from `[baseline's,target's]`. The same text gives the same object, with its memo."""
        pair = self._pairs.get(text) or self._pairs_of_tokens.get(text)
        if pair is None:
            pair = Pair(*read_message(_MANIFESTS.validate_json, text, "a pair of manifests"))
            self._remember_pair(text, pair)
        return pair

    def pair_with(self, header: Header, theirs: str, text: str) -> Pair:
        """The same for a rank that is alone in its manifest, so that it need not read its own part."""
        pair = self._pairs.get(text) or self._pairs_of_tokens.get(text)
        if pair is None:
            mine = Manifest(role=header.role, headers=(header,))
            other = read_message(Manifest.model_validate_json, theirs, "a manifest")
            pair = Pair(mine, other) if header.role == "baseline" else Pair(other, mine)
            self._remember_pair(text, pair)
        return pair

    def _remember_pair(self, text: str, pair: Pair) -> None:
        has_tokens = any(header.tokens is not None for header in pair.headers)
        known = self._pairs_of_tokens if has_tokens else self._pairs
        known.remember(text, pair, cost(text, len(pair.headers)))


class ManifestChecks:
    """The checks whether manifests make a point. One per rank, used by its dump thread.

    A check that fails ends the run for all ranks of both jobs, and raises the error.
    """

    def __init__(self, client: StoreClient, monitor: MonitorThread, cache: ManifestCache) -> None:
        self._client, self._monitor, self._cache = client, monitor, cache

    def check_pair(self, key: PointKey, pair: Pair) -> None:
        """Both manifests are consistent, and of one direction."""
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
        """The headers of this side fit together."""
        if own.conflict is not None:
            self._refuse(key, own.conflict)

    def check_found(self, key: PointKey, header: Header, found: Sealed) -> None:
        """What is under the key of the rendezvous must be of the other side, or the tombstone of an own entry."""
        if found.kind == GONE or found.writer.partition("/")[0] != header.role:
            return
        if found.kind == MISSED:
            other = read_header(found.payload)
        else:
            other = self._cache.manifest(found.payload).headers[0]
        self._refuse(key, two_leaders(other, header))

    def _refuse(self, key: PointKey, conflict: str) -> None:
        raise self._monitor.abort(PairingError(f"at the point {key}: {conflict}"), self._client)
