"""Patterns: what a user writes to select modules, read before there is a model. Without torch.

model.layers.*                 by path: `*` any characters, `?` one, `{layer_id}` one segment; `root` the model itself
:*DecoderLayer                 by class, or one that it is derived from
model.layers.*:LlamaMLP        by both
!*.rotary_emb                  not these
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grafter.core.match import compile_match
from grafter.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import torch

# What the model itself is called, whose path is empty.
ROOT = "root"
_WORD = re.compile(r"[^\s,]+")


@dataclass(frozen=True)
class Pattern:
    """One pattern as the user wrote it, without its `!`."""

    path: str
    class_name: str
    excludes: bool

    def matches(self, path: str, module: torch.nn.Module) -> bool:
        if self.path and compile_match(self.path).fullmatch(path or ROOT) is None:
            return False
        if not self.class_name:
            return True
        match = compile_match(self.class_name)
        return any(match.fullmatch(cls.__name__) is not None for cls in type(module).__mro__)


def read_patterns(texts: Iterable[str]) -> tuple[Pattern, ...]:
    """Patterns, several in a text by commas or spaces. Raises UsageError for what is none."""
    patterns = []
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"attach takes patterns over module paths as texts, not {text!r}.")
        patterns += [_read_pattern(word[0], word.start() + 1) for word in _WORD.finditer(text)]
    return tuple(patterns)


def _read_pattern(word: str, position: int) -> Pattern:
    """`position`: the character of the text at which it begins, counted from 1."""
    excludes = word.startswith("!")
    path, _, class_name = word.removeprefix("!").partition(":")
    if not path and not class_name:
        raise UsageError(
            f"{word!r}, at character {position}, is no pattern; write a path, `:Class`, or `path:Class`, with `!` "
            "before it for what is left out."
        )
    for part in filter(None, (path, class_name)):
        try:
            compile_match(part)
        except ConfigError as error:
            raise UsageError(f"the pattern {word!r} of attach, at character {position}: {error}") from None
    return Pattern(path, class_name, excludes)
