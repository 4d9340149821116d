"""Write-back: where the values go, what memory changes, and which tensors are refused before anything changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grafter.core.writing.write_back import WriteMode, Written, apply_write, check_write
from grafter.errors import WriteRefused

IN_PLACE = WriteMode()
CUT = WriteMode(gradient="cut")
STRICT = WriteMode(gradient="strict")
RETURN = WriteMode(write="return")
RETURN_CUT = WriteMode(write="return", gradient="cut")
RETURN_STRICT = WriteMode(write="return", gradient="strict")
ALL_MODES = [IN_PLACE, CUT, STRICT, RETURN, RETURN_CUT, RETURN_STRICT]
by_mode = pytest.mark.parametrize("mode", ALL_MODES, ids=lambda m: f"{m.write}-{m.gradient}")


def write(target: torch.Tensor, incoming: torch.Tensor, mode: WriteMode = IN_PLACE) -> Written:
    check_write(target, incoming, mode)
    return apply_write(target, incoming, mode)


def refused(target: torch.Tensor, incoming: torch.Tensor, mode: WriteMode, match: str) -> None:
    with pytest.raises(WriteRefused, match=match) as caught:
        check_write(target, incoming, mode)
    assert "Nothing was written." in str(caught.value)


# --- values ---------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "slice": lambda x: x[1:, ::2],
    "reshaped": lambda x: x.view(2, -1),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "unbind": lambda x: x.unbind(0)[2],
    "0-dim": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
    "unsqueezed": lambda x: x[:, None],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [IN_PLACE, RETURN], ids=["in_place", "return"])
def test_every_layout_takes_the_values_and_only_its_own_memory_changes(layout: str, mode: WriteMode) -> None:
    """A target with any strides gets exactly the incoming values; the rest of its storage keeps its own."""
    storage = torch.arange(24.0).reshape(4, 6)
    target = LAYOUTS[layout](storage)
    incoming = -1.0 - torch.arange(float(target.numel())).reshape(target.shape)
    before = storage.clone()
    written = write(target, incoming, mode)
    assert torch.equal(written.value, incoming)
    assert written.saturated is None
    assert (storage != before).sum() == (incoming.numel() if mode.write == "in_place" else 0)


@by_mode
def test_staging_may_be_overwritten_after_the_write(mode: WriteMode) -> None:
    """What apply_write returns shares no memory with the incoming value."""
    incoming = torch.ones(3)
    value = write(torch.zeros(3), incoming, mode).value
    incoming.fill_(7)
    assert torch.equal(value, torch.ones(3))


def test_in_place_returns_the_target_itself() -> None:
    """in_place: dump's result is the object it was given, so that a caller may ignore it."""
    target = torch.zeros(3)
    assert write(target, torch.ones(3)).value is target


def test_the_returned_tensor_keeps_dtype_and_dense_strides_of_the_target() -> None:
    """return: a channels_last target gives a channels_last value of the target's dtype."""
    target = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    value = write(target, torch.ones(2, 3, 4, 5), RETURN).value
    assert (value.dtype, value.stride()) == (torch.bfloat16, target.stride())


def test_a_conjugated_view_reads_back_what_was_written() -> None:
    """A lazily conjugated target takes the value, and its base holds the conjugate."""
    base = torch.zeros(2, dtype=torch.complex64)
    incoming = torch.tensor([1 + 2j, 3 - 4j])
    write(base.conj(), incoming)
    assert torch.equal(base.conj(), incoming)


@pytest.mark.parametrize(
    "made_of_the_target", [torch.t, lambda x: x, lambda x: x.flip(0).t()], ids=["t", "self", "copy"]
)
@pytest.mark.parametrize("mode", [IN_PLACE, RETURN], ids=["in_place", "return"])
def test_a_transform_may_return_a_view_of_the_target(
    made_of_the_target: Callable[[torch.Tensor], torch.Tensor], mode: WriteMode
) -> None:
    """An incoming value that overlaps the target's memory is written as it was before the write."""
    target = torch.arange(9.0).reshape(3, 3)
    incoming = made_of_the_target(target)
    expected = incoming.clone()
    assert torch.equal(write(target, incoming, mode).value, expected)


# --- shapes, kinds and memory ---------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(shapes, shapes)
def test_shapes_must_be_equal(target_shape: tuple[int, ...], incoming_shape: tuple[int, ...]) -> None:
    """check_write accepts equal shapes and no other pair, broadcastable or not."""
    target, incoming = torch.zeros(target_shape), torch.ones(incoming_shape)
    if target_shape == incoming_shape:
        assert torch.equal(write(target, incoming).value, incoming)
    else:
        refused(target, incoming, IN_PLACE, "Shapes must be equal")


