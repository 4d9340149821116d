"""The words: docstrings are whole sentences that name existing things, and rewritten places keep to plain English."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "grafter").rglob("*.py"))

# Pages and packages that were rewritten in plain English: all of docs/ but the page for who changes the code.
REWRITTEN_PAGES = [
    "README.md",
    "benchmarks/README.md",
    "transforms/README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if page.name != "architecture.md"),
]
# Not rewritten yet.
UNWRITTEN = {"__pycache__", "py.typed", "core", "messages", "commit_protocol.py"}
REWRITTEN_SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("grafter", "grafter/core")
    for path in sorted((ROOT / folder).iterdir())
    if path.name not in UNWRITTEN
]

# What readers stumbled over, as regular expressions, and what to write instead.
STOCK_PHRASES = {
    # From the table of the project's style guide.
    r"\ba hole is no zero\b": "regions that no rank covers are an error",
    r"\bis called so\b": "has this name",
    r"\bbring them together\b": "every rank is now waiting",
    r"\b(has|have|had) not got\b": "lacks, does not have",
    r"\bare refused at the second\b": "the second one raises UsageError",
    r"\bby whatever means\b": "say what does not happen",
    r"\bmedian allows\b": "the other points differ by at most ...",
    r"\blead to on this rank\b": "the plan that this rank derives",
    r"\btold\b": "reported, known, notified",
    r"\b(go|goes|going|went|gone) on\b": "continue",
    r"\b(take|takes|taking|taken|took) up\b": "prepare, accept",
    r"\bpays? for the question\b": "kept off the common path for speed",
    r"\b(come|comes|came) to (an?|the|its?|that|this|them|their|every|all|each|one|no|both)\b": "reaches, arrives at",
    # Found while the places above were rewritten.
    r"\banew\b": "again",
    r"\bso far as\b": "as far as, if",
    r"\bnobody\b": "no rank, no job, no one",
    r"\bin good order\b": "normally",
    r"\bwhat became of\b": "the result of",
    r"\bat all events\b": "leave it out",
    r"\bto and fro\b": "back and forth",
    r"\bheeds?\b": "follows, uses",
    r"\ball the same\b": "anyway, even if",
    r"\bof (its|their) own accord\b": "by itself, automatically",
    r"\bas ever\b": "as usual, as for any other point",
    r"\bwhat becomes of\b": "the result of, what happens to",
    r"\bhears? of\b": "learns, is notified of",
    r"\b(go|goes) by\b": "uses, follows",
    r"\. Nor (do|does|is|are|has|have)\b": "... do not ..., either",
    r"\bin the place of\b": "instead of, replaces",
    r"\bthe own (job|rank|side)\b": "its own",
    r"(?<!here )\b(is|are) no (?!longer|more|reason|need)\w": "is not a ...",
}

PATH = re.compile(r"\b(?:grafter|tests|docs|benchmarks|transforms|launch)/[\w./<>*-]+")
DOTTED = re.compile(r"(?<![\w./-])grafter(?:\.[A-Za-z_]\w*)+")


@cache
def docstrings(path: Path) -> list[tuple[int, str]]:
    """(line, text) of each docstring of a file."""
    return [
        (node.body[0].lineno, text)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for text in [ast.get_docstring(node)]
        if text
    ]


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def fault_of(text: str) -> str | None:
    """What is wrong with the form of a docstring; None if nothing is."""
    if not re.search(r"[.:?)`\"'>]$", text.split("\n\n")[0].rstrip()):
        return "its first paragraph ends in the middle of a sentence"
    if '" "' in text or '"\n"' in text or re.search(r'"\s*\n\s*"', text):
        return "it holds the quotes of two joined texts"
    return None


def missing_names(text: str) -> list[str]:
    """The files, modules and functions that a text names and that do not exist."""
    paths = [found.rstrip(".") for found in PATH.findall(text)]
    missing = [name for name in paths if "<" not in name and not list(ROOT.glob(name))]
    return missing + [name for name in DOTTED.findall(text) if not exists(name)]


@cache
def exists(name: str) -> bool:
    """Whether `grafter.x.y` is a module, or an attribute of one."""
    found: object = importlib.import_module("grafter")
    parts = name.split(".")
    for count, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:count]))
            except ImportError:
                return False
    return True


def stock_phrases(text: str) -> list[str]:
    """The stock phrases in a text, each with what to write instead."""
    joined = re.sub(r'"\s*\n\s*f?"|\s*\n\s*#?\s*|\s+', " ", text)
    return [
        f"{found[0]!r} (write: {better})"
        for phrase, better in STOCK_PHRASES.items()
        for found in [re.search(phrase, joined, re.IGNORECASE)]
        if found is not None
    ]


def prose(page: str) -> str:
    """A page without its blocks of code and without `names`, which are as the program prints them."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`]+`", "", text)


