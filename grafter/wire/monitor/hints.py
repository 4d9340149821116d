"""Hints: what the models of both jobs say about why their points part. Pure; each is a sentence, or a few."""

from __future__ import annotations

from collections.abc import Sequence

from grafter.core.roles import RoleName
from grafter.wire.monitor.status_board import BoardLine

_NAMES_SHOWN = 8
_ROLES: tuple[RoleName, ...] = ("baseline", "target")


def find_hints(lines: Sequence[BoardLine]) -> list[str]:
    """lines: those of the board, of both jobs."""
    hints = [*_of_models(lines), *_of_passes(lines), *_of_gradients(lines)]
    return [*hints, *(hint for role in _ROLES if (hint := _of_bypassed(role, lines)))]


def _of_models(lines: Sequence[BoardLine]) -> list[str]:
    """Both wait, at points of different models."""
    waiting = [next((ln for ln in lines if ln.role == role and ln.state == "waiting"), None) for role in _ROLES]
    own, other = waiting
    if own is None or other is None:
        return []
    names = [_model_of(line) for line in (own, other)]
    if names[0] == names[1] or not all(name in line.hooks.models for name in names for line in (own, other)):
        return []
    shown = [f"the model {name!r}" if name else "the model with plain names" for name in names]
    return [
        f"Both jobs have several models, and call them in another order: the baseline is in {shown[0]}, and the target "
        f"in {shown[1]}. Points of both cannot meet in one run then. Compare one model in a run: "
        f'--compare "{_filter_for(names[0], names)}" --set step=manual, and then the other: '
        f'--compare "{_filter_for(names[1], names)}" --set step=manual.'
    ]


def _model_of(line: BoardLine) -> str:
    """`point` begins with its name, in quotes."""
    named = (model for model in line.hooks.models if model and line.point[1:].startswith(f"{model}."))
    return max(named, key=len, default="")


def _filter_for(name: str, names: Sequence[str]) -> str:
    if name:
        return f"name.startswith('{name}.')"
    return f"not name.startswith('{next(other for other in names if other)}.')"


def _of_passes(lines: Sequence[BoardLine]) -> list[str]:
    """One job's models have been called more often."""
    passes = {role: max((line.hooks.passes for line in lines if line.role == role), default=0) for role in _ROLES}
    if not all(passes.values()) or passes["baseline"] == passes["target"]:
        return []
    more, less = sorted(_ROLES, key=lambda role: passes[role], reverse=True)
    return [
        f"The {more} has begun {_counted(passes[more])} of its models, the {less} {passes[less]}. If the first ones of "
        f"the {more} only warm it up (profiling, dummy tokens), leave them out: --set {more}_warm_up=N "
        f"(GRAFTER_{more.upper()}_WARM_UP), where N is how many they are."
    ]


def _counted(passes: int) -> str:
    return f"{passes} forward pass{'es' * (passes != 1)}"


def _of_gradients(lines: Sequence[BoardLine]) -> list[str]:
    """A job waits at the gradient of a weight."""
    if not any(line.state == "waiting" and line.call_site.startswith("the parameter ") for line in lines):
        return []
    return [
        "A weight's gradient is a point at each backward pass. If one job accumulates gradients over more backward "
        "passes than the other, take them when the optimizer steps: --set weight_gradients=optimizer_step "
        "(GRAFTER_WEIGHT_GRADIENTS)."
    ]


def _of_bypassed(role: RoleName, lines: Sequence[BoardLine]) -> str | None:
    """Modules of one job whose hooks were passed by."""
    names = list(dict.fromkeys(name for line in lines if line.role == role for name in line.hooks.bypassed))
    if not names:
        return None
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return (
        f"These modules of the {role} have no points, though parts of them were called: "
        f"{', '.join(names[:_NAMES_SHOWN])}{more}. A module that is called as module.forward(...) runs no hooks; "
        "call module(...), or leave these names out of the filters."
    )
