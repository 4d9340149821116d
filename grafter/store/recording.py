"""A recording: what one role recorded, rank by rank, in program order; and what it holds besides the dumped values.

    facts of each rank    rank<r>.recording.json        was it recorded at all, with which filters, with how many ranks
    points                the dumps of each rank         grafter.open_dumps, and the recorded part of each point

Nothing in a recording is trusted: the reader of dumps opens the files, texts are checked against their types, and a tag
that has the name of an option is rejected. A point that cannot be played is played as one without a value, with the
reason.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from grafter.config.settings.config import GrafterConfig
from grafter.core.leaves import Leaves, encode_extras, spec_of
from grafter.core.messages.announced_models import AnnouncedHooks, AnnouncedModel
from grafter.core.messages.local_value import LocalValue
from grafter.core.messages.manifest import Header
from grafter.core.messages.roster import PlayedFrom
from grafter.core.points import OPTIONS, OWN_TAGS
from grafter.core.records import RankSummary
from grafter.core.roles import ROLES, SHARED_SETTINGS, RankIdentity, Role
from grafter.errors import DumpError
from grafter.store.dumps.directory import find_role_directory
from grafter.store.dumps.point import DumpedPoint
from grafter.store.dumps.reader import Dumps, open_dumps
from grafter.store.dumps.record import DumpRecord
from grafter.store.dumps.record_file import read_file, shown
from grafter.store.written_files import write_whole

# A process is started for each.
_MOST_RANKS = 1024
_LONGEST_FACTS = 1 << 26
Model = TypeVar("Model", bound=BaseModel)
_SCALARS = (str, int, float, bool, type(None))


class RecordedFailure(Exception):
    """The error with which the recorded program's point failed."""


@dataclass(frozen=True)
class RecordedPoint:
    """One point of one recorded rank."""

    point: DumpedPoint = field(repr=False)
    record: DumpRecord = field(repr=False)
    part: RecordedPart = field(repr=False)

    @property
    def tags(self) -> dict[str, Any]:
        """The tags of the recorded call."""
        return dict(self.record.tags)

    @property
    def is_gradient(self) -> bool:
        """Whether the point is a gradient."""
        return self.record.phase == "backward"

    @property
    def is_missing(self) -> bool:
        """Whether this is a gradient that the recorded program did not have."""
        return self.is_gradient and self.part.header.nothing is not None

    @property
    def given(self) -> dict[str, Any]:
        """The options of the recorded call that playing it needs: the participants, if not all ranks took part."""
        participants = self.part.header.participants
        return {"ranks": list(participants)} if len(participants) < self.record.role_world_size else {}

    def offer(self) -> LocalValue:
        """The rank's offer, with mapped memory. If the point cannot be read, the offer has a reason instead."""
        header = self.part.header
        if header.failure is not None:
            return LocalValue(self, failure=RecordedFailure(header.failure))
        if header.nothing is not None:
            return LocalValue(self, nothing=f"{header.nothing} (when it was recorded)", plain=dict(header.others))
        try:
            return self._offer(header)
        except DumpError as error:
            return LocalValue(self, nothing=f"the recording cannot be used here: {error}")

    def _offer(self, header: Header) -> LocalValue:
        rank = self.record.role_rank
        tensors = [self.point.local(rank, spec.path) for spec in header.leaves]
        specs = tuple(spec_of(spec.path, tensor) for spec, tensor in zip(header.leaves, tensors, strict=True))
        for described, found in zip(header.leaves, specs, strict=True):
            if (described.shape, described.dtype) != (found.shape, found.dtype):
                raise DumpError(f"{self.point}: its header says {described}, and its file has {found}. It is damaged.")
        if not specs or len(header.layouts) not in (0, len(specs)):
            raise DumpError(f"{self.point}: its header describes no tensors, or other layouts than tensors.")
        text, extras = self._extras(header)
        leaves = Leaves(self, list(tensors), list(tensors), specs, header.structure, dict(header.others))
        if header.tokens is not None and header.tokens.same_as is not None:
            raise DumpError(f"{self.point}: its tokens refer to another rank's, which never happens in a recording.")
        return LocalValue(self, leaves, text, extras, header.layouts, header.axes, header.tokens)

    def _extras(self, header: Header) -> tuple[str | None, list[torch.Tensor]]:
        if header.extras is None:
            return None, []
        text, tensors = encode_extras(self.point.extras(self.record.role_rank) or {})
        if len(tensors) != len(header.extras_tensors):
            raise DumpError(
                f"{self.point}: of the {len(header.extras_tensors)} tensors in its extras, {len(tensors)} are in its "
                f"file. {self.record.reason or 'It is damaged.'}"
            )
        restored = [
            _as_recorded(tensor, described.shape, described.dtype, str(self.point))
            for tensor, described in zip(tensors, header.extras_tensors, strict=True)
        ]
        # The same function wrote it; it differs if metadata had to be replaced by values that a file can hold.
        if text != header.extras:
            raise DumpError(f"{self.point}: its extras could not be kept in the recording as they were.")
        return text, restored


