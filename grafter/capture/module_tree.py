"""Module trees: the modules of a job's models as data, which `grafter plan suggest` reads after the run.

<run>/<role>/modules.json           by role rank 0
<run>/<role>/modules.rank<r>.json   by a rank with modules that no lower rank has: another pipeline stage
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grafter.capture.containers import Arguments
from grafter.capture.naming import layer_id_at
from grafter.capture.selection import select_modules, unwrapped, walk
from grafter.core.tensor_access import is_dtensor
from grafter.errors import UsageError
from grafter.store.written_files import write_whole

TREE_SCHEMA_VERSION = 1
_FILE = re.compile(r"modules(?:\.rank(\d+))?\.json")


class Weight(BaseModel):
    """A parameter of a module. shape: that on this rank; for a DTensor the global one, and `is_global` is True."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    shape: tuple[int, ...]
    dtype: str
    is_global: bool = False


class ModuleNode(BaseModel):
    """One module. path: without wrappers, and with a layer's own number where it has one.

    arguments: the names of the positional arguments of its `forward`. tensors: the paths of tensors that its hooks saw
    (`.in.hidden_states`, `.out.0`); empty if it had no hooks or was never called. can_be_called: also False for a
    further path of a module that has points under another one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: str
    class_name: str
    weights: dict[str, Weight] = {}
    arguments: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    can_be_called: bool = True


class ModuleTree(BaseModel):
    """A model's modules, parents before children, children in the model's order. The first is the model, path ''.

    own_paths: each module's path in this process, which may count a stage's layers from 0. It is not written.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    modules: tuple[ModuleNode, ...]
    own_paths: tuple[str, ...] = Field(default=(), exclude=True)

    @property
    def class_name(self) -> str:
        """The class of the model."""
        return self.modules[0].class_name


class _TreeFile(BaseModel):
    """The content of a file: the models of one rank."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int
    role: str
    role_rank: int
    models: tuple[ModuleTree, ...]


def tree_of(model: torch.nn.Module) -> ModuleTree:
    """The tree of a model. Shapes and dtypes are read, values are not."""
    model = unwrapped(model)
    nodes, paths = [], []
    with_points = {path for path, _ in select_modules(model, ())}
    for path, module in walk(model):
        nodes.append(
            ModuleNode(
                path=_numbered_path(model, path),
                class_name=type(module).__name__,
                weights={name: _weight(value) for name, value in module._parameters.items() if value is not None},
                arguments=tuple(Arguments(module).positional),
                can_be_called=path in with_points,
            )
        )
        paths.append(path)
    return ModuleTree(modules=tuple(nodes), own_paths=tuple(paths))


def _numbered_path(model: torch.nn.Module, path: str) -> str:
    """The path with the layers' own numbers, since a pipeline stage may count its layers from 0."""
    segments = path.split(".")
    return ".".join(str(layer_id_at(model, path, n)) if s.isdecimal() else s for n, s in enumerate(segments))


def _weight(value: torch.Tensor) -> Weight:
    return Weight(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."), is_global=is_dtensor(value))


def merge_trees(trees: Sequence[ModuleTree]) -> ModuleTree:
    """The tree of a model of which parts (pipeline stages) are given, with layers in the order of their numbers.

    If several parts have a module, the first one is kept.
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


def write_trees(path: Path, trees: Sequence[ModuleTree], role: str = "baseline", role_rank: int = 0) -> None:
    """Write one rank's models to a file, which appears whole or not at all."""
    content = _TreeFile(schema_version=TREE_SCHEMA_VERSION, role=role, role_rank=role_rank, models=tuple(trees))
    write_whole(path, json.dumps(content.model_dump(exclude_defaults=True), separators=(",", ":")))


def read_role_trees(directory: Path) -> list[ModuleTree]:
    """The models of one role, merged from the files of its ranks. Raises UsageError if there are none."""
    paths = list(directory.iterdir()) if directory.is_dir() else []
    found = sorted((int(match[1] or 0), path) for path in paths if (match := _FILE.fullmatch(path.name)))
    if not found:
        raise UsageError(
            f"{directory} has no modules.json: run the two programs with `grafter run --attach` (or grafter.attach) "
            f"and a filter, and give the run's directory."
        )
    # Models of one class are parts of one model (pipeline stages), or copies.
    by_class: dict[str, list[ModuleTree]] = {}
    for tree in (tree for _, path in found for tree in read_trees(path)):
        by_class.setdefault(tree.class_name, []).append(tree)
    return [merge_trees(parts) for parts in by_class.values()]


def read_trees(path: Path) -> list[ModuleTree]:
    """The models of one file. Raises UsageError if it cannot be read."""
    try:
        content = _TreeFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path} is not a module tree: {place + ': ' if place else ''}{first['msg']}.") from None
    if content.schema_version != TREE_SCHEMA_VERSION:
        raise UsageError(
            f"{path} has version {content.schema_version} of the format, and this grafter reads {TREE_SCHEMA_VERSION}."
        )
    if not content.models or any(not tree.modules or tree.modules[0].path for tree in content.models):
        raise UsageError(f"{path} is not a module tree: it has no model, or one whose first module is not the model.")
    return list(content.models)
