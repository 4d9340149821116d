"""User transforms: how a path finds a function, what is said when it doesn't, and how a transform runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grafter.core.user_transform import GraftTransformInput, UserTransform, load_transform, transform, transform_of
from grafter.errors import TransformError

GOOD = """
import dataclasses
import torch

LOADED = []

@dataclasses.dataclass
class Config:
    scale: float = 2.0

def transform(graft_input):
    return graft_input.received_list[0] * Config().scale

def helper(graft_input):
    return graft_input.target

constant = 3
"""


@pytest.fixture(autouse=True)
def fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test has its own current directory, on `sys.path` too; what it imports is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def place(path: str, text: str = GOOD) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def graft_input_of(*received: torch.Tensor, target: torch.Tensor | None = None) -> GraftTransformInput:
    return GraftTransformInput(
        tags={"name": "x", "step": 0},
        received_list=list(received),
        received_extras_list=[None] * len(received),
        target=torch.zeros(3) if target is None else target,
    )


def loading_fails(path: str, *texts: str) -> TransformError:
    with pytest.raises(TransformError) as caught:
        load_transform(path)
    for text in (repr(path), *texts):
        assert text in str(caught.value)
    return caught.value


# --- the forms of a path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "somepackage.inner.module.transform",
        "somepackage.inner.module:transform",
        "somepackage/inner/module.py:transform",
        "./somepackage/inner/module.py:transform",
        "single.py:transform",
        "single:transform",
        "single.transform",
    ],
)
def test_every_form_of_path_finds_the_function(path: str) -> None:
    """Modules with a dot or a colon, files with and without a slash: all find a function that works."""
    place("somepackage/__init__.py", "")
    place("somepackage/inner/__init__.py", "")
    place("somepackage/inner/module.py")
    place("single.py")
    loaded = load_transform(path)
    assert (loaded.path, loaded.receives) == (path, "all")
    assert loaded(graft_input_of(torch.ones(3))).tolist() == [2, 2, 2]


def test_an_absolute_file_works_from_anywhere(fresh_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file given by its whole path does not depend on the current directory."""
    file = place("somewhere/t.py").absolute()
    monkeypatch.chdir("/")
    assert load_transform(f"{file}:transform").receives == "all"


def test_one_file_is_one_module() -> None:
    """However a file is spelt, it is executed once, and both loads give functions of one module."""
    place("a/t.py", GOOD + "\nimport sys\nsys.executions = getattr(sys, 'executions', 0) + 1\n")
    Path("link.py").symlink_to(Path("a/t.py").absolute())
    try:
        first, second, third = (
            load_transform(p) for p in ("a/t.py:transform", "./a/../a/t.py:helper", "link.py:transform")
        )
        assert first.function is third.function
        assert first.function.__globals__ is second.function.__globals__  # type: ignore[attr-defined]
        assert sys.executions == 1  # type: ignore[attr-defined]
    finally:
        del sys.executions  # type: ignore[attr-defined]


def test_a_file_shadows_no_module_and_adds_no_path() -> None:
    """A file called json.py is loaded, and `import json` and sys.path stay what they were."""
    import json

    place("elsewhere/json.py")
    path_before, modules_before = list(sys.path), set(sys.modules)
    load_transform("elsewhere/json.py:transform")
    assert sys.modules["json"] is json
    assert sys.path == path_before
    (added,) = {name for name in sys.modules if name not in modules_before}
    assert added.startswith("_grafter_transform_")


@pytest.mark.parametrize(
    "path", ["", ":", "transform", "module:", ":transform", "a..b", "a-b.c", "t.py:", "m:f()", "m:a.b"]
)
def test_what_is_no_path_is_answered_with_the_three_forms(path: str) -> None:
    """Anything else shows how a path is written."""
    loading_fails(path, "package.module:function", "path/to/file.py:function")


@pytest.mark.parametrize("path", ["t.py", "a/t.py", "./t"])
def test_a_file_without_a_function_is_told_what_to_add(path: str) -> None:
    """A file alone names no function; the message writes the path with one."""
    loading_fails(path, f"`{path}:transform`")


# --- what is not there ----------------------------------------------------------------------------------------------


def test_a_missing_file_names_near_files_and_the_directory(fresh_directory: Path) -> None:
    """A misspelt file name suggests the one that is there, and says where was looked."""
    place("cookbook/take_last.py")
    loading_fails("cookbook/take_lats.py:transform", "take_last.py", "Did you mean", str(fresh_directory))


