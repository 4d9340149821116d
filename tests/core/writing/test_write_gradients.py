"""Write-back and autograd: which gradient each mode gives the producer and the consumers of a tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

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


# --- gradients, in place --------------------------------------------------------------------------------------------


def test_straight_through_in_place_gives_the_producer_its_gradient() -> None:
    """Consumers differentiate at the grafted value; a producer that saved nothing gets the exact gradient."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = 3 * x
    version = y._version
    write(y, torch.tensor([10.0, 20.0]))
    (y * y).sum().backward()
    assert y._version == version
    # d(y^2)/dy at the grafted y is 2y; times dy/dx = 3.
    assert x.grad is not None and x.grad.tolist() == [60.0, 120.0]


def test_an_operation_that_saved_its_output_differentiates_with_the_grafted_value() -> None:
    """exp saved this memory: with straight_through in place, its gradient is the other side's (documented)."""
    x = torch.tensor([1.0], requires_grad=True)
    y = x.exp()
    write(y, torch.tensor([5.0]))
    y.backward()
    assert x.grad is not None and x.grad.tolist() == [5.0]


def test_a_consumer_that_ran_before_the_write_keeps_its_output() -> None:
    """Its output is of the old values, its gradient of the new ones (documented)."""
    x = torch.tensor([3.0], requires_grad=True)
    y = 1 * x
    square = y * y
    write(y, torch.tensor([5.0]))
    square.backward()
    assert square.item() == 9
    assert x.grad is not None and x.grad.tolist() == [10.0]


def test_strict_makes_autograd_name_the_operation() -> None:
    """strict raises the version counter: backward through an operation that saved this memory is torch's error."""
    x = torch.tensor([1.0], requires_grad=True)
    y = x.exp()
    write(y, torch.tensor([5.0]), STRICT)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*Exp"):
        y.backward()


def test_strict_where_nothing_was_saved_is_straight_through() -> None:
    """strict changes nothing for a producer that didn't save its output."""
    x = torch.tensor([1.0], requires_grad=True)
    y = 3 * x
    write(y, torch.tensor([5.0]), STRICT)
    (y * y).backward()
    assert x.grad is not None and x.grad.tolist() == [30.0]


def test_cut_in_place_gives_the_producer_none() -> None:
    """cut: consumers' parameters get gradients at the grafted value, the producer gets none, nothing raises."""
    x = torch.tensor([1.0], requires_grad=True)
    weight = torch.tensor([2.0], requires_grad=True)
    y = x.exp()
    before = y.sum()
    write(y, torch.tensor([5.0]), CUT)
    (y * weight).backward()
    assert x.grad is None
    assert weight.grad is not None and weight.grad.tolist() == [5.0]
    # What used the tensor before this point is not cut off.
    before.backward()
    assert x.grad is not None


@pytest.mark.parametrize("view", [lambda y: y[0], lambda y: y.view(4), torch.t], ids=["row", "reshaped", "transposed"])
def test_cut_in_place_on_a_view_gives_its_part_of_the_base_zeros(
    view: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The base's other elements keep their gradient, the view's get zero, and exp's saved output stays usable."""
    x = torch.zeros(2, 2, requires_grad=True)
    y = x.exp()
    part = view(y)
    write(part, torch.full(part.shape, 5.0), CUT)
    (y.sum() + part.sum()).backward()
    covered = torch.zeros(2, 2)
    view(covered).fill_(1)
    assert x.grad is not None and torch.equal(x.grad, 1 - covered)
    assert torch.equal(view(y), torch.full(part.shape, 5.0))


@pytest.mark.parametrize("mode", [CUT, STRICT], ids=["cut", "strict"])
@pytest.mark.parametrize(
    "view",
    [lambda y: y.chunk(2)[0], lambda y: y.split(1)[1], lambda y: y.unbind()[0]],
    ids=["chunk", "split", "unbind"],
)
def test_one_of_several_views_is_refused_for_cut_and_strict(
    view: Callable[[torch.Tensor], torch.Tensor], mode: WriteMode
) -> None:
    """Outputs of chunk, split and unbind: autograd allows no write that it sees; the message says `return`."""
    y = torch.ones(2, 2, requires_grad=True) * 2
    part = view(y)
    refused(part, torch.zeros_like(part), mode, r"chunk, split or unbind.*Use write=return")
    assert torch.equal(y, torch.full((2, 2), 2.0))


@pytest.mark.parametrize("mode", [CUT, STRICT], ids=["cut", "strict"])
def test_a_view_made_under_no_grad_is_refused_for_cut_and_strict(mode: WriteMode) -> None:
    """torch would raise in the consumer; grafter says so before the write."""
    y = torch.ones(2, 2, requires_grad=True) * 2
    with torch.no_grad():
        view = y[0]
    refused(view, torch.zeros(2), mode, "made under no_grad")


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w[0]], ids=["leaf", "view of a leaf"])
def test_cut_in_place_on_a_leaf_is_refused(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A parameter has no producer; cutting it in place would stop its training."""
    target = view(torch.nn.Parameter(torch.ones(2, 2)))
    refused(target, torch.zeros_like(target), CUT, "leaf that requires grad.*Use write=return")


@pytest.mark.parametrize("mode", [IN_PLACE, STRICT], ids=["straight_through", "strict"])
def test_a_leaf_takes_the_value_and_still_trains(mode: WriteMode) -> None:
    """In place into a parameter: it stays the same leaf, and its gradient is taken at the grafted value."""
    weight = torch.nn.Parameter(torch.ones(2))
    write(weight, torch.tensor([3.0, 4.0]), mode)
    (weight * weight).sum().backward()
    assert weight.is_leaf and weight.grad is not None and weight.grad.tolist() == [6.0, 8.0]


def test_straight_through_in_place_works_on_a_chunk() -> None:
    """The default mode writes an output of chunk, and its gradient flows to the producer."""
    x = torch.ones(4, requires_grad=True)
    y = 3 * x
    left, right = y.chunk(2)
    write(left, torch.tensor([10.0, 20.0]))
    (left * left).sum().add(right.sum()).backward()
    assert y.tolist() == [10, 20, 3, 3]
    assert x.grad is not None and x.grad.tolist() == [60, 120, 3, 3]


# --- gradients, return ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [RETURN, RETURN_STRICT], ids=["straight_through", "strict"])
def test_return_is_exact(mode: WriteMode) -> None:
    """The producer (exp) differentiates at its own value, the consumer (square) at the grafted one."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    own = x.exp()
    kept = own.detach().clone()
    grafted = torch.tensor([5.0, 7.0], dtype=torch.float64)
    y = write(own, grafted, mode).value
    (y * y).sum().backward()
    assert torch.equal(own, kept)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * grafted * kept, rtol=0, atol=1e-12)


