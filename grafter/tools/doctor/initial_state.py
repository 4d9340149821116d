"""Checks whether both commands start from the same state, from what their probes recorded at the first model call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grafter.tools.doctor.finding import Finding, fault, listed, ok, warning
from grafter.tools.doctor.probe_log import JobLog, Tensors

# The average error that rounding a weight to a narrower dtype may cause.
_ROUNDED = 1e-2
_SAME_WEIGHTS = "Load the same checkpoint in both, or graft them: grafter.dump_model(model) with b2t."
_HARMLESS_MODES = frozenset({"threads"})


def judge_initial_state(baseline: JobLog, target: JobLog) -> Iterator[Finding]:
    """Judge inputs, weights, dropout, random states and modes at the first call of the first process of each job."""
    one, other = baseline.first_process, target.first_process
    if one is None or other is None:
        who = " and ".join(role for role, process in (("baseline", one), ("target", other)) if process is None)
        text = f"no call of a torch model was seen in the {who}, so its initial state is unknown"
        yield warning("start", text, "Put grafter.dump on its input ids, positions and weights, and compare those.")
        return
    yield judge_inputs(one.first["inputs"], other.first["inputs"])
    yield judge_weights(one.first["weights"], other.first["weights"])
    yield judge_dropout(one.first, other.first)
    yield judge_random_states(one.first, other.first)
    yield judge_modes(one.first["modes"], other.first["modes"])


def judge_inputs(one: Tensors, other: Tensors) -> Finding:
    """Judge the inputs of the outermost model's first call. An input of one side may be computed inside the other."""
    check = "inputs"
    equal, different, reshaped = _sorted_out(one, other)
    if different:
        text = f"the first call gets different values: {listed(different)}"
        advice = "Feed both the same tokens and positions first: until then, no later result means anything."
        return fault(check, text, advice)
    if reshaped:
        shapes = ", ".join(f"{name} {_what(one[name])} / {_what(other[name])}" for name in reshaped[:3])
        text = f"of another shape or dtype: {shapes}"
        return warning(check, text, "Check that they mean the same, and declare dims= there.")
    if not equal:
        text = f"none has the same name: baseline {listed(one) or 'none'}; target {listed(other) or 'none'}"
        return warning(check, text, "Compare the output of the embedding first: it shows whether the tokens agree.")
    single = sorted(one.keys() ^ other.keys())
    rest = f"; only one side has {listed(single)}" if single else ""
    return ok(check, f"equal at the first call: {listed(equal)}{rest}")


def judge_weights(one: Tensors, other: Tensors) -> Finding:
    """Judge weights by name. For a weight in another dtype, the mean absolute value is compared."""
    check = "weights"
    equal, different, reshaped = _sorted_out(one, other)
    both = len(equal) + len(different) + len(reshaped)
    if not both:
        text = f"no name in common: {listed(one, 2)} / {listed(other, 2)}"
        advice = "Map the names in the plan file (docs/configuration.md), and compare them with grafter.dump_model."
        return warning(check, text, advice)
    if different:
        text = f"{len(different)} of {both} differ, first {different[0]}"
        return fault(check, text, _SAME_WEIGHTS)
    whole = [name for name in reshaped if one[name]["shape"] == other[name]["shape"]]
    off = [name for name in whole if not _alike(one[name], other[name])]
    if off:
        text = f"{len(off)} of {both} have different values in another dtype, first {off[0]}"
        return fault(check, text, _SAME_WEIGHTS)
    single = len(one.keys() ^ other.keys())
    rest = [f"{len(reshaped)} are sharded or of another dtype"] if reshaped else []
    rest += [f"{single} have a name that only one side has"] if single else []
    if not equal and not whole:
        text = f"all {both} have different shapes on the two sides, so they cannot be compared without their layouts"
        return warning(check, text, "Compare them with grafter.dump_model and dims= (docs/layouts.md).")
    return ok(check, "; ".join([f"{len(equal)} equal to the last bit", *rest]))


def judge_dropout(one: dict[str, Any], other: dict[str, Any]) -> Finding:
    """Judge which modules drop values at the first call, and the models' modes. one, other: first calls."""
    check = "dropout"
    active = {role: first["dropout"] for role, first in (("baseline", one), ("target", other)) if first["dropout"]}
    where = "; ".join(f"{role}: {listed(names, 3)}" for role, names in active.items())
    if len(active) == 1:
        text = f"active on only one side: {where}"
        return fault(check, text, "Call model.eval() there, or use training mode in both.")
    if active:
        text = f"active on both sides: {where}"
        return warning(check, text, "Set its probability to 0: the two jobs drop different values.")
    if one["training"] != other["training"]:
        role = "baseline" if one["training"] else "target"
        text = f"none is active, but the {role}'s model is in training mode and the other's is not"
        return warning(check, text, "Call model.eval() or model.train() in both: batch norms and others depend on it.")
    return ok(check, f"none is active; both models are in {'training' if one['training'] else 'evaluation'} mode")


def judge_random_states(one: dict[str, Any], other: dict[str, Any]) -> Finding:
    """Judge the states of the random generators at the first call. one, other: first calls."""
    check = "random states"
    states, others = one["random_states"], other["random_states"]
    common = sorted(states.keys() & others.keys())
    different = [kind for kind in common if states[kind] != others[kind]]
    if not different:
        return ok(check, f"equal at the first call: {', '.join(common)}")
    text = f"they differ at the first call: {', '.join(different)}"
    # torch starts from the same seed in every process, Python and numpy from a random one: unseeded, they always
    # differ.
    drawn = [kind for kind in different if kind in ("torch", "cuda")]
    if drawn and (one["dropout"] or other["dropout"]):
        return warning(check, text, "Seed both just before the first step: torch.manual_seed(0).")
    rest = "no dropout is active, so only sampling would show it" if drawn else "which is normal unless they are seeded"
    return ok(check, f"{text}; {rest}")


def judge_modes(one: dict[str, Any], other: dict[str, Any]) -> Finding:
    """Judge torch's global modes at the first call, by name."""
    compared = [mode for mode in one if mode not in _HARMLESS_MODES]
    different = [f"{mode}: {one[mode]} / {other.get(mode)}" for mode in compared if one[mode] != other.get(mode)]
    if different:
        advice = "If the two should agree to the last digits, set these to the same values."
        return warning("modes", "; ".join(different), advice)
    return ok("modes", f"the same: {', '.join(compared)}")


def _sorted_out(one: Tensors, other: Tensors) -> tuple[list[str], list[str], list[str]]:
    """Names on both sides: equal, different, and of another shape or dtype (or unreadable)."""
    equal, different, reshaped = [], [], []
    for name in one:
        if name not in other:
            continue
        a, b = one[name], other[name]
        if a.get("digest") is not None and a.get("digest") == b.get("digest"):
            equal.append(name)
        elif a["shape"] != b["shape"] or "digest" not in a or "digest" not in b or _narrower(a["dtype"], b["dtype"]):
            reshaped.append(name)
        else:
            different.append(name)
    return equal, different, reshaped


def _narrower(one: str, other: str) -> bool:
    """Whether two dtypes round differently. Integers are compared by value."""
    return one != other and any("float" in dtype or "complex" in dtype for dtype in (one, other))


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    one, other = a.get("abs_mean"), b.get("abs_mean")
    return one is None or other is None or bool(abs(one - other) <= _ROUNDED * max(one, other, 1e-12))


def _what(tensor: dict[str, Any]) -> str:
    return f"{tensor['dtype']}{tensor['shape']}"
