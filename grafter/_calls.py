"""The functions that users call. Off, each returns after one check; on, it goes to the `Grafter` of this process.

Compiled code traces them: a call in a compiled region is an operator where that is possible, else it breaks the graph
and runs between the two parts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from grafter import _process
from grafter._process import IN_GRAPHS, hint_once, is_traced
from grafter.config.switch import enabled
from grafter.core.points import enter_context, enter_context_of, leave_context, why_not_decorated
from grafter.errors import UsageError

if TYPE_CHECKING:
    import torch

    from grafter.capture.attachment import Attachment
    from grafter.core.messages.counts import Pending
    from grafter.rank.grafter import Grafter

Wrapped = TypeVar("Wrapped", bound=Callable[..., Any])

# None: no eager code has asked yet whether grafting is on, or it is on and no compiler has been imported until now.
_off: bool | None = None
_on: bool | None = None
_compiler_is_here = False


def dump(name: str, value: Any, /, **arguments: Any) -> Any:
    """A point: offer `value` to the other job, or take the other job's, as the filters say.

    Args:
        name: what this tensor is, the same in both jobs.
        value: a tensor of any shape, strides, dtype and device; or a pytree of tensors (one point: all or nothing; its
            other leaves must be equal in both jobs); or a function that gives either, called only if the point matches.
        arguments: tags (scalars: str, int, float, bool, None), which together with `name`, the step and the count
            within the step identify the point; and these options, which are not tags:
            extras: a dict of data (tensors included) that the other side's transform receives beside the tensor.
            ranks: role ranks, or a process group, of this job that share the point. Default: all ranks of the job.
            wait: "both", or "job": never wait for the other job (docs/non-blocking.md). A value that is sent is copied,
            and may be changed once this returns; one that is received is grafted only if it is there already.
            transform: a function or path that overrides GRAFTER_TRANSFORM_PATH here.
            write: "in_place" or "return"; gradient: "straight_through", "cut" or "strict" (docs/write-modes.md).
            dims: where this rank's tensor lies in the global one, such as "b s h[tp] d" (docs/layouts.md); of a pytree,
            a dict from a leaf's path or last key to its dims. A DTensor says it by itself.
            layout: a `grafter.Layout` (or a dict of them) for what dims cannot say.
            axes: this rank's place on the mesh, {"tp": (rank, size)}, where `set_axes` or `set_mesh` have not said.
            seq_lens: global lengths of the packed sequences, where dims has a zigzag over `t`.
            tokens: a `grafter.Tokens`, which token each row of `t`, or of `b s`, is: rows meet those of the same token,
            whatever the batches (docs/tokens.md).
            start: of the tokens' sequences (one position, one for each, or a dict): rows before it do not count.
            new_rows_only: True: rows count from where this point and sequence met the other side last. Left out, both
            are as GRAFTER_START and GRAFTER_NEW_ROWS_ONLY say.

    Returns:
        The value itself; with `write="return"`, a value of the same shape and dtype that holds what came. A grafted
        point in place changes the tensor's memory before this returns. A function that is not needed is returned as
        it came.

    Called by every rank of `ranks`, and by the matching ranks of the other job; it waits for them at a point that a
    filter matches. The tensor may be changed again once it returns.

    Raises:
        GrafterError: a usage error; or the end of the run (a peer is gone, the two jobs ask for different points, the
            time is up), on every rank with the same text.
    """
    if _off or (_off is None and _decide()):
        return value
    if _compiler_is_here and is_traced():
        return _dump_traced(name, value, arguments)
    return _dump_on(name, value, arguments)


def attach(
    model: torch.nn.Module, *patterns: str, inputs: bool = True, outputs: bool = True, name: str | None = None
) -> Attachment | None:
    """Points for a model's modules, without a line in the model: hooks on the inputs and outputs of those selected.

    Args:
        model: any module; wrappers around it (DDP, torch.compile, FSDP) are seen through. Of the model itself, calls of
            `model.forward(...)` are reached, too.
        patterns: over module paths and classes (docs/capture.md): `"model.layers.*"`, `":*DecoderLayer"`,
            `"!*.rotary_emb"`. Default: GRAFTER_ATTACH, else all modules.
        inputs, outputs: whether inputs, and whether outputs, are points.
        name: stands before the names of the model's points (`policy.layers.mlp.out`), the same in both jobs. Give one
            to each of several models of one class. Default: plain names.

    Returns:
        An attachment, whose `detach()` (or end of a `with` block) leaves the model as it was; None while grafting is
        off.

    A module `model.layers.3.mlp` has the points `model.layers.mlp.in.<argument>` and `model.layers.mlp.out` with the
    tag `layer_id=3`; a tuple's or dict's tensors are `.out.0`, `.out.<key>`. The plan file's `names` give other names.
    What a graft brings is handed on instead of the module's own tensor, whose memory stays as it is, unless
    GRAFTER_WRITE or a rule says `in_place`. Called by every rank, before its first point where both jobs' modules are
    to be compared.
    """
    if _off or (_off is None and _decide()):
        return None
    return _active(watch_models=False).attach(model, patterns, inputs=inputs, outputs=outputs, name=name)


def dump_model(model: torch.nn.Module) -> int:
    """All parameters and persistent buffers as points, in the order of their paths; how many there are.

    Grafting them b2t makes two jobs start from the same weights, across layouts (DTensors say theirs; `dims` come from
    the plan file). Names are as with `attach`: `model.layers.mlp.up_proj.weight` with `layer_id=3`. Written in place.
    Called by every rank that has the model. 0 while grafting is off.
    """
    if _off or (_off is None and _decide()):
        return 0
    return _active().dump_model(model)


def step() -> None:
    """The end of an iteration, on every rank. Points of the next one have a `step` that is higher by one."""
    if _off or (_off is None and _decide()):
        return
    _step_on()


def close() -> None:
    """Leave the run. Called at exit by itself; a matched point after it is refused."""
    global _off
    if _process.grafter is None and _off is None and enabled():
        from grafter.rank.grafter import Grafter

        # A rank without a point joins, too: the others wait for it, and must learn that it leaves.
        if not Grafter.is_made:
            _active()
    if _process.grafter is not None:
        _process.grafter.close()
    elif _off is None:
        _off = True


def pending() -> Pending:
    """What lies in this rank's outbox and has not been taken: how many points, and their bytes (docs/non-blocking.md).

    Of points with `wait="job"` that this rank sends. All 0 where there are none, and while grafting is off. Each rank
    asks for itself, at any time; nothing is waited for.
    """
    if _process.grafter is not None:
        found: Pending = _process.grafter.pending()
        return found
    from grafter.core.messages.counts import Pending

    return Pending()


class context:
    """Tags for every point inside: `with grafter.context(layer_id=3): ...`, or a decorator.

    As a decorator it also takes a function of the decorated call's `self` that gives the tags:
    `@grafter.context(lambda self: {"layer_id": self.layer_id})`. Blocks nest, inner tags win, and an exception restores
    what was before. `ranks=`, `axes=`, `tokens=`, `start=` and `new_rows_only=` are passed on to the points inside,
    also to those of modules.
    """

    __slots__ = ("_arguments", "_of_self")

    def __init__(self, of_self: Callable[[Any], dict[str, Any]] | None = None, /, **arguments: Any) -> None:
        if of_self is not None and not callable(of_self):
            raise UsageError(f"context takes tags as keyword arguments, or a function of self; not {of_self!r}.")
        self._of_self = of_self
        self._arguments = arguments

    def __enter__(self) -> None:
        if _off or (_off is None and _decide()):
            return
        if self._of_self is not None:
            raise UsageError("context(function of self) is a decorator; a `with` block has no self to give it.")
        _enter(self._arguments)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What is left is what this thread entered last, so one object may be entered again inside of itself, and by
        # several threads.
        if _off or (_off is None and _decide()):
            return
        _leave()

    def __call__(self, function: Wrapped) -> Wrapped:
        arguments, of_self = self._arguments, self._of_self
        why_not = why_not_decorated(function)
        if why_not is not None:
            raise UsageError(f"context cannot decorate {function!r}: {why_not}")

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            if _off or (_off is None and _decide()):
                return function(*args, **kwargs)
            if of_self is None:
                _enter(arguments)
            else:
                _enter_with_self(arguments, of_self, args, function)
            try:
                return function(*args, **kwargs)
            finally:
                _leave()

        return inside  # type: ignore[return-value]


def _untraced(function: Wrapped) -> Wrapped:
    """The function as the compiler leaves it alone: it breaks the graph, and runs between its two parts."""

    @functools.wraps(function)
    def apart(*args: Any) -> Any:
        if _compiled_caller is not None and _compiled_caller():
            return _call_apart(function, args)
        return function(*args)

    return _left_alone(apart)  # type: ignore[no-any-return]


def _left_alone(function: Any) -> Any:
    # What `torch.compiler.disable` sets, which would import the compiler.
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = IN_GRAPHS
    _apart_codes.add(function.__code__)
    return function


def _call_apart(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if function not in _disabled:
        import torch.compiler

        _disabled[function] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        _disabled[hint_once] = torch.compiler.disable(hint_once)  # type: ignore[no-untyped-call]
    _disabled[hint_once]()
    return _disabled[function](*args)


# Returns whether the frame that runs was called by compiled code; None before a compiler was imported.
_compiled_caller: Callable[[], Any] | None = None
_apart_codes = {_call_apart.__code__}
_disabled: dict[Callable[..., Any], Callable[..., Any]] = {}


def _decide() -> bool:
    """True if grafting is off. Compiled code runs this while it is traced, and its answer is a constant of the graph.

    Nothing that traced code reads may change meanwhile, or a second trace of the same code would not fit the first.
    """
    global _off, _on, _compiled_caller, _compiler_is_here
    if _on and "torch._dynamo" not in sys.modules:
        return False
    if _on is None:
        _on = enabled()
    compiler = sys.modules.get("torch._dynamo")
    if _on and compiler is None:
        return False
    if _on and compiler is not None and _compiled_caller is None:
        _compiler_is_here = True
        for code in _apart_codes:
            compiler.eval_frame.skip_code(code)
        _compiled_caller = sys.modules["torch"]._C._dynamo.eval_frame.get_eval_frame_callback
    if not _process.is_being_traced():
        _off = not _on
    return not _on


# What `torch.compiler.assume_constant_result` sets; setting it here does not import the compiler.
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dump_traced(name: str, value: Any, arguments: dict[str, Any]) -> Any:
    """`dump` as the compiler traces it: an operator where that can be, else as in eager code, with a break."""
    for argument in arguments.values():
        if not (argument is None or isinstance(argument, (str, int, float, bool))):
            return _dump_on(name, value, arguments)
    if not _is_tensor(value):
        return _dump_on(name, value, arguments)
    has_gradient = _has_gradient(value)
    site = _site_of(name, tuple(arguments.items()), has_gradient)
    if site == -1:
        return _dump_on(name, value, arguments)
    if site == -2:
        return value
    return _offer_traced(value, site)


def _has_gradient(value: Any) -> bool:
    import torch

    return torch.is_grad_enabled() and value.requires_grad and _gradients_are_on()


def _gradients_are_on() -> bool:
    return _active().context.rules.has_gradients


_gradients_are_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_tensor(value: Any) -> bool:
    """Whether an operator can take it: of a subclass (DTensor), it would be given the wrapper's parts."""
    import torch

    return type(value) is torch.Tensor or type(value) is torch.nn.Parameter


