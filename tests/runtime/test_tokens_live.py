"""Rows by token between real jobs: batches of other shapes and orders, windows, and what is refused. About 8 s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter.analysis.run.run_summary import read_run_summary

WIDTH = 8
UNTOUCHED = -1.0
FILTERS = {
    "b2t_filter": "name.startswith('b2t')",
    "t2b_filter": "name.startswith('t2b')",
    "compare_filter": "name.startswith('cmp')",
}

# A trainer's packed batch, one sequence after the other; and an engine's, padded, in another order, of which "q" is new
# and of "y" more was generated.
PACKED = [("x", 0), ("x", 1), ("x", 2), ("y", 0), ("y", 1), ("z", 0)]
PADDED = [[("y", 0), ("y", 1), ("y", 2)], [("q", 0), None, None], [("x", 0), ("x", 1), ("x", 2)]]
BOTH = {("x", 0), ("x", 1), ("x", 2), ("y", 0), ("y", 1)}


def value_of(row: Any) -> torch.Tensor:
    """What the model makes of a token, whatever its batch."""
    if row is None:
        return torch.full((WIDTH,), 99.0)
    return torch.arange(WIDTH) + 10.0 * row[1] + 100.0 * "qxyz".index(row[0])


def tokens_of(rows: list[Any]) -> grafter.Tokens:
    """Of [t] rows, or of [b][s]."""
    if not isinstance(rows[0], list):
        return grafter.Tokens.from_positions([row and row[0] for row in rows], [row[1] if row else -1 for row in rows])
    ids = [[row and row[0] for row in own] for own in rows]
    return grafter.Tokens.from_positions(ids, [[row[1] if row else -1 for row in own] for own in rows])


def packed() -> torch.Tensor:
    return torch.stack([value_of(row) for row in PACKED])


def padded() -> torch.Tensor:
    return torch.stack([torch.stack([value_of(row) for row in own]) for own in PADDED])


# --- one packed batch against one padded, TP=1 to TP=2


def run_packed(rank: Rank) -> dict[str, Any]:
    tokens = tokens_of(PACKED)
    options = {"dims": "t h", "tokens": tokens}
    found = {}
    grafter.dump("b2t.in_place", packed(), **options)
    grafter.dump("b2t.return", packed(), **options)
    grafter.dump("cmp.equal", packed(), **options)
    grafter.dump("cmp.fault", packed(), **options)
    found["t2b"] = grafter.dump("t2b.back", torch.full((len(PACKED), WIDTH), UNTOUCHED), **options).tolist()
    grafter.dump("b2t.tree", {"ids": packed().int(), "weights": {"w": packed()[:, :2]}}, dims="t h", tokens=tokens)
    return found


def run_padded(rank: Rank) -> dict[str, Any]:
    grafter.set_axes(tp=(rank.role_rank, 2))
    tokens = tokens_of(PADDED)
    options = {"dims": "b s h[tp]", "tokens": tokens}
    own = slice(WIDTH // 2 * rank.role_rank, WIDTH // 2 * (rank.role_rank + 1))
    empty = torch.full((3, 3, WIDTH // 2), UNTOUCHED)
    found = {"in_place": grafter.dump("b2t.in_place", empty.clone(), **options)}
    kept = empty.clone()
    found["return"] = grafter.dump("b2t.return", kept, write="return", **options)
    assert torch.equal(kept, empty), "return touches no memory"
    grafter.dump("cmp.equal", padded()[..., own].contiguous(), **options)
    wrong = padded()[..., own].clone()
    wrong[2, 1, 3] += 0.5
    grafter.dump("cmp.fault", wrong, **options)
    grafter.dump("t2b.back", padded()[..., own].transpose(0, 1).contiguous().transpose(0, 1), **options)
    tree = {"ids": torch.full((3, 3, 4), -1, dtype=torch.int32), "weights": {"w": torch.zeros(3, 3, 1)}}
    grafter.dump("b2t.tree", tree, **options)
    found["ids"], found["w"] = tree["ids"], tree["weights"]["w"]
    return {name: value.tolist() for name, value in found.items()}


def expected(untouched: float = UNTOUCHED) -> torch.Tensor:
    return torch.stack(
        [
            torch.stack([value_of(row) if row in BOTH else torch.full((WIDTH,), untouched) for row in own])
            for own in PADDED
        ]
    )


def test_a_packed_batch_meets_a_padded_one_in_another_order(tmp_path: Path) -> None:
    """In both directions, TP=1 and TP=2, in place, returned, compared, and as a tree; rows without a partner stay."""
    with two_jobs(tmp_path, run_packed, run_padded, ranks=(1, 2), **FILTERS) as jobs:
        first, *others = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    (note,) = [note for note in read_run_summary(tmp_path / "run").notes if "only one side" in note]
    first_of_six = "b2t.in_place at step 0: 1 only at baseline rank 0 (z:0); 2 only at the other side (y:2, q:0)"
    assert note.endswith(f"left out: 6. {first_of_six}")
    for way in ("in_place", "return"):
        assert torch.equal(torch.cat([torch.tensor(one[way]) for one in others], dim=-1), expected())
    assert torch.equal(torch.cat([torch.tensor(one["ids"]) for one in others], dim=-1), expected().int())
    assert torch.equal(torch.cat([torch.tensor(one["w"]) for one in others], dim=-1), expected(0.0)[..., :2])
    back = [value_of(row).tolist() if row in BOTH else [UNTOUCHED] * WIDTH for row in PACKED]
    assert first["t2b"] == back
    for (role, _), records in ledgers.items():
        by_name = {record.name: record for record in records}
        assert {record.outcome for record in records} <= {"grafted", "compared", "sent"}
        for record in records:
            assert (record.tokens.matched, record.tokens.only_here, record.tokens.only_there) == (
                (5, 1, 2) if role == "baseline" else (5, 2, 1)
            )
            here, there = record.tokens.only_here_tokens, record.tokens.only_there_tokens
            assert (here, there) == ((["z:0"], ["y:2", "q:0"]) if role == "baseline" else (["y:2", "q:0"], ["z:0"]))
        if role == "target":
            assert by_name["cmp.equal"].difference.rel == 0 and by_name["cmp.equal"].before.numel == 5 * WIDTH // 2
            fault = by_name["cmp.fault"]
            assert fault.difference.max_abs == 0.5 and fault.difference.max_abs_index == [2, 1, 3]
            assert fault.leaves[0].token == "x:1"
            assert by_name["cmp.fault"].bytes_received == 4 * 5 * WIDTH // 2


# --- rows cut over ranks


def run_cut(rank: Rank) -> Any:
    """Sequence parallel, context parallel, and data parallel ranks that have other rows each."""
    rows = [("x", n) for n in range(8)] + [("y", n) for n in range(8)]
    whole = torch.stack([value_of(row) for row in rows])
    grafter.set_axes(cp=(rank.role_rank, 2))
    chunks = torch.arange(16).view(2, 4, 2)
    zigzag = torch.cat([chunks[:, rank.role_rank], chunks[:, 3 - rank.role_rank]], dim=1).reshape(-1)
    own = torch.arange(16).view(8, 2)[:, rank.role_rank]
    tokens, told = tokens_of(rows), tokens_of([rows[n] for n in own.tolist()])
    if rank.is_baseline:
        grafter.dump("b2t.zigzag", whole[zigzag], dims="t[cp:zigzag] h", seq_lens=[8, 8], tokens=tokens)
        grafter.dump("b2t.own", whole[own], dims="t h", tokens=told)
        grafter.dump("b2t.undeclared", whole[own], tokens=told)
        return None
    every, backwards = tokens_of(rows[1 - rank.role_rank :: 2]), tokens_of(rows[::-1])
    found = [
        grafter.dump("b2t.zigzag", torch.zeros(8, WIDTH), dims="t[cp] h", tokens=every),
        grafter.dump("b2t.own", torch.zeros(16, WIDTH // 2), dims="t h[cp]", tokens=backwards),
        grafter.dump("b2t.undeclared", torch.zeros(16, WIDTH), dims="t h # cp:replicated", tokens=backwards),
    ]
    half = slice(WIDTH // 2 * rank.role_rank, WIDTH // 2 * (rank.role_rank + 1))
    wanted = [whole[1 - rank.role_rank :: 2], whole.flip(0)[:, half], whole.flip(0)]
    return [torch.equal(one, other) for one, other in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_rows_that_are_cut_over_ranks_meet_by_token(tmp_path: Path, backend: str) -> None:
    """Each rank tells its own rows, or all ranks tell those of all where dims cut them (zigzag included)."""
    with two_jobs(tmp_path, run_cut, run_cut, ranks=(2, 2), backend=backend, **FILTERS) as jobs:
        results = succeed(jobs.wait())
    assert results[2:] == [[True] * 3] * 2


# --- what does not fit


def run_misfits(rank: Rank) -> dict[str, Any]:
    x, tokens = torch.zeros(4, 2), grafter.Tokens.from_lengths(["x"], [4])
    mine, theirs = rank.is_baseline, not rank.is_baseline

    def take_all(given: grafter.GraftTransformInput) -> torch.Tensor:
        return given.received_list[0]

    grafter.dump("cmp.one_side", x, dims="t h", **({"tokens": tokens} if mine else {}))
    grafter.dump("cmp.no_rows", x, dims="m h" if theirs else "t h", tokens=tokens)
    grafter.dump("cmp.short", x[:3] if theirs else x, dims="t h", tokens=tokens)
    grafter.dump("cmp.whole", x, dims="t h", tokens=tokens, transform=take_all)
    other = tokens if mine else grafter.Tokens.from_lengths(["y"], [4])
    grafter.dump("cmp.strangers", x, dims="t h", tokens=other)
    errors = {}
    for name, options in {
        "far": {"tokens": tokens, "start": 5},
        "negative": {"tokens": tokens, "start": -1},
        "unknown": {"tokens": tokens, "start": {"z": 1}},
        "untold": {"start": 2},
        "no_tokens": {"tokens": "x"},
    }.items():
        try:
            grafter.dump(f"cmp.{name}", x, dims="t h", **(options if mine else {"tokens": tokens}))
        except grafter.GrafterError as error:
            errors[name] = str(error)
    return errors


def test_what_does_not_fit_is_refused_with_a_reason(tmp_path: Path) -> None:
    """A failed point on both sides, and where the call itself is wrong, an error there; nothing is sent."""
    with two_jobs(tmp_path, run_misfits, run_misfits, **FILTERS) as jobs:
        errors, none = succeed(jobs.wait())
        records = {record.name: record for record in jobs.ledgers()["target", 0]}
        theirs = {record.name: record for record in jobs.ledgers()["baseline", 0]}
    assert none == {}
    for name, parts in {
        "one_side": ["failed", "baseline rank 0 gives tokens=", "target rank 0", "on every rank of both sides"],
        "no_rows": ["failed", "target rank 0", "'m h'", "nor `b` or `s`", 'dims="t h[tp]"'],
        "short": ["failed", "target rank 0 announces 4 rows", "[3, 2] has 3"],
        "whole": ["failed", 'receives="resharded"'],
        "strangers": ["skipped", "4 are only at the baseline (x:0..3, say), 4 are only at the target (y:0..3, say)"],
        "far": ["failed", "start= is 5 for the sequence 'x', whose rows end at 4", "from 0 to 4"],
        "negative": ["failed", "start= is -1"],
        "unknown": ["failed", "names the sequence 'z'"],
        "untold": ["failed", "give tokens=, too"],
        "no_tokens": ["failed", "tokens= is a grafter.Tokens"],
    }.items():
        record = records[f"cmp.{name}"]
        assert all(part in f"{record.outcome} {record.reason}" for part in parts), record.reason
        assert theirs[f"cmp.{name}"].reason == record.reason
        assert not record.bytes_received
    assert {name: error in (records[f"cmp.{name}"].reason or "") for name, error in errors.items()} == dict.fromkeys(
        ["far", "negative", "unknown", "untold", "no_tokens"], True
    )


# --- a model's own points, in a context; ids that differ


def attached(rank: Rank) -> Any:
    """Two layers, hooked. The jobs call the sequences otherwise, and the target's second layer is off for one token."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)).requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    texts = {"r1": [5, 6, 7], "r2": [5, 9], "r3": [8, 8, 8, 8]}
    grafter.attach(model)
    names = ["r2", "r1", "r3"] if rank.is_baseline else ["r1", "r3", "r2"]
    ids = [token for name in names for token in texts[name]]
    sequences = [name if rank.is_baseline else 100 + number for number, name in enumerate(names) for _ in texts[name]]
    places = [place for name in names for place in range(len(texts[name]))]
    x = torch.tensor([[token, place, token * place, 1.0] for token, place in zip(ids, places, strict=True)])
    if not rank.is_baseline:
        model[1].register_forward_hook(lambda module, args, out: out + torch.eye(9)[4][:, None], prepend=True)
    tokens = grafter.Tokens.from_positions(sequences, places, token_ids=ids)
    with grafter.context(tokens=tokens):
        model(x)
        grafter.dump("cmp.none", torch.zeros(3), tokens=None)
    return None


