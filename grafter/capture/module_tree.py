"""Module trees: the modules of a job's models as data, which `grafter plan suggest` reads after the run.

<run>/<role>/modules.json           of role rank 0
<run>/<role>/modules.rank<r>.json   of a rank with modules that no rank before it has: another pipeline stage
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grafter.capture.naming import layer_id_at
from grafter.capture.selection import select_modules, unwrapped, walk
from grafter.core.processes import is_from_signal_handler
from grafter.core.tensor_access import is_dtensor
from grafter.errors import UsageError
from grafter.store.written_files import write_whole

SCHEMA_VERSION = 1
_FILE = re.compile(r"modules(?:\.rank(\d+))?\.json")


class Weight(BaseModel):
    """A module's own parameter. shape: that on this rank; of a DTensor the global one, and `is_global` is True."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    shape: tuple[int, ...]
    dtype: str
    is_global: bool = False


class ModuleNode(BaseModel):
    """One module. path: without wrappers, and with a layer's own number where it has one.

    arguments: the names of those that its `forward` takes by position. tensors: paths of tensors that its hooks have
    seen (`.in.hidden_states`, `.out.0`); empty where it had no hooks or was never called. can_be_called: False also for
    a further path of a module that has points under another one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: str
    class_name: str
    weights: dict[str, Weight] = {}
    arguments: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    can_be_called: bool = True


class ModuleTree(BaseModel):
    """A model's modules, parents before children and these in the model's order. The first is the model, path ''."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    modules: tuple[ModuleNode, ...]
    # Of each module, its path in this process, which may count a stage's layers from 0. Not written down.
    own_paths: tuple[str, ...] = Field(default=(), exclude=True)

    @property
    def class_name(self) -> str:
        return self.modules[0].class_name


class _TreeFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int
    role: str
    role_rank: int
    models: tuple[ModuleTree, ...]


def tree_of(model: torch.nn.Module) -> ModuleTree:
    """A model as it stands; shapes and dtypes are read, values never."""
    model = unwrapped(model)
    nodes, paths = [], []
    with_points = {path for path, _ in select_modules(model, ())}
    for path, module in walk(model):
        nodes.append(
            ModuleNode(
                path=_numbered_path(model, path),
                class_name=type(module).__name__,
                weights={name: _weight(value) for name, value in module._parameters.items() if value is not None},
                arguments=_positional_arguments(module),
                can_be_called=path in with_points,
            )
        )
        paths.append(path)
    return ModuleTree(modules=tuple(nodes), own_paths=tuple(paths))


def _numbered_path(model: torch.nn.Module, path: str) -> str:
    """The path with the numbers that layers themselves have: a pipeline stage counts its own from 0."""
    segments = path.split(".")
    return ".".join(str(layer_id_at(model, path, n)) if s.isdecimal() else s for n, s in enumerate(segments))


def _weight(value: torch.Tensor) -> Weight:
    return Weight(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."), is_global=is_dtensor(value))


def _positional_arguments(module: torch.nn.Module) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError) as error:
        if is_from_signal_handler(error):
            raise
        return ()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in by_position)


def merge_trees(trees: Sequence[ModuleTree]) -> ModuleTree:
    """Parts of one model, as pipeline stages have them: the modules of all, layers in the order of their numbers.

    Of a module that several have, the first one's is kept.
    """
    nodes: dict[str, ModuleNode] = {}
    children: dict[str, dict[str, None]] = {}
    for node in (node for tree in trees for node in tree.modules):
        kept = nodes.setdefault(node.path, node)
        if node.tensors and not kept.tensors:
            nodes[node.path] = kept.model_copy(update={"tensors": node.tensors})
        if node.path:
            children.setdefault(node.path.rpartition(".")[0], {}).setdefault(node.path)
    return ModuleTree(modules=tuple(nodes[path] for path in _in_order("", children)))


def _in_order(path: str, children: dict[str, dict[str, None]]) -> Iterator[str]:
    yield path
    below = list(children.get(path, ()))
    names = [child.rpartition(".")[2] for child in below]
    if all(name.isdecimal() for name in names):
        below.sort(key=lambda child: int(child.rpartition(".")[2]))
    for child in below:
        yield from _in_order(child, children)


# Files.


def write_trees(path: Path, trees: Sequence[ModuleTree], role: str = "baseline", role_rank: int = 0) -> None:
    """Write one rank's models to a file, which is there in full or not at all."""
    content = _TreeFile(schema_version=SCHEMA_VERSION, role=role, role_rank=role_rank, models=tuple(trees))
    write_whole(path, json.dumps(content.model_dump(exclude_defaults=True), separators=(",", ":")))


def read_role_trees(directory: Path) -> list[ModuleTree]:
    """The models of one role, put together from what its ranks have written. Raises UsageError where there is none."""
    found = sorted((int(match[1] or 0), path) for path in _children(directory) if (match := _FILE.fullmatch(path.name)))
    if not found:
        raise UsageError(
            f"{directory} has no modules.json: run the two programs with `grafter run --attach` (or grafter.attach) "
            f"and a filter, and give the run's directory."
        )
    return _joined_parts([tree for _, path in found for tree in read_trees(path)])


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def read_trees(path: Path) -> list[ModuleTree]:
    """The models of one file. Raises UsageError for one that cannot be read."""
    try:
        content = _TreeFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path} is no module tree: {place + ': ' if place else ''}{first['msg']}.") from None
    if content.schema_version != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has version {content.schema_version} of the format, and this grafter reads {SCHEMA_VERSION}."
        )
    if not content.models or any(not tree.modules or tree.modules[0].path for tree in content.models):
        raise UsageError(f"{path} is no module tree: it has no model, or one whose first module is not the model.")
    return list(content.models)


def _joined_parts(trees: list[ModuleTree]) -> list[ModuleTree]:
    """Models of one class are parts of one, as pipeline stages are, or copies of it, of which the first counts."""
    by_class: dict[str, list[ModuleTree]] = {}
    for tree in trees:
        by_class.setdefault(tree.class_name, []).append(tree)
    return [merge_trees(parts) for parts in by_class.values()]
