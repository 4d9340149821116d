"""grafter: find where two PyTorch programs that should agree stop agreeing.

Two jobs run side by side, a baseline and a target. Named tensors cross between them while they run; what arrives is
compared, or written into the other job's memory. One tensor travels through the layers once down and once back:

    _calls      `dump` and the other functions: off? return
    cli         the commands                                       (above all others: nothing imports them)
    tools       programs around a run: launcher, doctor, recorded requests
    analysis    what the files of a run say: compare, locate, report
    rank        the `Grafter` of one rank: tags, filters, direction
    capture     points that are not written in the program: hooks, compiled code
    runtime     one point: key, header, pairing, exchange, transform, vote, write-back, ledger
    wire        how ranks talk: rendezvous, channels, pairing, commit, exchange, outbox, monitor
    store       the files of a run: ledger, dumps, recordings
    config      what the user set
    core        pure: points, filters, layouts, tokens, plans, messages, measures, write-back

docs/architecture.md names the file of each step.

Importing this reads no environment, opens nothing and hooks nothing. With GRAFTER_ENABLE unset, `dump` returns its
value after one check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grafter._calls import attach, close, context, dump, dump_model, pending, step
from grafter.core.layout.axes import set_axes, set_mesh
from grafter.errors import GrafterError

if TYPE_CHECKING:
    from grafter.config.settings.config import GrafterConfig
    from grafter.core.layout.declared import Layout
    from grafter.core.tokens.tokens import Tokens
    from grafter.core.user_transform import GraftTransformInput, transform
    from grafter.rank.grafter import Grafter
    from grafter.store.dumps.reader import open_dumps
    from grafter.tools.requests.recorder import RequestRecorder

__all__ = [
    "dump",
    "step",
    "context",
    "close",
    "attach",
    "dump_model",
    "set_axes",
    "set_mesh",
    "transform",
    "Layout",
    "Tokens",
    "open_dumps",
    "RequestRecorder",
    "pending",
    "Grafter",
    "GrafterConfig",
    "GraftTransformInput",
    "GrafterError",
]


def __getattr__(name: str) -> Any:
    # Imported when first used, so that importing the package costs no pydantic.
    if name == "GrafterConfig":
        from grafter.config.settings.config import GrafterConfig

        return GrafterConfig
    if name == "Grafter":
        from grafter.rank.grafter import Grafter

        return Grafter
    if name == "Layout":
        from grafter.core.layout.declared import Layout

        return Layout
    if name == "Tokens":
        from grafter.core.tokens.tokens import Tokens

        return Tokens
    if name == "open_dumps":
        from grafter.store.dumps.reader import open_dumps

        return open_dumps
    if name == "RequestRecorder":
        from grafter.tools.requests.recorder import RequestRecorder

        return RequestRecorder
    if name in ("GraftTransformInput", "transform"):
        from grafter.core import user_transform

        return getattr(user_transform, name)
    raise AttributeError(f"module 'grafter' has no attribute {name!r}")
