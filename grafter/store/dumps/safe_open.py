"""Files below a role's directory, opened so that a name or a link can lead nowhere else, and a pipe cannot block.

The directory itself is the user's word and may be a link. What lies in it is not trusted: no part of a path is followed
if it is a link, and what was opened is then looked at, not what a name stood for a moment before.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grafter.errors import DumpError

_FILE = re.compile(r"rank(?P<rank>0|[1-9][0-9]{0,8})/(?P<name>[^/\0]+\.safetensors)")
_NOTHING_FOLLOWED = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST_SHOWN = 120


def rank_of_file(file: str) -> int | None:
    """The rank below which a record's `file` lies; None where it is no path of the format."""
    found = _FILE.fullmatch(file)
    if found is None or found["name"].startswith("."):
        return None
    return int(found["rank"])


@contextmanager
def opened(directory: Path, relative: str) -> Iterator[int]:
    """A descriptor of a plain file below `directory`, closed at the end. Raises DumpError for anything else."""
    where = f"{directory}/{shown(relative)}"
    parts = relative.split("/")
    if not all(parts) or any(part in (".", "..") or "\0" in part for part in parts):
        raise DumpError(f"{where}: this is no path inside of the directory; nothing outside of it is read.")
    held: list[int] = []
    try:
        held.append(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for part in parts[:-1]:
            held.append(os.open(part, _NOTHING_FOLLOWED | os.O_DIRECTORY, dir_fd=held[-1]))
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        held.append(os.open(parts[-1], _NOTHING_FOLLOWED | os.O_NONBLOCK, dir_fd=held[-1]))
        if not stat.S_ISREG(os.fstat(held[-1]).st_mode):
            raise DumpError(f"{where}: this is no plain file, and dumps are plain files.")
        yield held[-1]
    except (OSError, ValueError) as error:
        raise DumpError(f"{where}: {_why(error)}") from error
    finally:
        for descriptor in reversed(held):
            os.close(descriptor)


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file. It was moved or deleted, or the directory was copied in part."
    if isinstance(error, OSError) and error.errno in (40, 62, 20):  # ELOOP on Linux and macOS, ENOTDIR
        return (
            "it, or the directory it lies in, is a symbolic link or no directory; dumps are plain files in plain ones."
        )
    return f"it cannot be read: {error.strerror if isinstance(error, OSError) else error}."


def listed(directory: Path, relative: str) -> list[str]:
    """The names in a directory below `directory`, sorted; none where it is a link or no directory."""
    try:
        outer = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        inner = os.open(relative, _NOTHING_FOLLOWED | os.O_DIRECTORY, dir_fd=outer)
    except OSError:
        return []
    finally:
        os.close(outer)
    try:
        return sorted(os.listdir(inner))
    finally:
        os.close(inner)


def shown(text: str) -> str:
    """A name from a file, as a message may show it."""
    if len(text) <= _LONGEST_SHOWN and text.isprintable():
        return text
    plain = "".join(character if character.isprintable() else "?" for character in text[: _LONGEST_SHOWN + 1])
    return plain if len(plain) <= _LONGEST_SHOWN else f"{plain[:_LONGEST_SHOWN]}..."
