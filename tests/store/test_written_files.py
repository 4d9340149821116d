"""Files that grafter writes: whole or untouched, line by line or not, and on a full disk with the path in the error."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import small_files
from report_parts import record, summary

import grafter
from grafter.analysis.report import writing
from grafter.capture.module_tree import ModuleNode, ModuleTree, write_trees
from grafter.cli import plan_suggest as plan_suggest
from grafter.config.control.in_force import InForce
from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.announced_models import AnnouncedHooks
from grafter.core.roles import Place
from grafter.store.dumps.writer import write_tensors
from grafter.store.ledger import LedgerWriter, read_ledger, write_summary
from grafter.store.recording import write_rank_facts
from grafter.store.run_files import HistoryLine, append_history, read_history, write_run_facts
from grafter.store.written_files import LineFile, whole_file, write_whole
from grafter.tools.requests.batch_file import BatchWriter
from grafter.tools.requests.entry import Entry, Part

LONG = "x" * 100_000
CONFIG = GrafterConfig(role="baseline", master_port=1, compare_filter="True")
PLACE = Place("baseline", 0, 1)


TREE = ModuleTree(modules=(ModuleNode(path="", class_name=LONG),))


def write_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "render_page", lambda page: LONG)
    writing.write_page(page=object(), path=path)  # type: ignore[arg-type]


def write_batch(directory: Path) -> None:
    BatchWriter(directory).write([Entry(0, "a", 0.0, frozenset(), {"request": Part(f'"{LONG}"')})], {})


# What is written, the file's name, and who writes it into the directory.
WRITERS: dict[str, tuple[str, Callable[[Path, pytest.MonkeyPatch], Any]]] = {
    "tensors": (
        "x.safetensors",
        lambda here, _: write_tensors(here / "x.safetensors", {"value": torch.ones(100_000)}, {}),
    ),
    "run facts": ("run.json", lambda here, _: write_run_facts(here, CONFIG, PLACE, LONG, "id", {"baseline": 1})),
    "summary": ("rank0.summary.json", lambda here, _: write_summary(here, summary("baseline", error=LONG))),
    "module trees": ("modules.json", lambda here, _: write_trees(here / "modules.json", [TREE])),
    "recording": (
        "rank0.recording.json",
        lambda here, _: write_rank_facts(here.parent, CONFIG, PLACE, AnnouncedHooks((LONG,))),
    ),
    "page": ("report.html", lambda here, patch: write_page(here / "report.html", patch)),
    "plan": ("plan.yaml", lambda here, _: plan_suggest._write(here / "plan.yaml", LONG)),
    "requests": ("requests-", lambda here, _: write_batch(here)),
    "text": ("verdict.json", lambda here, _: write_whole(here / "verdict.json", LONG)),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_leaves_no_part_and_the_error_names_the_file(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file it is: nothing of it stays, and what is raised has its path, and not that of a temporary file."""
    here = tmp_path / "baseline"
    here.mkdir()
    name, write = WRITERS[what]
    with small_files(10_000), pytest.raises(Exception, match=re.escape(str(here / name))) as raised:
        write(here, monkeypatch)
    assert ".tmp" not in str(raised.value)
    assert list(here.iterdir()) == []
    write(here, monkeypatch)
    (written,) = here.iterdir()
    assert written.name.startswith(name) and not written.name.endswith(".tmp")


def test_no_module_writes_a_temporary_file_by_itself() -> None:
    """Renaming what was written belongs to one module, which all others use."""
    package = Path(grafter.__file__).parent
    own = [path for path in package.rglob("*.py") if re.search(r"os\.replace\(|\.rename\(|mkstemp", path.read_text())]
    assert [path.name for path in own] == ["written_files.py"]


def test_what_was_there_stays_where_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    """A failed write, an exception in the block, and a directory that is gone leave the earlier file as it was."""
    path = tmp_path / "x"
    write_whole(path, "first")
    with small_files(10), pytest.raises(OSError, match="large"):
        write_whole(path, LONG)
    with pytest.raises(KeyboardInterrupt), whole_file(path) as descriptor:
        os.write(descriptor, b"second")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "absent" / "x"))):
        write_whole(tmp_path / "absent" / "x", "second")


def test_a_symbolic_link_in_the_temporary_files_place_is_not_written_through(tmp_path: Path) -> None:
    """In a directory that others may write to, nobody can have another file overwritten."""
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "x.tmp").symlink_to(other)
    with pytest.raises(OSError) as raised:
        write_whole(tmp_path / "x", "theirs")
    assert raised.value.errno == errno.ELOOP and other.read_text() == "mine"


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """A line for which there is no room leaves the file as it was, so that the next one is whole."""
    file = LineFile(tmp_path / "lines", is_new=True)
    file.append(b"a" * 50)
    with small_files(80), pytest.raises(OSError, match=re.escape(str(tmp_path / "lines"))):
        file.append(b"b" * 50)
    file.append(b"c" * 50)
    file.close()
    assert (tmp_path / "lines").read_text() == "a" * 50 + "\n" + "c" * 50 + "\n"
    with pytest.raises(FileExistsError):
        LineFile(tmp_path / "lines", is_new=True)


def test_a_ledger_stays_readable_where_a_line_did_not_fit(tmp_path: Path) -> None:
    """The point that did not fit is missing; those before and after it are read."""
    ledger = LedgerWriter(tmp_path, 0)
    with small_files(1500):
        ledger.write(record("target", 0, 1e-6, layer=0))
        with pytest.raises(OSError, match=re.escape(str(ledger.path))):
            ledger.write(record("target", 1, 1e-6, layer=1))
    ledger.write(record("target", 2, 1e-6, layer=2))
    ledger.close()
    assert [line.sequence for line in read_ledger(ledger.path)] == [0, 2]


def test_changes_stay_readable_where_a_line_did_not_fit(tmp_path: Path) -> None:
    """As a ledger's."""
    role = tmp_path / "baseline"
    role.mkdir()
    fields = {"time": 0.0, "number": 1, "step": 1, "by": None, "in_force": InForce()}
    with small_files(400):
        append_history(role, HistoryLine(asked="set", **fields))
        with pytest.raises(OSError, match=re.escape(str(role / "control.jsonl"))):
            append_history(role, HistoryLine(asked="x" * 400, **fields))
    append_history(role, HistoryLine(asked="off", **fields))
    assert [line.asked for line in read_history(tmp_path)["baseline"]] == ["set", "off"]