def test_no_dimension_is_not_one_dimension() -> None:
    """[] and [1] hold one value each and are still different shapes; the message shows both."""
    refused(torch.zeros(1), torch.tensor(1.0), RETURN, r"shape \[\] cannot be written into a tensor of shape \[1\]")


OVERLAPPING: dict[str, Callable[[], torch.Tensor]] = {
    "expanded": lambda: torch.zeros(1, 3).expand(4, 3),
    "expanded 0-dim": lambda: torch.zeros(()).expand(2),
    "windows": lambda: torch.zeros(8).unfold(0, 3, 1),
    "as_strided": lambda: torch.zeros(6).as_strided((2, 3), (1, 1)),
}


@pytest.mark.parametrize("made", OVERLAPPING)
def test_memory_that_overlaps_itself_is_refused_in_place_and_allowed_for_return(made: str) -> None:
    """Elements that share memory can't take different values in place; a new tensor can hold them."""
    target = OVERLAPPING[made]()
    incoming = torch.arange(float(target.numel())).reshape(target.shape)
    refused(target, incoming, IN_PLACE, "share memory")
    assert torch.equal(write(target, incoming, RETURN).value, incoming)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=3))
def test_no_overlapping_layout_is_accepted(dims: list[tuple[int, int]]) -> None:
    """Whatever sizes and strides: a target that is accepted in place holds, afterwards, every incoming value."""
    target = torch.zeros(128).as_strided([size for size, _ in dims], [stride for _, stride in dims])
    incoming = 1 + torch.arange(float(target.numel())).reshape(target.shape)
    with contextlib.suppress(WriteRefused):
        assert torch.equal(write(target, incoming).value, incoming)


def _zero_tensor() -> torch.Tensor:
    return torch._efficientzerotensor((3,))


def _freed() -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(("made", "why"), [(_zero_tensor, "all-zero"), (_freed, "was freed")], ids=["zero", "freed"])
def test_memory_that_is_not_there_is_refused_in_place(made: Callable[[], torch.Tensor], why: str) -> None:
    """A tensor without memory of its own can't be written; a new one of its shape can be returned."""
    refused(made(), torch.ones(3), IN_PLACE, why)
    assert torch.equal(write(made(), torch.ones(3), RETURN).value, torch.ones(3))


def _fake() -> torch.Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(3)


KINDS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.zeros(3).to_sparse(), "layout torch.sparse_coo"),
    "meta": (lambda: torch.zeros(3, device="meta"), "meta device"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "quantised"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(3)]), "nested"),
    "fake": (_fake, "FakeTensor"),
    "lazy": (lambda: torch.nn.UninitializedParameter(), "uninitialised parameter"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [IN_PLACE, RETURN], ids=["in_place", "return"])
def test_what_is_not_values_in_memory_is_refused_on_either_side(kind: str, mode: WriteMode) -> None:
    """Sparse, meta, quantised, nested, fake and lazy tensors are refused as target and as incoming, with the reason."""
    made, why = KINDS[kind]
    refused(made(), torch.ones(3), mode, f"tensor to write into is.*{why}")
    refused(torch.zeros(3), made(), mode, f"incoming value is.*{why}")


def test_a_tensor_inside_vmap_is_refused() -> None:
    """Under torch.func a tensor stands for many values, and none of them can be grafted."""

    def inside(x: torch.Tensor) -> torch.Tensor:
        refused(x, torch.zeros(3), IN_PLACE, "torch.func")
        return x

    torch.func.vmap(inside)(torch.ones(2, 3))


def test_a_plain_subclass_is_written_like_a_tensor() -> None:
    """A subclass that only adds attributes (a Parameter, a user's class) has memory of its own."""

    class Named(torch.Tensor):
        pass

    target = torch.zeros(3).as_subclass(Named)
    assert write(target, torch.ones(3)).value is target
    assert target.tolist() == [1, 1, 1]


# --- GPU ------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: staging on the CPU into a CUDA target")


@pytest.mark.cuda
@needs_gpu
@by_mode
def test_cpu_staging_is_written_into_a_cuda_target(mode: WriteMode) -> None:
    """The value crosses to the target's device, in its dtype, non-contiguous targets and pinned staging included."""
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        for incoming in (torch.arange(6.0).reshape(3, 2), torch.arange(6.0).reshape(3, 2).pin_memory()):
            target = torch.zeros(2, 3, device="cuda").to(dtype).t()
            value = write(target, incoming, mode).value
            assert value.is_cuda and value.dtype == dtype
            assert torch.equal(value.float().cpu(), incoming)
