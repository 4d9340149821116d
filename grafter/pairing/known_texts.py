"""What came again is not worked out again: manifests and pairs, by the texts that they came as.

Most points say in every step what they said in the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from grafter.pairing.manifest import Header, Manifest, Pair, manifest_text, with_tokens_told_once
from grafter.pairing.mismatch import find_conflict
from grafter.rendezvous.wire import read_message

_MOST_REMEMBERED = 4096
# Those with tokens are long, and others in each step: few are kept, for the next layers.
_MOST_REMEMBERED_WITH_TOKENS = 16
_MANIFESTS = TypeAdapter(tuple[Manifest, Manifest])


def read_header(text: str) -> Header:
    return read_message(Header.model_validate_json, text, "a header")


class KnownTexts:
    """One per rank, used by its dump thread."""

    def __init__(self) -> None:
        self.pairs: dict[str, Pair] = {}
        self._pairs_of_tokens: dict[str, Pair] = {}
        # By the texts of their headers.
        self._manifests: dict[tuple[str, ...], str] = {}
        self._manifests_of_tokens: dict[tuple[str, ...], str] = {}
        self._read_manifests: dict[str, Manifest] = {}

    def collected(self, header: Header, came: Sequence[str]) -> str:
        """The manifest of one role, as text, from its leader's header and the texts of the others."""
        texts = (header.text, *came)
        manifest = self._manifests.get(texts) or self._manifests_of_tokens.get(texts)
        if manifest is None:
            headers, told = [header, *map(read_header, came)], texts
            has_tokens = any(own.tokens is not None for own in headers)
            if has_tokens:
                told = tuple(own.text for own in with_tokens_told_once(headers))
            manifest = manifest_text(header.role, told, find_conflict(headers))
            _remember(self._manifests_of_tokens if has_tokens else self._manifests, texts, manifest, has_tokens)
        return manifest

    def manifest(self, text: str) -> Manifest:
        known = self._read_manifests.get(text)
        if known is None:
            known = read_message(Manifest.model_validate_json, text, "a manifest")
            _remember(self._read_manifests, text, known, known.headers[0].tokens is not None)
        return known

    def pair(self, text: str) -> Pair:
        """Both manifests from `[baseline's,target's]`. The same text gives the same object, with what it remembers."""
        pair = self.pairs.get(text) or self._pairs_of_tokens.get(text)
        if pair is None:
            pair = Pair(*read_message(_MANIFESTS.validate_json, text, "a pair of manifests"))
            self._remember_pair(text, pair)
        return pair

    def pair_with(self, header: Header, theirs: str, text: str) -> Pair:
        """The same of a rank that is alone in its manifest, of which it need not read its own part."""
        pair = self.pairs.get(text) or self._pairs_of_tokens.get(text)
        if pair is None:
            mine = Manifest(role=header.role, headers=(header,))
            other = read_message(Manifest.model_validate_json, theirs, "a manifest")
            pair = Pair(mine, other) if header.role == "baseline" else Pair(other, mine)
            self._remember_pair(text, pair)
        return pair

    def _remember_pair(self, text: str, pair: Pair) -> None:
        has_tokens = any(header.tokens is not None for header in pair.headers)
        _remember(self._pairs_of_tokens if has_tokens else self.pairs, text, pair, has_tokens)


def _remember(known: dict[Any, Any], text: Any, found: Any, has_tokens: bool) -> None:
    if len(known) >= (_MOST_REMEMBERED_WITH_TOKENS if has_tokens else _MOST_REMEMBERED):
        known.clear()
    known[text] = found
