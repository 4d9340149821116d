"""Pairs that `grafter plan suggest` finds between two module trees, how sure it is, and what it leaves out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suggest_parts import (
    MEGATRON_NAMES,
    TITAN_NAMES,
    changed,
    confidence_of,
    divided,
    found_pairs,
    left_of,
    llama,
    mixtral,
    node,
    pattern,
    renamed,
    tree,
)

from grafter.analysis.plan_suggest.assignment import best_pairs
from grafter.analysis.plan_suggest.matching import match_trees
from grafter.analysis.plan_suggest.pairs import Confidence
from grafter.capture.module_tree import ModuleTree, tree_of

HIGH = Confidence.high


@pytest.fixture(scope="module")
def llama_tree() -> ModuleTree:
    return tree_of(llama())


@pytest.fixture(scope="module")
def mixtral_tree() -> ModuleTree:
    return tree_of(mixtral())


def expected(tree: ModuleTree, names: dict[str, str]) -> dict[str, str]:
    """What a renamed copy should be paired to: all that can be called."""
    found = {}
    for one in tree.modules:
        if one.can_be_called:
            path = pattern(one.path)
            found[path] = ".".join(names.get(segment, segment) for segment in path.split("."))
    return found


@pytest.mark.parametrize("names", [TITAN_NAMES, MEGATRON_NAMES, {}])
@pytest.mark.parametrize("model", ["llama_tree", "mixtral_tree"])
def test_a_model_in_other_words_is_found_again(
    names: dict[str, str], model: str, request: pytest.FixtureRequest
) -> None:
    """Every module has its own counterpart; with high confidence, where it has weights or holds some that have."""
    ours: ModuleTree = request.getfixturevalue(model)
    suggestion = match_trees(ours, renamed(ours, names))
    assert found_pairs(suggestion) == expected(ours, names)
    bare = {"act_fn", "rotary_emb"}
    sure = {a: b for a, b in expected(ours, names).items() if a.rpartition(".")[2] not in bare}
    assert found_pairs(suggestion, HIGH) == sure
    assert suggestion.left == ()


def test_names_that_say_nothing_are_told_apart_by_shapes(llama_tree: ModuleTree) -> None:
    """Where a shape is there once, its module is found; where several have it, the pair is not high."""
    segments = {s for n in llama_tree.modules for s in n.path.split(".") if s and not s.isdecimal()}
    opaque = {segment: f"m{number}x" for number, segment in enumerate(sorted(segments))}
    suggestion = match_trees(llama_tree, renamed(llama_tree, opaque))
    right = expected(llama_tree, opaque)
    assert found_pairs(suggestion).items() <= right.items()
    layer = "model.layers.{layer_id}"
    for alone in ("mlp.down_proj", "mlp", "self_attn"):
        assert confidence_of(suggestion, f"{layer}.{alone}") != "low", alone
    assert confidence_of(suggestion, f"{layer}.mlp.down_proj") == "high"
    for several in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"):
        assert confidence_of(suggestion, f"{layer}.{several}") == "medium", several


def test_order_in_the_model_need_not_agree_where_names_do(llama_tree: ModuleTree) -> None:
    """torchtitan registers its norms after attention and feed-forward, Megatron before."""
    blocks = [list(g) for _, g in itertools.groupby(llama_tree.modules, key=lambda n: n.path.split(".")[:4])]
    reordered = ModuleTree(modules=tuple(n for block in [blocks[0], *reversed(blocks[1:])] for n in block))
    suggestion = match_trees(llama_tree, renamed(reordered, TITAN_NAMES))
    assert found_pairs(suggestion) == expected(llama_tree, TITAN_NAMES)


COLUMNS, ROWS = (
    dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"), 0),
    {
        "o_proj": 1,
        "down_proj": 1,
    },
)


@pytest.mark.parametrize("turned", [False, True])
def test_sizes_may_be_divided_by_tensor_parallelism(llama_tree: ModuleTree, turned: bool) -> None:
    """Either side; the reasons say by how much and in which dim."""
    shards = renamed(divided(llama_tree, 2, {**COLUMNS, **ROWS}), TITAN_NAMES)
    suggestion = match_trees(shards, llama_tree) if turned else match_trees(llama_tree, shards)
    pairs = found_pairs(suggestion, HIGH)
    if turned:
        pairs = {b: a for a, b in pairs.items()}
    bare = {"act_fn", "rotary_emb"}
    assert pairs == {a: b for a, b in expected(llama_tree, TITAN_NAMES).items() if a.rpartition(".")[2] not in bare}
    assert suggestion.ratio == (-2 if turned else 2)
    side = "the baseline's" if turned else "the target's"
    (down,) = [named.pair for named in suggestion.pairs if named.baseline_path.endswith(("down_proj", "w2"))]
    assert down.reasons[0] == f"shapes equal, {side} divided by 2 in dim 1"


def fused_llama(llama_tree: ModuleTree) -> ModuleTree:
    """As Megatron has it: q, k and v in one, gate and up in one."""
    nodes = []
    for one in renamed(llama_tree, MEGATRON_NAMES).modules:
        segment = one.path.rpartition(".")[2]
        prefix = one.path.rpartition(".")[0]
        if segment in ("k_proj", "v_proj", "up_proj"):
            continue
        if segment == "q_proj":
            one = node(f"{prefix}.linear_qkv", 32, 16, kind="ColumnParallelLinear")
        elif segment == "gate_proj":
            one = node(f"{prefix}.linear_fc1", 48, 16, kind="ColumnParallelLinear")
        nodes.append(one)
    return ModuleTree(modules=tuple(nodes))


FUSED_COLUMNS = {"linear_qkv": 0, "linear_fc1": 0, "word_embeddings": 0, "output_layer": 0}


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_modules_are_left_out_and_their_parts_named(llama_tree: ModuleTree, ranks: int) -> None:
    """Even where tensor parallelism makes `linear_fc1` as large as `up_proj`: 48 x 16, divided by 2, is 24 x 16."""
    fused = divided(fused_llama(llama_tree), ranks, {**FUSED_COLUMNS, "linear_proj": 1, "linear_fc2": 1})
    suggestion = match_trees(llama_tree, fused)
    layer, theirs = "model.layers.{layer_id}", "decoder.layers.{layer_id}"
    by = ", divided by 2" if ranks == 2 else ""
    left = left_of(suggestion, "target")
    assert (
        left[f"{theirs}.self_attention.linear_qkv"] == f"holds q_proj, k_proj, v_proj of there in one (their rows{by})"
    )
    assert left[f"{theirs}.mlp.linear_fc1"] == f"holds gate_proj, up_proj of there in one (their rows{by})"
    parts = left_of(suggestion, "baseline")
    assert parts[f"{layer}.self_attn.v_proj"] == "is a part of linear_qkv there"
    assert parts[f"{layer}.mlp.up_proj"] == "is a part of linear_fc1 there"
    # What holds them holds the same.
    assert confidence_of(suggestion, f"{layer}.mlp") == confidence_of(suggestion, f"{layer}.self_attn") == "high"
    assert confidence_of(suggestion, f"{layer}.mlp.down_proj") == "high"


def test_a_fused_module_without_a_known_name_is_told_by_its_rows() -> None:
    """Only where no module of the other side has its shape, and no part has one like it on its own side."""
    ours = tree(node("a"), node("a.x", 6, 8), node("a.y", 4, 8), node("b", 3, 3))
    theirs = tree(node("a"), node("a.xy", 10, 8), node("b", 3, 3))
    suggestion = match_trees(ours, theirs)
    assert left_of(suggestion, "target") == {"a.xy": "holds x, y of there in one (their rows)"}
    assert confidence_of(suggestion, "a") == "high"


def test_another_kind_of_feed_forward_is_no_reason_to_give_up_the_rest(
    llama_tree: ModuleTree, mixtral_tree: ModuleTree
) -> None:
    """Llama and Mixtral: what they share is high; their feed-forwards are a pair that is not, nor is any in them."""
    suggestion = match_trees(llama_tree, mixtral_tree)
    layer = "model.layers.{layer_id}"
    high = found_pairs(suggestion, HIGH)
    assert {f"{layer}.self_attn.{p}_proj" for p in "qkvo"} | {"lm_head", "model.norm", f"{layer}.self_attn"} <= set(
        high
    )
    assert confidence_of(suggestion, f"{layer}.mlp") == confidence_of(suggestion, layer) == "medium"
    assert not any(".mlp." in path for path in found_pairs(suggestion, Confidence.medium) if "act_fn" not in path)
    assert left_of(suggestion, "target")[f"{layer}.mlp.experts"].startswith("no module there has weights of 2x48x16")


def test_another_width_is_never_high(llama_tree: ModuleTree) -> None:
    """A model of twice the size is no sharding of this one: pairs by name alone are low."""
    wide = changed(llama_tree, shape=lambda _, shape: tuple(2 * size for size in shape))
    suggestion = match_trees(llama_tree, wide)
    assert suggestion.ratio == 1
    high = found_pairs(suggestion, HIGH)
    assert not [n for n in llama_tree.modules if n.weights and pattern(n.path) in high]


def test_only_the_feed_forward_twice_as_wide_is_no_tensor_parallelism(llama_tree: ModuleTree) -> None:
    wide = changed(
        llama_tree, shape=lambda path, shape: tuple(48 if size == 24 and ".mlp." in path else size for size in shape)
    )
    suggestion = match_trees(llama_tree, wide)
    assert suggestion.ratio == 1
    layer = "model.layers.{layer_id}"
    assert {confidence_of(suggestion, f"{layer}.mlp.{n}_proj") for n in ("gate", "up", "down")} == {"low"}
    assert confidence_of(suggestion, f"{layer}.self_attn.q_proj") == "high"


def test_lists_of_unlike_length_are_at_most_medium(llama_tree: ModuleTree) -> None:
    shorter = ModuleTree(modules=tuple(n for n in llama_tree.modules if ".layers.2" not in n.path))
    suggestion = match_trees(llama_tree, shorter)
    layer = "model.layers.{layer_id}"
    (named,) = [named for named in suggestion.pairs if named.baseline_path == f"{layer}.mlp"]
    assert named.pair.confidence is Confidence.medium
    assert named.pair.reasons[-1] == "3 layers in the baseline, 2 in the target"
    assert confidence_of(suggestion, "lm_head") == "high"


def test_layers_of_two_kinds_are_matched_kind_by_kind() -> None:
    """A dense layer before sparse ones, as DeepSeek has them: each kind has its own modules, one pattern each."""

    def layers(words: tuple[str, str, str]) -> list[object]:
        norm, dense, router = words
        found: list[object] = []
        for number in range(4):
            found += [node(f"layers.{number}"), node(f"layers.{number}.{norm}", 8, kind="RMSNorm")]
            found.append(node(f"layers.{number}.mlp"))
            found.append(
                node(f"layers.{number}.mlp.{dense if number == 0 else router}", *((32, 8) if number == 0 else (4, 8)))
            )
        return found

    ours, theirs = (
        tree(node("layers", kind="ModuleList"), *layers(words))
        for words in (("input_layernorm", "up_proj", "gate"), ("attention_norm", "w3", "router"))
    )
    suggestion = match_trees(ours, theirs)
    layer = "layers.{layer_id}"
    assert found_pairs(suggestion, HIGH) == {
        "": "",
        layer: layer,
        f"{layer}.mlp": f"{layer}.mlp",
        f"{layer}.input_layernorm": f"{layer}.attention_norm",
        f"{layer}.mlp.up_proj": f"{layer}.mlp.w3",
        f"{layer}.mlp.gate": f"{layer}.mlp.router",
    }
    assert suggestion.left == ()


def test_numbers_of_layers_do_not_make_lists_of_one_name() -> None:
    """`layers.0` and `blocks.0` have the number in common, and not the name."""
    for name, reason in (("layers", "names equal"), ("blocks", "numbers equal, names of the lists alike")):
        ours, theirs = (
            tree(
                node(at, kind="ModuleList"),
                *(one for n in "01" for one in (node(f"{at}.{n}"), node(f"{at}.{n}.up", 4, 8))),
            )
            for at in ("layers", name)
        )
        reasons = {pair.target_path: pair.pair.reasons for pair in match_trees(ours, theirs).pairs}
        assert reason in reasons[f"{name}.{{layer_id}}"]


def test_an_encoder_and_a_decoder_keep_apart() -> None:
    """Two lists of layers on each side, alike in everything but their names and their number of modules."""

    def half(name: str, norm: str) -> list[object]:
        found = [node(name), node(f"{name}.layers", kind="ModuleList")]
        for number in range(2):
            at = f"{name}.layers.{number}"
            found += [node(at), node(f"{at}.{norm}", 8, kind="LayerNorm"), node(f"{at}.fc1", 8, 8)]
        return found

    ours = tree(*half("encoder", "norm1"), *half("decoder", "norm1"))
    theirs = tree(*half("encoder", "ln_1"), *half("decoder", "ln_1"))
    pairs = found_pairs(match_trees(ours, theirs))
    for name in ("encoder", "decoder"):
        assert pairs[f"{name}.layers.{{layer_id}}.norm1"] == f"{name}.layers.{{layer_id}}.ln_1"


def test_experts_in_a_list_have_a_number_of_their_own(llama_tree: ModuleTree) -> None:
    def moe(experts: str, word: str) -> ModuleTree:
        nodes = [node("layers", kind="ModuleList")]
        for layer, expert in itertools.product(range(2), range(3)):
            at = f"layers.{layer}"
            nodes += [node(at), node(f"{at}.{experts}", kind="ModuleList")] if expert == 0 else []
            nodes += [node(f"{at}.{experts}.{expert}"), node(f"{at}.{experts}.{expert}.{word}", 8, 4)]
        return tree(*nodes)

    pairs = found_pairs(match_trees(moe("experts", "up_proj"), moe("local_experts", "w3")))
    assert pairs["layers.{layer_id}.experts.{expert}.up_proj"] == "layers.{layer_id}.local_experts.{expert}.w3"


def test_a_padded_vocabulary_is_a_medium_pair() -> None:
    ours, theirs = tree(node("wte", 32000, 64), node("x", 8, 8)), tree(node("embed", 32128, 64), node("x", 8, 8))
    assert confidence_of(match_trees(ours, theirs), "wte") == "medium"


def test_a_dropout_elsewhere_is_another_one() -> None:
    """Modules without weights need a place in common: what holds them is a pair, or is called alike."""
    ours = tree(
        node("attn"), node("attn.q", 4, 4), node("attn.dropout", kind="Dropout"), node("ffn"), node("ffn.w", 8, 4)
    )
    theirs = tree(
        node("attn"), node("attn.q", 4, 4), node("ffn"), node("ffn.w", 8, 4), node("ffn.dropout", kind="Dropout")
    )
    suggestion = match_trees(ours, theirs)
    assert "attn.dropout" not in found_pairs(suggestion)
    assert left_of(suggestion, "baseline") == {
        "attn.dropout": "it has no weights, and none in its place there has a like name"
    }


def test_one_name_for_two_meanings_is_not_high(llama_tree: ModuleTree) -> None:
    """Gemma 2's `post_attention_layernorm` is not what comes before the feed-forward, as it is Llama's."""
    nodes = []
    for one in llama_tree.modules:
        nodes.append(one)
        if one.path.endswith("post_attention_layernorm"):
            path = one.path.replace("post_attention", "pre_feedforward")
            nodes.append(one.model_copy(update={"path": path}))
    suggestion = match_trees(llama_tree, ModuleTree(modules=tuple(nodes)))
    assert confidence_of(suggestion, "model.layers.{layer_id}.post_attention_layernorm") != "high"


def test_nothing_in_common() -> None:
    """Only the models themselves, which are not sure."""
    suggestion = match_trees(tree(node("up", 8, 4)), tree(node("conv", 3, 3, 7, 7, kind="Conv2d")))
    assert found_pairs(suggestion) == {"": ""}
    assert left_of(suggestion, "baseline") == {"up": "no module there has weights of 8x4"}


# What is assigned.


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 5), st.data())
def test_the_assignment_is_the_best_there_is(rows: int, columns: int, data: st.DataObject) -> None:
    """As good as the best of all one-to-one assignments, and every pair is above the threshold."""
    cells = st.lists(st.integers(-5, 5), min_size=rows * columns, max_size=rows * columns)
    scores = np.array(data.draw(cells), dtype=np.float64).reshape(rows, columns)
    pairs = best_pairs(scores, 1.0)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert all(scores[pair] > 1.0 for pair in pairs)
    profit = np.maximum(scores - 1.0, 0)
    wide = profit if rows <= columns else profit.T
    best = max(
        sum(wide[i, c] for i, c in enumerate(order))
        for order in itertools.permutations(range(wide.shape[1]), len(wide))
    )
    assert sum(profit[pair] for pair in pairs) == pytest.approx(best)


# Any tree, and a copy of it.

WORDS = (
    "q_proj",
    "wq",
    "w1",
    "w2",
    "fc1",
    "norm",
    "ln_1",
    "proj",
    "mlp",
    "attn",
    "x",
    "alpha",
    "beta",
    "out",
    "in",
    "gate",
)


@st.composite
def trees(draw: st.DrawFn) -> ModuleTree:
    """Up to 25 modules; a list of like layers may be among them."""
    nodes: list[object] = []

    def grow(prefix: str, depth: int) -> None:
        for word in draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True)):
            path = f"{prefix}{word}"
            if depth and draw(st.booleans()):
                nodes.append(node(path))
                grow(f"{path}.", depth - 1)
            else:
                shape = draw(st.sampled_from([(), (4,), (4, 4), (8, 4), (4, 8), (16, 4), (3, 5), (7, 2)]))
                nodes.append(node(path, *shape, kind=draw(st.sampled_from(["Linear", "RMSNorm", "Act"]))))

    grow("", 2)
    if draw(st.booleans()):
        before, nodes = nodes, []
        grow("", 1)
        layer, nodes = nodes, before
        nodes.append(node("layers", kind="ModuleList"))
        for number in range(draw(st.integers(2, 3))):
            nodes.append(node(f"layers.{number}", kind="Layer"))
            nodes += [one.model_copy(update={"path": f"layers.{number}.{one.path}"}) for one in layer]  # type: ignore[attr-defined]
    return tree(*nodes)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(trees(), st.data())
def test_a_copy_with_names_that_say_nothing_is_never_wrong_where_it_is_sure(
    ours: ModuleTree, data: st.DataObject
) -> None:
    """High pairs of a renamed copy are right, whatever the order of its modules; and their shapes are equal."""
    segments = sorted({s for one in ours.modules for s in one.path.split(".") if s and not s.isdecimal()})
    opaque = {segment: f"{chr(97 + number)}{'zyxw'[number % 4] * 6}" for number, segment in enumerate(segments)}
    theirs = renamed(ours, opaque)
    if data.draw(st.booleans()):
        theirs = ModuleTree(modules=(theirs.modules[0], *reversed(theirs.modules[1:])))
    for named in match_trees(ours, theirs).of_confidence(HIGH):
        right = ".".join(opaque.get(segment, segment) for segment in named.baseline_path.split("."))
        assert named.target_path == right, named.pair.reasons
        assert named.pair.baseline.shapes == named.pair.target.shapes


@settings(max_examples=150, deadline=None)
@given(trees(), trees())
def test_two_trees_of_any_kind_never_give_a_sure_pair_of_other_shapes(ours: ModuleTree, theirs: ModuleTree) -> None:
    """Nor two pairs for one module, nor one that is left out as well; and each that is has a reason."""
    suggestion = match_trees(ours, theirs)
    for named in suggestion.of_confidence(HIGH):
        ratio = abs(named.pair.relation.ratio)
        for ours_one, theirs_one in zip(
            named.pair.baseline.weights.values(), named.pair.target.weights.values(), strict=True
        ):
            assert torch.Size(ours_one.shape).numel() in {
                torch.Size(theirs_one.shape).numel() * r for r in (1, ratio, 1 / ratio)
            }
    for side in ("baseline", "target"):
        paired = [named.baseline_path if side == "baseline" else named.target_path for named in suggestion.pairs]
        assert len(paired) == len(set(paired))
        left = left_of(suggestion, side)
        assert not set(paired) & set(left) and all(left.values())
