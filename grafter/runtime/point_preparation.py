"""The preparation of a point: its value, taken apart, and the header that describes it to the other ranks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from grafter.config.options import PointOptions
from grafter.config.settings.config import GrafterConfig
from grafter.core.bounded_memory import BoundedMemory, cost
from grafter.core.layout.axes import axes_from_text, axes_of_job, read_axes
from grafter.core.layout.declared import declare_layouts
from grafter.core.leaves import Leaves, NothingToOffer, encode_extras, take_apart
from grafter.core.messages.local_value import LocalValue
from grafter.core.messages.manifest import Header
from grafter.core.messages.participants import own_participants
from grafter.core.messages.states import OutboxPlace
from grafter.core.points import PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.roles import Direction, RankIdentity
from grafter.errors import LayoutError
from grafter.runtime.recompute.recompute import Recomputations
from grafter.runtime.session import Session
from grafter.runtime.windows import Windows
from grafter.store.dumps.rank_dumps import RankDumps

# The rendezvous store takes texts of 8 MiB and drops the connection at a longer one. Each side's headers are one text.
MOST_DESCRIBED_BYTES = 7 << 20
_MOST_REMEMBERED = 4096
_MOST_REMEMBERED_WITH_TOKENS = 64
# For the texts of long headers; the headers take ten times as much at most.
_MOST_REMEMBERED_BYTES = 1 << 22
_Headers = BoundedMemory[tuple[Any, ...], Header]
# The fields of a header besides whose it is, in the order in which `_describe` gathers them.
_DESCRIPTION = (
    "participants", "direction", "call_site", "needs", "generation", "staging", "leaves", "structure", "others",
    "extras", "extras_tensors", "nothing", "failure", "nccl_device", "layouts", "axes", "check_replicas",
    "partial_target", "tokens", "wait", "outbox", "early",
)  # fmt: skip


class PointTooLarge(Exception):
    """So many leaves cannot be described to the other ranks; the text says how many there are, and the limit."""


class Point(NamedTuple):
    """One point of this rank that a filter has matched: what it is, and how it is treated. Made at each call.

    direction: None where it is only saved. tags: without its own name, step and phase. module: the announced module
    that it belongs to, if a hook has read it. is_parameter: the gradient of a parameter.
    """

    key: PointKey
    direction: Direction | None
    options: PointOptions
    tags: dict[str, Any]
    call_site: str
    module: str | None = None
    is_parameter: bool = False


@dataclass(frozen=True)
class PointTools:
    """What handles the values of one rank's points: it prepares them, saves them, keeps them for a recomputation."""

    preparer: PointPreparer
    dumps: RankDumps
    recomputations: Recomputations


