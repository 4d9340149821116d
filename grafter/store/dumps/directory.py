"""A role's directory of dumps: which one is meant, which ranks wrote there, and every record that can be read.

lines of each rank            rank<r>.dumps.jsonl
files that no line names      a crash came between file and line: the file's own record is taken
what is wrong                 problems; what only deserves mention: notes
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafter.errors import DumpError
from grafter.store.dumps.record import DumpRecord, Problem
from grafter.store.dumps.record_file import (
    NewerFormat,
    lines_name,
    listed,
    opened,
    read_lines,
    read_record_of_file,
    shown,
)

ROLES = ("baseline", "target")
_RANK_NAME = re.compile(r"rank(0|[1-9][0-9]{0,8})(\.dumps\.jsonl)?")
_LONGEST_RUN_FACTS = 1 << 24


@dataclass
class DumpDirectory:
    """What was found. `records`: of each rank, in its order; no two of one rank have the same `order`."""

    path: Path
    records: dict[int, list[DumpRecord]] = field(default_factory=dict)
    run: dict[str, Any] | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_role_directory(directory: str | os.PathLike[str], role: str | None) -> Path:
    """The role's directory that is meant. Raises DumpError where there is none, or a choice to be made."""
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


def _instead(path: Path, there: list[str]) -> str:
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
    """All records of a role's directory. Raises DumpError where nothing of it can be read."""
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
                f"the records {files[record.file]} and {record.order} name one file, {shown(record.file)}; the first "
                "one counts",
            )
        )
    else:
        records[record.order] = record
        if record.file is not None:
            files[record.file] = record.order


def _look_at_files(found: DumpDirectory, role_rank: int, records: dict[int, DumpRecord], files: dict[str, int]) -> None:
    """Files that no line names are read; files that a line names and that are not there are told."""
    there, others = set(), []
    for name in listed(found.path, f"rank{role_rank}"):
        if name.endswith(".safetensors") and not name.startswith("."):
            there.add(f"rank{role_rank}/{name}")
        else:
            others.append(name)
    if others:
        found.notes.append(
            f"rank{role_rank}/ has {len(others)} files that are no dumps, such as {shown(others[0])}: a write that was "
            "broken off, if its name ends so"
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
                Problem(file, f"no line names it, and it says that it is {shown(str(record.file))}; it is left out")
            )
        else:
            _add(records, files, record, file, found)
    if unnamed:
        found.notes.append(
            f"rank{role_rank}/ has {len(unnamed)} files that no line names, such as {shown(unnamed[0])}: the process "
            "ended between writing the two. What they say of themselves is taken"
        )


def _keep_one_job(found: DumpDirectory) -> None:
    """One directory is one role of one size: what says otherwise than the first record is left out, and told."""
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
                        f"record {record.order} is of a {record.role} of {record.role_world_size} ranks, and others "
                        f"are of a {job[0]} of {job[1]}; two runs were mixed. It is left out",
                    )
                )
        found.records[role_rank] = [r for r in records if (r.role, r.role_world_size) == job]


def _read_run_facts(found: DumpDirectory) -> dict[str, Any] | None:
    if not os.path.lexists(found.path / "run.json"):
        return None
    try:
        with opened(found.path, "run.json") as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            facts = json.loads(file.read(_LONGEST_RUN_FACTS))
    except (DumpError, ValueError, RecursionError) as error:
        found.problems.append(Problem("run.json", f"it cannot be read ({str(error)[:200]})"))
        return None
    if not isinstance(facts, dict):
        found.problems.append(Problem("run.json", "it is no JSON object"))
        return None
    return facts
