"""The output of both jobs on one stream: each line with its job's name; at a terminal's bottom, a status line."""

from __future__ import annotations

import codecs
import os
import select
import shutil
import threading
import time
from collections import deque
from typing import IO, TextIO

# A line without an end is printed in pieces of this size, which limits the launcher's memory.
_LONGEST_PIECE = 64 * 1024
_KEPT_LINES = 200
_READ_BYTES = 64 * 1024
_PIPE_POLL_SECONDS = 0.25
# How long a reader continues after its job is gone, if a process that escaped from the job still writes.
_DRAIN_SECONDS = 5.0
# A progress bar redraws itself many times per second; at this interval, a line is made of it.
_PROGRESS_SECONDS = {True: 1.0, False: 5.0}
_COLOURS = {"baseline": "\x1b[36m", "target": "\x1b[35m", "grafter": "\x1b[1m"}
_RESET = "\x1b[0m"
_CLEAR_LINE = "\r\x1b[K"


class LineSplitter:
    """A splitter of bytes into whole lines. Pure: the caller passes the time.

    Bytes that are not UTF-8 become U+FFFD. A carriage return overwrites, as on a terminal: of a progress bar, the last
    state before each newline becomes a line, and in between one state every `progress_seconds`.
    """

    def __init__(self, progress_seconds: float) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._partial = ""
        self._progress_seconds = progress_seconds
        self._next_progress = float("-inf")

    def feed(self, data: bytes, now: float) -> list[str]:
        """The lines that `data` completes, without their ends. `now`: seconds of any monotonic clock."""
        *whole, self._partial = (self._partial + self._decoder.decode(data)).split("\n")
        lines = [_visible(line) for line in whole]
        if whole:
            self._next_progress = float("-inf")
        # A carriage return at the end may be half of a line end.
        text = self._partial.rstrip("\r")
        if "\r" in text:
            overwritten = text.rpartition("\r")[0]
            self._partial = self._partial[len(overwritten) + 1 :]
            state = _visible(overwritten)
            if state and now >= self._next_progress:
                lines.append(state)
                self._next_progress = now + self._progress_seconds
        while len(self._partial) > _LONGEST_PIECE:
            lines.append(self._partial[:_LONGEST_PIECE])
            self._partial = self._partial[_LONGEST_PIECE:]
        return lines

    def finish(self) -> list[str]:
        """The rest that has no newline."""
        rest = _visible(self._partial + self._decoder.decode(b"", final=True))
        self._partial = ""
        return [rest] if rest else []


def _visible(line: str) -> str:
    if "\r" not in line:
        return line
    return next((part for part in reversed(line.split("\r")) if part), "")


class RunOutput:
    """The output of a run: one stream for both jobs and the launcher. Lines from different threads never mix."""

    def __init__(self, stream: TextIO, quiet: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._lock = threading.Lock()
        self._status = ""
        self.is_terminal = stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self._coloured = self.is_terminal and not os.environ.get("NO_COLOR")
        # The reader of the stream is gone, or the disk is full: the launcher ends the run.
        self.broken: Exception | None = None
        self.last_lines: dict[str, deque[str]] = {}

    def splitter(self) -> LineSplitter:
        return LineSplitter(_PROGRESS_SECONDS[self.is_terminal])

    def lines(self, label: str, lines: list[str]) -> None:
        """Print lines of one job (or of "grafter"), each with `[label] ` before it."""
        if not lines:
            return
        with self._lock:
            self.last_lines.setdefault(label, deque(maxlen=_KEPT_LINES)).extend(lines)
        if not self._quiet:
            prefix = f"[{label}] "
            if self._coloured:
                prefix = f"{_COLOURS.get(label, '')}{prefix}{_RESET}"
                # A colour that the job left on must not affect the next line.
                lines = [line + _RESET if "\x1b[" in line else line for line in lines]
            self._write("".join(f"{prefix}{line}\n" for line in lines))

    def say(self, text: str) -> None:
        """Print a message of the launcher itself."""
        self.lines("grafter", text.split("\n"))

    def status(self, text: str | None) -> None:
        """On a terminal, show `text` below everything else; None removes it."""
        if not self.is_terminal or self._quiet:
            return
        width = shutil.get_terminal_size().columns - 1
        line = "" if text is None else f"[grafter] {text}".replace("\n", " ")[:width]
        if line != self._status:
            self._write("", new_status=line)

    def _write(self, text: str, new_status: str | None = None) -> None:
        encoding = self._stream.encoding or "utf-8"
        with self._lock:
            clear = _CLEAR_LINE if self._status else ""
            if new_status is not None:
                self._status = new_status
            shown = (clear + text + self._status).encode(encoding, "replace").decode(encoding)
            if self.broken is not None:
                return
            try:
                self._stream.write(shown)
                self._stream.flush()
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self.broken = error


class OutputReader(threading.Thread):
    """The reader of one job's pipe until it ends. Each job has its own thread, so that neither waits for the other."""

    def __init__(self, pipe: IO[bytes], label: str, output: RunOutput) -> None:
        super().__init__(name=f"grafter-output-{label}", daemon=True)
        self._pipe, self._label, self._output = pipe, label, output
        self._job_gone_at: float | None = None

    def job_is_gone(self) -> None:
        """No process of the job is left: stop once the pipe is empty, even if another process holds it open."""
        self._job_gone_at = time.monotonic()

    def run(self) -> None:
        # Only this thread closes the pipe: its number could by then belong to another file.
        with self._pipe:
            self._pass_on(self._pipe.fileno())

    def _pass_on(self, fd: int) -> None:
        splitter = self._output.splitter()
        # Not `select`, which takes no descriptor above 1023.
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            gone_at = self._job_gone_at
            readable = poll.poll(_PIPE_POLL_SECONDS * 1000)
            if not readable and gone_at is not None:
                break
            if readable:
                data = os.read(fd, _READ_BYTES)
                if not data or (gone_at is not None and time.monotonic() > gone_at + _DRAIN_SECONDS):
                    break
                self._output.lines(self._label, splitter.feed(data, time.monotonic()))
        self._output.lines(self._label, splitter.finish())
