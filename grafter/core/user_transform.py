"""User transforms: the one-argument functions that turn what came into what is written.

    def transform(graft_input: GraftTransformInput) -> torch.Tensor: ...

`load_transform` finds one by its path, at start, so that a wrong path fails before any model has run.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args, overload

import torch

from grafter.core.processes import is_from_signal_handler
from grafter.errors import TransformError

Receives = Literal["all", "same_rank", "resharded"]
Function = TypeVar("Function", bound=Callable[..., Any])

_RECEIVES_MARK = "__grafter_receives__"
_FORMS = "`package.module.function`, `package.module:function` or `path/to/file.py:function`"
_SIGNATURE = "def transform(graft_input: grafter.GraftTransformInput) -> torch.Tensor"


@dataclass(frozen=True)
class GraftTransformInput:
    """What a transform is given. grafter fills every field; the defaults are for tests of your own transforms.

    tags: name, step, phase and all tags of the point.
    received_list: one tensor per sending rank that this transform receives, in role-rank order, each of the shape and
        dtype that its sender had. The memory is grafter's and is used again after the write: return it, or something
        made of it, but do not keep it.
    received_extras_list: parallel to `received_list`: what that sender gave as `extras`, or None.
    target: this rank's tensor before the write. Read it; never write into it: another rank may still abort the point.
    sender_ranks: role ranks of the senders, parallel to `received_list`.
    sender_layouts, target_layout: where these tensors lie in the global one, as `grafter.Layout`s (parallel to
        `received_list`; resharded: of all senders); None where a side declares nothing.
    path: the leaf's path in a pytree, "" for a bare tensor.
    """

    tags: dict[str, Any]
    received_list: list[torch.Tensor]
    received_extras_list: list[dict[str, Any] | None]
    target: torch.Tensor
    direction: Literal["b2t", "t2b", "compare"] = "b2t"
    role: Literal["baseline", "target"] = "target"
    role_rank: int = 0
    role_world_size: int = 1
    sender_ranks: list[int] = field(default_factory=list)
    sender_layouts: list[Any] | None = None
    target_layout: Any | None = None
    path: str = ""


@overload
def transform(function: Function, *, receives: Receives = "all") -> Function: ...
@overload
def transform(function: None = None, *, receives: Receives = "all") -> Callable[[Function], Function]: ...
def transform(
    function: Function | None = None, *, receives: Receives = "all"
) -> Function | Callable[[Function], Function]:
    """Mark a function as a transform and say which tensors it needs; only those are moved.

    receives: "all" (the default, also without this decorator): the whole tensor of every sender.
        "same_rank": only that of the sender which would serve this rank without a transform: `received_list` has
        length 1.
        "resharded": this rank's own part of the senders' tensor, put together by the layouts of both sides:
        `received_list` has length 1, and its tensor the shape of the target (without padding). The extras are those of
        the lowest sending rank.

    Raises TransformError for any other value of `receives`.
    """
    # A plain str, so that the value a user really passed can be looked at.
    asked: str = receives
    if asked not in get_args(Receives):
        raise TransformError(f"receives={asked!r} is not known; legal values are {', '.join(get_args(Receives))}.")

    def mark(marked: Function) -> Function:
        setattr(marked, _RECEIVES_MARK, receives)
        return marked

    return mark if function is None else mark(function)


@dataclass(frozen=True)
class UserTransform:
    """A loaded transform. `path` is as the user wrote it."""

    path: str
    function: Callable[[GraftTransformInput], Any]
    receives: Receives

    def __call__(self, graft_input: GraftTransformInput) -> torch.Tensor:
        """Run the function without autograd, with a forked random state: no graft shifts the model's dropout.

        The random states that are restored are torch's of the CPU and, for a CUDA target, of its device. Raises
        TransformError, chained and with the line of the user's file, when the function raises or returns no tensor.
        What a signal handler of the program raises meanwhile passes as it is.
        """
        target = graft_input.target
        devices = [target.device] if target.is_cuda else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                value = self.function(graft_input)
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            raise TransformError(f"transform {self.path!r} {_describe(error, self._file())}") from error
        if not isinstance(value, torch.Tensor):
            raise TransformError(
                f"transform {self.path!r} returned {_kind(value)}, not a torch.Tensor. "
                f"It must return the tensor to write: {_SIGNATURE}."
            )
        return value

    def _file(self) -> str | None:
        code = getattr(self.function, "__code__", None)
        return None if code is None else code.co_filename


def load_transform(path: str) -> UserTransform:
    """Find the transform that `path` names and check that it can be called with one argument.

    path: `package.module.function`, `package.module:function` or `path/to/file.py:function` (a relative file is looked
    up from the current directory). A module or file is executed at its first load; the same one again is not.

    Raises TransformError naming the path, what was looked for and near names.
    """
    source, name = _split_path(path)
    module = _load_file(path, source) if _is_file(source) else _import_module(path, source, name)
    function = _find_function(path, module, name)
    _check_signature(path, function)
    return UserTransform(path=path, function=function, receives=getattr(function, _RECEIVES_MARK, "all"))


def transform_of(function: Callable[[GraftTransformInput], Any]) -> UserTransform:
    """A function given as it is, not by path, with the same checks; `path` is then its module and name.

    Raises TransformError if it cannot be called with one argument.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    path = f"{getattr(function, '__module__', type(function).__module__)}.{name}"
    if inspect.isclass(function):
        raise TransformError(f"transform {path!r} is {_kind(function)}, not a function. A transform is `{_SIGNATURE}`.")
    _check_signature(path, function)
    return UserTransform(path=path, function=function, receives=getattr(function, _RECEIVES_MARK, "all"))


