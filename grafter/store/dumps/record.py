"""What one dumped point says of itself: the schema of the files, described for other languages in docs/dump-format.md.

Below `<dir>/<run_name>/<role>/`, each rank writes alone:

    rank<r>.dumps.jsonl                       one `DumpRecord` a line, in the order of the program, each appended once
                                              its file is in place
    rank<r>/<order>-<name>.safetensors        the tensors of one point (level `full`); the same record, as JSON, is the
                                              value of "grafter" in its `__metadata__`, so that a file stands alone

A tensor is called `value<path>` as it was when the program came to the point, and `grafted<path>` as the program went
on with it, where a graft changed it; `<path>` is the leaf's, empty for a bare tensor. `extras<n>` are tensors within
extras. A dtype that safetensors lacks is stored as another, which the leaf's `stored_as` names.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.records import DirectionName, Outcome, Role, TensorStatistics
from grafter.core.token_runs import TokenRuns

FORMAT_VERSION = 1
METADATA_KEY = "grafter"

Level = Literal["full", "statistics", "checksum"]


class _Record(BaseModel):
    # Unknown fields are kept out, not refused: a newer grafter may have written the file.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class DumpedLeaf(_Record):
    """One tensor of the point. `dtype` as in `torch.float32`, without `torch.`; the shape is the local one."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    # Where it lies in the global tensor, as it was declared; None where nothing was.
    layout: DeclaredLayout | None = None
    # Of the value when the program came to the point; of what it went on with, where a graft changed it.
    statistics: TensorStatistics | None = None
    grafted_statistics: TensorStatistics | None = None
    # Hexadecimal; which function is said in docs/dump-format.md.
    checksum: str | None = None
    grafted_checksum: str | None = None
    stored_as: str | None = None


class DumpRecord(_Record):
    """One point on one rank. `order` counts this rank's dumped points over the whole run, in the program's order."""

    format_version: int = FORMAT_VERSION
    order: int
    time: float
    name: str
    tags: dict[str, Any]
    step: int
    phase: str
    occurrence: int
    role: Role
    role_rank: int
    role_world_size: int
    # Role ranks that share the point.
    participants: tuple[int, ...]
    call_site: str
    level: Level
    # Relative to the role's directory; None below level `full`, or where nothing could be saved (`reason` says why).
    file: str | None = None
    reason: str | None = None
    # The tensors of the value that are not saved, or not both before and after a graft: path -> why. None in files of
    # grafters that did not tell.
    unsaved: dict[str, str] | None = None
    leaves: tuple[DumpedLeaf, ...] = ()
    # The leaves that are no tensors: path -> value.
    others: dict[str, Any] = {}
    # This rank's place on the mesh: (axis, coordinate, size).
    axes: tuple[tuple[str, int, int], ...] = ()
    # As they were given; a tensor is {"__grafter_tensor__": n}, stored as `extras<n>`.
    extras: dict[str, Any] | None = None
    # Metadata that cannot be encoded: its path -> its repr. And what GRAFTER_DUMP_EXCLUDE left out.
    not_encoded: dict[str, str] = {}
    excluded: tuple[str, ...] = ()
    tokens: TokenRuns | None = None
    # What the graft of this point came to; None where no filter of a direction matched.
    direction: DirectionName | None = None
    outcome: Outcome | None = None
    # GRAFTER_RECORD: this rank's header as it would have travelled, for a graft from this recording.
    header: str | None = None
