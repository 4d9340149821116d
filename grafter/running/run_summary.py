"""What the ledgers and summaries of one run say together: a row per point, merged over ranks, and what went wrong.

Pure but for `read_run_summary`; `grafter/show.py` draws it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grafter.control.history import history_notes
from grafter.direction import receiver_role
from grafter.errors import GrafterError
from grafter.ledger import Difference, LeafRecord, LedgerRecord, RankSummary, Role, read_run, read_summaries
from grafter.points import OWN_TAGS, PHASE, is_rank_tag

# From good to bad; a point is as bad as its worst rank.
_SEVERITY = {
    "posted": 0, "sent": 0, "compared": 1, "grafted": 1, "missed": 2, "expired": 2, "displaced": 2, "skipped": 3,
    "failed": 4,
}  # fmt: skip
# Points that do not wait, where the two sides came at different times; each side says it in its own way.
UNMET = ("missed", "expired", "displaced")
_NAMES_SHOWN = 8
_ROLES = ("baseline", "target")

RankLedger = tuple[Role, int, list[LedgerRecord]]


@dataclass(frozen=True)
class PointRow:
    """One point, on one rank or merged over all that took part.

    Shape, dtype and differences are those of the worst leaf of the worst receiver. `rel` is None where no difference
    was taken; `nonfinite` counts NaN and Inf on which the sides differ. `seconds` is the slowest rank's, of all stages.
    `disagreement` says how, where ranks had different outcomes.
    """

    step: int
    name: str
    tags: dict[str, Any]
    phase: str
    occurrence: int
    direction: str
    outcome: str
    reason: str | None
    ranks: tuple[str, ...]
    leaf: str
    shape: tuple[int, ...] | None
    dtype: str | None
    rel: float | None
    max_abs: float | None
    cosine: float | None
    nonfinite: int
    seconds: float
    bytes_received: int
    call_site: str
    disagreement: str | None = None
    # How far the sender's copies are apart, where they were compared and are not equal.
    replicas: Difference | None = None

    @property
    def label(self) -> str:
        """The point as a person reads it: `layer layer_id=3`."""
        parts = [self.name, *(f"{tag}={value}" for tag, value in self.tags.items())]
        if self.phase != PHASE:
            parts.append(f"phase={self.phase}")
        if self.occurrence:
            parts.append(f"#{self.occurrence}")
        return " ".join(parts)

    @property
    def is_trouble(self) -> bool:
        return self.outcome in ("failed", "skipped")

    def as_json(self) -> str:
        """One line; NaN and Infinity as in the ledger."""
        replicas = self.replicas.model_dump() if self.replicas is not None else None
        return json.dumps({**asdict(self), "replicas": replicas})


@dataclass(frozen=True)
class RunSummary:
    """One run directory, read. `notes` are worth knowing, `problems` make the run a failure; both are sentences."""

    run_directory: Path
    rows: list[PointRow]
    notes: list[str]
    problems: list[str]
    # Points on disk, of all ranks; and whether they can be grafted from later.
    saved: int = 0
    is_recording: bool = False

    def count(self, *outcomes: str) -> int:
        return sum(row.outcome in outcomes for row in self.rows)


def read_run_summary(run_directory: Path, all_ranks: bool = False) -> RunSummary:
    """Read everything under `<dir>/<run_name>`. `all_ranks`: a row per point and rank, senders too.

    Raises GrafterError where a line of a ledger is not a record.
    """
    ledgers = list(read_run(run_directory))
    summaries = read_summaries(run_directory)
    key_tags = _read_key_tags(run_directory)
    rows = merge_ranks(ledgers, key_tags)
    problems = find_problems(rows, summaries, _read_attach(run_directory))
    notes = history_notes(run_directory) + find_notes(ledgers, rows, summaries)
    saved = sum(summary.dumped for summary in summaries)
    is_recording = any(_is_recording(run_directory / role) for role in _ROLES)
    shown = list_ranks(ledgers) if all_ranks else rows
    return RunSummary(run_directory, shown, notes, problems, saved, is_recording)


def find_run(directory: Path) -> Path:
    """`directory` if it is a run, else the newest run in it. Raises GrafterError where there is none."""
    if not directory.is_dir():
        if directory.exists():
            raise GrafterError(
                f"{directory} is a file and no run's directory. Give a run directory, or the --out directory of "
                "`grafter run`; `grafter report` also takes what `grafter compare --json` wrote."
            )
        raise GrafterError(
            f"{directory}: there is no such file or directory. Give a run directory, or the --out directory of "
            "`grafter run`; `grafter report` also takes a file of `grafter compare --json`."
        )
    if _written(directory):
        return directory
    runs = [(max(times), path) for path in directory.iterdir() if path.is_dir() and (times := _written(path))]
    if not runs:
        raise GrafterError(_why_no_run(directory))
    return max(runs)[1]


def _why_no_run(directory: Path) -> str:
    """What the directory has instead of ledgers, and what to do with it."""
    if directory.name in _ROLES and any(directory.glob("rank*.dumps.jsonl")):
        directory, roles = directory.parent, [directory.name]
    else:
        roles = [role for role in _ROLES if any((directory / role).glob("rank*.dumps.jsonl"))]
    if any(_is_recording(directory / role) for role in roles):
        return (
            f"{directory} holds a recording of the {' and the '.join(roles)}, which has met nobody. Graft from it: "
            f"grafter run --peer {directory} ..."
        )
    if len(roles) == 1:
        return (
            f"{directory} holds dumps of the {roles[0]} alone, and nothing to set them against. Give two directories: "
            "grafter compare BASELINE TARGET, or grafter report BASELINE TARGET."
        )
    if roles:
        return (
            f"{directory} holds dumps of both roles, and no ledger, as the jobs did not meet. Compare them: "
            f"grafter compare {directory}, or grafter report {directory}."
        )
    return (
        f"{directory} holds no run: no <run>/<role>/rank<r>.ledger.jsonl is in it. A rank writes one once both jobs "
        f"have joined."
    )


def _is_recording(role_directory: Path) -> bool:
    return bool(_configuration(role_directory / "run.json").get("record"))


def _configuration(run_facts: Path) -> dict[str, Any]:
    """The settings that a run.json has; none where it is missing or damaged, which those who need it tell."""
    try:
        found = json.loads(run_facts.read_bytes())["configuration"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(run_directory: Path) -> list[float]:
    files = [path for role in _ROLES for path in (run_directory / role).glob("rank*.ledger.jsonl")]
    return [path.stat().st_mtime for path in files]


def _read_key_tags(run_directory: Path) -> frozenset[str] | None:
    """Which tags identify a point in this run; None: all but rank tags."""
    key = _read_setting(run_directory, "key")
    return frozenset(tag.strip() for tag in key.split(",")) if key else None


def _read_attach(run_directory: Path) -> str | None:
    """The patterns of `--attach`, where the run has any."""
    return _read_setting(run_directory, "attach")


def _read_setting(run_directory: Path, name: str) -> str | None:
    """A setting of the run as its first role has it that has it; None where no role has."""
    for path in sorted(run_directory.glob("*/run.json")):
        value = _configuration(path).get(name)
        if value:
            return str(value)
    return None


# Rows.


def list_ranks(ledgers: Iterable[RankLedger]) -> list[PointRow]:
    """A row per record, in the order of steps and then of each rank."""
    records = [record for _, _, ranks_records in ledgers for record in ranks_records]
    records.sort(key=lambda record: (record.step, record.sequence, record.role, record.role_rank))
    return [_row([record], _tags(record, None)) for record in records]


def merge_ranks(ledgers: Sequence[RankLedger], key_tags: frozenset[str] | None = None) -> list[PointRow]:
    """A row per point, in the order of steps and then of the first rank that recorded it."""
    present = {f"{role} {rank}" for role, rank, _ in ledgers}
    groups = group_points(ledgers, key_tags)
    return [_row(group, _tags(group[0], key_tags), _disagreement(group, present)) for group in groups]


def group_points(ledgers: Sequence[RankLedger], key_tags: frozenset[str] | None = None) -> list[list[LedgerRecord]]:
    """The records of each point, over all ranks; in the order of `merge_ranks`, one for each of its rows."""
    groups: dict[str, list[LedgerRecord]] = {}
    for _, _, records in ledgers:
        for record in records:
            tags = _tags(record, key_tags)
            identity = json.dumps([record.step, record.name, tags, record.phase, record.occurrence], sort_keys=True)
            groups.setdefault(identity, []).append(record)
    return sorted(groups.values(), key=lambda group: (group[0].step, group[0].sequence))


def _tags(record: LedgerRecord, key_tags: frozenset[str] | None) -> dict[str, Any]:
    """The tags that identify the point, without those that every point has."""
    return {
        tag: value
        for tag, value in record.tags.items()
        if tag not in OWN_TAGS and (tag in key_tags if key_tags is not None else not is_rank_tag(tag))
    }


def _row(group: list[LedgerRecord], tags: dict[str, Any], disagreement: str | None = None) -> PointRow:
    receiving = receiver_role(group[0].direction)
    # A point that failed is told in the receiver's words; a sender only hears of it.
    group = sorted(group, key=lambda record: (record.role != receiving, record.role_rank))
    worst = max(group, key=lambda record: _SEVERITY[record.outcome])
    leaf, difference = _worst_leaf([record for record in group if record.role == receiving] or group)
    return PointRow(
        step=worst.step,
        name=worst.name,
        tags=tags,
        phase=worst.phase,
        occurrence=worst.occurrence,
        direction=worst.direction,
        outcome=worst.outcome,
        reason=worst.reason,
        ranks=tuple(f"{record.role} {record.role_rank}" for record in group),
        leaf=leaf.path if leaf else "",
        shape=tuple(leaf.shape) if leaf else None,
        dtype=leaf.dtype if leaf else None,
        rel=difference.rel if difference else None,
        max_abs=difference.max_abs if difference else None,
        cosine=difference.cosine if difference else None,
        nonfinite=difference.nan + difference.inf if difference else 0,
        seconds=max(sum(record.seconds.values()) for record in group),
        bytes_received=sum(record.bytes_received for record in group),
        call_site=worst.call_site,
        disagreement=disagreement,
        replicas=_unequal_replicas(group),
    )


def _unequal_replicas(group: list[LedgerRecord]) -> Difference | None:
    compared = (leaf.replicas for record in group for leaf in record.leaves if leaf.replicas is not None)
    return next((replicas for replicas in compared if replicas.mismatched_fraction), None)


def _worst_leaf(receivers: list[LedgerRecord]) -> tuple[LeafRecord | None, Difference | None]:
    """The leaf that differs most over all receivers, and by how much; without differences, the first leaf."""
    leaves = [leaf for record in receivers for leaf in record.leaves]
    compared = [leaf for leaf in leaves if leaf.difference is not None]
    if compared:
        leaf = max(compared, key=lambda leaf: _badness(leaf.difference))
        return leaf, leaf.difference
    whole = [record.difference for record in receivers if record.difference is not None]
    return (leaves[0] if leaves else None), max(whole, key=_badness, default=None)


def _badness(difference: Difference | None) -> tuple[bool, float]:
    assert difference is not None
    rel = difference.rel
    return difference.nan + difference.inf > 0, -1.0 if rel is None else rel


def _disagreement(group: list[LedgerRecord], present: set[str]) -> str | None:
    """How the ranks of one point differ in what happened, or None."""
    there = {f"{record.role} {record.role_rank}": record.outcome for record in group}
    called = {f"{role} {rank}" for role, ranks in group[0].participants.items() for rank in ranks}
    # A rank whose ledger is not here at all may be on another machine.
    absent = sorted((called & present) - there.keys())
    kinds = {_kind(outcome) for outcome in there.values()}
    if len(kinds) == 1 and not absent:
        return None
    return "; ".join([f"{rank}: {outcome}" for rank, outcome in there.items()] + [f"{r}: no record" for r in absent])


def _kind(outcome: str) -> str:
    if outcome in UNMET:
        return "missed"
    return "well" if _SEVERITY[outcome] < 2 else outcome


# Sentences.


def find_problems(rows: list[PointRow], summaries: list[RankSummary], attach: str | None = None) -> list[str]:
    """What makes a run a failure, whatever its jobs' exit codes say. attach: the patterns of `--attach`, if any."""
    problems = []
    failed = [row for row in rows if row.outcome == "failed"]
    if failed:
        points = "1 point" if len(failed) == 1 else f"{len(failed)} points"
        problems.append(f"{points} failed; the first is {failed[0].label} at step {failed[0].step}.")
    apart = [row for row in rows if row.replicas is not None]
    if apart:
        points = "1 point" if len(apart) == 1 else f"{len(apart)} points"
        worst = max(apart, key=lambda row: row.replicas.max_abs or 0.0 if row.replicas else 0.0)
        figure = worst.replicas.max_abs if worst.replicas else None
        problems.append(
            f"the sender's replicas differ at {points}, though they were declared copies; the worst is {worst.label} "
            f"at "
            f"step {worst.step}" + (f" (max |d| {figure:.3g})." if figure is not None else ".")
        )
    by_error: dict[str, list[str]] = {}
    for summary in summaries:
        if summary.error:
            text = f"{summary.error_kind}: {summary.error}" if summary.error_kind else summary.error
            by_error.setdefault(text, []).append(f"{summary.role} {summary.role_rank}")
    problems += [f"{', '.join(ranks)} left with {text}" for text, ranks in by_error.items()]
    if summaries and all(summary.only_dumps for summary in summaries):
        if not any(summary.dumped or summary.dumps_left_out for summary in summaries):
            problems.append(_why_nothing(rows, summaries, "nothing was saved", attach))
        elif not any(summary.dumped for summary in summaries):
            problems.append("nothing was saved: all points that the dump filter matched were left out (see the notes).")
    elif not any(row.outcome in ("grafted", "compared") for row in rows):
        problems.append(_why_nothing(rows, summaries, attach=attach))
    return problems


