"""The `Grafter` of this process, made from the environment at the first call that needs it."""

from __future__ import annotations

from grafter import _process
from grafter.config.settings.config import GrafterConfig
from grafter.rank.autoattach.first_call import watch_from_here
from grafter.rank.grafter import Grafter


def active(*, watch_models: bool = True) -> Grafter:
    """Raises ConfigError where the environment holds no valid configuration.

    watch_models: whether this call may be the first, and says nothing of which models are to be attached.
    """
    if _process.grafter is None:
        _process.grafter = Grafter(GrafterConfig.from_environment())
        if watch_models and _process.grafter.config.attach is not None:
            # The start of this Python did not do it, unless `grafter run` has started it.
            watch_from_here()
    grafter: Grafter = _process.grafter
    return grafter
