"""How grafter writes files: whole or not at all, or line by line. On a full disk nothing is left behind, and every
error names the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from grafter.core.processes import is_from_signal_handler

TEMPORARY_SUFFIX = ".tmp"
# The most that the system takes in one call.
_MAX_PIECES = 1024


@contextlib.contextmanager
def whole_file(path: str | Path, mode: int = 0o644) -> Iterator[int]:
    """A descriptor to write to; `path` has all that was written once the block ends, and is untouched if it raises.

    Raises OSError, with the path in it, and then leaves no temporary file; the block's own exceptions pass.
    """
    temporary = f"{path}{TEMPORARY_SUFFIX}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and not is_from_signal_handler(error):
            _name_file(error, path)
        raise


def write_whole(path: str | Path, content: str | bytes, mode: int = 0o644) -> None:
    """A file that has all of `content`, text as UTF-8, or is untouched. Raises OSError, with the path in it."""
    with whole_file(path, mode) as descriptor:
        write_pieces(descriptor, [memoryview(content.encode() if isinstance(content, str) else content)])


def write_pieces(descriptor: int, pieces: Sequence[memoryview]) -> None:
    """All of the pieces, one after another. Raises OSError."""
    left = list(pieces)
    # The system writes at most 2 GiB in one call, and less where the disk is nearly full.
    while left:
        written = os.writev(descriptor, left[:_MAX_PIECES])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


class LineFile:
    """A file of lines that one process appends to. What was appended survives a crash of the process."""

    def __init__(self, path: str | Path, *, is_new: bool = False) -> None:
        """is_new: raises FileExistsError where the file is there already."""
        self.path = Path(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_EXCL if is_new else 0)
        self._descriptor = os.open(path, flags, 0o644)
        self._end = os.fstat(self._descriptor).st_size

    def append(self, line: bytes) -> None:
        """A line without its end. Raises OSError, with the path in it, where it cannot be written in full, and then
        takes back what was: half a line would spoil the next one, too. The same where a signal's handler raises."""
        whole = line + b"\n"
        try:
            written = os.write(self._descriptor, whole)
            if written < len(whole):
                write_pieces(self._descriptor, [memoryview(whole)[written:]])
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            if isinstance(error, OSError) and not is_from_signal_handler(error):
                _name_file(error, self.path)
            raise
        self._end += len(whole)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _name_file(error: OSError, path: str | Path) -> None:
    """The file itself, not its temporary name; a write through a descriptor names none. Its text then has it."""
    error.filename, error.filename2 = str(path), None