def _why_nothing(
    rows: list[PointRow],
    summaries: list[RankSummary],
    head: str = "nothing was grafted or compared",
    attach: str | None = None,
) -> str:
    if rows and all(row.outcome in UNMET for row in rows):
        return (
            f"{head}: all {len(rows)} points were missed. A side with wait=job does not wait for the other: let the "
            "receiver wait (wait=both there), or come later, and see that entries are kept for long enough "
            "(GRAFTER_OUTBOX_SECONDS, GRAFTER_OUTBOX_BYTES)."
        )
    if rows:
        return f"{head}: of {len(rows)} matched points none got through."
    if not summaries:
        hint = "" if attach else " Programs that never import grafter need --attach '*'."
        return (
            f"{head}: the jobs ended before both had joined. A job joins at its first call of grafter; one that never "
            f"calls it, or fails before, keeps the other waiting.{hint} See the ends of their outputs above."
        )
    unmatched = _unmatched(summaries)
    if any(summary.error for summary in summaries):
        return f"{head}: the run ended before its first point was complete (see above)."
    if not unmatched:
        if any(summary.hooks_never_fired for summary in summaries):
            return f"{head}: modules have hooks, and no call reached them."
        if attach:
            return f"{head}: no module was attached: --attach {attach!r} matches none (see the jobs' outputs above)."
        return f"{head}: no rank called `grafter.dump` at all."
    calls = max(max(counts.values()) for counts in unmatched.values())
    names = f"{len(unmatched)} name{'s' * (len(unmatched) != 1)}"
    return f"{head}: no filter matched a point; {names} came, up to {calls} times a rank (see the notes)."