def _as_recorded(tensor: torch.Tensor, shape: tuple[int, ...], dtype_name: str, where: str) -> torch.Tensor:
    """A tensor of extras with its original dtype, if a file has no name for that dtype."""
    dtype = getattr(torch, dtype_name, None)
    if tensor.dtype is dtype and tuple(tensor.shape) == shape:
        return tensor
    if isinstance(dtype, torch.dtype):
        raw = tensor.contiguous().clone().view(-1).view(torch.uint8)
        if prod(shape) * dtype.itemsize == raw.numel():
            return raw.view(dtype).view(shape)
    raise DumpError(
        f"{where}: a tensor of its extras is {dtype_name[:40]}{list(shape)}, but its file has something else."
    )


@dataclass(frozen=True)
class RecordedRank:
    """One recorded rank. lost: how many points its recording lacks, because they could not be written."""

    role_rank: int
    facts: RankFacts
    points: tuple[RecordedPoint, ...]
    played_from: PlayedFrom
    lost: int = 0
    # How the recorded process ended; None if it closed normally.
    ended: str | None = None


@dataclass(frozen=True)
class RoleRecording:
    """The recording of one role, with all its ranks. problems: what could not be read, while the rest was."""

    directory: Path
    role: Role
    ranks: tuple[RecordedRank, ...]
    problems: tuple[str, ...]

    @property
    def shared_settings(self) -> dict[str, str]:
        """The settings of the recorded job that the live job must share."""
        return self.ranks[0].facts.shared_settings


def find_recording(directory: str | os.PathLike[str], role: Role) -> tuple[Path, RankFacts]:
    """The role's directory, and the facts of its rank 0. Quick, however much was recorded. Raises DumpError."""
    path = _role_directory(Path(directory), role)
    facts = _read(path, facts_name(0), RankFacts)
    if facts is None:
        raise DumpError(
            f"{path} holds no recording: there is no {facts_name(0)} in it. A recording is made with GRAFTER_RECORD=1 "
            "(or `grafter run --record`); what GRAFTER_DUMP_FILTER saves cannot be grafted from."
        )
    if facts.role != role:
        raise _wrong_role(path, shown(facts.role), role)
    if facts.recording_version > RECORDING_VERSION:
        raise DumpError(
            f"{path}: a newer grafter recorded it (version {facts.recording_version}, this one plays up to "
            f"{RECORDING_VERSION}). Update grafter here."
        )
    if not 0 < facts.role_world_size <= _MOST_RANKS:
        raise DumpError(f"{path} names {facts.role_world_size} ranks; 1 to {_MOST_RANKS} can be played.")
    return path, facts


def open_recording(directory: str | os.PathLike[str], role: Role) -> RoleRecording:
    """A recording without its tensors. directory: the role's, or that of the run. Raises DumpError."""
    path, first = find_recording(directory, role)
    size = first.role_world_size
    facts = [_facts_of(path, rank, first) for rank in range(size)]
    dumps = open_dumps(path) if any(name.endswith(".dumps.jsonl") for name in os.listdir(path)) else None
    by_rank = _points_by_rank(dumps, size) if dumps is not None else {}
    ranks = []
    for rank in range(size):
        points = by_rank.get(rank, ())
        last_step = points[-1].record.step if points else None
        played_from = PlayedFrom(directory=str(path), points=len(points), last_step=last_step)
        summary = _read(path, f"rank{rank}.summary.json", RankSummary)
        lost = summary.dumps_lost if summary is not None else 0
        ranks.append(RecordedRank(rank, facts[rank], points, played_from, lost, _how_ended(summary)))
    problems = tuple(map(str, dumps.problems)) if dumps is not None else ()
    return RoleRecording(path, role, tuple(ranks), problems)


def _role_directory(path: Path, role: Role) -> Path:
    for place in (path, path / role):
        if (place / facts_name(0)).is_file():
            return place
    other = next((name for name in ROLES if (path / name / facts_name(0)).is_file()), None)
    if other is not None:
        raise _wrong_role(path, other, role)
    # Raises the error that says what the directory holds instead.
    return find_role_directory(path, None)


def _wrong_role(path: Path, found: str, role: Role) -> DumpError:
    return DumpError(
        f"{path} holds a recording of the {found}, but a recording of the {role} is needed here. Give that, or let the "
        f"recording be the {found} and the live job the {role}."
    )


