"""Saved points: what is in the files of a run that only dumps. All in this process."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_disk import small_files
from safetensors import safe_open
from safetensors.torch import load_file

from grafter.config.options import PointOptions
from grafter.config.settings.config import GrafterConfig
from grafter.core.points import PointKey
from grafter.core.records import RankSummary
from grafter.core.rows.tokens import TokenRuns
from grafter.errors import ConfigError, UsageError
from grafter.rank.grafter import Grafter
from grafter.store.dumps.record import DumpRecord
from grafter.store.dumps.snapshot import SMALL_BYTES, Buffers, SharedBuffer, capacity_of, held_bytes
from grafter.store.dumps.writer import file_name, write_tensors


class Run:
    """One rank that only dumps, and what it left on disk."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        given = {"dump_filter": "True", "log_level": "warning", "run_name": "run", **settings}
        self.grafter = Grafter(GrafterConfig(enable=True, role="baseline", dir=str(directory), **given))
        self.directory = directory / "run" / "baseline"

    def records(self) -> list[DumpRecord]:
        lines = (self.directory / "rank0.dumps.jsonl").read_text().splitlines()
        records = [DumpRecord.model_validate_json(line) for line in lines]
        # The writer does not make the model: what it writes is the model's own text all the same.
        assert [record.model_dump_json() for record in records] == lines
        return records

    def tensors(self, record: DumpRecord) -> dict[str, torch.Tensor]:
        assert record.file is not None
        return load_file(self.directory / record.file)

    def summary(self) -> RankSummary:
        return RankSummary.model_validate_json((self.directory / "rank0.summary.json").read_text())


@contextmanager
def run(directory: Path, **settings: Any) -> Iterator[Run]:
    opened = Run(directory, **settings)
    try:
        yield opened
    finally:
        opened.grafter.close()


def saved(directory: Path, value: Any, **arguments: Any) -> tuple[DumpRecord, dict[str, torch.Tensor]]:
    """The one record, and its tensors, of a value that was dumped."""
    with run(directory) as only:
        only.grafter.dump("x", value, **arguments)
    (record,) = only.records()
    return record, only.tensors(record) if record.file is not None else {}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