def find_notes(ledgers: list[RankLedger], rows: list[PointRow], summaries: list[RankSummary]) -> list[str]:
    """What a reader should know besides the rows."""
    notes = [
        f"ranks disagree on {row.label} at step {row.step}: {row.disagreement}" for row in rows if row.disagreement
    ]
    if len(notes) > _NAMES_SHOWN:
        notes = [*notes[:_NAMES_SHOWN], f"and {len(notes) - _NAMES_SHOWN} more points on which ranks disagree"]
    if any(row.nonfinite for row in rows):
        notes.append("! marks points where the sides differ in NaN or Inf; rel and max_abs are over the finite values")
    notes += _unmet_notes(rows) + _token_notes(ledgers)
    notes += _dump_notes(summaries)
    unmatched = _unmatched(summaries)
    notes += [_filter_note(text, list(unmatched)) for text in _common([s.filters_never_matched for s in summaries])]
    for tag in _common([s.tags_never_seen for s in summaries]):
        notes.append(f"no point had the tag {tag}, which a filter asks for{_near(tag, _seen_tags(rows))}")
    if unmatched:
        shown = [f"{name} ({_counts(counts)})" for name, counts in list(unmatched.items())[:_NAMES_SHOWN]]
        more = f", and {len(unmatched) - _NAMES_SHOWN} more" if len(unmatched) > _NAMES_SHOWN else ""
        notes.append(f"names that no filter matched: {', '.join(shown)}{more}")
    closed = {(summary.role, summary.role_rank) for summary in summaries}
    silent = [f"{role} {rank}" for role, rank, _ in ledgers if (role, rank) not in closed]
    if silent:
        notes.append(f"ended without closing (killed, crashed, or still running): {', '.join(silent)}")
    return notes


