"""What a recording keeps besides the dumped values: of each point the header as it would have travelled; of each rank,
what it would have announced."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from grafter.pairing.manifest import Header
from grafter.rendezvous.announced_models import AnnouncedHooks, AnnouncedModel
from grafter.rendezvous.join import SHARED_SETTINGS, Place
from grafter.settings.config import GrafterConfig
from grafter.written_files import write_whole

RECORDING_VERSION = 1


class RecordedPart(BaseModel):
    """One rank's part of a point: the `header` of a `DumpRecord`, as JSON. module: that whose hook took the point.
    is_parameter: a parameter's gradient, to which all ranks come in one order. new_rows_only: which rows count is a
    matter of what met before, so the header has all of them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    header: Header
    module: str | None = None
    is_parameter: bool = False
    new_rows_only: bool = False


class RankFacts(BaseModel):
    """`rank<r>.recording.json`: there is one for every rank of a recorded job, also where none of its points matched.

    modules: those with hooks, None where nothing was attached. models: those they belong to. shared_settings: the
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
    """What both jobs of a run must have alike."""
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
