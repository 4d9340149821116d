"""Tensors cross between real models in real shardings, none of which knows of the other or of how it is split.

Both programs of a pair share a checkpoint, but layers 0, 1 and 3 have weights of each program's own; only layer 2 is
the same in both. A run has six steps on the same tokens, and what crosses is chosen by step:

    ALONE          nothing is written; everything is compared
    B2T, T2B       every layer's input and output
    ONE_INPUT      the input of layer 2 alone, b2t; the rest of layer 2 is compared
    PROJECTED_*    q, k, v and the hidden values of the MLP, of every layer; what they become is compared
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
from common import LAYERS
from pair import LLAMA, LLAMA_TP, MEGATRON, TITAN, PairRun, Program, run_programs
from rope_order import from_titan

ALONE, B2T, T2B, ONE_INPUT, PROJECTED_B2T, PROJECTED_T2B = range(6)
SHARED_LAYER = 2
OWN_LAYERS = [layer for layer in range(LAYERS) if layer != SHARED_LAYER]
RESIDUAL = ("layer_in", "layer_out")
PROJECTED = ("q", "k", "v", "mlp_hidden")
NAMES = (*RESIDUAL, *PROJECTED, "attn", "mlp_out")

B2T_FILTER = (
    f"step == {B2T} and name in {RESIDUAL} or step == {ONE_INPUT} and name == 'layer_in' and layer_id == {SHARED_LAYER}"
    f" or step == {PROJECTED_B2T} and name in {PROJECTED}"
)
T2B_FILTER = f"step == {T2B} and name in {RESIDUAL} or step == {PROJECTED_T2B} and name in {PROJECTED}"
COMPARE_FILTER = (
    f"step == {ALONE} or step == {ONE_INPUT} and name != 'layer_in' and layer_id == {SHARED_LAYER}"
    f" or step >= {PROJECTED_B2T} and (name == 'attn' or name == 'mlp_out' and layer_id == {SHARED_LAYER})"
)
DIRECTIONS = {B2T: "b2t", T2B: "t2b", PROJECTED_B2T: "b2t", PROJECTED_T2B: "t2b"}

# `rel`, a ratio of squares: in float32 it is some 1e-14 between two ways to compute one value.
SAME_REL, OTHER_REL = 1e-12, 1e-2
# On logits of about 1, most of whose differences come from the order in which sums over 128 values are taken.
LOGITS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Pair:
    baseline: Program
    target: Program
    # By name of a point: only where the values mean different things.
    transforms: dict[str, str] = field(default_factory=dict)
    titan: str | None = None

    def programs(self) -> dict[str, Program]:
        return {"baseline": self.baseline, "target": self.target}


def _rope(function: str) -> dict[str, str]:
    path = Path(__file__).parent / "programs" / "rope_order.py"
    return dict.fromkeys(("q", "k"), f"{path}:{function}")


PAIRS = {
    "llama-to-llama-tp": Pair(LLAMA, LLAMA_TP),
    "llama-to-titan": Pair(LLAMA, TITAN, _rope("target_is_titan"), "target"),
    "llama-to-megatron": Pair(LLAMA, MEGATRON),
    "titan-to-megatron": Pair(TITAN, MEGATRON, _rope("baseline_is_titan"), "baseline"),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


@pytest.fixture(scope="module")
def run(pair: Pair, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> PairRun:
    directory = tmp_path_factory.mktemp("pair")
    settings = {"b2t_filter": B2T_FILTER, "t2b_filter": T2B_FILTER, "compare_filter": COMPARE_FILTER}
    if pair.transforms:
        rules = [f"  - {{match: {name}, transform: '{path}'}}" for name, path in pair.transforms.items()]
        (directory / "plan.yaml").write_text("\n".join(["rules:", *rules, ""]))
        settings["plan"] = str(directory / "plan.yaml")
    return run_programs(pair.programs(), settings, directory, weights, OWN_LAYERS, steps=6)


def matched_points() -> Iterator[tuple[tuple[int, str, int], str]]:
    """Every point of the run that a filter matches, with its direction: the filters' text, said once more by hand."""
    for name, layer in product(NAMES, range(LAYERS)):
        yield (ALONE, name, layer), "compare"
    for (step, direction), layer in product(DIRECTIONS.items(), range(LAYERS)):
        for name in RESIDUAL if step in (B2T, T2B) else PROJECTED:
            yield (step, name, layer), direction
        if step in (PROJECTED_B2T, PROJECTED_T2B):
            yield (step, "attn", layer), "compare"
    for step in (PROJECTED_B2T, PROJECTED_T2B):
        yield (step, "mlp_out", SHARED_LAYER), "compare"
    for name in NAMES:
        yield (ONE_INPUT, name, SHARED_LAYER), "b2t" if name == "layer_in" else "compare"


def receiver_of(direction: str) -> str:
    return "baseline" if direction == "t2b" else "target"


def sender_of(direction: str) -> str:
    return "target" if direction == "t2b" else "baseline"


