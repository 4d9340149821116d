"""Decides which page `grafter report` makes of a directory, writes it beside the run's files, and opens it."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from grafter.analysis.report.dumped_pictures import has_dumps, has_role_dumps
from grafter.analysis.report.html import render_page
from grafter.analysis.report.page_data import PageData
from grafter.errors import GrafterError, UsageError
from grafter.store.written_files import write_whole

REPORT_NAME = "report.html"


def make_page(places: Sequence[Path]) -> PageData:
    """The page of one or two places.

    One place: a run, the --out directory of `grafter locate`, a directory of such directories (its newest one is
    taken), or a file that `grafter compare --json` wrote. Two places: directories of dumps, which are compared. Raises
    GrafterError if it is none of these.
    """
    from grafter.analysis.report.comparison_page import compare_dumps, read_comparison
    from grafter.analysis.report.locate_page import is_locate_directory, make_locate_page
    from grafter.analysis.report.run_page import make_run_page, run_findings
    from grafter.analysis.report.run_reading import has_records, read_run_files

    first, *rest = places
    if len(rest) == 1:
        return compare_dumps(first, rest[0])
    if rest:
        raise UsageError(f"{len(places)} places were given. Give one place, or two directories of dumps to compare.")
    if first.is_file():
        return read_comparison(first)
    run = find_place(first)
    if is_locate_directory(run):
        return make_locate_page(run)
    if has_records(run) or not has_dumps(run):
        return make_run_page(run)
    # Both jobs only dumped.
    page = compare_dumps(run, None)
    return replace(page, findings=(*run_findings(read_run_files(run)), *page.findings))


def find_place(directory: Path) -> Path:
    """The run or directory of `grafter locate`: `directory` itself, or the newest one in it. Raises GrafterError."""
    from grafter.analysis.report.locate_page import ALONE, is_locate_directory
    from grafter.analysis.report.run_reading import has_ledgers
    from grafter.analysis.run.run_summary import find_run

    if has_ledgers(directory) or is_locate_directory(directory) or has_dumps(directory):
        return directory
    inside = [path for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    located = [path for path in inside if is_locate_directory(path)]
    if not located:
        return find_run(directory)
    runs = [(path / ALONE, path) for path in located] + [(path, path) for path in inside if has_ledgers(path)]
    return max(runs, key=lambda run: max(role.stat().st_mtime for role in run[0].iterdir()))[1]


def page_directory(place: Path) -> Path:
    """The directory for the page of a place: beside its ledgers, dumps or file."""
    if place.is_file():
        return place.parent
    return place if has_role_dumps(place) else find_place(place)


def write_page(page: PageData, path: Path) -> None:
    """Render the page into `path`, completely or not at all. Raises GrafterError if the file cannot be written."""
    text = render_page(page)
    try:
        write_whole(path, text)
    except OSError as error:
        raise GrafterError(f"the report cannot be written to {path}: {error.strerror}.") from error


def can_show() -> bool:
    """Whether there is a display, and probably a person who looks at it."""
    if os.environ.get("CI"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def show_page(path: Path) -> bool:
    """Open the page in the user's browser. Returns whether that worked."""
    return can_show() and webbrowser.open(path.resolve().as_uri())
