"""What lies in the store: sealed values, each naming the run, its own key, its writer and its kind.

A sealed value is text: `<mac> <kind> <writer> <run id> <store key>`, a newline, and the payload (JSON). With a shared
secret, the mac is HMAC-SHA256 over all the rest; an unsigned or foreign value is refused. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from grafter.errors import ProtocolError

PROTOCOL_VERSION = 1
_UNSIGNED = "-"


@dataclass(frozen=True)
class Sealed:
    kind: str
    writer: str
    payload: str


class Seal:
    """Seals and opens values of one run. `writer` is this process, such as `baseline/0`."""

    def __init__(self, writer: str, secret: str | None) -> None:
        self._writer = writer.replace(" ", "_")
        self._secret = secret.encode() if secret else None
        self.run_id = _UNSIGNED

    def _mac(self, text: str) -> str:
        if self._secret is None:
            return _UNSIGNED
        return hmac.digest(self._secret, text.encode(), hashlib.sha256).hex()

    def seal(self, key: str, kind: str, payload: str) -> str:
        text = f"{kind} {self._writer} {self.run_id} {key}\n{payload}"
        return f"{self._mac(text)} {text}"

    def open(self, key: str, value: bytes) -> Sealed:
        """Check and unpack one value; raises ProtocolError, naming the key and what is wrong with it."""
        if not value:
            raise ProtocolError(
                f"the store holds an empty value under {key!r}: it was deleted while it was still needed. "
                f"Another program may be using this store; give the pair a master port or a group_name of its own."
            )
        try:
            text = value.decode()
            mac, signed = text.split(" ", 1)
            header, payload = signed.split("\n", 1)
            kind, writer, run_id, written_key = header.split(" ", 3)
        except ValueError:
            raise ProtocolError(
                f"what lies in the store under {key!r} was not written by grafter (it starts with {value[:40]!r}). "
                f"Another program may be using this master port."
            ) from None
        if self._secret is not None and not hmac.compare_digest(mac, self._mac(signed)):
            raise ProtocolError(
                f"the value under {key!r} (it says: written by {writer}) is unsigned or signed with another secret. "
                f"Set GRAFTER_SECRET to the same value in both jobs."
            )
        if self._secret is None and mac != _UNSIGNED:
            raise ProtocolError(
                f"{writer} signs its messages, and this process has no secret. Set GRAFTER_SECRET here."
            )
        if written_key != key or (run_id != self.run_id and _UNSIGNED not in (run_id, self.run_id)):
            raise ProtocolError(
                f"the value under {key!r} was written for {written_key!r} of run {run_id}, and this is run "
                f"{self.run_id}: it is a leftover or a copy of another run. Use a fresh master port."
            )
        return Sealed(kind, writer, payload)
