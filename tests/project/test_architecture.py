"""docs/architecture.md is true of the tree: its layers, its list of files, and every path that it names."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "grafter"
TESTS = ROOT / "tests"
# Folders of tests/ that are about no folder of the package.
OTHER_TESTS = {"e2e", "parts", "project"}


def listed_files() -> dict[str, set[str]]:
    """Folder -> its files, as the page lists them."""
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", PAGE.split("## Files")[1], re.M)
    return {folder: set(re.findall(r"`(\w+)`", files)) for folder, files in rows}


def files_of_tree() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        folder = path.parent.relative_to(PACKAGE).as_posix()
        if folder != ".":
            found.setdefault(folder, set()).update({path.stem} - {"__init__"})
    return found


def test_the_list_of_files_is_the_tree() -> None:
    """A file that is added, moved or removed must be so on the page."""
    assert listed_files() == files_of_tree()


def test_every_path_on_the_page_exists() -> None:
    """Also those of the steps, and of where new pieces go."""
    before = PAGE.split("## Files")[0]
    layers = "cli|tools|analysis|rank|capture|runtime|wire|store|config|core"
    paths = set(re.findall(rf"`((?:grafter|tests|{layers})/[\w/.]*)`", before))
    missing = [path for path in paths if not (ROOT / path).exists() and not (PACKAGE / path).exists()]
    assert paths and not missing


def test_the_layers_are_those_of_the_contract() -> None:
    """In the same order, from the top down."""
    block = re.search(r"```\n(.*?)```", PAGE, re.S)
    assert block is not None
    drawn = [line.split()[0] for line in block[1].splitlines()]
    contracts = (ROOT / "pyproject.toml").read_text().split("[tool.importlinter]")[1]
    layers = re.search(r"^layers = \[(.*)\]$", contracts, re.M)
    assert layers is not None
    first, *named = re.findall(r'"(\w+)"', layers[1])
    assert first == "_calls"
    assert named[: len(drawn)] == drawn
    assert set(named[len(drawn) :]) == {"_process", "version", "errors"}
    assert "ignore_imports" not in contracts


def test_tests_are_laid_out_like_the_package() -> None:
    """Each folder of tests is a folder of the package, and no test lies outside of a folder."""
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    of_package = {folder for folder in folders if folder.parts[:1] not in {(name,) for name in OTHER_TESTS}}
    strange = sorted(folder.as_posix() for folder in of_package if not (PACKAGE / folder / "__init__.py").is_file())
    assert of_package and not strange
    assert not list(TESTS.glob("test_*.py"))
