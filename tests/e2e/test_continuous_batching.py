"""A small server with continuous batching, prefix reuse and preemption against one packed batch: rows meet by token.

Three sessions of the same conversations, each in as many passes: HEALTHY; FAULTY, where layer 2 takes positions that
are off by one after a prefix hit; and MENDED, where the fault is still there, but that layer's output is grafted. All
decoder layers' outputs are compared while both jobs run, and dumped, and then compared once more from disk. Costs about
35 s of one core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
from common import LAYERS
from pair import PairRun, Program, run_commands
from safetensors.torch import load_file
from scheduling import ROWS_PER_PASS, Scheduler
from traffic import CONVERSATIONS, of_session
from typer.testing import CliRunner

from grafter.analysis.compare.comparison_records import PointRecord, SummaryRecord, read_line
from grafter.cli.main import app
from grafter.core.records import LedgerRecord

HEALTHY, FAULTY, MENDED = range(3)
SESSIONS = 3
FAULTY_LAYER = 2
LAYER_IN, LAYER_OUT = "model.layers.in.hidden_states", "model.layers.out"

# `rel`, a ratio of squares. Measured of single rows: at most 3e-13 without the fault, at least 2.5e-4 after it.
SAME_REL, OTHER_REL = 1e-11, 1e-5

Token = tuple[str, int]


@dataclass
class Pass:
    """rows: which token each row is. after_hit: those of requests that found a beginning of theirs in the cache."""

    rows: list[Token] = field(default_factory=list)
    after_hit: set[Token] = field(default_factory=set)


class Schedule:
    """What the server does in one session, from its scheduler alone: without a model it takes a millisecond."""

    def __init__(self, session: int) -> None:
        scheduler = Scheduler(of_session(session))
        self.passes: list[Pass] = []
        while chunks := scheduler.next_pass():
            self.passes.append(Pass())
            for chunk in chunks:
                rows = [(chunk.name, position) for position in range(chunk.start, chunk.start + chunk.count)]
                self.passes[-1].rows += rows
                self.passes[-1].after_hit.update(rows if chunk.hit else ())
            scheduler.computed(chunks)
        self.preempted = scheduler.preempted
        self.times = Counter(token for one in self.passes for token in one.rows)
        self.packed = [(one.name, position) for one in of_session(session) for position in range(len(one.tokens))]
        self.never = [token for token in self.packed if token not in self.times]


SCHEDULES = [Schedule(session) for session in range(SESSIONS)]
PASSES = len(SCHEDULES[HEALTHY].passes)

BASELINE = Program("packed_batch.py", 1, {})
TARGETS = {"tp1": Program("continuous_batching.py", 1, {}), "tp2": Program("continuous_batching.py", 2, {})}

PLAN = f"""\
rules:
  - {{match: "{LAYER_IN}", role: baseline, dims: "1 t h"}}
  - {{match: "{LAYER_OUT}", role: baseline, dims: "1 t h"}}
  - {{match: "{LAYER_IN}", role: target, dims: "1 t h # tp:replicated"}}
  - {{match: "{LAYER_OUT}", role: target, dims: "1 t h # tp:replicated"}}
