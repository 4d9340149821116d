"""What a recording keeps besides the dumped values.

For each point, this is the header as it would have been sent; for each rank, what it would have announced.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.announced_models import AnnouncedHooks, AnnouncedModel
from grafter.core.messages.manifest import Header
from grafter.core.place import SHARED_SETTINGS, Place
from grafter.store.written_files import write_whole

RECORDING_VERSION = 1


class RecordedPart(BaseModel):
    """One rank's part of a point: the `header` of a `DumpRecord`, as JSON.

    module: the module whose hook took the point. is_parameter: a parameter's gradient, which all ranks reach in the
    same order.
    new_rows_only: which rows count depends on earlier exchanges, so the header has all of them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    header: Header
    module: str | None = None
    is_parameter: bool = False
    new_rows_only: bool = False


class RankFacts(BaseModel):
    """`rank<r>.recording.json`: every rank of a recorded job writes one, even if none of its points matched.

    modules: those with hooks, None if nothing was attached. models: those that they belong to. shared_settings: the
    filters and the key.
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
    return f"rank{role_rank}.recording.json"


def settings_of(config: GrafterConfig) -> dict[str, str]:
    """The settings that both jobs of a run must share."""
    return {name: str(getattr(config, name)) for name in SHARED_SETTINGS if getattr(config, name)}


def write_rank_facts(run_directory: Path, config: GrafterConfig, place: Place, hooks: AnnouncedHooks) -> None:
    """Called by every rank of a recorded job, once the run has begun. Raises OSError."""
    facts = RankFacts(
        role=place.role,
        role_rank=place.role_rank,
        role_world_size=place.role_world_size,
        modules=hooks.modules,
        models=hooks.models,
        shared_settings=settings_of(config),
    )
    write_whole(run_directory / place.role / facts_name(place.role_rank), facts.model_dump_json(indent=1))