def _unmet_notes(rows: list[PointRow]) -> list[str]:
    """Points that do not wait, and that did not meet: how many, and why the first did not."""
    unmet = [row for row in rows if row.outcome in UNMET]
    if not unmet:
        return []
    first = unmet[0]
    points = "1 point was" if len(unmet) == 1 else f"{len(unmet)} points were"
    return [f"{points} missed, as nobody waited; the first is {first.label} at step {first.step}: {first.reason}"]


def _token_notes(ledgers: list[RankLedger]) -> list[str]:
    """Rows addressed by token that only one side had: how many points have any, and what the first of them left out."""
    found: dict[tuple[str, str, int, str, int], str] = {}
    for role, role_rank, records in ledgers:
        for record in records:
            tokens = record.tokens
            if tokens is None or not (tokens.only_here or tokens.only_there):
                continue
            key = (record.name, repr(record.tags), record.step, record.phase, record.occurrence)
            sides = [
                f"{count} {where} ({', '.join(names)}{', say' if len(names) > 3 else ''})"
                for count, where, names in (
                    (tokens.only_here, f"only at {role} rank {role_rank}", tokens.only_here_tokens),
                    (tokens.only_there, "only at the other side", tokens.only_there_tokens),
                )
                if count
            ]
            found.setdefault(key, f"{record.name} at step {record.step}: {'; '.join(sides)}")
    if not found:
        return []
    first = next(iter(found.values()))
    return [f"points with rows whose token only one side had, which were left out: {len(found)}. {first}"]


