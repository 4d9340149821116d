"""The README is true: its smallest use, copied to the letter, does what it says; its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GRAFTER_", "DUMPER_GRAFTER_"))}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def test_the_smallest_use_prints_the_table_that_the_readme_shows(tmp_path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        name = block.split("\n", 1)[0].removeprefix("# ")
        (tmp_path / name).write_text(block)
    command = re.search(r"```sh\n(grafter run .*?)\n```", README, re.S)
    assert command is not None
    done = subprocess.run(
        shlex.split(command[1]), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.search(r"```\n(step point.*?)```", README, re.S)
    assert shown is not None

    def facts(table: str) -> list[list[str]]:
        """The columns up to `cosine`; seconds and the bar vary."""
        return [line.split()[:8] for line in table.splitlines() if line.lstrip().startswith("0 hidden")]

    assert len(facts(shown[1])) == 4
    assert [row[:6] for row in facts(done.stdout)] == [row[:6] for row in facts(shown[1])]
    rel = [float(row[6]) for row in facts(done.stdout)]
    assert rel[1] > 1e-7
    assert rel[0] == rel[2] == rel[3] == 0.0


@pytest.mark.parametrize(
    "document", ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))]
)
def test_links_between_documents_lead_to_files(document: str) -> None:
    path = ROOT / document
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / link).exists(), f"{document} links to {link}"
