"""The module trees of attached models, written for `grafter plan suggest`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grafter.capture.module_tree import ModuleTree, write_trees

if TYPE_CHECKING:
    from grafter.capture.attachment import Attachment
    from grafter.core.messages.roster import Roster


def write_module_trees(
    directory: Path, attachments: Sequence[Attachment], role_rank: int, roster: Roster | None = None
) -> Path | None:
    """Write what the hooked models of this rank are made of; None where lower ranks have the same modules.

    Called by every rank that has attached, at its first matched point and when it closes: then it is known which
    tensors came. `directory` is the role's, and exists.
    """
    role = directory.name
    if not attachments or (role_rank and roster is not None and not _has_news(attachments, role, role_rank, roster)):
        return None
    path = directory / (f"modules.rank{role_rank}.json" if role_rank else "modules.json")
    write_trees(path, [_with_tensors(attachment) for attachment in attachments], role, role_rank)
    return path


def _has_news(attachments: Sequence[Attachment], role: str, role_rank: int, roster: Roster) -> bool:
    for key in (key for attachment in attachments for key in attachment.keys):
        holders = roster.ranks_with(role, key)  # type: ignore[arg-type]
        if not holders or min(holders) == role_rank:
            return True
    return False


def _with_tensors(attachment: Attachment) -> ModuleTree:
    by_path = {points.path: tuple(sorted(points._names)) for points in attachment.points}
    tree = attachment.tree
    nodes = (
        node.model_copy(update={"tensors": by_path[path]}) if by_path.get(path) else node
        for path, node in zip(tree.own_paths, tree.modules, strict=True)
    )
    return ModuleTree(modules=tuple(nodes))
