"""Operators: how grafter's are registered with torch, and kept from being repeated in a backward graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

# They talk to another process, so no CUDA graph may contain them: inductor cuts its graphs around them.
_TAGS = (torch.Tag.pt2_compliant_tag, *filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))

_library: Any = torch.library.Library("grafter", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, runs: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator `grafter::...` that the compiler puts into its graphs, and that autograd does not differentiate.

    runs: its implementation for all devices. fake: the same for shapes, strides and dtypes only.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)
    _library.impl(name, runs, "CompositeExplicitAutograd")
    _library.impl(name, _above(name), "Autograd", with_keyset=True)
    torch.library.register_fake(f"grafter::{name}", fake, lib=_library)
    return getattr(torch.ops.grafter, name).default


def _above(name: str) -> Callable[..., Any]:
    """The implementation for autograd, which calls the one below and records nothing."""

    def run(keyset: Any, *args: Any) -> Any:
        operator = getattr(torch.ops.grafter, name).default
        mode = get_proxy_mode()
        known = 0 if mode is None else len(mode.tracer.graph.nodes)
        with torch._C._AutoDispatchBelowAutograd():
            result = operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if mode is not None:
            _save_for_backward(mode.tracer.graph.nodes, len(mode.tracer.graph.nodes) - known)
        return result

    return run


def _save_for_backward(nodes: Any, count: int) -> None:
    """Mark the last `count` nodes, those of one operator, to be saved: in a checkpointed region, the compiler repeats
    all others in the backward graph."""
    for node in itertools.islice(reversed(nodes), count):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