def test_return_is_exact_for_any_downstream_function() -> None:
    """The gradient equals J_producer(own)^T g_consumer(grafted) for a softmax producer and a non-linear consumer."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    grafted = torch.randn(3, 5, dtype=torch.float64)
    own = x.softmax(-1)
    y = write(own, grafted, RETURN).value
    (y.sin() * y).sum().backward()

    at_grafted = grafted.clone().requires_grad_()
    (consumer_gradient,) = torch.autograd.grad((at_grafted.sin() * at_grafted).sum(), at_grafted)
    (expected,) = torch.autograd.grad(x.softmax(-1), x, consumer_gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


def test_what_return_gives_may_be_modified_in_place() -> None:
    """A model that adds its residual in place into the dumped tensor works, and its gradient is right."""
    x = torch.ones(2, requires_grad=True)
    y = write(2 * x, torch.tensor([5.0, 6.0]), RETURN).value
    y += x
    (y * y).sum().backward()
    assert y.tolist() == [6, 7]
    assert x.grad is not None and x.grad.tolist() == [12 * 3, 14 * 3]


def test_return_can_be_differentiated_twice() -> None:
    """The gradient of a gradient passes through the point: d2(y^3 at y=2x)/dx2, with y grafted."""
    x = torch.tensor(1.0, requires_grad=True)
    y = write(2 * x, torch.tensor(5.0), RETURN).value
    (first,) = torch.autograd.grad(y**3, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert (first.item(), second.item()) == (2 * 3 * 25, 2 * 2 * 6 * 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at its first use of forward mode
def test_return_passes_forward_mode_tangents() -> None:
    """A dual tensor's tangent passes through unchanged, beside the grafted value."""
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2, requires_grad=True), torch.tensor([3.0, 4.0]))
        primal, tangent = forward_ad.unpack_dual(write(dual, torch.tensor([5.0, 6.0]), RETURN).value)
    assert primal.tolist() == [5, 6] and tangent is not None and tangent.tolist() == [3, 4]


def test_return_cut_is_detached() -> None:
    """return + cut: the result doesn't require grad, also for a leaf."""
    assert not write(torch.ones(2, requires_grad=True), torch.zeros(2), RETURN_CUT).value.requires_grad


def test_return_of_a_leaf_trains_the_leaf() -> None:
    """return + straight_through on a parameter: its gradient is taken at the grafted value, its memory stays."""
    weight = torch.nn.Parameter(torch.ones(2))
    value = write(weight, torch.tensor([3.0, 4.0]), RETURN).value
    (value * value).sum().backward()
    assert weight.tolist() == [1, 1]
    assert weight.grad is not None and weight.grad.tolist() == [6, 8]


# --- without autograd -----------------------------------------------------------------------------------------------


@by_mode
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "output"])
def test_without_autograd_every_mode_is_a_plain_write(
    mode: WriteMode, guard: Callable[[], contextlib.AbstractContextManager[None]], leaf: bool
) -> None:
    """Under no_grad and inference_mode nothing is refused for its gradient, and requires_grad stays as it was."""
    target = torch.ones(2, requires_grad=True)
    target = target if leaf else target * 2
    with guard():
        value = write(target, torch.zeros(2), mode).value
    assert value.tolist() == [0, 0]
    assert target.requires_grad
    if mode.write == "return":
        assert not value.requires_grad


@by_mode
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[0], lambda x: x.chunk(2)[0]], ids=["whole", "row", "chunk"])
def test_inference_tensors_are_written_inside_and_outside_inference_mode(
    mode: WriteMode, inside: bool, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Inference tensors (no version counter) take the value wherever the dump is called."""
    with torch.inference_mode():
        target = view(torch.zeros(2, 2))
    assert target.is_inference()
    with torch.inference_mode(inside):
        value = write(target, torch.ones(target.shape), mode).value
    assert value.eq(1).all()
    assert target.eq(1).all() == (mode.write == "in_place")


def test_a_view_of_a_normal_tensor_made_in_inference_mode_is_written() -> None:
    """In an engine, a view of a parameter that inference_mode made can be written there."""
    weight = torch.zeros(2, 2, requires_grad=True)
    with torch.inference_mode():
        write(weight[0], torch.ones(2), CUT)
    assert weight.tolist() == [[1, 1], [0, 0]]


def test_a_tensor_without_gradient_that_was_saved_for_another_ones_is_written_silently() -> None:
    """The weight's gradient is the input, and the input was grafted: no error, and the grafted values."""
    weight, x = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0])
    loss = (weight * x).sum()
    apply_write(x, torch.tensor([5.0]), WriteMode())
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.item() == 5.0
