"""What lies in the store: sealed values, each naming the run, its own key, its writer and its kind.

A sealed value is text: `<mac> <kind> <writer> <run id> <store key>`, a newline, and the payload (JSON). With a shared
secret, the mac is HMAC-SHA256 over all the rest. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from grafter.core.messages.ignored import IgnoredValues
from grafter.core.processes import is_from_signal_handler
from grafter.errors import ProtocolError

PROTOCOL_VERSION = 1
Message = TypeVar("Message")
_UNSIGNED = "-"
_FRESH = "Use a fresh master port for each run."


class Sealed(NamedTuple):
    """What one process wrote. A named tuple, since a frozen dataclass costs three times as much to make.

    descriptor: a file descriptor that came with it over a channel. Whoever takes the message closes it.
    """

    kind: str
    writer: str
    payload: str
    descriptor: int | None = None


class Seal:
    """Seals and opens values of one run. `writer` is this process, such as `baseline/0`."""

    def __init__(self, writer: str, secret: str | None) -> None:
        self._writer = writer.replace(" ", "_")
        self._secret = secret.encode() if secret else None
        self.run_id = _UNSIGNED
        # What was found in the store, by any client of this process, and was not written by this run.
        self.ignored = IgnoredValues(self._writer)

    @property
    def has_secret(self) -> bool:
        """Whether it can be told who wrote a value."""
        return self._secret is not None

    @property
    def writer(self) -> str:
        """As which this process signs."""
        return self._writer

    def _mac(self, text: str) -> str:
        if self._secret is None:
            return _UNSIGNED
        return hmac.digest(self._secret, text.encode(), hashlib.sha256).hex()

    def seal(self, key: str, kind: str, payload: str) -> str:
        text = f"{kind} {self._writer} {self.run_id} {key}\n{payload}"
        # Said here, too: every message is sealed, and most runs have no secret.
        return f"{_UNSIGNED} {text}" if self._secret is None else self._signed(text)

    def sealed_as(self, key: str, sealed: Sealed) -> str:
        """The text under a key, whoever wrote it: what an exchange expects there."""
        return self._signed(f"{sealed.kind} {sealed.writer} {self.run_id} {key}\n{sealed.payload}")

    def _signed(self, text: str) -> str:
        return f"{_UNSIGNED if self._secret is None else self._mac(text)} {text}"

    def open(self, key: str, value: bytes) -> Sealed:
        """Check and unpack the value under `key`; raises ProtocolError, naming the key and what is wrong with it."""
        found = self.read(key, value)
        if isinstance(found, str):
            raise ProtocolError(found)
        return found

    def read(self, key: str, value: bytes) -> Sealed | str:
        """The same, or what is wrong with the value."""
        if not value:
            return (
                f"the store holds an empty value under {key!r}: it was deleted while it was still needed. "
                f"Another program may be using this store; give the pair a master port or a group_name of its own."
            )
        found = self._read_message(value)
        if isinstance(found, str):
            return found
        written_key, sealed = found
        if written_key != key:
            return f"the value under {key!r} was written for {written_key!r}: it is a copy. {_FRESH}"
        return sealed

    def unseal(self, value: bytes) -> tuple[str, Sealed]:
        """(the key it was written for, what it holds) of a value that names its own key. Raises ProtocolError."""
        if self._secret is None:
            # Said here, too: every message is opened, and most runs have no secret.
            try:
                header, payload = value.decode().split("\n", 1)
                mac, kind, writer, run_id, key = header.split(" ", 4)
                if run_id == self.run_id and mac == _UNSIGNED:
                    # As `Sealed(...)`, by one call instead of two.
                    return key, tuple.__new__(Sealed, (kind, writer, payload, None))
            except ValueError as error:
                if is_from_signal_handler(error):
                    raise
        found = self._read_message(value)
        if isinstance(found, str):
            raise ProtocolError(found)
        return found

    def _read_message(self, value: bytes) -> tuple[str, Sealed] | str:
        try:
            text = value.decode()
            header, payload = text.split("\n", 1)
            mac, kind, writer, run_id, key = header.split(" ", 4)
        except ValueError as error:
            if is_from_signal_handler(error):
                raise
            return (
                f"a message was not written by grafter (it starts with {value[:40]!r}). Another program may be using "
                f"this master port."
            )
        if self._secret is not None and not hmac.compare_digest(mac.encode(), self._mac(text[len(mac) + 1 :]).encode()):
            return (
                f"a message that says it is from {writer} ({key}) is unsigned or signed with another secret. Set "
                f"GRAFTER_SECRET to the same value in both jobs."
            )
        if self._secret is None and mac != _UNSIGNED:
            return f"{writer} signs its messages, and this process has no secret. Set GRAFTER_SECRET."
        if run_id != self.run_id and _UNSIGNED not in (run_id, self.run_id):
            return f"a message ({key}) is from run {run_id}, and this is run {self.run_id}. {_FRESH}"
        return key, Sealed(kind, writer, payload)


def read_unproven(value: bytes) -> Sealed | None:
    """What a value holds, whoever wrote it; None where it is no message of grafter's. Nothing in it may be trusted."""
    try:
        header, payload = value.decode().split("\n", 1)
        _, kind, writer, _, _ = header.split(" ", 4)
    except ValueError as error:
        if is_from_signal_handler(error):
            raise
        return None
    return Sealed(kind, writer, payload)


def read_message(parse: Callable[[str], Message], text: str, what: str) -> Message:
    """Typed data from a peer's text; raises ProtocolError where it is something else."""
    try:
        return parse(text)
    except ValueError as error:
        if is_from_signal_handler(error):
            raise
        raise ProtocolError(
            f"{what} that came through the store or a channel is not what the protocol allows "
            f"({str(error).splitlines()[0]}): {text[:80]!r}. Both jobs need the same version of "
            f"grafter, and no other program may write there."
        ) from error
