"""The public surface, pinned: a name or a parameter that appears or goes is a decision, not an accident."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import grafter
from grafter.core.points import CONTEXT_OPTIONS, OPTIONS


def test_public_names_are_exactly_these() -> None:
    assert sorted(grafter.__all__) == [
        "GraftTransformInput",
        "Grafter",
        "GrafterConfig",
        "GrafterError",
        "Layout",
        "RequestRecorder",
        "Tokens",
        "attach",
        "close",
        "context",
        "dump",
        "dump_model",
        "open_dumps",
        "pending",
        "set_axes",
        "set_mesh",
        "step",
        "transform",
    ]
    for name in grafter.__all__:
        assert getattr(grafter, name).__doc__, f"grafter.{name} has no docstring"


def test_every_public_name_and_option_has_a_row_on_the_page_of_the_api() -> None:
    """With the parameters that the function really has, and no row of something that does not exist."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    named = re.findall(r"^\| `@?grafter\.(\w+)", page, re.MULTILINE)
    assert sorted(named) == sorted(grafter.__all__)
    assert set(re.findall(r"^\| `(\w+)=`", page, re.MULTILINE)) == OPTIONS
    assert set(re.findall(r"`(\w+)`", page.split("may also be given to")[0].rsplit("\n\n", 1)[1])) == CONTEXT_OPTIONS
    for name, shown in re.findall(r"^\| `@?grafter\.(\w+)\(([^`]*)\)`", page, re.MULTILINE):
        given = set(re.findall(r"(\w+)=", shown)) - {"tp"}
        assert given <= set(inspect.signature(getattr(grafter, name)).parameters), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dmup'"):
        _ = grafter.dmup


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("dump", "(name: 'str', value: 'Any', /, **arguments: 'Any') -> 'Any'"),
        ("step", "() -> 'None'"),
        ("close", "() -> 'None'"),
        ("context", "(of_self: 'Callable[[Any], dict[str, Any]] | None' = None, /, **arguments: 'Any') -> 'None'"),
    ],
)
def test_signatures(name: str, signature: str) -> None:
    assert str(inspect.signature(getattr(grafter, name))) == signature


def test_the_methods_of_a_grafter_mirror_the_functions() -> None:
    for name in ("dump", "step", "close"):
        method, function = inspect.signature(getattr(grafter.Grafter, name)), getattr(grafter, name)
        assert list(method.parameters)[1:] == list(inspect.signature(function).parameters)


def test_fields_of_a_transforms_input() -> None:
    """Fields are added, none is removed or renamed: the first four are a convention that others share."""
    names = [field.name for field in dataclasses.fields(grafter.GraftTransformInput)]
    assert names == [
        "tags",
        "received_list",
        "received_extras_list",
        "target",
        "direction",
        "role",
        "role_rank",
        "role_world_size",
        "sender_ranks",
        "sender_layouts",
        "target_layout",
        "path",
    ]


def test_every_error_is_a_grafter_error_and_stands_in_the_tree() -> None:
    from grafter import errors

    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    assert len(kinds) > 10
    for kind in kinds:
        assert issubclass(kind, grafter.GrafterError)
        assert kind.__name__ in (errors.__doc__ or "")


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """`import grafter.step` would hide `grafter.step`."""
    import pkgutil

    modules = {module.name for module in pkgutil.iter_modules(grafter.__path__)}
    assert modules & (set(grafter.__all__) - {"Grafter"}) == set()
