"""Is grafting on? Uses only the standard library, because nothing else is imported while grafting is off."""

from __future__ import annotations

import os
from collections.abc import Mapping

from grafter.errors import ConfigError

PREFIX = "GRAFTER_"
# The prefix of an earlier version.
OLD_PREFIX = "DUMPER_GRAFTER_"
# Set for processes that a rank starts after it has joined. The start-up module repeats the name, as it imports nothing.
HELPER_MARK = "_GRAFTER_RANK_PROCESS"

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")
LEGAL_WORDS = f"{', '.join(TRUE_WORDS)} or {', '.join(FALSE_WORDS)}"


def enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether GRAFTER_ENABLE (or DUMPER_GRAFTER_ENABLE) is on; unset or blank is off.

    Raises ConfigError if the value is neither on nor off, if both variables are set and differ, or if a misspelling is
    set instead.
    """
    found = read_variable(environ, "enable")
    if found is None:
        _refuse_misspelt(environ)
        return False
    variable, text = found
    value = switch_value(text)
    if value is None:
        raise ConfigError(
            f"{variable}={text!r} is neither on nor off, so it is not clear whether to graft. Legal: {LEGAL_WORDS}."
        )
    return value


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a variable such as GRAFTER_ENABLED, with which a run would silently graft nothing.

    While grafting is off, no other variable is checked.
    """
    for variable, text in environ.items():
        for prefix in (PREFIX, OLD_PREFIX):
            name = variable.removeprefix(prefix)
            if variable.startswith(prefix) and text.strip() and sorted(name[:6].upper()) == sorted("ENABLE"):
                raise ConfigError(
                    f"{variable} is not a setting of grafter, so grafting is off. Did you mean {prefix}ENABLE?"
                )


def switch_value(text: str) -> bool | None:
    """True, False, or None if the text means neither."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    return False if word in FALSE_WORDS else None


def read_variable(environ: Mapping[str, str], field: str) -> tuple[str, str] | None:
    """(variable, stripped text) of one field, under its name or its old name; None if both are unset or blank.

    Raises ConfigError if both are set and differ.
    """
    found = [
        (variable, text)
        for variable in (PREFIX + field.upper(), OLD_PREFIX + field.upper())
        if (text := environ.get(variable, "").strip())
    ]
    if len(found) == 2 and found[0][1] != found[1][1]:
        # The texts are not shown, because one of the fields is a secret.
        raise ConfigError(
            f"{found[0][0]} and {found[1][0]} are both set and differ. They are two names of one setting; "
            f"unset the older one, {found[1][0]}."
        )
    return found[0] if found else None