def _facts_of(path: Path, rank: int, first: RankFacts) -> RankFacts:
    facts = _read(path, facts_name(rank), RankFacts)
    if facts is None:
        raise DumpError(
            f"{path}: the {first.role} has {first.role_world_size} ranks, but {facts_name(rank)} does not exist. It "
            "was copied in part, or that rank wrote elsewhere (another machine): bring all ranks' files into one "
            "directory."
        )
    if (facts.role, facts.role_rank, facts.role_world_size) != (first.role, rank, first.role_world_size):
        raise DumpError(f"{path}/{facts_name(rank)}: it belongs to another rank or another job than {facts_name(0)}.")
    return facts


def _points_by_rank(dumps: Dumps, size: int) -> dict[int, tuple[RecordedPoint, ...]]:
    found: dict[int, list[RecordedPoint]] = {}
    for point in dumps:
        for rank, record in point.records.items():
            if record.header is not None and rank < size:
                _check_tags(point, record)
                found.setdefault(rank, []).append(RecordedPoint(point, record, _part_of(point, record)))
    in_order = {rank: tuple(sorted(points, key=lambda one: one.record.order)) for rank, points in found.items()}
    for points in in_order.values():
        for one, other in pairwise(points):
            if not 0 <= one.record.step <= other.record.step:
                raise DumpError(f"{dumps.directory}: {other.point} comes after {one.point}; steps can only increase.")
    return in_order


def _check_tags(point: DumpedPoint, record: DumpRecord) -> None:
    """Check tags that are passed to `dump` again: a tag with the name of an option would act as one."""
    for tag, value in record.tags.items():
        if tag in OPTIONS or tag in OWN_TAGS or type(value) not in _SCALARS:
            raise DumpError(f"{point}: {shown(tag)} cannot be a tag. The recording is damaged, or was tampered with.")


def _part_of(point: DumpedPoint, record: DumpRecord) -> RecordedPart:
    try:
        part = RecordedPart.model_validate_json(record.header or "")
        header = part.header
        if (header.role, header.role_rank) != (record.role, record.role_rank):
            raise ValueError("it belongs to another rank")
        if record.role_rank not in header.participants or header.participants[-1] >= record.role_world_size:
            raise ValueError("its participants do not belong to this job")
        return part
    except (ValueError, RecursionError) as error:
        reason = shown(str(error).splitlines()[0])
        header = Header(
            role=record.role, role_rank=record.role_rank, participants=tuple(range(record.role_world_size)),
            direction=record.direction or "b2t", call_site=record.call_site,
            nothing=f"what the recording says of it cannot be read ({reason})",
        )  # fmt: skip
        return RecordedPart(header=header)


def _how_ended(summary: RankSummary | None) -> str | None:
    if summary is None:
        return "ended without closing (killed, or crashed)"
    return f"ended with {summary.error_kind}: {summary.error.splitlines()[0]}" if summary.error else None


def _read(path: Path, name: str, model: type[Model]) -> Model | None:
    """The content of the file; None if there is no such file. Raises DumpError for anything else."""
    if not os.path.lexists(path / name):
        return None
    text = read_file(path, name, _LONGEST_FACTS)
    try:
        return model.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        raise DumpError(f"{path}/{name}: it cannot be read: {shown(str(error).splitlines()[0])}.") from None


RECORDING_VERSION = 1


class RecordedPart(BaseModel):
    """One rank's part of a point: the `header` of a `DumpRecord`, as JSON.

    module: the module whose hook took the point. is_parameter: it is a parameter's gradient, which all ranks reach in
    the same order. new_rows_only: which rows count depends on earlier exchanges, so the header has all of them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    header: Header
    module: str | None = None
    is_parameter: bool = False
    new_rows_only: bool = False


class RankFacts(BaseModel):
    """`rank<r>.recording.json`: every rank of a recorded job writes one, even if none of its points matched.

    modules: those with hooks; None if nothing was attached. models: those of the modules. shared_settings: the filters
    and the key.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    recording_version: int = RECORDING_VERSION
    role: str
    role_rank: int
    role_world_size: int
    modules: tuple[str, ...] | None = None
    models: tuple[AnnouncedModel, ...] = ()
    shared_settings: dict[str, str] = {}


def facts_name(role_rank: int) -> str:
    """The name of the file with one rank's facts."""
    return f"rank{role_rank}.recording.json"


def settings_of(config: GrafterConfig) -> dict[str, str]:
    """The settings that both jobs of a run must share."""
    return {name: str(getattr(config, name)) for name in SHARED_SETTINGS if getattr(config, name)}


def write_rank_facts(run_directory: Path, config: GrafterConfig, place: RankIdentity, hooks: AnnouncedHooks) -> None:
    """Called by every rank of a recorded job, once the run has begun. Raises OSError."""
    facts = RankFacts(
        role=place.role, role_rank=place.role_rank, role_world_size=place.role_world_size, modules=hooks.modules,
        models=hooks.models, shared_settings=settings_of(config),
    )  # fmt: skip
    write_whole(run_directory / place.role / facts_name(place.role_rank), facts.model_dump_json(indent=1))
