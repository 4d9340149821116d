"""One contract for every exchange: what arrives is bit for bit what was sent, only that moves, and memory is reused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Rank, succeed, two_jobs

import grafter
from grafter.wire.exchange.gloo import CHUNK_BYTES, chunk_sizes, chunks_of

BACKENDS = [
    pytest.param("auto", id="shared memory"),
    pytest.param("gloo", id="gloo"),
    pytest.param(
        "nccl",
        id="nccl",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs an NVIDIA GPU, and there is none"),
        ],
    ),
]
FLOAT8 = [getattr(torch, name) for name in sorted(dir(torch)) if name.startswith("float8_")]
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
    *FLOAT8,
]


def settings_of(backend: str) -> dict[str, Any]:
    """The run's settings; NCCL refuses two ranks on one GPU only within one host id (see `enter`)."""
    return {"backend": backend, "stats": "off", "b2t_filter": "True", "timeout": 60}


def device_of(rank: Rank) -> str:
    """Called first in each rank: where its tensors lie."""
    if os.environ["GRAFTER_BACKEND"] != "nccl":
        return "cpu"
    os.environ["NCCL_HOSTID"] = f"{rank.role}-{rank.role_rank}"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    return "cuda"


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all: for floating dtypes NaN with payloads, infinities and subnormals are among them."""
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    high = 2 if dtype is torch.bool else 256
    values = torch.randint(0, high, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return values.view(dtype).view(shape) if numel else torch.empty(shape, dtype=dtype)


def bits_of(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def cases() -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as senders have them, by name. Both sides make the same ones."""
    for seed, dtype in enumerate(DTYPES):
        name = str(dtype).removeprefix("torch.")
        yield f"{name} contiguous", random_bits((37, 5), dtype, seed)
        yield f"{name} transposed", random_bits((37, 5), dtype, seed).t()
        yield f"{name} strided", random_bits((37, 5), dtype, seed)[::3, 1:4]
        yield f"{name} of no dimension", random_bits((), dtype, seed)
        yield f"{name} empty", random_bits((0, 3), dtype, seed)
    yield "empty in its last dim", torch.empty(3, 0)
    yield "expanded", random_bits((1, 4), torch.float32, 1).expand(5, 4)
    yield "channels last", random_bits((2, 3, 4, 5), torch.float32, 2).to(memory_format=torch.channels_last)
    yield (
        "special values",
        torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 5e-324], dtype=torch.float64),
    )
    yield "NaN payloads", torch.tensor([0x7FC00001, 0x7F800001, -0x3FFFFF], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.complex64, torch.complex128):
        yield f"{dtype} conjugated", random_bits((6, 3), dtype, 3).conj()
        yield f"{dtype} conjugated and transposed", random_bits((6, 3), dtype, 3).t().conj()
        yield f"{dtype} negative view", torch.view_as_real(random_bits((6, 3), dtype, 4).conj().resolve_conj()).neg()
        yield f"{dtype} imaginary part of a conjugate", random_bits((6, 3), dtype, 4).conj().imag
    yield "view of a large storage", random_bits((1 << 22,), torch.float32, 5)[7:11]


def dump_cases(rank: Rank) -> list[str]:
    """The names of the cases that did not arrive as they were sent."""
    device = device_of(rank)
    wrong = []
    for number, (name, sent) in enumerate(cases()):
        if rank.is_baseline:
            grafter.dump("case", sent.to(device), number=number)
            continue
        target = torch.zeros_like(sent, memory_format=torch.contiguous_format).to(device)
        returned = grafter.dump("case", target, number=number)
        if returned is not target or bits_of(target) != bits_of(sent):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype_and_stride_arrives_bit_for_bit_and_nothing_else_moves(tmp_path: Path, backend: str) -> None:
    """All dtypes, contiguous or not, empty, of no dimension, conjugated; the ledgers count exactly the view's bytes."""
    with two_jobs(tmp_path, dump_cases, dump_cases, **settings_of(backend)) as jobs:
        _, wrong = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    failed = [(r.tags, r.reason) for r in ledgers["target", 0] if r.outcome != "grafted"]
    assert failed == []
    assert wrong == []
    nbytes = [tensor.numel() * tensor.dtype.itemsize for _, tensor in cases()]
    assert nbytes[-1] == 16
    assert [r.bytes_sent for r in ledgers["baseline", 0]] == nbytes
    assert [r.bytes_received for r in ledgers["target", 0]] == nbytes


