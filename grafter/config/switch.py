"""Is grafting on? Read with the standard library alone, because off means that nothing else is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping

from grafter.errors import ConfigError

PREFIX = "GRAFTER_"
# Where an older run has it.
# Set for processes that a rank starts after it has joined; the start-up module spells it out, since it imports nothing.
HELPER_MARK = "_GRAFTER_RANK_PROCESS"
OLD_PREFIX = "DUMPER_GRAFTER_"

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")
LEGAL_WORDS = f"{', '.join(TRUE_WORDS)} or {', '.join(FALSE_WORDS)}"


def enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether GRAFTER_ENABLE (or DUMPER_GRAFTER_ENABLE) is on; unset or blank is off.

    Raises ConfigError if it is neither a word for on nor one for off, if both are set and differ, or if what is set is
    a misspelling of it.
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
    """GRAFTER_ENABLED=1 must not be a run that silently grafts nothing. Off, no other variable is looked at."""
    for variable, text in environ.items():
        for prefix in (PREFIX, OLD_PREFIX):
            name = variable.removeprefix(prefix)
            if variable.startswith(prefix) and text.strip() and sorted(name[:6].upper()) == sorted("ENABLE"):
                raise ConfigError(
                    f"{variable} is no setting of grafter, so grafting is off. Did you mean {prefix}ENABLE?"
                )


def switch_value(text: str) -> bool | None:
    """True, False, or None where the text is no word for either."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    return False if word in FALSE_WORDS else None


def read_variable(environ: Mapping[str, str], field: str) -> tuple[str, str] | None:
    """(variable, text) of one field under its name or its old one; None where both are unset or blank.

    The text is without blanks around it. Raises ConfigError if both names are set and differ.
    """
    found = [
        (variable, text)
        for variable in (PREFIX + field.upper(), OLD_PREFIX + field.upper())
        if (text := environ.get(variable, "").strip())
    ]
    if len(found) == 2 and found[0][1] != found[1][1]:
        # The texts are not shown: one of the fields is a secret.
        raise ConfigError(
            f"{found[0][0]} and {found[1][0]} are both set and differ. They are two names of one setting; "
            f"unset the older one, {found[1][0]}."
        )
    return found[0] if found else None