def _dump_notes(summaries: list[RankSummary]) -> list[str]:
    """What of the dumps is not what was asked for."""
    saved = {
        role: sum(s.dumped for s in summaries if s.role == role) for role in dict.fromkeys(s.role for s in summaries)
    }
    notes = []
    if any(saved.values()):
        notes.append(f"points saved to disk: {', '.join(f'{role} {count}' for role, count in saved.items())}")
    lost = [f"{s.role} {s.role_rank}: {s.dumps_lost}" for s in summaries if s.dumps_lost]
    if lost:
        notes.append(f"points that were to be saved and are lost (a full disk, say; see the log): {', '.join(lost)}")
    for limit in ("steps", "points", "bytes"):
        left_out = [f"{s.role} {s.role_rank}: {n}" for s in summaries if (n := s.dumps_left_out.get(limit, 0))]
        if left_out:
            notes.append(f"points that the limit of {limit} kept from being saved: {', '.join(left_out)}")
    return notes


def _unmatched(summaries: list[RankSummary]) -> dict[str, dict[Role, int]]:
    """Name -> role -> how often the rank that called it most did."""
    counts: dict[str, dict[Role, int]] = {}
    for summary in summaries:
        for name, count in summary.unmatched.items():
            by_role = counts.setdefault(name, {})
            by_role[summary.role] = max(count, by_role.get(summary.role, 0))
    return counts


def _counts(by_role: dict[Role, int]) -> str:
    if len(by_role) == 2 and len(set(by_role.values())) == 1:
        return f"{next(iter(by_role.values()))} calls each"
    return ", ".join(f"{role} {count}" for role, count in by_role.items())


def _common(lists: list[list[str]]) -> list[str]:
    """What all ranks say: of a pipeline, each stage alone leaves filters unmatched."""
    return [text for text in lists[0] if all(text in other for other in lists)] if lists else []


def _filter_note(text: str, names: list[str]) -> str:
    """`text` is `direction: expression`."""
    wanted = re.findall(r"'([^']*)'|\"([^\"]*)\"", text)
    near = [name for pair in wanted for name in difflib.get_close_matches(pair[0] or pair[1], names, n=2)]
    hint = f"; there are points named {', '.join(dict.fromkeys(near))}" if near else ""
    return f"a filter never matched: {text}{hint}"


def _near(tag: str, tags: list[str]) -> str:
    near = difflib.get_close_matches(tag, tags, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _seen_tags(rows: list[PointRow]) -> list[str]:
    return sorted({tag for row in rows for tag in row.tags})
