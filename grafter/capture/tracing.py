"""Tracing: a call of a model that makes a program out of it (torch.jit.trace, torch.export, make_fx).

Its values stand for others, so a point of it would mean nothing, and what a point does would become part of the
program. Hooks are silent there. torch.compile is none of these: its code is run in the model's place.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

logger = logging.getLogger("grafter")

_is_jit_tracing = torch._C._is_tracing
_count_modes = torch._C._len_torch_dispatch_stack
_is_key_included = torch._C._dispatch_tls_is_dispatch_key_included
# Where modes act that make_fx(pre_dispatch=True) and torch.export set.
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
# Whether torch.export makes a program, by either of its ways. Code that the compiler traces may ask it.
is_exporting: Any = getattr(torch.compiler, "is_exporting", lambda: False)
_told = False


def is_being_traced() -> bool:
    """Whether the call that runs now is one of those."""
    if torch.compiler.is_dynamo_compiling():
        return bool(is_exporting())
    return _is_traced_now()


def _is_traced_now() -> bool:
    if not (_is_jit_tracing() or is_exporting()):
        # Nearly every call runs under no mode at all, which costs less to ask than whether one of them traces.
        if not _count_modes() and not _is_key_included(_PRE_DISPATCH):
            return False
        proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
        if proxies is None or proxies.get_proxy_mode() is None:
            return False
    _tell_once()
    return True


def _tell_once() -> None:
    global _told
    if not _told:
        _told = True
        logger.info(
            "grafter: a model is being traced (torch.jit.trace, torch.export or make_fx): this call of it has no points"
        )
