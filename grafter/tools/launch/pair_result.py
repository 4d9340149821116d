"""How a run ended: exit codes, which job failed first, and which jobs `--attach` did not reach."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grafter.errors import GrafterError


class Interrupted(GrafterError):
    """A run that Ctrl-C or a signal ended. `exit_code`: what a shell reports for it, 128 + the signal."""

    def __init__(self, text: str, stop_signal: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + stop_signal


@dataclass(frozen=True)
class PairResult:
    """How a run ended, as far as its processes can tell; the ledgers in `run_directory` say what was grafted.

    `exit_codes` by role: negative for a signal, None if a job was never started or its end was not seen. `failed_role`
    is the job that failed first, and by itself. `ended_roles` are the jobs that the launcher ended. `unreached` are the
    jobs in which `attach` found no model, as far as this process can tell. `attach`: its patterns, if any.
    `is_recorded`: the run was to record its jobs' values. `key_tags`: the tags that identify a point besides its name,
    if the setting `key` names them. `last_lines` are the last lines (200 at most) of each job's output, by role, even
    of a quiet run.
    """

    run_directory: Path
    exit_codes: dict[str, int | None]
    stop_signal: int | None = None
    failed_role: str | None = None
    ended_roles: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    attach: str | None = None
    is_recorded: bool = False
    key_tags: frozenset[str] | None = None
    last_lines: dict[str, list[str]] = field(default_factory=dict)

    def raise_if_interrupted(self) -> None:
        """Raise Interrupted if a signal ended the run."""
        if self.stop_signal is not None:
            where = f"; its ledgers are in {self.run_directory}" if self.run_directory.is_dir() else ""
            raise Interrupted(f"the run `{self.run_directory.name}` was interrupted{where}.", self.stop_signal)


def find_unreached(announced: Collection[str], failed: Collection[str]) -> tuple[str, ...]:
    """The jobs that could have attached a model and did not. announced: those that have reached their join.

    Baseline rank 0 opens the run, and no target can announce itself before that: if the baseline is missing, nothing is
    known about the target. A job that failed by itself may have failed before it had a model.
    """
    missing = ("target",) if "baseline" in announced else ("baseline",)
    return tuple(role for role in missing if role not in announced and role not in failed)


def describe_unreached(roles: Sequence[str]) -> str:
    """Why `--attach` may have found nothing, as sentences."""
    return (
        f"--attach reached no model in the {' job and in the '.join(roles)} job: no module there has hooks. Either its "
        "program called no torch module that has parameters, or its Python ignores PYTHONPATH (python -I, -E "
        "or -S; a command that sets PYTHONPATH itself). See docs/zero-code.md."
    )


def newest_run_of_role(out: Path, role: str) -> Path:
    """The run directory under `out` to which a job of `role` wrote last; `out` itself if there is none."""
    written = [(path.stat().st_mtime, path.parent.parent) for path in out.glob(f"*/{role}/rank*")]
    return max(written)[1] if written else out