def comments_and_texts(source: str) -> str:
    """The docstrings, comments and literal texts of a Python file, without its names."""
    literals = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and type(node.value) is str and " " in node.value
    ]
    comments = re.findall(r"(?:^|\s)# (.*)$", source, re.MULTILINE)
    return "\n".join([*literals, " ".join(comments)])


def sources_of(package: str) -> list[Path]:
    """The Python files of a package, or the file itself."""
    whole = ROOT / package
    files = [whole] if whole.is_file() else sorted(whole.rglob("*.py"))
    assert files, f"there is no {package}"
    return files


def has_subject(docstring: str) -> bool:
    """Whether a class's docstring names what the class is, rather than only to what it belongs."""
    return bool(docstring) and re.match(r"(Of|By|As|With|From|Its|Their|Also|None)\b", docstring) is None


def test_docstrings_are_whole_sentences() -> None:
    """No docstring is cut by a blank line in the middle of a sentence, or holds the quotes of two joined texts."""
    faults = [
        f"{place(path, line)}: {fault}"
        for path in SOURCES
        for line, text in docstrings(path)
        if (fault := fault_of(text))
    ]
    assert not faults, "\n".join(faults)


def test_docstrings_name_what_exists() -> None:
    """Each file, module and function of this project that a docstring names exists."""
    faults = [
        f"{place(path, line)}: there is no {name}"
        for path in SOURCES
        for line, text in docstrings(path)
        for name in missing_names(text)
    ]
    assert not faults, "\n".join(faults)


def test_comments_name_files_that_exist() -> None:
    """Each file of this project that a comment names exists."""
    faults = [
        f"{place(path, number)}: there is no {name}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.lstrip().startswith("#")
        for name in missing_names(line)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("package", REWRITTEN_SOURCES)
def test_rewritten_classes_have_docstrings_with_a_subject(package: str) -> None:
    """Each class has a docstring that says what it is ("The outbox of one rank.", not "Of one rank.")."""
    faults = [
        f"{place(path, node.lineno)}: {node.name}"
        for path in sources_of(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not has_subject(ast.get_docstring(node) or "")
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", REWRITTEN_PAGES)
def test_rewritten_pages_have_no_stock_phrases(page: str) -> None:
    """A page that was rewritten stays in plain English."""
    assert not stock_phrases(prose((ROOT / page).read_text()))


@pytest.mark.parametrize("package", REWRITTEN_SOURCES)
def test_rewritten_sources_have_no_stock_phrases(package: str) -> None:
    """Docstrings, comments, help texts and messages of a package or file that was rewritten stay in plain English."""
    faults = {
        place(path, 1): found
        for path in sources_of(package)
        if (found := stock_phrases(comments_and_texts(path.read_text())))
    }
    assert not faults, "\n".join(f"{where}: {found}" for where, found in faults.items())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A row, and how\n\nmany there are.", "its first paragraph ends in the middle of a sentence"),
        ('The rank leaves "\n"the run.', "it holds the quotes of two joined texts"),
        ('It is over " "at once.', "it holds the quotes of two joined texts"),
        ("A row.\n\nMore about it", None),
        ("Returns `x`\n\nand more.", None),
    ],
)
def test_faults_of_docstrings_are_found(text: str, fault: str | None) -> None:
    """The checks above find the faults that they look for."""
    assert fault_of(text) == fault


def test_missing_names_are_found() -> None:
    """Files, modules and functions that do not exist are found; those that exist are not."""
    assert missing_names("see grafter/gone.py, grafter/runtime/session.py, docs/cli.md and docs/gone.md") == [
        "grafter/gone.py",
        "docs/gone.md",
    ]
    names = "grafter.dump, grafter.runtime.session.Session, grafter.gone and grafter.runtime.session.gone"
    assert missing_names(names) == [
        "grafter.gone",
        "grafter.runtime.session.gone",
    ]


def test_classes_without_a_subject_are_found() -> None:
    """Both kinds of faults."""
    assert not has_subject("") and not has_subject("Of one rank.") and has_subject("The outbox of one rank.")


def test_the_prose_of_a_page_has_neither_code_nor_names() -> None:
    """Blocks with and without fences, and names; all else stays."""
    page = "It was `told`.\n\n```sh\ntold\n```\n\n    told\n\n* told\n  the rest\n"
    assert prose(page).split() == ["It", "was", ".", "*", "told", "the", "rest"]


def test_stock_phrases_are_found() -> None:
    """Also across lines, comments and joined texts."""
    assert len(stock_phrases("it has\n# not got one, and goes\n    on")) == 2
    assert len(stock_phrases("A hole is no zero. Nor does it end all the same.")) == 4
    assert not stock_phrases("it lacks one and continues, and there is no other")