def test_every_point_is_grafted_sent_or_compared(run: PairRun, pair: Pair) -> None:
    """On every rank of both jobs, every point that a filter matches, and no other, has the outcome that it asks for."""
    for role, program in pair.programs().items():
        expected = {
            point: "compared" if direction == "compare" else "grafted" if role == receiver_of(direction) else "sent"
            for point, direction in matched_points()
        }
        for rank in range(program.ranks):
            records = run.records[role, rank]
            reasons = {point: record.reason for point, record in records.items() if record.reason}
            assert {point: record.outcome for point, record in records.items()} == expected, reasons


def test_left_alone_the_jobs_differ(run: PairRun) -> None:
    """Layer 0 has the same input in both jobs and gives another output, and so it goes on to the logits."""
    assert run.difference(ALONE, "layer_in", 0) == 0
    for layer in range(LAYERS):
        assert run.difference(ALONE, "layer_out", layer) > OTHER_REL
    baseline, target = run.logits("baseline", ALONE), run.logits("target", ALONE)
    assert (baseline - target).norm() > 0.3 * baseline.norm()


@pytest.mark.parametrize("step", [B2T, T2B])
def test_grafting_every_layer_makes_the_logits_equal(run: PairRun, step: int) -> None:
    """The receiving job's logits become the sending job's, and those are what they were."""
    sender, receiver = sender_of(DIRECTIONS[step]), receiver_of(DIRECTIONS[step])
    torch.testing.assert_close(
        run.logits(receiver, step), run.logits(sender, step), atol=LOGITS_TOLERANCE, rtol=LOGITS_TOLERANCE
    )
    assert torch.equal(run.logits(sender, step), run.logits(sender, ALONE))


@pytest.mark.parametrize("step", [B2T, T2B, PROJECTED_B2T, PROJECTED_T2B])
def test_what_is_written_is_what_was_sent(run: PairRun, pair: Pair, step: int) -> None:
    """Put together without grafter, the receiver's tensors are the sender's bit for bit, after the RoPE permutation."""
    for name, layer in product(RESIDUAL if step in (B2T, T2B) else PROJECTED, range(LAYERS)):
        value = {role: run.whole(role, step, name, layer) for role in pair.programs()}
        if name in pair.transforms:
            assert pair.titan is not None
            value[pair.titan] = from_titan(value[pair.titan])
        assert torch.equal(value["baseline"], value["target"]), (name, layer)


@pytest.mark.parametrize("step", [B2T, T2B])
def test_a_write_into_an_output_reaches_the_next_layer(run: PairRun, pair: Pair, step: int) -> None:
    """Each layer's output was grafted, so the next one's input is equal already before it is grafted itself."""
    role = receiver_of(DIRECTIONS[step])
    for rank, layer in product(range(pair.programs()[role].ranks), range(LAYERS)):
        difference = run.records[role, rank][step, "layer_in", layer].difference
        assert difference is not None and difference.max_abs == 0, (rank, layer)


def test_a_write_into_an_input_reaches_its_layer(run: PairRun) -> None:
    """Given the baseline's input, the layer with the same weights computes the same values, in whatever sharding."""
    for name in NAMES[1:]:
        assert run.difference(ALONE, name, SHARED_LAYER) > OTHER_REL, name
        assert run.difference(ONE_INPUT, name, SHARED_LAYER) < SAME_REL, name


@pytest.mark.parametrize("step", [PROJECTED_B2T, PROJECTED_T2B])
def test_a_write_into_a_projection_reaches_what_is_made_of_it(run: PairRun, step: int) -> None:
    """With the other job's q, k and v, attention gives the other job's values; so does the MLP's second projection."""
    for layer in range(LAYERS):
        assert run.difference(ALONE, "attn", layer) > OTHER_REL
        assert run.difference(step, "attn", layer) < SAME_REL, layer
    assert run.difference(step, "mlp_out", SHARED_LAYER) < SAME_REL


def test_each_receiver_gets_its_own_part_once(run: PairRun) -> None:
    """What crosses for a rank is as large as its local tensor, and all that is sent arrives."""
    for point, direction in matched_points():
        if direction == "compare":
            continue
        sent = received = 0
        for (role, rank), records in run.records.items():
            record = records[point]
            sent += record.bytes_sent
            received += record.bytes_received
            if role == receiver_of(direction):
                (leaf,) = record.leaves
                assert record.bytes_received == 4 * torch.Size(leaf.shape).numel(), (point, rank)
        assert sent == received, point


def test_titan_gives_dtensors_and_pending_collectives(run: PairRun, pair: Pair) -> None:
    """All three kinds of value that a point may be given were among those above."""
    for role, program in pair.programs().items():
        expected = {"Tensor", "DTensor", "AsyncCollectiveTensor"} if program is TITAN else {"Tensor"}
        assert run.kinds(role) == expected


def test_the_rope_permutation_is_needed(run: PairRun, pair: Pair) -> None:
    """Where q and k have a transform, the same layer with the same input has them in another order; v it has not."""
    for name in ("q", "k", "v"):
        values = {role: run.whole(role, ONE_INPUT, name, SHARED_LAYER) for role in pair.programs()}
        same = torch.allclose(values["baseline"], values["target"], atol=1e-4)
        assert same == (name not in pair.transforms), name
