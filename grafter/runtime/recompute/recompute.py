"""Recomputation: a point that fires again during backward is not exchanged, and writes again what it wrote before.

Activation checkpointing drops what a part of the model computed, a region, and computes it again in the backward pass:
in another order, often on another thread, outside of the `with` blocks that were around it.

    forward of a region     the point meets the other side; what was written is kept on the region (kept_writes)
    its recomputation       the n-th firing of a point there is the n-th in the forward pass: it writes the same again
                            (a sender, and a comparison, write nothing)

Step and context are those of the region's start (regions). What a region keeps lives as long as the graph that needs
it.
Regions of `torch.utils.checkpoint` are seen because its two implementations are wrapped while a Grafter is open.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint

from grafter.config.options import PointOptions
from grafter.core.leaves import Leaves, NothingToOffer, take_apart
from grafter.core.points import PointKey, StepCounter, point_context
from grafter.core.writing.write_back import WriteMode
from grafter.runtime.recompute.kept_writes import Kept
from grafter.runtime.recompute.regions import (
    Recomputation,
    Region,
    begin,
    checkpoint_calls,
    end,
    keeps_graph,
    open_counters,
    regions_in_forward,
    scopes,
)


class Recomputations:
    """What one Grafter's points keep for their recomputation. Wraps torch's checkpointing until it is closed."""

    def __init__(self, counter: StepCounter) -> None:
        self._counter = counter
        self._is_open = True
        if not open_counters:
            _adopt_enclosing_regions()
        open_counters.append(counter)
        _torch_wraps.hold()

    def close(self) -> None:
        """Leave torch as it was, once no recomputation runs and no other Grafter is open. May be called twice."""
        if self._is_open:
            self._is_open = False
            open_counters[:] = [counter for counter in open_counters if counter is not self._counter]
            _torch_wraps.release()

    def keep(self, key: PointKey, options: PointOptions, leaves: Leaves | None, written: Any) -> None:
        """A matched point has fired in a forward pass. leaves: what was written to; None if nothing was."""
        if regions := regions_in_forward():
            mode = WriteMode(options.write, options.gradient)
            kept = Kept.of(key, mode, leaves, written) if leaves is not None else Kept(key)
            for region in regions:
                region.keep(self._counter, kept)

    def keep_nothing(self, key: PointKey) -> None:
        """A matched point was not exchanged."""
        self.keep_entry(Kept(key))

    def keep_entry(self, entry: Any) -> None:
        """Keep it on all regions whose forward pass this is; in a recomputation, those that began in it."""
        for region in regions_in_forward():
            region.keep(self._counter, entry)

    def lead_to_graph(self) -> bool:
        """Whether what runs now, without a graph, is to run again for one."""
        return any(region.is_differentiated for region in regions_in_forward())

    def keep_gradients(self, value: Any, register: Callable[[str], Any]) -> None:
        """The graph whose gradients are points is made in the recomputation; their order is settled now.

        register: gives the point of phase backward for the path of a tensor in `value`, or None.
        """
        try:
            leaves = take_apart(value)
        except NothingToOffer:
            return
        for spec, tensor in zip(leaves.specs, leaves.originals, strict=True):
            if tensor.is_floating_point() or tensor.is_complex():
                entry = register(spec.path)
                if entry is not None:
                    self.keep_entry(entry)


class Recomputed:
    """What torch calls to recompute a region, instead of the function that it was given."""

    def __init__(self, region: Region, function: Callable[..., Any]) -> None:
        self.region, self.function = region, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        region, run = self.region, Recomputation(self.region)
        if region.is_adopted:
            end(region)
        scopes_before, around = scopes.get(), point_context.get()
        _torch_wraps.hold()
        scopes.set((*scopes_before, run))
        point_context.set(region.around)
        try:
            outputs = self.function(*args, **kwargs)
        finally:
            point_context.set(around)
            scopes.set(scopes_before)
            _torch_wraps.release()
        if region.is_differentiated:
            if run.has_cut:
                outputs = _differentiable(outputs)
            if not keeps_graph():
                region.forget()
        return outputs


def _differentiable(outputs: Any) -> Any:
    """Reentrant checkpointing refuses outputs none of which requires grad. Where grafts have cut them all off, they
    become leaves: the gradient ends there, and the region's inputs get none."""
    several = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    if any(isinstance(output, torch.Tensor) and output.requires_grad for output in several):
        return outputs
    return tuple(
        output.detach().requires_grad_()
        if isinstance(output, torch.Tensor) and (output.is_floating_point() or output.is_complex())
        else output
        for output in several
    )


class _TorchWraps:
    """The wraps around torch's two implementations: there while a Grafter is open, or a recomputation runs."""

    def __init__(self) -> None:
        self._holders = 0
        self._lock = threading.Lock()
        self._restore: list[Callable[[], None]] = []

    def hold(self) -> None:
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._wrap_reentrant(torch.utils.checkpoint.CheckpointFunction)
                self._wrap_other(torch.utils.checkpoint._checkpoint_hook)

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            while self._holders == 0 and self._restore:
                self._restore.pop()()

    def _wrap_reentrant(self, owner: Any) -> None:
        plain = owner.forward

        def forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
            region = Region(is_differentiated=True)
            begin(region)
            try:
                outputs = plain(ctx, run_function, *args)
            finally:
                end(region)
            ctx.run_function = Recomputed(region, run_function)
            return outputs

        self._set(owner, "forward", forward, staticmethod(forward))

    def _wrap_other(self, owner: Any) -> None:
        """The saved-tensor hooks, one object for each region, under which its forward pass runs."""
        plain_init, plain_enter, plain_exit = owner.__init__, owner.__enter__, owner.__exit__

        def init(hooks: Any, frame: Any) -> None:
            plain_init(hooks, frame)
            hooks.grafter_region = Region(is_differentiated=False)
            frame.recompute_fn = Recomputed(hooks.grafter_region, frame.recompute_fn)

        def enter(hooks: Any) -> Any:
            begin(hooks.grafter_region)
            return plain_enter(hooks)

        def leave(hooks: Any, *raised: Any) -> Any:
            end(hooks.grafter_region)
            return plain_exit(hooks, *raised)

        for name, wrap in (("__init__", init), ("__enter__", enter), ("__exit__", leave)):
            self._set(owner, name, wrap, wrap)

    def _set(self, owner: type, name: str, function: Callable[..., Any], wrap: Any) -> None:
        own = owner.__dict__.get(name)

        def restore() -> None:
            # A wrap that another library has put around ours since then stays: it calls ours, which still works.
            if owner.__dict__.get(name) is wrap:
                if own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)

        setattr(owner, name, wrap)
        self._restore.append(restore)
        _leave_out_of_compilation(function)


def _leave_out_of_compilation(function: Any) -> None:
    """The compiler does not trace this function itself; what it calls is traced as usual."""
    skip_code = getattr(torch._C._dynamo.eval_frame, "skip_code", None)
    if skip_code is not None:
        skip_code(function.__code__)


_torch_wraps = _TorchWraps()
_leave_out_of_compilation(Recomputed.__call__)


def _adopt_enclosing_regions() -> None:
    """Regions whose forward pass had begun when the first Grafter came: its first call is inside of them."""
    for holder, attribute in reversed(list(checkpoint_calls(sys._getframe(1)))):
        region = Region(is_differentiated=attribute == "run_function", is_adopted=True)
        setattr(holder, attribute, Recomputed(region, getattr(holder, attribute)))
        begin(region)
