"""Records read back: a rank's lines, and the record that each file of tensors has of itself."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from grafter.errors import DumpError
from grafter.store.dumps.record import FORMAT_VERSION, METADATA_KEY, DumpRecord, Problem
from grafter.store.dumps.tensor_file import LONGEST_HEADER, TensorFile, read_header

_LONGEST_LINE = LONGEST_HEADER


class NewerFormat(DumpError):
    """A newer grafter wrote the file: no fault of one file, but of this version for all of them."""


class _Version(BaseModel):
    format_version: int


def lines_name(role_rank: int) -> str:
    return f"rank{role_rank}.dumps.jsonl"


def read_lines(directory: Path, role_rank: int, problems: list[Problem]) -> Iterator[DumpRecord]:
    """The records of one rank's lines; what is no record is told in `problems`, and the rest is read.

    Raises DumpError where the file cannot be opened, or where a newer grafter wrote it.
    """
    name = lines_name(role_rank)
    with opened(directory, name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            where = f"{name}:{number}"
            if not line.endswith(b"\n"):
                if len(line) == _LONGEST_LINE:
                    problems.append(Problem(where, f"it is longer than {_LONGEST_LINE} bytes, so the rest is not read"))
                else:
                    problems.append(Problem(where, "it breaks off; the process ended in the middle of it, probably"))
                return
            try:
                yield _read_record(line, f"{directory}/{where}", role_rank)
            except _NoRecord as reason:
                problems.append(Problem(where, str(reason)))


def read_record_of_file(directory: Path, relative: str, role_rank: int) -> DumpRecord:
    """What a file of tensors says of itself. Raises DumpError for a file that is none."""
    with opened(directory, relative) as descriptor:
        return record_in(read_header(descriptor, f"{directory}/{shown(relative)}"), role_rank)


def record_in(file: TensorFile, role_rank: int) -> DumpRecord:
    """Raises DumpError where the file's metadata has no record, or another rank's."""
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        raise DumpError(f"{file.where}: its metadata has no {METADATA_KEY!r}, so it is no dump of grafter.")
    try:
        return _read_record(text.encode(errors="replace"), file.where, role_rank)
    except _NoRecord as reason:
        raise DumpError(f"{file.where}: its metadata is no record: {reason}") from None


class _NoRecord(Exception):
    pass


def _read_record(text: bytes, where: str, role_rank: int) -> DumpRecord:
    try:
        record = DumpRecord.model_validate_json(text)
    except ValidationError as error:
        _check_version(text, where)
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _NoRecord(f"not a record: {f'{shown(place)}: ' if place else ''}{shown(first['msg'])}") from None
    except RecursionError:
        raise _NoRecord("not a record: it is nested too deep") from None
    if record.format_version > FORMAT_VERSION:
        _refuse_version(record.format_version, where)
    _check_record(record, role_rank)
    return record


def _check_version(text: bytes, where: str) -> None:
    try:
        version = _Version.model_validate_json(text).format_version
    except (ValidationError, RecursionError):
        return
    if version > FORMAT_VERSION:
        _refuse_version(version, where)


def _refuse_version(version: int, where: str) -> None:
    raise NewerFormat(
        f"{where}: a newer grafter wrote it, in version {version} of the format, and this one reads up to version "
        f"{FORMAT_VERSION}. Update grafter here."
    )


def _check_record(record: DumpRecord, role_rank: int) -> None:
    """What the types cannot say. What is checked here, the rest of the package takes for granted."""
    if record.role_rank != role_rank:
        raise _NoRecord(f"it is of role rank {record.role_rank}, and stands among those of rank {role_rank}")
    if not 0 <= record.role_rank < record.role_world_size:
        raise _NoRecord(f"role rank {record.role_rank} of {record.role_world_size} ranks is no place")
    if record.order < 0 or record.occurrence < 0 or record.format_version < 1:
        raise _NoRecord("order, occurrence or format_version is below what they count from")
    if record.file is not None and rank_of_file(record.file) != role_rank:
        raise _NoRecord(
            f"its file {shown(record.file)!r} is not of the form rank{role_rank}/<name>.safetensors; nothing else is "
            "opened"
        )
    paths = [leaf.path for leaf in record.leaves]
    if len(set(paths)) != len(paths):
        raise _NoRecord("two of its leaves have one path")
    if any(size < 0 for leaf in record.leaves for size in leaf.shape):
        raise _NoRecord("a leaf has a negative size")


# Files below a role's directory, opened so that a name or a link can lead nowhere else, and a pipe cannot block.
#
# The directory itself is the user's word and may be a link. What lies in it is not trusted: no part of a path is
# followed if it is a link, and what was opened is then looked at, not what a name stood for a moment before.

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