def many_chunks() -> list[torch.Tensor]:
    """Over several gloo chunks: by rows, by parts of rows, and not contiguous in both."""
    rows = random_bits((1300, 2600), torch.float64, 1)
    wide = random_bits((2, 3_000_001), torch.int32, 2)
    deep = random_bits((2, 3, 500_001), torch.float64, 3)
    return [rows, rows.t(), wide, wide[:, ::2], deep, deep.transpose(0, 2), deep.to(torch.complex128).conj()]


def dump_large(rank: Rank) -> list[bool]:
    device = device_of(rank)
    same = []
    for number, sent in enumerate(many_chunks()):
        value = sent if rank.is_baseline else torch.zeros(sent.shape, dtype=sent.dtype)
        got = grafter.dump("large", value.to(device), number=number)
        same.append(bits_of(got) == bits_of(sent))
    return same


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_tensors_of_any_stride_arrive_whole(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_large, dump_large, **settings_of(backend)) as jobs:
        _, same = succeed(jobs.wait())
    assert same == [True] * len(many_chunks())


def dump_own_rank(rank: Rank) -> float:
    device = device_of(rank)
    value = torch.tensor([10.0 + rank.role_rank if rank.is_baseline else 0.0], device=device)
    return float(grafter.dump("h", value))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ranks", "received"),
    [((1, 1), [10.0]), ((2, 2), [10.0, 11.0]), ((1, 2), [10.0, 10.0])],
    ids=["1 to 1", "2 to 2", "1 to 2"],
)
def test_without_a_transform_ranks_are_served_by_their_place(
    tmp_path: Path, backend: str, ranks: tuple[int, int], received: list[float]
) -> None:
    """The k-th sender serves the k-th receiver; a single one serves all."""
    with two_jobs(tmp_path, dump_own_rank, dump_own_rank, ranks=ranks, **settings_of(backend)) as jobs:
        values = succeed(jobs.wait())
    assert values[ranks[0] :] == received


def concatenate(graft_input: Any) -> torch.Tensor:
    assert graft_input.sender_ranks == list(range(len(graft_input.received_list)))
    scale = graft_input.received_extras_list[-1]["scale"]
    return torch.cat(graft_input.received_list) * scale


def dump_shards(rank: Rank) -> list[list[float]]:
    """Senders have shards of unequal sizes; each receiver makes the whole of them."""
    device = device_of(rank)
    values = []
    for number in range(3):
        if rank.is_baseline:
            shard = torch.full((2 + rank.role_rank,), 1.0 + rank.role_rank + number, device=device)
            grafter.dump("w", shard, extras={"scale": torch.tensor(2.0)}, number=number)
        else:
            whole = torch.zeros(5, device=device)
            values.append(grafter.dump("w", whole, transform=concatenate, number=number).tolist())
    return values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("receivers", [1, 2])
def test_a_transform_receives_the_tensors_of_all_senders_and_their_extras(
    tmp_path: Path, backend: str, receivers: int
) -> None:
    with two_jobs(tmp_path, dump_shards, dump_shards, ranks=(2, receivers), **settings_of(backend)) as jobs:
        values = succeed(jobs.wait())[2:]
        ledgers = jobs.ledgers()
    whole = [[2.0 * (1 + n)] * 2 + [2.0 * (2 + n)] * 3 for n in range(3)]
    assert values == [whole] * receivers
    assert [r.bytes_received for r in ledgers["target", 0]] == [5 * 4 + 2 * 4] * 3
    assert [r.bytes_sent for r in ledgers["baseline", 1]] == [(3 * 4 + 4) * receivers] * 3


SIZES = [1 << 10, 1 << 21, 1 << 12, 1 << 22, 1 << 22, 8, 0, 1 << 10]


def dump_sizes(rank: Rank) -> tuple[bool, int, int]:
    """(all arrived, blocks made, bytes of the last): from point to point larger and smaller."""
    right = True
    for number, numel in enumerate(SIZES):
        sent = torch.arange(numel, dtype=torch.float32) + number
        got = grafter.dump("sized", sent if rank.is_baseline else torch.zeros(numel), number=number)
        right = right and torch.equal(got, sent)
    staging = grafter._process.grafter.lifecycle.session.transfer.staging  # type: ignore[union-attr]
    return right, staging.generation, staging.capacity


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_block_is_used_again_until_a_larger_one_is_needed(tmp_path: Path, backend: str) -> None:
    """Eight points that grow and shrink take three blocks at the receiver, and none at the sender."""
    with two_jobs(tmp_path, dump_sizes, dump_sizes, **settings_of(backend)) as jobs:
        baseline, target = succeed(jobs.wait())
    assert target == (True, 3, 16 << 20)
    assert baseline == (True, 0, 0)