# Set while code is traced, with the module that has the operator.
_offer_traced: Any = None


def _site_of(name: str, arguments: tuple[tuple[str, Any], ...], has_gradient: bool) -> int:
    """The point's operator, as a constant of the graph."""
    global _offer_traced
    from grafter.capture.compiled import find_site, offer_traced

    _offer_traced = offer_traced
    return find_site(_active(), name, arguments, has_gradient=has_gradient)


_site_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


_enter = _untraced(enter_context)
_enter_with_self = _untraced(enter_context_of)
_leave = _untraced(leave_context)


@_left_alone
def _dump_on(name: str, value: Any, arguments: dict[str, Any]) -> Any:
    # As `_untraced` would do it, without the cost of passing all arguments on once more.
    if _compiled_caller is not None and _compiled_caller():
        return _call_apart(_dump_now, (name, value, arguments))
    grafter = _process.grafter
    return _dump_now(name, value, arguments) if grafter is None else grafter.dump_point(name, value, arguments)


def _dump_now(name: str, value: Any, arguments: dict[str, Any]) -> Any:
    return _active().dump_point(name, value, arguments)


@_untraced
def _step_on() -> None:
    _active().step()


def _active(*, watch_models: bool = True) -> Grafter:
    from grafter.rank.autoattach.active import active

    return active(watch_models=watch_models)
