"""A role's directory of dumps: finds it, and reads every record in it.

lines of each rank            rank<r>.dumps.jsonl
files that no line names      the process died between writing the file and its line: the file's own record is used
problems                      what could not be read, or contradicts the rest
notes                         what deserves mention and loses nothing
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafter.core.roles import ROLES
from grafter.errors import DumpError
from grafter.store.dumps.record import DumpRecord, Problem
from grafter.store.dumps.record_file import (
    NewerFormat,
    lines_name,
    listed,
    read_file,
    read_lines,
    read_record_of_file,
    shown,
)

_RANK_NAME = re.compile(r"rank(0|[1-9][0-9]{0,8})(\.dumps\.jsonl)?")
_LONGEST_RUN_FACTS = 1 << 24


@dataclass
class DumpDirectory:
    """The content of a role's directory.

    records: by rank, sorted by `order`, which is unique within a rank. run: the content of run.json, or None.
    """

    path: Path
    records: dict[int, list[DumpRecord]] = field(default_factory=dict)
    run: dict[str, Any] | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_role_directory(directory: str | os.PathLike[str], role: str | None) -> Path:
    """The role's directory, given it or a run's directory. Raises DumpError if there is none, or if both roles fit."""
    path = Path(directory)
    if role is not None and role not in ROLES:
        raise DumpError(f"role={role!r}: a role is baseline or target.")
    if not path.is_dir():
        raise DumpError(f"{path}: there is no such directory. Give a run's directory, or a role's in it.")
    if _rank_numbers(path):
        return path
    there = [name for name in ROLES if (path / name).is_dir() and _rank_numbers(path / name)]
    if role is not None:
        if role not in there:
            raise DumpError(f"{path}: it holds no dumps of the {role}{_instead(path, there)}")
        return path / role
    if len(there) > 1:
        raise DumpError(f"{path}: this run holds dumps of both roles. Choose {path / there[0]} or {path / there[1]}.")
    if not there:
        raise DumpError(f"{path}: it holds no dumps{_instead(path, there)}")
    return path / there[0]


def _rank_numbers(path: Path) -> list[int]:
    try:
        names = os.listdir(path)
    except OSError as error:
        raise DumpError(f"{path}: it cannot be read: {error.strerror}.") from error
    return sorted({int(found[1]) for name in names if (found := _RANK_NAME.fullmatch(name))})


def _instead(path: Path, there: Sequence[str]) -> str:
    if there:
        return f", but of the {there[0]}. To compare two runs, give two directories: grafter compare BASELINE TARGET."
    runs = sorted(
        run.name for run in path.iterdir() if any((run / role).is_dir() and _rank_numbers(run / role) for role in ROLES)
    )
    if runs:
        more = ", ..." if len(runs) > 5 else ""
        return f", but the runs {', '.join(map(shown, runs[:5]))}{more} in it do. Give one of them."
    return ". A run writes them where GRAFTER_DUMP_FILTER matches a point."


def read_directory(path: Path) -> DumpDirectory:
    """All records of a role's directory. Raises DumpError if nothing in it can be read."""
    found = DumpDirectory(path)
    for role_rank in _rank_numbers(path):
        found.records[role_rank] = _read_rank(found, role_rank)
    if not any(found.records.values()) and found.problems:
        listing = "\n    ".join(map(str, found.problems[:10]))
        raise DumpError(f"{path}: nothing in it can be read:\n    {listing}")
    _keep_one_job(found)
    found.run = _read_run_facts(found)
    return found


def _read_rank(found: DumpDirectory, role_rank: int) -> list[DumpRecord]:
    records: dict[int, DumpRecord] = {}
    files: dict[str, int] = {}
    name = lines_name(role_rank)
    if os.path.lexists(found.path / name):
        try:
            for record in read_lines(found.path, role_rank, found.problems):
                _add(records, files, record, name, found)
        except NewerFormat:
            raise
        except DumpError as error:
            found.problems.append(Problem(name, str(error)))
    _look_at_files(found, role_rank, records, files)
    return [records[order] for order in sorted(records)]


def _add(
    records: dict[int, DumpRecord], files: dict[str, int], record: DumpRecord, where: str, found: DumpDirectory
) -> None:
    if record.order in records:
        found.problems.append(
            Problem(where, f"a second record has the order {record.order} ({shown(record.name)}); the first one counts")
        )
    elif record.file is not None and record.file in files:
        found.problems.append(
            Problem(
                where,
                f"the records {files[record.file]} and {record.order} name the same file, {shown(record.file)}; the "
                "first one counts",
            )
        )
    else:
        records[record.order] = record
        if record.file is not None:
            files[record.file] = record.order


def _look_at_files(found: DumpDirectory, role_rank: int, records: dict[int, DumpRecord], files: dict[str, int]) -> None:
    """Read the files that no line names; report the files that a line names and that are missing."""
    there, others = set(), []
    for name in listed(found.path, f"rank{role_rank}"):
        if name.endswith(".safetensors") and not name.startswith("."):
            there.add(f"rank{role_rank}/{name}")
        else:
            others.append(name)
    if others:
        found.notes.append(
            f"rank{role_rank}/ has {len(others)} files that are not dumps, such as {shown(others[0])}: interrupted "
            "writes, if they end in .tmp"
        )
    for file, order in files.items():
        if file not in there:
            found.problems.append(Problem(file, f"record {order} names it, and there is no such file"))
    unnamed = sorted(there - files.keys())
    for file in unnamed:
        try:
            record = read_record_of_file(found.path, file, role_rank)
        except NewerFormat:
            raise
        except DumpError as error:
            found.problems.append(Problem(file, f"no line names it, and {str(error).partition(': ')[2]}"))
            continue
        if record.file != file:
            found.problems.append(
                Problem(file, f"no line names it, and its own record names {shown(str(record.file))}; it is left out")
            )
        else:
            _add(records, files, record, file, found)
    if unnamed:
        found.notes.append(
            f"rank{role_rank}/ has {len(unnamed)} files that no line names, such as {shown(unnamed[0])}: the process "
            "ended before it wrote the lines. The records inside the files are used"
        )


def _keep_one_job(found: DumpDirectory) -> None:
    """Leave out, and report, records of another role or world size than the first record's: two runs were mixed."""
    first = next((record for records in found.records.values() for record in records), None)
    if first is None:
        return
    job = (first.role, first.role_world_size)
    for role_rank, records in found.records.items():
        for record in records:
            if (record.role, record.role_world_size) != job:
                found.problems.append(
                    Problem(
                        lines_name(role_rank),
                        f"record {record.order} belongs to a {record.role} of {record.role_world_size} ranks, the "
                        f"others to a {job[0]} of {job[1]}; two runs were mixed. It is left out",
                    )
                )
        found.records[role_rank] = [r for r in records if (r.role, r.role_world_size) == job]


def _read_run_facts(found: DumpDirectory) -> dict[str, Any] | None:
    if not os.path.lexists(found.path / "run.json"):
        return None
    try:
        facts = json.loads(read_file(found.path, "run.json", _LONGEST_RUN_FACTS))
    except (DumpError, ValueError, RecursionError) as error:
        found.problems.append(Problem("run.json", f"it cannot be read ({str(error)[:200]})"))
        return None
    if not isinstance(facts, dict):
        found.problems.append(Problem("run.json", "it is not a JSON object"))
        return None
    return facts