_kept: list[torch.Tensor] = []


def keep(graft_input: Any) -> torch.Tensor:
    """A transform that breaks its promise and keeps what it was given."""
    _kept.append(graft_input.received_list[0])
    return graft_input.received_list[0]


def dump_and_keep(rank: Rank) -> list[list[float]]:
    for number in range(3):
        value = torch.full((4,), 1.0 + number if rank.is_baseline else 0.0)
        grafter.dump("kept", value, transform=keep, number=number)
    return [tensor.tolist() for tensor in _kept]


def test_memory_that_a_transform_keeps_is_never_written_again(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_and_keep, dump_and_keep, **settings_of("auto")) as jobs:
        _, kept = succeed(jobs.wait())
    assert kept == [[1.0] * 4, [2.0] * 4, [3.0] * 4]


def dump_tree(rank: Rank) -> list[Any]:
    fill = 1 if rank.is_baseline else 0
    tree = {
        "ids": torch.full((2, 2), fill * 7, dtype=torch.int64),
        "nested": [torch.full((3,), float(fill)), torch.empty(0), torch.full((), fill, dtype=torch.bool)],
        "count": 4,
    }
    got = grafter.dump("tree", tree)
    return [got["ids"].tolist(), [leaf.tolist() for leaf in got["nested"]], got["count"]]


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_pytree_arrives_as_one_point(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_tree, dump_tree, **settings_of(backend)) as jobs:
        baseline, target = succeed(jobs.wait())
        assert [r.bytes_received for r in jobs.ledgers()["target", 0]] == [4 * 8 + 3 * 4 + 1]
    assert target == baseline == [[[7, 7], [7, 7]], [[1.0] * 3, [], True], 4]


# Parts of tensors: what layouts say goes to one receiver is strided at both ends, and comes from several senders.


