"""Reads the notes of the witnesses of one run, and compares them to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafter.tools.doctor.finding import Finding, fault, listed, ok, warning

# For each tensor by its path: shape, dtype, digest; for weights also the mean of their absolute values.
Tensors = dict[str, dict[str, Any]]


@dataclass
class ProcessNotes:
    """One process that called a model. `first` is its first call; `outputs` by call; `end` None: it recorded no end."""

    first: dict[str, Any]
    outputs: dict[int, Tensors] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    trouble: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return int(self.first["rank"])


@dataclass
class JobNotes:
    """One job: how many Pythons loaded the witness, whether one of them used grafter, and those that called a model, by
    rank.
    """

    pythons: int = 0
    uses_grafter: bool = False
    processes: list[ProcessNotes] = field(default_factory=list)

    @property
    def first_process(self) -> ProcessNotes | None:
        return self.processes[0] if self.processes else None


def read_notes(directory: Path) -> dict[str, JobNotes]:
    """The notes by role. A line that a killed process did not finish is ignored."""
    jobs = {"baseline": JobNotes(), "target": JobNotes()}
    for path in sorted(directory.glob("*.jsonl")):
        job = jobs.get(path.name.split("-")[0])
        if job is None:
            continue
        job.pythons += 1
        lines = list(_lines(path))
        job.uses_grafter = job.uses_grafter or any(line.get("uses_grafter") for line in lines)
        process = _read_process(lines)
        if process is not None:
            job.processes.append(process)
    for job in jobs.values():
        job.processes.sort(key=lambda process: (process.rank, process.first["time"]))
    return jobs


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _read_process(lines: Sequence[dict[str, Any]]) -> ProcessNotes | None:
    first = next((line for line in lines if line["kind"] == "first call"), None)
    if first is None:
        return None
    process = ProcessNotes(first)
    for line in lines:
        if line["kind"] == "call":
            process.outputs[line["number"]] = line["outputs"]
        elif line["kind"] == "end":
            process.end = line
        elif line["kind"] == "trouble":
            process.trouble.append(line["text"])
    return process


def first_change(one: JobNotes, other: JobNotes) -> str | None:
    """The earliest difference between two runs of one command; None if they agree to the last bit."""
    if len(one.processes) != len(other.processes):
        return f"{len(one.processes)} processes called a model in one run, {len(other.processes)} in the other"
    for a, b in zip(one.processes, other.processes, strict=True):
        change = _change(a, b)
        if change is not None:
            return change if len(one.processes) == 1 else f"{change} (rank {a.rank})"
    return None


def _change(a: ProcessNotes, b: ProcessNotes) -> str | None:
    for what in ("weights", "inputs"):
        name = first_different(a.first[what], b.first[what])
        if name is not None:
            return f"{what[:-1]} {name} of the first call differs"
    if _calls(a) != _calls(b):
        return f"models were called {_calls(a)} times in one run, {_calls(b)} in the other"
    for number in sorted(a.outputs.keys() & b.outputs.keys()):
        name = first_different(a.outputs[number], b.outputs[number])
        if name is not None:
            return f"output {name} of call {number + 1} differs"
    if a.end is not None and b.end is not None:
        name = first_different(a.end["weights"], b.end["weights"])
        if name is not None:
            return f"weight {name} at the end differs"
        for kind in a.first["random_states"]:
            # A random state that was never seeded differs from the start, and shows nothing.
            before, after = (
                [p[when]["random_states"].get(kind) for p in (vars(a), vars(b))] for when in ("first", "end")
            )
            if before[0] == before[1] and after[0] != after[1]:
                return f"the random state of {kind} at the end differs"
    return None


def _calls(process: ProcessNotes) -> int:
    return int(process.end["calls"]) if process.end is not None else len(process.outputs)


def first_different(one: Tensors, other: Tensors) -> str | None:
    """The first tensor that only one side has, or that is not equal to the last bit. Unreadable ones are skipped."""
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other:
            return name
        digests = one[name].get("digest"), other[name].get("digest")
        if None not in digests and digests[0] != digests[1]:
            return name
    return None


def what_was_seen(job: JobNotes) -> str:
    """The facts behind an agreement: `3 calls, 12 weights at the end, random states`."""
    calls = sum(len(process.outputs) for process in job.processes)
    seen = [f"{calls} model call{'s' * (calls != 1)}"]
    ends: list[Mapping[str, Any]] = [process.end for process in job.processes if process.end is not None]
    if ends:
        seen += [f"{sum(len(end['weights']) for end in ends)} weights at the end", "random states"]
    return ", ".join(seen)


# Checks whether both commands start from the same state, from what the witnesses saw at the first call of a model.

# The average error that rounding a weight to a narrower dtype may cause.
_ROUNDED = 1e-2
_SAME_WEIGHTS = "Load the same checkpoint in both, or graft them: grafter.dump_model(model) with b2t."
_HARMLESS_MODES = frozenset({"threads"})


def judge_likeness(baseline: JobNotes, target: JobNotes) -> Iterator[Finding]:
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
    """Judge the inputs of the outermost model's first call. An input of only one side may be computed inside the
    other's model.
    """
    check = "inputs"
    equal, different, reshaped = _sorted_out(one, other)
    if different:
        text = f"the first call gets different values: {listed(different)}"
        return fault(
            check, text, "Feed both the same tokens and positions first: until then, no later result means anything."
        )
    single = sorted(one.keys() ^ other.keys())
    if reshaped:
        shapes = ", ".join(f"{name} {_what(one[name])} / {_what(other[name])}" for name in reshaped[:3])
        return warning(
            check, f"of another shape or dtype: {shapes}", "Check that they mean the same, and declare dims= there."
        )
    if not equal:
        text = f"none has the same name: baseline {listed(one) or 'none'}; target {listed(other) or 'none'}"
        return warning(check, text, "Compare the output of the embedding first: it shows whether the tokens agree.")
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
    check = "dropout"
    active = {role: first["dropout"] for role, first in (("baseline", one), ("target", other)) if first["dropout"]}
    where = "; ".join(f"{role}: {listed(names, 3)}" for role, names in active.items())
    if len(active) == 1:
        return fault(
            check, f"active on only one side: {where}", "Call model.eval() there, or use training mode in both."
        )
    if active:
        return warning(
            check, f"active on both sides: {where}", "Set its probability to 0: the two jobs drop different values."
        )
    if one["training"] != other["training"]:
        role = "baseline" if one["training"] else "target"
        text = f"none is active, but the {role}'s model is in training mode and the other's is not"
        return warning(check, text, "Call model.eval() or model.train() in both: batch norms and others depend on it.")
    return ok(check, f"none is active; both models are in {'training' if one['training'] else 'evaluation'} mode")


def judge_random_states(one: dict[str, Any], other: dict[str, Any]) -> Finding:
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
    check = "modes"
    different = [
        f"{mode}: {one[mode]} / {other.get(mode)}"
        for mode in one
        if mode not in _HARMLESS_MODES and one[mode] != other.get(mode)
    ]
    if different:
        text = "; ".join(different)
        return warning(check, text, "If the two should agree to the last digits, set these to the same values.")
    return ok(check, f"the same: {', '.join(mode for mode in one if mode not in _HARMLESS_MODES)}")


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
    means = a.get("abs_mean"), b.get("abs_mean")
    if means[0] is None or means[1] is None:
        return True
    return bool(abs(means[0] - means[1]) <= _ROUNDED * max(means[0], means[1], 1e-12))


def _what(tensor: dict[str, Any]) -> str:
    return f"{tensor['dtype']}{tensor['shape']}"
