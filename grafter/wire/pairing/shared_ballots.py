"""Shared ballots: the votes of one set of receivers of one host, in shared memory that they all append to.

    | digest of the point, 12 bytes | role rank, 2 | kind, 1 | unused, 1 |      one record

A record is one `write` of 16 bytes to a memfd opened with O_APPEND. The kernel appends one at a time, and as the size
divides a page, no record is ever half written. So all readers see the same records in the same order. The memory
outlives every process but the last that has it open: a receiver that dies or is stopped takes no vote with it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

from grafter.core.commit_protocol import Ballot
from grafter.core.processes import is_from_signal_handler

_RECORD = struct.Struct("=12sHBx")
_RECORD_BYTES = _RECORD.size
_LOOK_BYTES = 64 * _RECORD_BYTES
RECLAIMED_BYTES = 1 << 20
# Points that are over, of which a late ballot may still come.
_REMEMBERED = 64


# The same ones come again at every point.
_ballot = lru_cache(maxsize=4096)(Ballot)


def create(name: str) -> int:
    """The descriptor of a new, empty log. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        return _opened_to_append(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def find(pid: int, name: str) -> int | None:
    """A descriptor of the log of this name that another process of this user has made; None if it has made none.

    Raises OSError where that process cannot be looked into: it has ended, belongs to another user, or is undumpable.
    """
    directory = f"/proc/{pid}/fd"
    for entry in os.listdir(directory):
        try:
            if os.readlink(f"{directory}/{entry}") != f"/memfd:{name} (deleted)":
                continue
            fd = _opened_to_append(f"{directory}/{entry}")
        except FileNotFoundError as error:
            if is_from_signal_handler(error):
                raise
            # Closed in the meantime.
            continue
        if _is_log(fd):
            return fd
        os.close(fd)
    return None


def _is_log(fd: int) -> bool:
    """A file may have been given any name; only memory has seals."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        return False
    return os.fstat(fd).st_uid == os.getuid() and bool(seals & fcntl.F_SEAL_SHRINK)


def _opened_to_append(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)


class SharedBallots:
    """One rank's handle of a log: what it has read, by point. Used by its dump thread."""

    def __init__(self, fd: int, role_rank: int, receivers: Sequence[int], *, reclaims: bool) -> None:
        """reclaims: whether this rank gives back what nobody will read again; one of the receivers does."""
        self.fd = fd
        self._role_rank = role_rank
        self._receivers = receivers
        self._position = 0
        self._ballots: defaultdict[bytes, list[Ballot]] = defaultdict(list)
        # The latest points that this rank is done with; of these a late ballot may come.
        self._over: dict[bytes, list[Ballot]] = {}
        self._history = _History(receivers) if reclaims else None
        self._reclaimed = 0

    def append(self, digest: bytes, kind: int) -> None:
        """Raises OSError where the system has no memory."""
        written = os.write(self.fd, _RECORD.pack(digest, self._role_rank, kind))
        if written != _RECORD_BYTES:
            raise OSError(f"{written} of {_RECORD_BYTES} bytes of a vote were written")

    def read(self, digest: bytes) -> Sequence[Ballot]:
        """The ballots of one point, in order. This rank reads each record once."""
        while True:
            records = os.pread(self.fd, _LOOK_BYTES, self._position)
            for point, role_rank, kind in _RECORD.iter_unpack(records):
                if self._history is not None:
                    self._history.add(point, role_rank, self._position)
                # Kind 0: reclaimed, and so of a point that is over.
                if kind:
                    (self._over if point in self._over else self._ballots)[point].append(_ballot(role_rank, kind))
                # One by one: whatever interrupts this, a record is taken twice at most, which changes no outcome.
                self._position += _RECORD_BYTES
            if len(records) < _LOOK_BYTES:
                break
        if self._history is not None and self._position - self._reclaimed > 2 * RECLAIMED_BYTES:
            self._reclaim(self._history.unneeded)
        ballots = self._ballots.get(digest)
        return ballots if ballots is not None else self._over.get(digest, [])

    def has_grown(self) -> bool:
        """Whether there is something that this rank has not read. May be asked from any thread."""
        return os.fstat(self.fd).st_size > self._position

    def forget(self, digest: bytes) -> None:
        """This rank is done with a point."""
        self._over[digest] = self._ballots.pop(digest, [])
        if len(self._over) > _REMEMBERED:
            del self._over[next(iter(self._over))]

    def _reclaim(self, unneeded: int) -> None:
        """Give memory of records back, by the MiB. The file's size grows with each point; what it holds does not."""
        while unneeded - self._reclaimed >= RECLAIMED_BYTES:
            try:
                with mmap.mmap(self.fd, RECLAIMED_BYTES, offset=self._reclaimed) as part:
                    part.madvise(mmap.MADV_REMOVE)
            except OSError as error:
                # It stays as it is, and costs memory.
                if is_from_signal_handler(error):
                    raise
            self._reclaimed += RECLAIMED_BYTES

    def close(self) -> None:
        os.close(self.fd)


class _History:
    """Where each receiver's latest two points begin in the log, by its own records.

    A receiver that appends to a point reads afterwards, before it may leave the point (`commit_protocol`), and it does
    one point at a time. So once it has a record in a next point, it has read everything up to its own records of the
    one before, whatever the order in which others do these points. It goes on reading from there, and never reads
    anything twice. Hence nobody reads what lies before the least of these places of all receivers.
    """

    def __init__(self, receivers: Sequence[int]) -> None:
        self._latest: dict[int, tuple[bytes, int]] = {}
        self._read_up_to = dict.fromkeys(receivers, 0)

    def add(self, point: bytes, role_rank: int, position: int) -> None:
        latest = self._latest.get(role_rank)
        if latest is None or (latest[0] != point and position > latest[1]):
            if latest is not None:
                self._read_up_to[role_rank] = latest[1]
            self._latest[role_rank] = (point, position)

    @property
    def unneeded(self) -> int:
        """How many bytes at the beginning of the log nobody will read."""
        return min(self._read_up_to.values())