def rows_and_columns(rank: Rank, whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(2, 0 if rank.is_baseline else 1)[rank.role_rank]


def dump_parts(rank: Rank) -> list[str]:
    """Rows of two senders into columns of two receivers, of every dtype. The names of what did not arrive."""
    device = device_of(rank)
    wrong = []
    grafter.set_axes(tp=(rank.role_rank, 2))
    for number, (name, whole) in enumerate(cases()):
        if whole.dim() != 2 or whole.numel() == 0:
            continue
        part = rows_and_columns(rank, whole)
        if rank.is_baseline:
            grafter.dump("part", part.to(device), number=number, dims="a[tp] b")
            continue
        target = torch.zeros_like(part, memory_format=torch.contiguous_format).to(device)
        grafter.dump("part", target, number=number, dims="a b[tp]")
        if bits_of(target) != bits_of(part):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_every_dtype_land_strided_bit_for_bit(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_parts, dump_parts, ranks=(2, 2), **settings_of(backend)) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    records = ledgers["target", 0] + ledgers["target", 1]
    assert len(records) > 100
    assert [(r.tags, r.reason) for r in records if r.outcome != "grafted"] == []
    assert values == [[], [], [], []]
    for record in records:
        (leaf,) = record.leaves
        assert record.bytes_received == torch.Size(leaf.shape).numel() * getattr(torch, leaf.dtype).itemsize


def dump_large_parts(rank: Rank) -> bool:
    """Over several chunks, between ranks whose dims have another order."""
    device = device_of(rank)
    whole = random_bits((1300, 5200), torch.float64, 1)
    part = rows_and_columns(rank, whole)
    axes = {"tp": (rank.role_rank, 2)}
    if rank.is_baseline:
        grafter.dump("large", part.to(device), dims="a[tp] b", axes=axes)
        return True
    target = torch.zeros(2600, 1300, dtype=torch.float64).to(device)
    grafter.dump("large", target, dims="b[tp] a", axes=axes)
    return bits_of(target.t()) == bits_of(part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_parts_land_whole_in_another_order_of_dims(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_large_parts, dump_large_parts, ranks=(2, 2), **settings_of(backend)) as jobs:
        assert succeed(jobs.wait()) == [True] * 4


# More pieces than NCCL takes in one call, of 1 to 3 rows each.
SEQUENCES = tuple(4 * (1 + number % 3) for number in range(300))


def dump_many_pieces(rank: Rank) -> Any:
    """Packed sequences, each cut zigzag over two ranks, into plain halves. (arrived, messages to or from each peer)."""
    from grafter.wire.exchange.gloo import GlooExchange

    device = device_of(rank)
    messages = 0
    next_tag = GlooExchange._next_tag

    def count(self: GlooExchange, plan: Any, peer: int) -> int:
        nonlocal messages
        messages += 1
        return next_tag(self, plan, peer)

    GlooExchange._next_tag = count  # type: ignore[method-assign]
    whole = random_bits((sum(SEQUENCES), 3), torch.float32, 7)
    axes = {"cp": (rank.role_rank, 2)}
    if not rank.is_baseline:
        part = whole.chunk(2, 0)[rank.role_rank]
        target = torch.zeros_like(part).to(device)
        grafter.dump("t", target, dims="t[cp] h", axes=axes)
        return bits_of(target) == bits_of(part), messages
    chunks = [sequence.chunk(4, 0) for sequence in whole.split(list(SEQUENCES), 0)]
    part = torch.cat([one[number] for one in chunks for number in (rank.role_rank, 3 - rank.role_rank)])
    grafter.dump("t", part.to(device), dims="t[cp:zigzag] h", axes=axes, seq_lens=SEQUENCES)
    return True, messages


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_small_pieces_travel_as_one_message(tmp_path: Path, backend: str) -> None:
    """Over gloo one message for each pair of ranks, whatever the number of pieces; in place on every way."""
    with two_jobs(tmp_path, dump_many_pieces, dump_many_pieces, ranks=(2, 2), **settings_of(backend)) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    nbytes = sum(SEQUENCES) * 3 * 4
    assert [arrived for arrived, _ in values] == [True] * 4
    assert [messages for _, messages in values] == [2 if backend == "gloo" else 0] * 4
    assert [ledgers["target", role_rank][0].bytes_received for role_rank in range(2)] == [nbytes // 2] * 2


# A large piece between small ones, so that messages of several pieces and chunks of one follow one another.
ROW_BYTES = [8, 16, 3 * CHUNK_BYTES // 2, 24, 0, 8, CHUNK_BYTES // 32 + 8, 40]


def dump_mixed_sizes(rank: Rank) -> Any:
    """A pytree of shards: its leaves are pieces of all sizes between the same two ranks."""
    device = device_of(rank)
    wholes = {f"k{n}": random_bits((2, size // 8), torch.float64, n) for n, size in enumerate(ROW_BYTES)}
    axes = {"tp": (rank.role_rank, rank.world_size)}
    if rank.is_baseline:
        grafter.dump("tree", {name: whole.to(device) for name, whole in wholes.items()}, dims="a b", axes=axes)
        return []
    targets = {name: torch.zeros(1, whole.shape[1], dtype=whole.dtype).to(device) for name, whole in wholes.items()}
    grafter.dump("tree", targets, dims="a[tp] b", axes=axes)
    return [n for n, target in targets.items() if bits_of(target) != bits_of(wholes[n].chunk(2, 0)[rank.role_rank])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_of_all_sizes_follow_one_another_in_order(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_mixed_sizes, dump_mixed_sizes, ranks=(1, 2), **settings_of(backend)) as jobs:
        assert succeed(jobs.wait()) == [[]] * 3
        ledgers = jobs.ledgers()
    assert [ledgers["target", role_rank][0].bytes_received for role_rank in range(2)] == [sum(ROW_BYTES)] * 2


def dump_from_the_second(rank: Rank) -> bool:
    """Of two senders, the second alone has something to move, and then both."""
    device = device_of(rank)
    right = True
    for number, sizes in enumerate([(0, 4), (2, 2), (4, 0)]):
        whole = random_bits((4, 3), torch.float32, number)
        if rank.is_baseline:
            part = whole.split(list(sizes), 0)[rank.role_rank]
            grafter.dump("h", part.to(device), dims="a[tp] b", axes={"tp": (rank.role_rank, 2)}, number=number)
        else:
            target = torch.zeros(4, 3).to(device)
            grafter.dump("h", target, number=number)
            right = right and bits_of(target) == bits_of(whole)
    return right


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_with_nothing_to_move_holds_nobody_up(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_from_the_second, dump_from_the_second, ranks=(2, 1), **settings_of(backend)) as jobs:
        assert succeed(jobs.wait()) == [True] * 3
        ledgers = jobs.ledgers()
    assert [[r.bytes_sent for r in ledgers["baseline", role_rank]] for role_rank in range(2)] == [
        [0, 24, 48],
        [48, 24, 0],
    ]


# Memory, in counts.

MIB = 1 << 20
BIG = 256 * MIB


def status_bytes(*fields: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.endswith("kB")}
    return sum(int(found[field]) * 1024 for field in fields)


def watch_peak(rank: Rank) -> int:
    """How much more memory this rank ever had resident because of the 256 MiB point, its own tensor left out."""
    grafter.dump("first", torch.ones(1))
    value = torch.full((8192, 8192), 1.0 if rank.is_baseline else 0.0)
    value = value.t() if rank.is_baseline else value
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_bytes("VmRSS")
    grafter.dump("big", value)
    peak = status_bytes("VmHWM") - before
    assert float(value[8191, 8191]) == 1.0
    return peak


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_receiver_needs_its_own_tensor_and_one_incoming_value(tmp_path: Path, backend: str) -> None:
    """And the sender a bounded buffer: over gloo two chunks; over shared memory the receiver's pages, which it maps."""
    with two_jobs(tmp_path, watch_peak, watch_peak, **settings_of(backend)) as jobs:
        sender, receiver = succeed(jobs.wait())
    assert receiver <= BIG + 24 * MIB
    assert sender <= (BIG if backend == "auto" else 2 * CHUNK_BYTES) + 24 * MIB


@pytest.mark.parametrize("lazy", [False, True], ids=["transposed", "conjugated"])
def test_a_sender_over_gloo_stages_at_most_two_chunks(lazy: bool) -> None:
    """However large the tensor: two buffers, used in turn."""
    tensor = torch.zeros(9 * CHUNK_BYTES // 8 + 3, dtype=torch.complex64)
    tensor = tensor.conj() if lazy else torch.zeros(3000, 3001, dtype=torch.float64).t()
    places = {chunk.data_ptr(): chunk.numel() for chunk in chunks_of(tensor)}
    own = tensor.untyped_storage()
    inside = [p for p in places if own.data_ptr() <= p < own.data_ptr() + own.nbytes()]
    assert not inside
    assert len(places) == 2
    assert max(places.values()) <= CHUNK_BYTES


def test_a_contiguous_tensor_is_sent_from_where_it_lies() -> None:
    tensor = torch.zeros(5, CHUNK_BYTES)
    own = tensor.untyped_storage()
    chunks = list(chunks_of(tensor))
    assert all(own.data_ptr() <= chunk.data_ptr() < own.data_ptr() + own.nbytes() for chunk in chunks)
    assert [chunk.numel() for chunk in chunks] == list(chunk_sizes(tuple(tensor.shape), 4))


def test_both_ends_cut_a_tensor_alike() -> None:
    for tensor in many_chunks():
        sizes = list(chunk_sizes(tuple(tensor.shape), tensor.dtype.itemsize))
        assert sizes == [chunk.numel() for chunk in chunks_of(tensor)]
        assert sum(sizes) == tensor.numel() * tensor.dtype.itemsize
        assert max(sizes) <= CHUNK_BYTES


# CUDA.

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none"),
]


def dump_cuda_cases(rank: Rank) -> list[str]:
    wrong = []
    for number, (name, sent) in enumerate(cases()):
        on_gpu = sent.cuda() if rank.is_baseline else torch.zeros(sent.shape, dtype=sent.dtype, device="cuda")
        grafter.dump("case", on_gpu, number=number)
        if not rank.is_baseline and bits_of(on_gpu) != bits_of(sent):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("backend", [pytest.param("auto", marks=needs_cuda), pytest.param("gloo", marks=needs_cuda)])
def test_cuda_tensors_are_staged_and_arrive_bit_for_bit(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_cuda_cases, dump_cuda_cases, **settings_of(backend)) as jobs:
        _, wrong = succeed(jobs.wait())
    assert wrong == []


def dump_on_shared_gpu(rank: Rank) -> str | None:
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    value = torch.full((4,), 1.0 if rank.is_baseline else 0.0, device="cuda")
    grafter.dump("h", value)
    return "written" if float(value[0]) == 1.0 else "untouched"


@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=needs_cuda)])
def test_nccl_on_one_gpu_without_host_ids_fails_the_point_with_the_reason(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_on_shared_gpu, dump_on_shared_gpu, **settings_of(backend)) as jobs:
        _, target = succeed(jobs.wait())
        (record,) = jobs.ledgers()["target", 0]
    assert target == "untouched"
    assert record.outcome == "failed"
    assert "GRAFTER_BACKEND=auto" in record.reason
