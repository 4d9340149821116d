"""The models of one rank as it announces them, and whether two jobs mean the same model by one name. Pure.

Points of a model that is alone have plain names in both jobs, so they meet. Where a job has several models of one
class, a name alone does not say which of them is meant: what tells them apart is the variable that holds a model in its
program, else its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict


class AnnouncedModel(BaseModel):
    """One model with hooks.

    name: what stands before the names of its points; empty where they are plain. class_name: without wrappers.
    variables: those that hold this model and no other of the rank. weights: a digest; empty where there is none.
    first_call: `file:line in function`; empty where it was not called yet. is_given: whether the user gave the name.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    class_name: str
    variables: tuple[str, ...] = ()
    weights: str = ""
    first_call: str = ""
    is_given: bool = False

    def __str__(self) -> str:
        held = f"the model {self.variables[0]!r}" if self.variables else "a model that no variable holds"
        called = f"first called at {self.first_call}" if self.first_call else "not called yet"
        points = f"{self.name}.*" if self.name else "plain names"
        return f"{held} of class {self.class_name} ({called}; its points: {points})"


class AnnouncedHooks(NamedTuple):
    """What a rank announces of its hooks. modules: None where it has none attached. models: those they belong to."""

    modules: tuple[str, ...] | None = None
    models: tuple[AnnouncedModel, ...] = ()


NO_HOOKS = AnnouncedHooks()
Models = Sequence[AnnouncedModel]
Pair = tuple[AnnouncedModel, AnnouncedModel]


def find_confused_models(baseline: Sequence[Models], target: Sequence[Models]) -> str | None:
    """Each side: its ranks' models. Which pair of models has one name without being known to be the same, as a
    sentence; None where all fit."""
    # A rank's weights say something only where the other job cuts them alike.
    pairs = zip(baseline, target, strict=True) if len(baseline) == len(target) else [(baseline[0], target[0])]
    for own, others in pairs:
        by_name = {model.name: model for model in _with_own_name(others)}
        for model in _with_own_name(own):
            other = by_name.get(model.name)
            if other is not None and not model.is_given and not other.is_given:
                rivals = _rivals(model, others, other) + _rivals(other, own, model)
                if not all(_is_surely(model, other, *rival) for rival in rivals):
                    return _explain(model, other, own, others)
    return None


def _with_own_name(models: Models) -> Models:
    """Those that share their name with no other: several that the program attaches by itself may, as may chunks."""
    counts = Counter(model.name for model in models)
    return [model for model in models if counts[model.name] == 1]


def _rivals(model: AnnouncedModel, there: Models, paired: AnnouncedModel) -> list[Pair]:
    """(model, another one than `paired` that it could belong to)."""
    return [(model, o) for o in there if o is not paired and not o.is_given and o.class_name == model.class_name]


def _is_surely(model: AnnouncedModel, other: AnnouncedModel, one: AnnouncedModel, rival: AnnouncedModel) -> bool:
    """Whether `model` and `other` belong together rather than `one`, which is either of them, and its `rival`."""
    by_variable = (_share_variable(model, other), _share_variable(one, rival))
    if by_variable[0] != by_variable[1]:
        return by_variable[0]
    if model.class_name != other.class_name:
        return False
    return _have_same_weights(model, other) and not _have_same_weights(one, rival)


def _share_variable(one: AnnouncedModel, other: AnnouncedModel) -> bool:
    return not set(one.variables).isdisjoint(other.variables)


def _have_same_weights(one: AnnouncedModel, other: AnnouncedModel) -> bool:
    return bool(one.weights) and one.weights == other.weights


def _explain(model: AnnouncedModel, other: AnnouncedModel, own: Models, others: Models) -> str:
    lists = "\n".join(f"  {role}: {m}" for role, side in (("baseline", own), ("target", others)) for m in side)
    return (
        f"the jobs have several models of class {model.class_name}, and it is not clear which of them are the same: by "
        f"their order {_short(model)} of the baseline would meet {_short(other)} of the target.\n{lists}\n"
        "Give each model the name that it has in both jobs, by the variable that holds it:\n"
        f"  --set baseline_models={_remedy(own)} --set target_models={_remedy(others)}\n"
        "(GRAFTER_BASELINE_MODELS, GRAFTER_TARGET_MODELS; `VARIABLE=` gives plain names), or call "
        "grafter.attach(model, name='...') in both programs."
    )


def _short(model: AnnouncedModel) -> str:
    return repr(model.variables[0]) if model.variables else f"a {model.class_name}"


def _remedy(models: Models) -> str:
    held = [model.variables[0] for model in models if model.variables]
    return ",".join(f"{variable}={variable}" for variable in held) or "VARIABLE=NAME"


# Begins the key under which a rank announces one tensor's point; keys of modules begin with their names.
TENSOR_KEY_MARK = "\t"


def is_tensor_key(key: str) -> bool:
    """Whether an announced key is that of one tensor, not of a module."""
    return key.startswith(TENSOR_KEY_MARK)
