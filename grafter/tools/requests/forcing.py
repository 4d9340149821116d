"""The recorded output's length, and how each API is made to generate the same number of tokens.

OpenAI's own servers refuse unknown fields, so only the limit is set there by default. Servers of the open engines also
accept `ignore_eos` and `min_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grafter.tools.requests.answers import read_answer


@dataclass(frozen=True)
class Forcing:
    """How to force the length.

    is_on: force the recorded length.
    ignore_eos, min_tokens: also set these fields in requests of OpenAI's form.
    """

    is_on: bool = True
    ignore_eos: bool = False
    min_tokens: bool = False


def recorded_length(output: Any, api: str) -> int | None:
    """The number of tokens in the output; None if it is not known, or if several outputs share one number."""
    if isinstance(output, dict) and "kind" in output and "status" in output:
        if output["status"] != 200 or "kept_bytes" in output:
            return None
        output, is_stream = output.get("body"), output["kind"] == "events"
    else:
        is_stream = False
    answer = read_answer(output, api, is_stream)
    if answer is None or len(answer.outputs) != 1:
        return None
    count = answer.outputs[0].token_count
    return count if count is not None and 0 < count < 1 << 31 else None


def force_length(body: dict[str, Any], api: str, count: int, forcing: Forcing) -> dict[str, Any]:
    """A copy of the request that asks for exactly `count` tokens, as far as the API can."""
    forced = dict(body)
    if api == "generate":
        given = body.get("sampling_params")
        params = dict(given) if isinstance(given, dict) else {}
        params |= {"max_new_tokens": count, "ignore_eos": True}
        return {**forced, "sampling_params": params}
    limit = "max_completion_tokens" if "max_completion_tokens" in body and api == "chat" else "max_tokens"
    forced[limit] = count
    if forcing.ignore_eos:
        forced["ignore_eos"] = True
    if forcing.min_tokens:
        forced["min_tokens"] = count
    return forced