def test_a_missing_directory_is_named() -> None:
    """A relative path from the wrong directory says which directory is current."""
    loading_fails("nowhere/t.py:transform", "no directory", "nowhere", str(Path.cwd()))


def test_a_missing_module_names_near_modules() -> None:
    """Top-level modules and submodules: the missing part is named, with what is near."""
    place("mypackage/__init__.py", "")
    place("mypackage/transforms.py")
    loading_fails("mypakage.transforms:transform", "no module 'mypakage'", "'mypackage'")
    loading_fails("mypackage.transform:transform", "no module 'mypackage.transform'", "'mypackage.transforms'")


def test_a_missing_module_that_is_a_file_here_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory need not be on sys.path; the message turns the module into the file's path."""
    place("folder/t.py")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(Path.cwd())])
    loading_fails("folder.t:transform", "write `folder/t.py:transform`")


def test_a_submodule_of_what_is_no_package_is_missing() -> None:
    """`single.transform.more` looks for a module inside a module."""
    place("single.py")
    loading_fails("single.inner.transform", "no module 'single.inner'")


@pytest.mark.parametrize("path", ["t.py:transfrom", "t:transfrom"])
def test_a_missing_function_names_near_functions(path: str) -> None:
    """A misspelt function suggests the one that is there and lists what the module defines."""
    place("t.py")
    loading_fails(path, "no function 'transfrom'", "Did you mean 'transform'?", "transform, helper")


def test_a_module_without_functions_says_so() -> None:
    """No suggestion is invented where nothing is defined."""
    place("t.py", "import torch\n")
    loading_fails("t.py:transform", "It defines no function.")


@pytest.mark.parametrize(
    ("name", "kind"), [("constant", "type int"), ("Config", "the class Config"), ("LOADED", "type list")]
)
def test_what_is_not_a_function_is_refused(name: str, kind: str) -> None:
    """A constant, a list and a class are named for what they are."""
    place("t.py")
    loading_fails(f"t.py:{name}", kind, "not a function")


@pytest.mark.parametrize("arguments", ["", "a, b", "a, *, b", "*, graft_input"])
def test_a_function_that_cannot_take_one_argument_is_refused(arguments: str) -> None:
    """The message shows the signature it has and the one it needs."""
    place("t.py", f"def transform({arguments}): ...")
    loading_fails("t.py:transform", f"({arguments})", "def transform(graft_input")


@pytest.mark.parametrize("arguments", ["a", "a, b=1", "*a", "a, /, *, k=0", "a, **k"])
def test_a_function_that_can_take_one_argument_is_accepted(arguments: str) -> None:
    """Optional further arguments are the user's business."""
    place("t.py", f"def transform({arguments}): ...")
    assert load_transform("t.py:transform").path == "t.py:transform"


def test_callable_objects_and_builtins_are_accepted() -> None:
    """functools.partial, instances with __call__, and functions that have no signature to inspect."""
    place(
        "t.py",
        "import functools, operator\nclass C:\n  def __call__(self, i): return i.target\n"
        "instance = C()\npartial = functools.partial(lambda k, i: i.target, 1)\n"
        "getter = operator.attrgetter('target')\n",
    )
    for name in ("instance", "partial", "getter"):
        assert load_transform(f"t.py:{name}")(graft_input_of()).tolist() == [0, 0, 0]


@pytest.mark.parametrize("path", ["broken.py:transform", "broken:transform", "broken.transform"])
def test_a_module_that_raises_shows_its_own_last_line(path: str) -> None:
    """The cause is chained, and file, line, function and source of the place that raised are in the text."""
    place("broken.py", "def build():\n    return {}['scale']\n\nSCALE = build()\n")
    error = loading_fails(path, "KeyError: 'scale'", "broken.py:2, in build: return {}['scale']")
    assert isinstance(error.__cause__, KeyError)


def test_a_file_that_raised_is_executed_again() -> None:
    """A failed load leaves no half-made module behind."""
    place("t.py", "1 / 0")
    loading_fails("t.py:transform", "ZeroDivisionError")
    place("t.py")
    load_transform("t.py:transform")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import absent_module_xyz", "ModuleNotFoundError: No module named 'absent_module_xyz'"),
        ("def transform(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("from . import sibling", "ImportError: attempted relative import"),
    ],
)
def test_other_ways_to_fail_at_import(text: str, said: str) -> None:
    """A missing import of its own, a syntax error and an exit are reported as the file's, not as a missing file."""
    place("t.py", text)
    error = loading_fails("t.py:transform", said, "t.py")
    assert error.__cause__ is not None


# --- the declaration ------------------------------------------------------------------------------------------------