def test_a_context_gives_tokens_to_a_models_points_and_token_ids_pair_sequences(tmp_path: Path) -> None:
    """`tokens=None` takes them away again."""
    with two_jobs(tmp_path, attached, attached, compare_filter="True") as jobs:
        succeed(jobs.wait())
        records = jobs.ledgers()["target", 0]
    assert [record.outcome for record in records] == ["compared"] * len(records) and len(records) >= 4
    assert records[-1].name == "cmp.none" and records[-1].tokens is None
    for record in records[:-1]:
        assert record.tokens.matched == 9
        is_off = record.difference.max_abs > 1e-3
        assert is_off == (record.name.endswith("out") and record.tags.get("layer_id") != 0), record.name
        if is_off:
            # The row 4 of the target: the second of the sequence 101, which is the baseline's r3.
            assert record.difference.max_abs_index[0] == 4 and record.leaves[0].token == "101:1"


# --- gradients, and what is on disk


def train(rank: Rank) -> Any:
    """The gradient of a row is ten times its token's value at the baseline; at the target, 1."""
    rows = PACKED if rank.is_baseline else [row for own in PADDED for row in own]
    leaf = torch.ones(len(rows), WIDTH, requires_grad=True)
    used = grafter.dump("h", leaf * 1.0, dims="t h", tokens=tokens_of(rows), start={"x": 1}, write="return")
    scale = torch.stack([value_of(row) * 10 for row in rows]) if rank.is_baseline else torch.ones(len(rows), WIDTH)
    (used * scale).sum().backward()
    grafter.step()
    assert leaf.grad is not None
    return leaf.grad.tolist()


