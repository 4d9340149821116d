"""`grafter plan suggest` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grafter.cli.command_options import GROUP, errors_reported
from grafter.errors import UsageError

if TYPE_CHECKING:
    from grafter.capture.module_tree import ModuleTree

plan_app = typer.Typer(
    name="plan",
    help="The plan file that both jobs share.",
    **GROUP,
)


@plan_app.callback()
def plan() -> None:
    """The plan file that both jobs share."""


@plan_app.command("suggest", short_help="Propose names for the modules of two programs.")
def suggest_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN | BASELINE TARGET",
            help="A run's directory, or two modules.json (or their roles' directories).",
        ),
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan to FILE. Default: stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Propose the plan file's names from the module trees of two programs, with a confidence for each.

    Every run in which both programs have hooks (`grafter run --attach`, or grafter.attach) leaves their trees in its
    directory; no point needs to match. Pairs of low confidence are comments.

    \b
    grafter plan suggest grafter_out/20250101-120000 --out plan.yaml
    grafter plan suggest a/modules.json b/modules.json

    Exit code: 0 a plan; 1 no module of one program resembles one of the other; 2 wrong usage.
    """
    # This import is slow (torch), and every command of the program imports this file.
    from grafter.analysis.plan_suggest.plan_text import plan_text
    from grafter.analysis.plan_suggest.tree_matching import match_trees

    with errors_reported("grafter plan suggest"):
        if out is not None and out.exists() and not force:
            raise UsageError(f"{out} exists already; give another name, or --force to replace it.")
        baseline, target = _read(sources)
        suggestion = match_trees(baseline[0], target[0])
        others = tuple(
            f"{tree.class_name}, another model of the {role}"
            for role, trees in (("baseline", baseline), ("target", target))
            for tree in trees[1:]
        )
        text = plan_text(suggestion, others)
        if out is None:
            typer.echo(text, nl=False)
        else:
            _write(out, text)
    if out is not None:
        typer.echo(f"{out}: {len(suggestion.pairs)} pairs, {len(suggestion.left)} modules left out", err=True)
    # The models themselves are a pair, whatever they contain.
    raise typer.Exit(0 if len(suggestion.pairs) > 1 else 1)


def _read(sources: list[Path]) -> tuple[list[ModuleTree], list[ModuleTree]]:
    from grafter.capture.module_tree import read_role_trees, read_trees

    if len(sources) == 1:
        from grafter.analysis.run.run_summary import find_run

        run = sources[0] if (sources[0] / "baseline").is_dir() else find_run(sources[0])
        return read_role_trees(run / "baseline"), read_role_trees(run / "target")
    if len(sources) != 2:
        raise UsageError("give one run's directory, or two files: of the baseline, then of the target.")
    baseline, target = (read_role_trees(path) if path.is_dir() else read_trees(path) for path in sources)
    return baseline, target


def _write(path: Path, text: str) -> None:
    from grafter.store.written_files import write_whole

    try:
        write_whole(path, text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from None