"""
GRAFTED = f"name == '{LAYER_OUT}' and step >= {MENDED * PASSES} and layer_id == {FAULTY_LAYER}"
DUMPED = f"name in ('{LAYER_IN}', '{LAYER_OUT}') and step < {MENDED * PASSES}"


@pytest.fixture(scope="module", params=TARGETS)
def run(request: pytest.FixtureRequest, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> PairRun:
    programs = {"baseline": BASELINE, "target": TARGETS[request.param]}
    directory = tmp_path_factory.mktemp("server")
    (directory / "plan.yaml").write_text(PLAN)
    own = {"baseline": ("--passes", PASSES), "target": ("--fault-from", FAULTY, "--fault-layer", FAULTY_LAYER)}
    # The packed batch is the same in all passes of a session: one of them is enough on disk.
    dumped = {"baseline": f"{DUMPED} and step % {PASSES} == 0", "target": DUMPED}
    commands = {
        role: [
            *("env", f"GRAFTER_DUMP_FILTER={dumped[role]}"),
            *program.command(str(directory / "saved" / role), "--weights", str(weights), "--sessions", str(SESSIONS)),
            *map(str, own[role]),
        ]
        for role, program in programs.items()
    }
    compared = f"name == '{LAYER_OUT}' and not ({GRAFTED})"
    settings = {"plan": str(directory / "plan.yaml"), "b2t_filter": GRAFTED, "compare_filter": compared}
    return run_commands(programs, commands, settings, directory)


@dataclass(frozen=True)
class Point:
    """A layer's output in one pass, and what each rank's ledger says of it."""

    session: int
    number: int
    layer: int
    records: dict[tuple[str, int], LedgerRecord]

    @property
    def computed(self) -> Pass:
        return SCHEDULES[self.session].passes[self.number]

    @property
    def step(self) -> int:
        return self.session * PASSES + self.number

    @property
    def of_target(self) -> list[LedgerRecord]:
        return [record for (role, _), record in self.records.items() if role == "target"]

    @property
    def rel(self) -> float:
        """Of the worst rank, in the rows that met."""
        found = [record.difference.rel for record in self.of_target if record.difference is not None]
        return max(rel for rel in found if rel is not None)


def points(run: PairRun, *sessions: int) -> Iterator[Point]:
    for session, number, layer in product(sessions, range(PASSES), range(LAYERS)):
        key = (session * PASSES + number, LAYER_OUT, layer)
        yield Point(session, number, layer, {rank: records[key] for rank, records in run.records.items()})


def in_words(tokens: list[Token]) -> list[str]:
    """As the ledger names them: `sequence:position..position`."""
    found: list[tuple[str, int, int]] = []
    for name, position in tokens:
        if found and (found[-1][0], found[-1][2] + 1) == (name, position):
            found[-1] = (name, found[-1][1], position)
        else:
            found.append((name, position, position))
    return [f"{name}:{first}" + (f"..{last}" if last > first else "") for name, first, last in found]


def test_the_server_does_what_servers_do() -> None:
    """Prompts come in chunks, prefill beside decode; prefixes are found; requests are preempted and computed anew."""
    for schedule in SCHEDULES:
        assert max(len(one.rows) for one in schedule.passes) == ROWS_PER_PASS
        assert any(len(dict(one.rows)) > 1 and len(one.rows) > len(dict(one.rows)) for one in schedule.passes)
        assert len(schedule.preempted) == 3 and sum(times - 1 for times in schedule.times.values()) == 9
        # What no pass computed: prefixes that a request never had to, and last tokens, of which nothing comes.
        assert len(schedule.packed) == 169 and len(schedule.times) == 139
        assert len(schedule.never) == 24 + len(CONVERSATIONS)
        assert sum(len(one.after_hit) for one in schedule.passes) == 73


def test_every_layer_of_every_pass_meets_the_packed_batch(run: PairRun) -> None:
    """All rows of a pass are matched, also those that come again; the rest of the batch is named as the baseline's."""
    matched = 0
    for point in points(run, *range(SESSIONS)):
        here, packed = point.computed.rows, SCHEDULES[point.session].packed
        others = in_words([token for token in packed if token not in here])
        for (role, _), record in point.records.items():
            is_grafted = (point.session, point.layer) == (MENDED, FAULTY_LAYER)
            written = "sent" if role == "baseline" else "grafted"
            assert record.outcome == (written if is_grafted else "compared"), record.reason
            counts = record.tokens
            assert counts is not None and (counts.matched, counts.kept_out) == (len(here), 0)
            alone, named = (counts.only_here, counts.only_here_tokens)
            met, also = (counts.only_there, counts.only_there_tokens)
            if role == "target":
                alone, named, met, also = met, also, alone, named
            assert (alone, met, also) == (len(packed) - len(here), 0, [])
            assert named and named == others[: len(named)]
        matched += len(here) if point.layer == 0 else 0
    assert matched == SESSIONS * 148
    assert all(len(records) == SESSIONS * PASSES * LAYERS for records in run.records.values())


def test_without_the_fault_every_layer_agrees(run: PairRun) -> None:
    for point in points(run, HEALTHY):
        assert point.rel < SAME_REL, (point.number, point.layer)


def test_the_fault_is_found_at_its_layer_and_its_rows(run: PairRun) -> None:
    """Exactly the passes that have a row after a prefix hit differ, from that layer on, and worst in such a row."""
    for point in points(run, FAULTY):
        after_hit = point.computed.after_hit
        if point.layer < FAULTY_LAYER or not after_hit:
            assert point.rel < SAME_REL, (point.number, point.layer)
            continue
        assert point.rel > OTHER_REL, (point.number, point.layer)
        worst = {leaf.token for record in point.of_target for leaf in record.leaves}
        assert worst <= {f"{name}:{position}" for name, position in after_hit}