def test_gradients_meet_by_token_and_dumps_hold_the_rows_that_count(tmp_path: Path) -> None:
    """The gradient of a row without a partner, or before the start, stays its own."""
    with two_jobs(
        tmp_path,
        train,
        train,
        gradients=1,
        b2t_filter="phase == 'backward'",
        compare_filter="phase == 'forward'",
        dump_filter="phase == 'forward'",
    ) as jobs:
        found = succeed(jobs.wait())[1]
        records = jobs.ledgers()["target", 0]
    rows = [row for own in PADDED for row in own]
    expected = [(value_of(row) * 10 if row in BOTH and row != ("x", 0) else torch.ones(WIDTH)).tolist() for row in rows]
    assert found == expected
    assert {(r.phase, r.outcome, r.tokens.matched) for r in records} == {
        ("forward", "compared", 4),
        ("backward", "grafted", 4),
    }
    (point,) = grafter.open_dumps(tmp_path / "run" / "target")
    saved = point.tokens(0)
    assert saved is not None and saved.record().runs == (("y", 0, 3), ("q", 0, 1), (None, 0, 2), ("x", 1, 2))
    assert point.local(0).shape == (8, WIDTH)


# --- windows


def converse(rank: Rank) -> list[Any]:
    """Two conversations that grow turn by turn; each turn's tensors hold all, per token [layer, k] ids and weights."""
    found = []
    options = dict(rank.arguments[0] if rank.is_baseline else rank.arguments[1])
    tp = options.pop("tp", 1)
    grafter.set_axes(tp=(rank.role_rank, tp))
    for turn in range(1, 5):
        lengths = {"a": 3 * turn, "b": 2 * turn}
        names = ["a", "b"] if rank.is_baseline else ["b", "a"]
        tokens = grafter.Tokens.from_lengths(names, [lengths[name] for name in names])
        ids = torch.cat([torch.arange(24).view(1, 4, 6) + 100 * torch.arange(lengths[n]).view(-1, 1, 1) for n in names])
        ids = ids.chunk(tp, 1)[rank.role_rank].int()
        weights = ids.float() / 7
        if not rank.is_baseline:
            ids, weights = torch.full_like(ids, -1), torch.full_like(weights, -1)
        own = dict(options)
        if "start" in own:
            start = own.pop("start")
            own["start"] = {name: lengths[name] * (turn - 1) // turn for name in names} if start == "turn" else start
            own["start"] = [own["start"][name] for name in names] if start == "turn" and turn % 2 else own["start"]
        name = "b2t.experts"
        grafter.dump(name, {"ids": ids, "weights": weights}, dims="t layer[tp] k", tokens=tokens, layer_id=7, **own)
        found.append(int((ids[:, 0, 0] >= 0).sum()))
        grafter.step()
    return found


def rows_received(jobs: Any) -> list[tuple[Any, ...]]:
    return [
        (record.outcome, record.tokens.matched, record.tokens.kept_out, record.bytes_received)
        for record in jobs.ledgers()["target", 0]
    ]


ROW_BYTES = 4 * 6 * 4 * 2


def conversation(directory: Path, baseline: dict[str, Any], target: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What each target rank had written, and its ledger's rows."""
    with Jobs(directory, **FILTERS) as jobs:
        jobs.start("baseline", 1, converse, baseline, target)
        jobs.start("target", target.get("tp", 1), converse, baseline, target)
        results = succeed(jobs.wait())
        return results[1:], rows_received(jobs)


def test_rows_before_a_start_are_not_sent_and_stay(tmp_path: Path) -> None:
    """One side's start counts for both; it may be one number, one per sequence, or a dict."""
    written, rows = conversation(tmp_path, {"start": "turn"}, {})
    assert written == [[5, 5, 5, 5]]
    assert rows == [("grafted", 5, 5 * (turn - 1), 5 * ROW_BYTES) for turn in (1, 2, 3, 4)]


def test_a_start_beyond_the_last_row_gives_no_rows(tmp_path: Path) -> None:
    """The point is skipped, which is no failure; what the other side keeps out is no row that it has not got."""
    written, rows = conversation(tmp_path, {"start": 2}, {"start": "turn"})
    assert written == [[1, 5, 5, 5]]
    assert [row[:2] for row in rows] == [("grafted", 1), ("grafted", 5), ("grafted", 5), ("grafted", 5)]


def test_only_new_rows_are_sent_turn_by_turn_also_to_other_shards(tmp_path: Path) -> None:
    """Each side remembers by itself; one that does is enough."""
    for number, (baseline, target) in enumerate([({"new_rows_only": True}, {"tp": 2}), ({}, {"new_rows_only": True})]):
        written, rows = conversation(tmp_path / str(number), baseline, target)
        ranks = target.get("tp", 1)
        assert written == [[5, 5, 5, 5]] * ranks
        assert [row[1] for row in rows] == [5] * 4 and {row[3] for row in rows} == {5 * ROW_BYTES // ranks}
