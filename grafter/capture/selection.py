"""Selection: which modules of a model get hooks, by patterns over path and class.

model.layers.*                 by path: `*` any characters, `?` one, `{layer_id}` one segment
:*DecoderLayer                 by class
model.layers.*:LlamaMLP        by both
!*.rotary_emb                  not these
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from grafter.errors import UsageError
from grafter.rules import compile_match

# Modules that wrap another one and stand in its path without being part of the model.
WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPER_CLASSES = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"})


@dataclass(frozen=True)
class Pattern:
    """One pattern as the user wrote it, without its `!`."""

    path: str
    class_name: str
    excludes: bool

    def matches(self, path: str, module: torch.nn.Module) -> bool:
        if self.path and compile_match(self.path).fullmatch(path) is None:
            return False
        if not self.class_name:
            return True
        match = compile_match(self.class_name)
        return any(match.fullmatch(cls.__name__) is not None for cls in type(module).__mro__)


def read_patterns(texts: Iterable[str]) -> tuple[Pattern, ...]:
    """Patterns, several in a text by commas or spaces. Raises UsageError, or ConfigError for braces."""
    patterns = []
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"attach takes patterns over module paths as texts, not {text!r}.")
        for word in text.replace(",", " ").split():
            excludes = word.startswith("!")
            path, _, class_name = word.removeprefix("!").partition(":")
            if not path and not class_name:
                raise UsageError(f"{word!r} is no pattern; write a path, `:Class`, or `path:Class`.")
            for part in (path, class_name):
                if part:
                    compile_match(part)
            patterns.append(Pattern(path, class_name, excludes))
    return tuple(patterns)


def select_modules(model: torch.nn.Module, patterns: tuple[Pattern, ...]) -> Iterator[tuple[str, torch.nn.Module]]:
    """(path without wrappers, module) of the selected ones, in the model's order; each module once.

    A path without a positive pattern selects nothing; one that only excludes selects all others.
    """
    positive = [pattern for pattern in patterns if not pattern.excludes]
    negative = [pattern for pattern in patterns if pattern.excludes]
    for path, module in walk(model):
        chosen = any(p.matches(path, module) for p in positive) if positive else True
        if chosen and not any(p.matches(path, module) for p in negative):
            yield path, module


def walk(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules but wrappers, with their paths as the model without wrappers would have them."""
    for raw, module in model.named_modules():
        if type(module).__name__ not in _WRAPPER_CLASSES:
            yield clean_path(model, raw), module


def clean_path(model: torch.nn.Module, raw: str) -> str:
    """A path without the segments of wrappers (DDP's `module`, torch.compile's `_orig_mod`, ...)."""
    segments, here = [], model
    for segment in raw.split(".") if raw else ():
        wrapped = type(here).__name__ in _WRAPPER_CLASSES and segment == "module"
        here = here.get_submodule(segment)
        if not wrapped and segment not in WRAPPER_SEGMENTS:
            segments.append(segment)
    return ".".join(segments)