def test_the_decorator_says_what_is_received() -> None:
    """`@transform`, `@transform()` and `@transform(receives=...)` mark the function and leave it what it is."""
    place(
        "t.py",
        "from grafter.core.user_transform import transform\n"
        "@transform\ndef plain(i): ...\n@transform()\ndef called(i): ...\n"
        "@transform(receives='same_rank')\ndef same_rank(i): ...\n"
        "@transform(receives='resharded')\ndef resharded(i): ...\n",
    )
    receives = {name: load_transform(f"t.py:{name}").receives for name in ("plain", "called", "same_rank", "resharded")}
    assert receives == {"plain": "all", "called": "all", "same_rank": "same_rank", "resharded": "resharded"}


def test_an_unknown_declaration_names_the_legal_ones() -> None:
    """A misspelt value is refused where it is written."""
    with pytest.raises(TransformError, match="'same-rank' is not known; legal values are all, same_rank"):
        transform(receives="same-rank")  # type: ignore[call-overload]


def test_a_function_needs_no_path() -> None:
    """A function given as it is: named by its module and name, its declaration read, its arguments checked."""

    @transform(receives="same_rank")
    def halve(graft_input: GraftTransformInput) -> torch.Tensor:
        return graft_input.received_list[0] / 2

    given = transform_of(halve)
    assert given.path.endswith("halve") and given.receives == "same_rank"
    assert given(graft_input_of(torch.ones(3))).tolist() == [0.5] * 3
    for wrong, why in ((lambda: None, "one argument"), (dict, "the class dict")):
        with pytest.raises(TransformError, match=why):
            transform_of(wrong)  # type: ignore[arg-type]


# --- the call -------------------------------------------------------------------------------------------------------


def loaded(function: object) -> UserTransform:
    return UserTransform(path="t.py:transform", function=function, receives="all")  # type: ignore[arg-type]


def test_a_transform_never_shifts_the_random_state() -> None:
    """Random numbers, seeds and exceptions in a transform leave torch's state as it was."""

    def noisy(graft_input: GraftTransformInput) -> torch.Tensor:
        torch.manual_seed(7)
        return torch.rand(3)

    def failing(graft_input: GraftTransformInput) -> torch.Tensor:
        torch.rand(3)
        raise ValueError("no")

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    loaded(noisy)(graft_input_of())
    with pytest.raises(TransformError):
        loaded(failing)(graft_input_of())
    assert torch.equal(torch.rand(3), expected)


def test_a_transform_records_no_graph() -> None:
    """A target that requires grad gives a result that doesn't, and grad mode is as before."""
    target = torch.ones(3, requires_grad=True)
    assert not loaded(lambda i: i.target * 2)(graft_input_of(target=target)).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("value", "kind"), [(None, "None"), ([torch.ones(1)], "type list"), (3.0, "type float")])
def test_what_is_not_a_tensor_is_refused(value: object, kind: str) -> None:
    """A forgotten return and a list are named for what they are."""
    with pytest.raises(TransformError, match=rf"'t.py:transform' returned {kind}|returned an object of {kind}"):
        loaded(lambda i: value)(graft_input_of())


def test_an_exception_points_at_the_users_line() -> None:
    """Of a failure deep in torch, the message has the type, the text and the line of the transform's own file."""
    place(
        "t.py",
        "import torch\n\ndef transform(graft_input):\n"
        "    return torch.einsum('ab,bc->ac', torch.ones(2), torch.ones(2))\n",
    )
    with pytest.raises(TransformError, match=re.escape("t.py:4, in transform: return torch.einsum(")) as caught:
        load_transform("t.py:transform")(graft_input_of())
    assert "RuntimeError" in str(caught.value) and isinstance(caught.value.__cause__, RuntimeError)


def test_an_assertion_without_a_text_still_says_where() -> None:
    """`assert` alone has no message; its line is the message."""
    place("t.py", "def transform(graft_input):\n    assert graft_input.target.sum() > 0\n")
    with pytest.raises(TransformError, match=re.escape("assert graft_input.target.sum() > 0")):
        load_transform("t.py:transform")(graft_input_of())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the random state of a CUDA target's device")
def test_a_transform_never_shifts_the_gpus_random_state() -> None:
    """For a CUDA target the state of its device is put back too."""
    target = torch.zeros(3, device="cuda")
    torch.cuda.manual_seed(0)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(0)
    loaded(lambda i: torch.rand(3, device="cuda"))(graft_input_of(target=target))
    assert torch.equal(torch.rand(3, device="cuda"), expected)