def _split_path(path: str) -> tuple[str, str]:
    """(file or module, function)."""
    separator = ":" if ":" in path else "."
    source, _, name = path.rpartition(separator)
    if separator == "." and (_is_file(path) or "/" in path):
        raise TransformError(
            f"transform {path!r} names a file but no function in it. Write `{path}:function`, e.g. `{path}:transform`."
        )
    legal_source = _is_file(source) or all(part.isidentifier() for part in source.split("."))
    if not (legal_source and name.isidentifier()):
        raise TransformError(f"transform {path!r} is not a path of a function. Write {_FORMS}.")
    return source, name


def _is_file(source: str) -> bool:
    return source.endswith(".py") or "/" in source


def _load_file(path: str, source: str) -> ModuleType:
    """Execute a file as a module whose name no `import` statement would ever ask for; once per real file."""
    file = Path(source).expanduser().resolve()
    if not file.is_file():
        raise TransformError(f"transform {path!r}: {_why_no_file(file)}")
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:16]
    module_name = f"_grafter_transform_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise TransformError(f"transform {path!r}: {file} is not a Python source file; its name must end in `.py`.")
    module = importlib.util.module_from_spec(spec)
    # Registered first, as the import system does: dataclasses and typing look their module up while it runs.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if is_from_signal_handler(error):
            raise
        del sys.modules[module_name]
        raise TransformError(f"transform {path!r}: {file} {_describe(error)}") from error
    return module


def _why_no_file(file: Path) -> str:
    if not file.parent.is_dir():
        return f"there is no directory {file.parent} (the current directory is {Path.cwd()})."
    near = _near(file.name, [other.name for other in file.parent.glob("*.py")])
    return f"there is no file {file.name} in {file.parent}.{near} (The current directory is {Path.cwd()}.)"


def _import_module(path: str, module_name: str, function_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if is_from_signal_handler(error):
            raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        # A module that was found but imports another one that is missing has raised; it is not missing.
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise TransformError(
                f"transform {path!r}: {_why_no_module(missing, module_name, function_name)}"
            ) from error
        raise TransformError(f"transform {path!r}: module {module_name!r} {_describe(error)}") from error


def _why_no_module(missing: str, module_name: str, function_name: str) -> str:
    parent, _, leaf = missing.rpartition(".")
    searched = getattr(sys.modules.get(parent), "__path__", ()) if parent else None
    prefix = f"{parent}." if parent else ""
    near = _near(leaf, [module.name for module in pkgutil.iter_modules(searched)], prefix)
    file = Path(*module_name.split(".")).with_suffix(".py")
    hint = f" There is a file {file} here: write `{file}:{function_name}`." if file.is_file() else ""
    return f"there is no module {missing!r} on this process's sys.path.{near}{hint} A transform's path is {_FORMS}."


def _find_function(path: str, module: ModuleType, name: str) -> Callable[[GraftTransformInput], Any]:
    place = module.__file__ if module.__name__.startswith("_grafter_transform_") else f"module {module.__name__!r}"
    if not hasattr(module, name):
        # Only what the module defines itself: its imports are not what the user misspelt.
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        defined = f" It defines: {', '.join(names[:10])}." if names else " It defines no function."
        raise TransformError(f"transform {path!r}: {place} has no function {name!r}.{_near(name, names)}{defined}")
    found = getattr(module, name)
    if not callable(found) or inspect.isclass(found):
        raise TransformError(
            f"transform {path!r}: {name!r} in {place} is {_kind(found)}, not a function. A transform is `{_SIGNATURE}`."
        )
    function: Callable[[GraftTransformInput], Any] = found
    return function


def _check_signature(path: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        if is_from_signal_handler(error):
            raise
        # Some functions written in C do not tell; they are found out at the first call.
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TransformError(
            f"transform {path!r} cannot be called with one argument: its signature is {signature} ({error}). "
            f"A transform is `{_SIGNATURE}`."
        ) from error


def _describe(error: BaseException, file: str | None = None) -> str:
    """`raised ValueError: text, at file:line, in function: source`.

    The line is that of the innermost frame in `file`, else the innermost one.
    """
    text = f"raised {type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return text
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen importlib")]
    own = [frame for frame in frames if frame.filename == file] or frames
    last = own[-1]
    return f"{text}, at {last.filename}:{last.lineno}, in {last.name}: {last.line}"


def _near(name: str, candidates: list[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, candidates, n=3)
    return f" Did you mean {' or '.join(repr(prefix + match) for match in matches)}?" if matches else ""


def _kind(value: object) -> str:
    if value is None:
        return "None"
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    return f"an object of type {type(value).__name__}"
