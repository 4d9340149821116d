"""What headers of one point must have in common, and the sentence where they do not. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence

from grafter.core.messages.manifest import Header


def find_mismatch(sender: Header, receiver: Header) -> str | None:
    """Why one sender's value cannot be this receiver's as it is; None if it can."""
    if sender.structure != receiver.structure:
        return _differently_built(sender, receiver)
    unequal = find_unequal_leaf(sender, receiver)
    if unequal is not None:
        return unequal
    for ours, theirs in zip(sender.leaves, receiver.leaves, strict=True):
        if ours.shape != theirs.shape:
            leaf = f" of {ours.path}" if ours.path else ""
            return (
                f"the shapes{leaf} differ: {ours} at {sender.who} ({sender.call_site}), {theirs} at {receiver.who} "
                f"({receiver.call_site}). A transform can turn one into the other (transforms/ has examples)"
            )
    return None


def find_structure_mismatch(headers: Sequence[Header]) -> str | None:
    """Whether one value is built otherwise than the first; the sentence says how."""
    first = headers[0]
    for header in headers[1:]:
        if header.structure != first.structure or len(header.leaves) != len(first.leaves):
            return _differently_built(first, header)
    return None


def _differently_built(one: Header, other: Header) -> str:
    return f"the values are built differently: {_structure(one)} at {one.who}, {_structure(other)} at {other.who}"


def find_unequal_leaf(sender: Header, receiver: Header) -> str | None:
    """Leaves that are no tensors must be equal, where both sides have them."""
    if sender.others == receiver.others:
        return None
    sent, there = dict(sender.others), dict(receiver.others)
    for path in sorted(sent | there):
        if sent.get(path) != there.get(path):
            one, other = _values(sent.get(path), there.get(path), absent="absent" if sender.nothing else "a tensor")
            return (
                f"the {f'leaf {path}' if path else 'value'} is {one} at {sender.who} and {other} at {receiver.who}; "
                "leaves that are no tensors must be equal"
            )
    return None


def _values(one: str | None, other: str | None, *, absent: str) -> tuple[str, str]:
    """With their types, where the values look alike."""
    types, values = zip(*(("", absent) if own is None else json.loads(own) for own in (one, other)), strict=True)
    shown = [own if known == "" else repr(own) for known, own in zip(types, values, strict=True)]
    if shown[0] == shown[1]:
        shown = [f"{own} ({known})" for known, own in zip(types, shown, strict=True)]
    return shown[0], shown[1]


def _structure(header: Header) -> str:
    paths = json.loads(header.structure) if header.structure != "tensor" else None
    return "a tensor" if paths is None else f"leaves {', '.join(paths[:6])}{', ...' if len(paths) > 6 else ''}"


def find_shared_gpu(headers: Sequence[Header]) -> str | None:
    """Whether two ranks would exchange through NCCL on one GPU; the sentence names them."""
    owners: dict[str, Header] = {}
    for header in headers:
        if header.nccl_device is not None:
            other = owners.setdefault(header.nccl_device, header)
            if other is not header:
                return (
                    f"{other.who} and {header.who} use one GPU ({header.nccl_device}), and NCCL refuses two ranks on "
                    "one device. Use GRAFTER_BACKEND=auto, or give each job GPUs of its own."
                )
    return None


def find_conflict(headers: Sequence[Header]) -> str | None:
    """Whether ranks of one role describe one point differently; the sentence says how. Pure."""
    first = headers[0]
    for header in headers[1:]:
        if header.participants != first.participants:
            return two_leaders(first, header)
        if header.wait != first.wait:
            return (
                f"{first.who} takes it with wait={first.wait} ({first.call_site}), {header.who} with "
                f"wait={header.wait} ({header.call_site}). Ranks of one job must decide alike: give all the same "
                "(GRAFTER_WAIT, a rule of the plan file, or the call)."
            )
        if header.direction != first.direction:
            return (
                f"{first.who} takes it as {first.direction}, {header.who} as {header.direction}; their filters differ."
            )
    return None


def two_leaders(first: Header, second: Header) -> str:
    return (
        f"ranks of one job declare different participants: {first.who} says {list(first.participants)} "
        f"(at {first.call_site}), {second.who} says {list(second.participants)} (at {second.call_site}). All "
        "ranks that share a point must give the same `ranks=`; ranks that do not share it need another tag (such as "
        "`pp_stage=...`) so that their points differ."
    )