def test_a_graft_of_that_layer_mends_what_follows(run: PairRun) -> None:
    """What would have been written over differs as before, and the layer behind it agrees with the baseline's."""
    for point in points(run, MENDED):
        is_wrong = point.layer == FAULTY_LAYER and point.computed.after_hit
        assert point.rel > OTHER_REL if is_wrong else point.rel < SAME_REL, (point.number, point.layer)


def test_the_values_written_are_the_baselines_for_the_rows_of_the_pass(run: PairRun) -> None:
    """Bit for bit, as the next layer got them on every rank; and the logits become what they are without the fault."""
    (packed,), servers = (
        [load_file(run.saved / role / f"rank{rank}.safetensors") for rank in range(program.ranks)]
        for role, program in run.programs.items()
    )
    rows_of = {token: row for row, token in enumerate(SCHEDULES[MENDED].packed)}
    for number, one in enumerate(SCHEDULES[MENDED].passes):
        step = MENDED * PASSES + number
        expected = packed[f"{step}.layer_out.{FAULTY_LAYER}"][[rows_of[token] for token in one.rows]]
        for server in servers:
            assert torch.equal(server[f"{step}.layer_out.{FAULTY_LAYER}"], expected)
            logits = [server[f"{session * PASSES + number}.logits"] for session in range(SESSIONS)]
            torch.testing.assert_close(logits[MENDED], logits[HEALTHY], atol=2e-5, rtol=0)
            assert bool((logits[FAULTY] - logits[HEALTHY]).abs().max() > 1e-3) == bool(one.after_hit)


def compare_dumps(run: PairRun, session: int) -> tuple[dict[tuple[str, int], PointRecord], SummaryRecord]:
    """`grafter compare` of all that a session dumped; the points by name and layer."""
    first, end = session * PASSES, (session + 1) * PASSES
    rule = ("--threshold", f"*: worst_row_rel <= {SAME_REL}", "--filter", f"step >= {first} and step < {end}")
    result = CliRunner().invoke(app, ["compare", str(run.run_directory), *rule, "--json"])
    lines = [read_line(line) for line in result.stdout.splitlines()]
    summary = lines[-1]
    assert isinstance(summary, SummaryRecord) and summary.exit_code == result.exit_code, result.output
    compared = [line for line in lines if isinstance(line, PointRecord)]
    return {(point.name, int(str(point.tags["layer_id"]))): point for point in compared}, summary


def test_the_dumps_of_a_session_agree_with_one_packed_batch(run: PairRun) -> None:
    """All passes against one, row by row: those that come again are compared each time, those never computed named."""
    compared, summary = compare_dumps(run, HEALTHY)
    assert summary.exit_code == 0, summary.sentence
    assert compared.keys() == set(product((LAYER_IN, LAYER_OUT), range(LAYERS)))
    never = SCHEDULES[HEALTHY].never
    for point in compared.values():
        tokens = point.tokens
        assert point.verdict == "passed" and tokens is not None
        assert (tokens.points_a, tokens.points_b) == (1, PASSES)
        assert (tokens.paired, tokens.again, tokens.only_a, tokens.only_b) == (148, 9, len(never), 0)
        assert tokens.only_a_tokens == in_words(never)[:5]


def test_the_dumps_of_the_faulty_session_name_layer_and_rows(run: PairRun) -> None:
    """The faulty layer is the culprit, what follows inherits, and the rows that are off are those after a hit."""
    compared, summary = compare_dumps(run, FAULTY)
    assert summary.exit_code == 1
    for (name, layer), point in compared.items():
        is_bad = layer > FAULTY_LAYER or (layer, name) == (FAULTY_LAYER, LAYER_OUT)
        assert (point.verdict == "failed") == is_bad, (name, layer)
        if is_bad:
            after_hit = [token for one in SCHEDULES[FAULTY].passes for token in one.after_hit]
            assert point.values["rows_far"] == len(after_hit)
            (leaf,) = point.leaves
            assert leaf.measures is not None and leaf.measures.rows is not None
            assert {(row.sequence, row.position) for row in leaf.measures.rows.worst} <= set(after_hit)
    assert summary.first_divergence == f"'{LAYER_OUT}' (layer_id={FAULTY_LAYER}, step={FAULTY * PASSES}), by token"
    assert summary.culprits == [summary.first_divergence]