NATIVE = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16"]
NATIVE += ["int8", "uint8", "bool", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", NATIVE)
def test_every_dtype_of_the_format_is_saved_bit_by_bit(dtype: str, tmp_path: Path) -> None:
    """The library reads the very bits, in the dtype and shape that they had."""
    value = torch.randn(3, 5).mul(3).to(getattr(torch, dtype))
    record, tensors = saved(tmp_path, value)
    assert same(tensors["value"], value)
    assert (record.leaves[0].dtype, record.leaves[0].shape, record.leaves[0].stored_as) == (dtype, (3, 5), None)


@pytest.mark.parametrize(
    ("dtype", "stored_as", "shape"),
    [
        ("complex64", "float32", (2, 3, 2)),
        ("complex128", "float64", (2, 3, 2)),
        ("complex32", "float16", (2, 3, 2)),
        ("float8_e8m0fnu", "uint8", (2, 3)),
        ("float8_e4m3fnuz", "uint8", (2, 3)),
    ],
)
def test_other_dtypes_are_saved_as_what_the_format_has(
    dtype: str, stored_as: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Complex numbers as pairs in a last dim of size 2, packed bytes as bytes; `stored_as` says so."""
    value = torch.randint(0, 255, (2, 3), dtype=torch.uint8)
    if dtype.startswith("complex"):
        value = torch.complex(torch.randn(2, 3), torch.randn(2, 3)).to(getattr(torch, dtype))
    else:
        value = value.view(getattr(torch, dtype))
    record, tensors = saved(tmp_path, value)
    assert (record.leaves[0].dtype, record.leaves[0].stored_as) == (dtype, stored_as)
    assert tensors["value"].shape == shape
    assert torch.equal(tensors["value"].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(24).view(2, 3, 4).transpose(0, 2),
        torch.arange(24)[::5],
        torch.ones(3).expand(4, 3),
        torch.complex(torch.ones(2), torch.ones(2)).conj(),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.nn.Parameter(torch.randn(3)),
        torch.randn(3, requires_grad=True) * 2,
    ],
    ids=["transposed", "strided", "expanded", "conjugated", "scalar", "empty", "parameter", "with graph"],
)
def test_values_are_saved_as_the_program_sees_them(value: torch.Tensor, tmp_path: Path) -> None:
    """Strides, views, conjugation and autograd leave no trace: row-major values of the shape that is seen."""
    record, tensors = saved(tmp_path, value)
    seen = value.detach().resolve_conj()
    expected = torch.view_as_real(seen) if seen.is_complex() else seen.contiguous()
    assert same(tensors["value"], expected)
    assert record.leaves[0].shape == tuple(value.shape)


def test_a_view_does_not_bring_its_storage_along(tmp_path: Path) -> None:
    """The file of a small view into a large tensor is small, and so is that of two views of one storage."""
    large = torch.zeros(1 << 20)
    record, _ = saved(tmp_path, {"a": large[:10], "b": large[5:25]})
    assert record.file is not None
    assert os.path.getsize(tmp_path / "run" / "baseline" / record.file) < 120 + 3000


def test_what_the_program_does_next_does_not_change_the_file(tmp_path: Path) -> None:
    """The snapshot is of the call: large and small values may be overwritten at once, buffers are used again."""
    with run(tmp_path, dump_queue_bytes="3MiB") as only:
        values = [torch.full((size,), 0.0) for size in (10, 1 << 18, 1 << 18, 1 << 18, 1 << 19)]
        for number in range(4):
            for value in values:
                value.fill_(number)
                only.grafter.dump("x", value)
                value.fill_(-1.0)
            only.grafter.step()
    found = [tensor.mean().item() for record in only.records() for tensor in only.tensors(record).values()]
    assert found == [number for number in range(4) for _ in values]


def test_a_pytree_is_one_file_with_its_other_leaves_in_the_record(tmp_path: Path) -> None:
    """Tensors by their paths; what is no tensor, data or not, stands in the record."""
    record, tensors = saved(tmp_path, {"kv": [torch.ones(2), torch.zeros(3)], "n": 3, "f": print})
    assert set(tensors) == {"value['kv'][0]", "value['kv'][1]"}
    assert record.others == {"['f']": repr(print), "['n']": 3}
    assert record.not_encoded == {"others['f']": repr(print)}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, device="meta"), "meta device"),
        (torch.ones(2, 2).to_sparse(), "sparse_coo"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
        (None, "holds no tensor"),
        ("text", "holds no tensor"),
    ],
)
def test_what_has_no_plain_values_is_recorded_with_the_reason(value: Any, words: str, tmp_path: Path) -> None:
    """There is a line and no file, and the run goes on."""
    record, _ = saved(tmp_path, value)
    assert record.file is None
    assert words in str(record.reason)


def test_a_storage_that_was_freed_is_not_read(tmp_path: Path) -> None:
    """A resharded parameter of FSDP has a shape and no memory."""
    value = torch.ones(1000)
    value.untyped_storage().resize_(0)
    record, _ = saved(tmp_path, value)
    assert "freed" in str(record.reason)


def test_a_leaf_without_values_does_not_cost_the_others(tmp_path: Path) -> None:
    """Those are in the file; the reason names the one that is not."""
    record, tensors = saved(tmp_path, {"a": torch.ones(2), "s": torch.ones(2, 2).to_sparse()})
    assert set(tensors) == {"value['a']"}
    assert [leaf.path for leaf in record.leaves] == ["['a']"]
    assert str(record.reason).startswith("['s']: ")


def test_a_function_that_gives_the_value_is_called_once_and_only_if_needed(tmp_path: Path) -> None:
    """As with a graft, `dump` then returns the value."""
    calls = []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.ones(2)

    with run(tmp_path, dump_filter="name == 'x'") as only:
        assert only.grafter.dump("y", make) is make
        assert isinstance(only.grafter.dump("x", make), torch.Tensor)
    assert len(calls) == 1


def test_the_record_says_what_the_point_was(tmp_path: Path) -> None:
    """Key, tags, context, step, occurrence, layout, axes, participants and the user's line; the file has it, too."""
    with run(tmp_path) as only:
        only.grafter.step()
        with _tags(layer_id=7):
            for _ in range(2):
                only.grafter.dump("attn/out", torch.ones(2, 4), dims="t h[tp]", axes={"tp": (1, 2)}, expert="e1")
    first, second = only.records()
    assert (first.name, first.step, first.phase) == ("attn/out", 1, "forward")
    assert (first.occurrence, second.occurrence) == (0, 1)
    assert (first.order, second.order) == (0, 1)
    assert first.tags == {"layer_id": 7, "expert": "e1"}
    assert first.leaves[0].layout is not None
    assert first.leaves[0].layout.dims == "t h[tp]"
    assert first.axes == (("tp", 1, 2),)
    assert first.participants == (0,)
    assert first.call_site.startswith(f"{__file__}:")
    assert first.file == "rank0/000000-attn_out.safetensors"
    with safe_open(only.directory / first.file, "pt") as file:
        assert DumpRecord.model_validate_json(file.metadata()["grafter"]) == first


@contextmanager
def _tags(**tags: Any) -> Iterator[None]:
    from grafter.core.points import Surroundings, surroundings

    around = surroundings.get()
    surroundings.set(Surroundings(tags, {}, around))
    yield
    surroundings.set(around)


def test_a_layout_that_does_not_fit_costs_itself_alone(tmp_path: Path) -> None:
    """The tensor is saved, and the record says what was wrong with its dims."""
    record, tensors = saved(tmp_path, torch.ones(2), dims="t h")
    assert "value" in tensors
    assert "names 2 dims" in record.not_encoded["layout"]


def test_extras_that_cannot_be_encoded_do_not_cost_the_tensor(tmp_path: Path) -> None:
    """They are named; a tensor among extras is saved beside the value; excluded keys stay with the caller."""
    extras = {"f": print, "t": torch.arange(3), "routed_experts": [1], "n": 1}
    record, tensors = saved(tmp_path, torch.ones(2), extras=extras)
    assert record.extras == {"f": repr(print), "t": {"__grafter_tensor__": 0}, "n": 1}
    assert record.not_encoded == {"extras.f": repr(print)}
    assert record.excluded == ("extras.routed_experts",)
    assert tensors["extras0"].tolist() == [0, 1, 2]
    assert "routed_experts" in extras


def test_tokens_are_in_the_record(tmp_path: Path) -> None:
    """What `tokens=` says of itself; what is no Tokens costs only the tokens."""

    class Tokens:
        def record(self) -> TokenRuns:
            return TokenRuns(runs=((0, 0, 2),))

    with run(tmp_path) as only:
        only.grafter.dump("x", torch.ones(2), tokens=Tokens())
        only.grafter.dump("x", torch.ones(2), tokens=[1, 2])
    first, second = only.records()
    assert first.tokens == TokenRuns(runs=((0, 0, 2),))
    assert second.tokens is None
    assert "tokens" in second.not_encoded
    assert second.file is not None


def test_level_statistics_has_figures_and_no_file(tmp_path: Path) -> None:
    """Of each leaf what the ledger has of a tensor; a rule may choose it for some points alone."""
    with run(tmp_path, rules=[{"match": "small", "dump_level": "statistics"}]) as only:
        only.grafter.dump("small", torch.tensor([1.0, 2.0, float("nan")]))
        only.grafter.dump("whole", torch.ones(2))
    small, whole = only.records()
    assert (small.level, small.file) == ("statistics", None)
    assert small.leaves[0].statistics is not None
    assert (small.leaves[0].statistics.mean, small.leaves[0].statistics.nan) == (1.5, 1)
    assert (whole.level, whole.leaves[0].statistics) == ("full", None)
    assert whole.file is not None


def test_level_checksum_is_sha256_of_the_row_major_bytes(tmp_path: Path) -> None:
    """A reader in any language can compute it from the values alone."""
    value = torch.arange(6, dtype=torch.float32).view(2, 3)
    with run(tmp_path, dump_level="checksum") as only:
        only.grafter.dump("x", value)
        only.grafter.dump("x", value.t().contiguous().t())
        only.grafter.dump("x", torch.empty(0))
    sums = [record.leaves[0].checksum for record in only.records()]
    expected = hashlib.sha256(b"".join(number.tobytes() for number in value.numpy().flatten())).hexdigest()
    assert sums == [expected, expected, hashlib.sha256().hexdigest()]
    assert list((only.directory / "rank0").iterdir()) == []


def test_limits_leave_out_and_count(tmp_path: Path) -> None:
    """By steps, by bytes and by points: nothing of what is left out is on disk, and the summary says how many."""
    with run(tmp_path, dump_steps="0,2-", dump_max_points=5) as only:
        for _ in range(4):
            for name in ("a", "b"):
                only.grafter.dump(name, torch.ones(2))
            only.grafter.step()
    assert [(record.step, record.name) for record in only.records()] == [
        (0, "a"), (0, "b"), (2, "a"), (2, "b"), (3, "a"),
    ]  # fmt: skip
    summary = only.summary()
    assert (summary.dumped, summary.dumps_left_out) == (5, {"steps": 2, "points": 1})
    assert len(list((only.directory / "rank0").iterdir())) == 5


def test_save_overrules_the_filter(tmp_path: Path) -> None:
    """`save=True` where no filter matches, `save=False` where it does; else it must be a bool."""
    with run(tmp_path, dump_filter="name == 'x'") as only:
        only.grafter.dump("x", torch.ones(1), save=False)
        only.grafter.dump("y", torch.ones(1), save=True)
        only.grafter.dump("y", torch.ones(1))
        with pytest.raises(UsageError, match="True and False"):
            only.grafter.dump("y", torch.ones(1), save="yes")
    assert [record.name for record in only.records()] == ["y"]
    assert only.summary().unmatched == {"x": 1, "y": 1}


def test_gradients_are_saved(tmp_path: Path) -> None:
    """With gradients on, those of matched points and of parameters' are saved, a second backward as another firing."""
    with run(tmp_path, gradients=True, dump_filter="phase == 'backward'") as only:
        leaf = torch.ones(3, requires_grad=True)
        out = only.grafter.dump("h", leaf * 2)
        (out * torch.arange(3.0)).sum().backward(retain_graph=True)
        (out * 5.0).sum().backward()
    first, second = only.records()
    assert [(r.name, r.phase, r.occurrence) for r in (first, second)] == [("h", "backward", 0), ("h", "backward", 1)]
    assert only.tensors(first)["value"].tolist() == [0.0, 1.0, 2.0]
    assert only.tensors(second)["value"].tolist() == [5.0, 5.0, 5.0]


def test_checkpointing_saves_a_point_once(tmp_path: Path) -> None:
    """The recomputation of a region comes to it again, and saves neither value nor gradient twice."""
    with run(tmp_path, gradients=True) as only:

        def region(x: torch.Tensor) -> torch.Tensor:
            return only.grafter.dump("h", x * 2).sin()  # type: ignore[no-any-return]

        x = torch.ones(3, requires_grad=True)
        torch.utils.checkpoint.checkpoint(region, x, use_reentrant=False).sum().backward()
        torch.utils.checkpoint.checkpoint(region, x, use_reentrant=True).sum().backward()
    assert [(r.phase, r.occurrence) for r in only.records()] == [
        ("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1),
    ]  # fmt: skip


def test_an_attached_model_and_its_weights_are_saved(tmp_path: Path) -> None:
    """Hooks and dump_model need no other job either."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    with run(tmp_path) as only:
        attachment = only.grafter.attach(model, ())
        model(torch.ones(1, 2))
        count = only.grafter.dump_model(model)
        attachment.detach()
    names = [(record.name, record.tags) for record in only.records()]
    assert count == 2
    assert len(names) == len({str(name) for name in names}) > count
    assert all(record.file is not None for record in only.records())


def test_inference_mode_and_default_device_do_not_matter(tmp_path: Path) -> None:
    """Buffers that were made in one mode serve in the other."""
    with run(tmp_path) as only:
        with torch.inference_mode():
            only.grafter.dump("x", torch.ones(1 << 18))
        only.grafter.tools.dumps.flush()
        only.grafter.dump("x", torch.ones(1 << 18, requires_grad=True))
        with torch.device("meta"):
            only.grafter.dump("x", torch.ones(1 << 18, device="cpu"))
    assert [bool((only.tensors(r)["value"] == 1).all()) for r in only.records()] == [True, True, True]


# The disk.


def test_a_run_of_one_name_is_not_mixed_with_an_earlier_one(tmp_path: Path) -> None:
    """The second is refused at its first point, in words that say what to do."""
    with run(tmp_path) as first:
        first.grafter.dump("x", torch.ones(1))
    with run(tmp_path) as second, pytest.raises(ConfigError, match="GRAFTER_RUN_NAME"):
        second.grafter.dump("x", torch.ones(1))
    assert len(first.records()) == 1


def test_a_full_disk_costs_the_dump_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What does not fit is told once and counted, leaves no part of a file, and its line says why it has none."""
    with run(tmp_path) as only:
        with caplog.at_level(logging.ERROR, "grafter"), small_files(40_000):
            for size in (10, 20_000, 30_000, 20):
                only.grafter.dump("x", torch.ones(size))
            only.grafter.tools.dumps.flush()
        only.grafter.dump("x", torch.ones(20_000))
    assert [record.file is not None for record in only.records()] == [True, False, False, True, True]
    assert "could not be written" in str(only.records()[1].reason)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert len(list((only.directory / "rank0").iterdir())) == 3
    assert (only.summary().dumped, only.summary().dumps_lost) == (3, 2)


def test_a_file_is_there_in_full_or_not_at_all(tmp_path: Path) -> None:
    """A failed write leaves neither the file nor its temporary one."""
    with small_files(100), pytest.raises(OSError, match="large"):
        write_tensors(tmp_path / "x.safetensors", {"value": torch.ones(100)}, {})
    assert list(tmp_path.iterdir()) == []


def test_tensors_lie_where_their_dtype_allows_them_to_be_mapped(tmp_path: Path) -> None:
    """Whatever the order of the leaves, each begins at a multiple of its element's size."""
    values = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(3), "c": torch.ones(1, dtype=torch.float64)}
    write_tensors(tmp_path / "x.safetensors", values, {"k": "v"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    sizes = {name: values[name].element_size() for name in values}
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % size == 0 for name, size in sizes.items())
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "x.safetensors").items()} == {
        name: tensor.tolist() for name, tensor in values.items()
    }


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", "", "x" * 500, "naïve\n\0", "-rf ~", "\ud800"])
def test_no_name_of_a_point_leaves_the_directory(name: str) -> None:
    """Names become plain file names: short, ASCII, without separators, never hidden."""
    made = file_name(7, name)
    assert made.startswith("000007-")
    assert len(made) < 110
    assert made.isascii()
    assert "/" not in made
    assert made == os.path.basename(made)


# Memory.


def test_a_slow_disk_slows_the_run_instead_of_eating_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the bound is under way at any time, and a point larger than all of it passes alone."""
    from grafter.store.dumps import saver, writer

    held, reserved, under_way = threading.Semaphore(0), [], []
    plain = writer.write_tensors

    def slow(*arguments: Any) -> None:
        assert held.acquire(timeout=250)
        under_way.append(backlog._bytes)
        plain(*arguments)

    monkeypatch.setattr(saver, "write_tensors", slow)
    with run(tmp_path, dump_queue_bytes="1MiB") as only:
        only.grafter.step()
        backlog = only.grafter.tools.dumps.open()._backlog
        done = threading.Event()

        def program() -> None:
            for size in (1 << 17, 1 << 17, 1 << 17, 1 << 19, 1 << 17):
                only.grafter.dump("x", torch.ones(size))
                reserved.append(backlog._bytes)
            done.set()

        thread = threading.Thread(target=program)
        thread.start()
        assert not done.wait(0.2)
        # Two of half a MiB each fit; the third waits for the first to be written.
        assert reserved == [1 << 19, 1 << 20]
        for _ in range(5):
            held.release()
        thread.join(250)
        assert done.is_set()
    assert under_way[3] == 1 << 21
    assert max(under_way[:3] + under_way[4:]) <= 1 << 20
    assert len(only.records()) == 5


def test_step_waits_for_what_came_before_this_step_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a step the one before is on disk; its own points may still be under way."""
    from grafter.store.dumps import saver, writer

    held, plain = threading.Semaphore(0), writer.write_tensors

    def slow(*arguments: Any) -> None:
        assert held.acquire(timeout=250)
        plain(*arguments)

    monkeypatch.setattr(saver, "write_tensors", slow)
    with run(tmp_path) as only:
        only.grafter.dump("x", torch.ones(1))
        only.grafter.step()
        assert only.records() == []
        only.grafter.dump("x", torch.ones(1))
        held.release()
        only.grafter.step()
        assert [record.step for record in only.records()] == [0]
        held.release()
    assert [record.step for record in only.records()] == [0, 1]


def test_buffers_are_used_again() -> None:
    """A buffer that came back serves the next that fits, and no more is kept than the limit."""
    buffers = Buffers(4 << 20)
    first = buffers.take(1 << 20)
    address = first.data_ptr()
    buffers.give_back(first)
    again = buffers.take((1 << 20) - 5)
    assert again.data_ptr() == address
    many = [buffers.take(1 << 20) for _ in range(6)]
    for buffer in [again, *many]:
        buffers.give_back(buffer)
    assert buffers._kept_bytes == 4 << 20
    assert buffers.take(SMALL_BYTES).numel() == SMALL_BYTES
    # What is in use counts, too: buffers of another size do not stay beside it.
    large = buffers.take(2 << 20)
    assert buffers._kept_bytes == 2 << 20
    assert large.numel() == 2 << 20


def test_small_tensors_share_a_buffer() -> None:
    """Parts of one are apart; it is used again from its beginning once all have come back; where nothing says that they
    come back in order, each has memory of its own."""
    sources = [torch.full((100,), float(number)) for number in range(3)]
    buffers = Buffers(8 << 20, in_order=True)

    def copy(source: torch.Tensor) -> tuple[bytes | memoryview, SharedBuffer | None]:
        return buffers.copy_small(source.data_ptr(), 400)

    copies = [copy(source) for source in sources]
    assert len({id(shared) for _, shared in copies}) == 1
    for source in sources:
        source.fill_(-1.0)
    assert [torch.frombuffer(bytearray(data), dtype=torch.float32).unique().item() for data, _ in copies] == [0, 1, 2]
    for _, shared in copies:
        buffers.give_back(shared)
    assert [bytes(data) for data, _ in copies[1:]] == [
        bytes(100 * b"\x00\x00\x80\x3f"),
        bytes(100 * b"\x00\x00\x00\x40"),
    ]
    again = copy(sources[0])
    assert bytes(copies[0][0]) == bytes(again[0])
    # A full one goes back as a whole, when the last part of it does.
    many = [again[1], *(copy(source)[1] for source in sources * 2000)]
    assert len({id(shared) for shared in many}) == 2
    for shared in many:
        assert buffers._kept_bytes == 0 or shared is many[-1]
        buffers.give_back(shared)
    assert buffers._kept_bytes == 2 << 20
    own, nothing = Buffers(8 << 20).copy_small(sources[0].data_ptr(), 400)
    assert isinstance(own, bytes) and nothing is None


def test_a_shared_buffer_that_is_free_before_the_next_takes_its_place_is_kept() -> None:
    """The writer gives back its last part while the program makes the next buffer: it is in use no more."""
    buffers = Buffers(64 << 20, in_order=True)
    source, take, parts = torch.zeros(SMALL_BYTES, dtype=torch.uint8), buffers.take, []
    for _ in range((2 << 20) // SMALL_BYTES):
        parts.append(buffers.copy_small(source.data_ptr(), SMALL_BYTES)[1])

    def while_the_writer_gives_back(nbytes: int) -> torch.Tensor:
        while parts:
            buffers.give_back(parts.pop())
        return take(nbytes)

    buffers.take = while_the_writer_gives_back  # type: ignore[method-assign,assignment]
    _, last = buffers.copy_small(source.data_ptr(), SMALL_BYTES)
    assert (buffers._used_bytes, buffers._kept_bytes) == (2 << 20, 2 << 20)
    buffers.give_back(last)


def test_pinned_memory_of_small_tensors_is_little_and_counted() -> None:
    """It is taken in granules of 64 KiB, all of which count as waiting."""
    tensor = SimpleNamespace(is_cuda=True, numel=lambda: 10, element_size=lambda: 4)
    assert held_bytes(tensor) == 64 << 10  # type: ignore[arg-type]
    assert held_bytes(torch.ones(10)) == 40
    assert [capacity_of(n, pinned=True) >> 10 for n in (0, 65_537, 3 << 20)] == [64, 128, 4096]


@pytest.mark.parametrize("moment", ["append", "pop"])
def test_a_signal_in_the_middle_of_handing_over_loses_no_point(tmp_path: Path, moment: str) -> None:
    """All is on disk when the handler is done, each point once; and what was over is not called unfinished."""
    found: list[int] = []
    with run(tmp_path) as only:
        only.grafter.dump("first", torch.ones(2))
        saver = only.grafter.tools.dumps.open()
        backlog = saver._backlog

        def handler() -> None:
            found.append(0)
            saver._end_all()
            found[-1] = len(only.records())

        class Jobs(deque[Any]):
            def append(self, job: Any) -> None:
                super().append(job)
                if moment == "append" and not found:
                    handler()

        class Unfinished(dict[int, Any]):
            def pop(self, order: int, *default: Any) -> Any:
                one = super().pop(order, *default) if found else self[order]
                if moment == "pop" and not found:
                    handler()
                    super().pop(order, *default)
                return one

        saver.flush()
        backlog._jobs, saver._unfinished = Jobs(), Unfinished()
        key, options = PointKey("other", (), 0, "forward", 0), PointOptions(None, "in_place", "cut", "skip")
        other = saver.take(key, {}, torch.ones(2), options, "here", (0,), ())
        only.grafter.dump("last", torch.ones(2))
        assert found == [3] and other is not None
        saver.finish(other)
    records = only.records()
    assert [record.name for record in records] == ["first", "last", "other"]
    assert [bool(record.reason) for record in records] == [False, False, True]


def test_a_call_that_no_filter_matches_opens_nothing(tmp_path: Path) -> None:
    """No file, no thread, no handler before the first point is saved."""
    handler = signal.getsignal(signal.SIGTERM)
    # Those of earlier tests may end meanwhile.
    threads = set(threading.enumerate())
    with run(tmp_path, dump_filter="name == 'x'") as only:
        only.grafter.dump("y", torch.ones(1))
        assert set(threading.enumerate()) <= threads
        assert signal.getsignal(signal.SIGTERM) == handler
        assert not (only.directory / "rank0.dumps.jsonl").exists()
        only.grafter.dump("x", torch.ones(1))
        assert signal.getsignal(signal.SIGTERM) != handler
    assert signal.getsignal(signal.SIGTERM) == handler
