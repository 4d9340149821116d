"""`grafter record` and `grafter replay` on the command line."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grafter.cli.command_options import ExcludeOption, JsonLinesOption, RowLimitOption, progress_bar
from grafter.errors import GrafterError, UsageError

if TYPE_CHECKING:
    from grafter.tools.requests.judgement import Outcome
    from grafter.tools.requests.reading import Place, Recording
    from grafter.tools.requests.replay import ReplayOptions

_EXIT_COULD_NOT = 2
_EXIT_INTERRUPTED = 130
# What the proxy and the replay need beside grafter.
_EXTRA_PACKAGES = ("httpx", "starlette", "uvicorn", "h11")


_Upstream = Annotated[str, typer.Option(metavar="URL", help="The server to record, such as http://127.0.0.1:30000.")]
_Port = Annotated[int, typer.Option(metavar="P", min=0, max=65535, help="Where clients connect; 0: a free port.")]
_Host = Annotated[str, typer.Option(metavar="HOST", help="The address to listen on.")]
_Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where recordings go. Default: grafter_out/requests-<time>.")
]
_Threshold = Annotated[
    int, typer.Option(metavar="N", min=0, help="Finished requests per batch; 0: only the last five minutes.")
]
_BodyLimit = Annotated[
    int, typer.Option("--body-mib", metavar="N", min=1, max=60, help="How much of a body is recorded.")
]


def record_command(
    upstream: _Upstream,
    port: _Port,
    host: _Host = "127.0.0.1",
    out: _Out = None,
    threshold: _Threshold = 1000,
    exclude: ExcludeOption = None,
    body_limit: _BodyLimit = 16,
) -> None:
    """Record the requests of clients and the answers of a server, as a proxy between them. Neither side changes.

    \b
    grafter record --upstream http://127.0.0.1:30000 --port 8000
    grafter replay grafter_out/requests-... --to http://127.0.0.1:30001

    Streams pass through as they arrive. Secrets in headers are never written. Ctrl-C and SIGTERM write what is in
    memory and end the proxy; SIGUSR1 only writes it.
    """
    try:
        _need_extra("grafter record")
        from grafter.tools.requests.recorder import DEFAULT_EXCLUDE, RequestRecorder
        from grafter.tools.requests.serving import check_url, default_directory, serve

        url = check_url(upstream, "--upstream")
        directory = out or default_directory(time.strftime("%Y%m%d-%H%M%S"))
        recorder = RequestRecorder(directory, threshold, exclude=DEFAULT_EXCLUDE if exclude is None else exclude)
    except (GrafterError, OSError) as error:
        typer.echo(f"grafter record: {error}", err=True)
        raise typer.Exit(_EXIT_COULD_NOT) from None
    try:
        serve(url, host, port, recorder, body_limit << 20, lambda text: print(text, file=sys.stderr, flush=True))
    except GrafterError as error:
        typer.echo(f"grafter record: {error}", err=True)
        raise typer.Exit(_EXIT_COULD_NOT) from None
    except KeyboardInterrupt:
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    finally:
        recorder.close()


_Recording = Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A file of a recording, or all of a directory.")]
_To = Annotated[list[str], typer.Option(metavar="URL", help="Where to send; give it twice for two servers.")]
_Speed = Annotated[float, typer.Option(metavar="X", min=0, help="Speed relative to the recording; 0: without gaps.")]
_Concurrency = Annotated[int, typer.Option(metavar="N", min=1, max=10000, help="Requests in flight at the same time.")]
_Only = Annotated[
    list[str] | None, typer.Option(metavar="ID", help="Only this request, by id or '#0'; may be repeated.")
]
_NoForceLength = Annotated[bool, typer.Option("--no-force-length", help="Do not force the output's length.")]
_IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Also set ignore_eos in requests of OpenAI's form.")]
_MinTokens = Annotated[bool, typer.Option("--min-tokens", help="Also set min_tokens in requests of OpenAI's form.")]
_Header = Annotated[
    list[str] | None, typer.Option(metavar="'NAME: VALUE'", help="Sent with every request; grafter replaces $VARIABLE.")
]
_Tolerance = Annotated[float, typer.Option(metavar="X", min=0, help="The largest allowed difference of logprobs.")]


def replay_command(
    recording: _Recording,
    to: _To,
    speed: _Speed = 1.0,
    concurrency: _Concurrency = 64,
    only: _Only = None,
    no_force_length: _NoForceLength = False,
    ignore_eos: _IgnoreEos = False,
    min_tokens: _MinTokens = False,
    header: _Header = None,
    logprob_tolerance: _Tolerance = 0.0,
    as_json: JsonLinesOption = False,
    limit: RowLimitOption = 0,
) -> None:
    """Send recorded requests again, in order and with their gaps, and report what differs.

    \b
    grafter replay DIR --to http://127.0.0.1:30000                       against the recorded answers
    grafter replay DIR --to http://127.0.0.1:30000 --to http://host:30001   two servers, against each other

    Exit code: 0 no answer differs; 1 an answer differs, or a server failed; 2 it could not be judged; 130 Ctrl-C.
    """
    try:
        _need_extra("grafter replay")
        from grafter.cli.requests_table import json_lines, print_replay
        from grafter.cli.show import make_console
        from grafter.tools.requests.call import Forcing
        from grafter.tools.requests.judgement import summarise
        from grafter.tools.requests.reading import Recording
        from grafter.tools.requests.replay import ReplayOptions, choose
        from grafter.tools.requests.serving import check_url

        urls = [check_url(url, "--to") for url in to]
        if len(urls) > 2:
            raise UsageError(f"--to is given {len(urls)} times; two servers are compared with each other at most.")
        forcing = Forcing(not no_force_length, ignore_eos, min_tokens)
        options = ReplayOptions(speed, concurrency, forcing, read_headers(header or []), logprob_tolerance)
        found = Recording(recording)
        outcomes, is_whole = _replay(found, choose(found.places, only or []), urls, options)
    except GrafterError as error:
        typer.echo(f"grafter replay: {error}", err=True)
        raise typer.Exit(_EXIT_COULD_NOT) from None
    summary = summarise(outcomes, len(urls))
    if as_json:
        for line in json_lines(outcomes, summary, urls):
            typer.echo(line)
    else:
        print_replay(outcomes, summary, urls, make_console(sys.stdout), limit=limit)
    raise typer.Exit(summary.exit_code if is_whole else _EXIT_INTERRUPTED)


def _replay(
    recording: Recording, places: Sequence[Place], urls: Sequence[str], options: ReplayOptions
) -> tuple[list[Outcome], bool]:
    """The outcomes, and whether they are complete: Ctrl-C may have interrupted the replay."""
    from grafter.tools.requests.replay import replay

    outcomes: list[Outcome] = []
    with progress_bar("replaying", "requests", len(places)) as progress:
        try:
            asyncio.run(replay(recording, places, urls, options, progress, outcomes))
        except KeyboardInterrupt:
            outcomes.sort(key=lambda outcome: outcome.number)
            return outcomes, False
    return outcomes, True


def read_headers(given: Sequence[str]) -> dict[str, str]:
    """Headers from `NAME: VALUE`. $VARIABLE in VALUE is replaced, so that a secret need not appear in the process list.

    Raises UsageError, which shows no value.
    """
    headers = {}
    for text in given:
        name, colon, value = text.partition(":")
        if not colon or not re.fullmatch(r"[A-Za-z0-9-]+", name.strip()):
            raise UsageError("--header: write it as 'NAME: VALUE', such as 'Authorization: Bearer $API_KEY'.")
        for variable in re.findall(r"\$([A-Za-z_][A-Za-z0-9_]*)", value):
            if variable not in os.environ:
                raise UsageError(f"--header {name.strip()}: the variable {variable} is not set.")
        read = re.sub(r"\$([A-Za-z_][A-Za-z0-9_]*)", lambda found: os.environ[found[1]], value).strip()
        if not read.isprintable() or not read.isascii():
            raise UsageError(f"--header {name.strip()}: its value has characters that no header may have.")
        headers[name.strip()] = read
    return headers


def _need_extra(command: str) -> None:
    """Raise UsageError if a package of the extra is missing. command: what needs it, as the user wrote it."""
    missing = [package for package in _EXTRA_PACKAGES if find_spec(package) is None]
    if missing:
        raise UsageError(f"{command} needs {' and '.join(missing)}: pip install {' '.join(_EXTRA_PACKAGES)}")
