"""The output of two jobs on one stream: lines, progress bars, colours, and when a wait is told."""

from __future__ import annotations

import io
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafter.tools.launch.run_output import LineSplitter, OutputReader, RunOutput
from grafter.tools.launch.supervision import WaitTeller


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_lines_do_not_depend_on_how_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    """Without progress bars, any cutting of the bytes gives the lines of the whole, bad UTF-8 replaced."""
    data = data.replace(b"\r", b"")
    splitter = LineSplitter(progress_seconds=1.0)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    lines = [line for a, b in itertools.pairwise(places) for line in splitter.feed(data[a:b], now=0.0)]
    *whole, rest = data.decode("utf-8", "replace").split("\n")
    assert lines + splitter.finish() == whole + ([rest] if rest else [])


def test_a_progress_bar_is_a_line_a_second_and_its_last_state() -> None:
    """Of states that overwrite one another, one is shown each interval, and the last one before the newline."""
    splitter = LineSplitter(progress_seconds=1.0)
    shown = [line for i in range(40) for line in splitter.feed(b"\r%3d%%" % i, now=i * 0.1)]
    assert shown == ["  0%", " 10%", " 20%", " 30%"]
    assert splitter.feed(b"\r100%\nnext\r\n", now=4.0) == ["100%", "next"]
    assert splitter.feed(b"cut\r", now=4.0) == []
    assert splitter.feed(b"\n", now=4.0) == ["cut"]


def test_a_line_without_end_is_printed_in_pieces() -> None:
    """Bytes without a newline do not pile up in the launcher, and none is lost."""
    splitter = LineSplitter(progress_seconds=1.0)
    lines = [line for _ in range(40) for line in splitter.feed(b"x" * 10_000, now=0.0)]
    assert lines and max(map(len, lines)) <= 64 * 1024
    assert "".join(lines + splitter.finish()) == "x" * 400_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_coloured_and_has_a_status_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal prefixes are coloured and the status is taken away before each line; NO_COLOR keeps it plain."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    output = RunOutput(terminal)
    output.status("target rank 0 waits")
    output.lines("target", ["hello"])
    output.status(None)
    text = terminal.getvalue()
    assert "\x1b[35m[target] \x1b[0mhello\n[grafter] target rank 0 waits" in text
    assert text.endswith("\r\x1b[K")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    RunOutput(plain).lines("target", ["hello"])
    assert plain.getvalue() == "[target] hello\n"


def test_an_encoding_without_the_character_costs_the_character() -> None:
    """A stream that cannot hold a job's letter gets a question mark, and the reader goes on."""
    raw = io.BytesIO()
    output = RunOutput(io.TextIOWrapper(raw, encoding="ascii"))
    output.lines("target", ["naïve", "next"])
    assert raw.getvalue() == b"[target] na?ve\n[target] next\n"
    assert output.broken is None


def test_a_reader_closes_its_pipe_itself_when_it_is_through() -> None:
    """Whoever started it may be gone before: a descriptor that another closed could by then be any other file's."""
    ours, theirs = os.pipe()
    pipe, raw = os.fdopen(ours, "rb", buffering=0), io.BytesIO()
    reader = OutputReader(pipe, "target", RunOutput(io.TextIOWrapper(raw, encoding="utf-8")))
    reader.start()
    os.write(theirs, b"last words")
    assert not pipe.closed
    os.close(theirs)
    reader.join(250)
    assert pipe.closed
    assert raw.getvalue() == b"[target] last words\n"


def test_a_wait_is_told_after_ten_seconds_and_each_minute() -> None:
    """In a pipe, a wait is told at 10 s and then each 60 s, counted anew once it ended."""
    teller = WaitTeller()
    told = [second for second in range(200) if teller.is_due("target waits" if second != 100 else None, float(second))]
    assert told == [10, 70, 111, 171]