class PointPreparer:
    """The preparer of one rank's points: it takes their values apart, and describes them to the other ranks."""

    def __init__(self, config: GrafterConfig, place: RankIdentity) -> None:
        self._config, self._place = config, place
        self._headers: _Headers = BoundedMemory(_MOST_REMEMBERED, _MOST_REMEMBERED_BYTES)
        self._headers_of_tokens: _Headers = BoundedMemory(_MOST_REMEMBERED_WITH_TOKENS, _MOST_REMEMBERED_BYTES)
        self.windows = Windows()

    def prepare(self, value: Any, options: PointOptions, key: PointKey | None = None) -> LocalValue:
        """The value, made if it is a function, taken apart. A failure is described, too: the other side must learn it.

        key: of the point, where it may count new rows only.
        """
        try:
            if callable(value) and not isinstance(value, torch.Tensor):
                value = value()
            leaves = take_apart(value)
            extras_text, extras = encode_extras(options.extras) if options.extras is not None else (None, [])
            try:
                layouts = declare_layouts(leaves, options.dims, options.layout, options.seq_lens)
            except LayoutError as error:
                raise LayoutError(f"the point {key.name!r}: {error}") if key is not None else error from None
            axes = self.axes(options.axes) if layouts else ()
            given = options.tokens is not None or options.has_window
            tokens = self.windows.announce(options, key) if given else None
        except NothingToOffer as nothing:
            return LocalValue(value, nothing=str(nothing), plain=nothing.plain)
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            return LocalValue(value, failure=error)
        return LocalValue(value, leaves, extras_text, extras, layouts, axes, tokens)

    def axes(self, given: Any) -> tuple[tuple[str, int, int], ...]:
        """This rank's place on the mesh: what the call says, else what was set, else the configuration."""
        place = self._place
        settled = axes_from_text(self._config.axes, place.role_rank, place.role_world_size) if self._config.axes else {}
        axes = {**settled, **axes_of_job(), **(read_axes(given) if given is not None else {})}
        return tuple((axis, coordinate, size) for axis, (coordinate, size) in sorted(axes.items()))

    def build_header(
        self,
        session: Session | None,
        point: Point,
        local: LocalValue,
        outbox: OutboxPlace | None = None,
        *,
        early: bool = False,
        recorded: bool = False,
    ) -> Header:
        """This rank's part of the point, for the other ranks. The same description gives the same object.

        session: None where nothing is transferred, in a recording or before both jobs have joined. outbox: where the
        snapshot lies. early: this rank has nothing for the point any more. recorded: another rank will wait.
        """
        options = point.options
        leaves, failure = local.leaves, local.failure
        description = (
            own_participants(self._place, options.ranks),
            point.direction,
            point.call_site,
            options.transform.receives if options.transform is not None else "identity",
            session.transfer.generation if session is not None else 0,
            session.transfer.staging.prepare() if session is not None else (0, 0),
            leaves.specs if leaves is not None else (),
            leaves.structure if leaves is not None else "",
            tuple(sorted((leaves.others if leaves is not None else local.plain).items())),
            local.extras_text,
            local.extras_specs if local.extras else (),
            local.nothing,
            f"{type(failure).__name__}: {failure}" if failure is not None else None,
            self._nccl_device(leaves),
            local.layouts,
            local.axes,
            bool(local.layouts) and self._config.check_replicas,
            options.partial_target,
            local.tokens,
            options.wait if not recorded else "both",
            outbox,
            early,
        )
        # Tokens are others in each step, and long; the same ones come again from layer to layer.
        known = self._headers_of_tokens if local.tokens is not None else self._headers
        header = known.get(description)
        if header is None:
            fields: dict[str, Any] = dict(zip(_DESCRIPTION, description, strict=True))
            header = _bounded(Header(role=self._place.role, role_rank=self._place.role_rank, **fields))
            known.remember(description, header, cost(header.text))
        return header

    def _nccl_device(self, leaves: Leaves | None) -> str | None:
        if self._config.backend != "nccl" or leaves is None or not leaves.tensors[0].is_cuda:
            return None
        uuid = torch.cuda.get_device_properties(leaves.tensors[0].device).uuid
        return f"{uuid} {os.environ.get('NCCL_HOSTID', '')}".strip()


def _bounded(header: Header) -> Header:
    """The header; where all of its side's would be too long for the store if they were like it, one that says so."""
    allowed = MOST_DESCRIBED_BYTES // max(1, len(header.participants))
    # Within the text of its side a header is quoted, which at most doubles it.
    if 2 * len(header.text) <= allowed or (nbytes := len(json.dumps(header.text))) <= allowed:
        return header
    error = PointTooLarge(
        f"{len(header.leaves)} leaves take {nbytes} bytes to describe, and {allowed} are allowed for each of "
        f"{len(header.participants)} ranks: graft them as several points, or as fewer, larger tensors"
    )
    return header.changed(
        leaves=(), structure="", others=(), extras=None, extras_tensors=(), layouts=(), tokens=None, outbox=None,
        failure=f"{type(error).__name__}: {error}",
    )  # fmt: skip
