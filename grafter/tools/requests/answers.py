"""Reads what a server answered, in one form for every API: text, tokens and logprobs of each output.

OpenAI's chat: `choices[].message.content`, or in a stream `choices[].delta.content`; completions: `choices[].text`.
SGLang's /generate: `text` (in a stream, the whole text so far), `output_ids`, `meta_info`; for several inputs, a list.
Anything may be missing or of another type: unknown parts are ignored, and nothing raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reply:
    """The reply of one server, or of the recording: `status`, and the body as `body_fields` returns it.

    error: why there is no answer, or no complete one. status None: not known (recorded inside a server). seconds: until
    the answer was complete; first_seconds: until its first piece.
    """

    status: int | None = None
    kind: str = "none"
    body: Any = None
    error: str | None = None
    seconds: float | None = None
    first_seconds: float | None = None


@dataclass
class Output:
    """One output of an answer. `tokens`: ids, or texts if there are only these. `logprobs`: one per token, if given."""

    text: str = ""
    tokens: list[int | str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    token_count: int | None = None
    finish_reason: str | None = None


@dataclass
class ServerAnswer:
    """An answer: all of its outputs, in order of their index."""

    outputs: list[Output]


def read_answer(body: Any, api: str, is_stream: bool) -> ServerAnswer | None:
    """The answer in a body, None if it is not one of this API. body: JSON, or the list of a stream's events' data."""
    if api == "generate":
        return _read_generate(body, is_stream)
    if api in ("chat", "completions"):
        return _read_openai(body if is_stream and isinstance(body, list) else [body])
    return None


def _read_openai(events: list[Any]) -> ServerAnswer | None:
    outputs: dict[int, Output] = {}
    usage: Any = None
    for event in events:
        if not isinstance(event, dict):
            continue
        usage = event["usage"] if isinstance(event.get("usage"), dict) else usage
        for choice in _items(event.get("choices")):
            if isinstance(choice, dict):
                index = choice.get("index")
                _add_choice(outputs.setdefault(index if isinstance(index, int) else 0, Output()), choice)
    if not outputs:
        return None
    answer = ServerAnswer([outputs[index] for index in sorted(outputs)])
    if len(answer.outputs) == 1:
        count = usage.get("completion_tokens") if usage is not None else None
        only = answer.outputs[0]
        only.token_count = count if _is_count(count) else len(only.tokens) or None
    return answer


def _add_choice(output: Output, choice: dict[str, Any]) -> None:
    said = choice.get("delta") or choice.get("message") or choice
    if isinstance(said, dict):
        # A model's reasoning and its tool calls are part of its answer.
        for name in ("reasoning_content", "content", "text"):
            if isinstance(said.get(name), str):
                output.text += said[name]
        for call in _items(said.get("tool_calls")):
            function = call.get("function") if isinstance(call, dict) else None
            for name in ("name", "arguments"):
                if isinstance(function, dict) and isinstance(function.get(name), str):
                    output.text += function[name]
    if isinstance(choice.get("finish_reason"), str):
        output.finish_reason = choice["finish_reason"]
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict):
        for item in _items(logprobs.get("content")):
            if isinstance(item, dict):
                output.tokens.append(str(item.get("token")))
                output.logprobs.append(_number(item.get("logprob")))
        output.tokens += [str(token) for token in _items(logprobs.get("tokens"))]
        output.logprobs += [_number(value) for value in _items(logprobs.get("token_logprobs"))]


def _read_generate(body: Any, is_stream: bool) -> ServerAnswer | None:
    outputs: dict[int, Output] = {}
    items = body if isinstance(body, list) else [body]
    for number, item in enumerate(items):
        if not isinstance(item, dict) or not ("text" in item or "output_ids" in item):
            continue
        index = item.get("index")
        place = (index if isinstance(index, int) else 0) if is_stream else number
        _take_generated(outputs.setdefault(place, Output()), item)
    return ServerAnswer([outputs[index] for index in sorted(outputs)]) if outputs else None


def _take_generated(output: Output, item: dict[str, Any]) -> None:
    """Add one answer, or one event of a stream, in which a server sends the whole text so far or only the new part."""
    meta = item["meta_info"] if isinstance(item.get("meta_info"), dict) else {}
    text, ids, count = item.get("text"), _ids(item.get("output_ids")), meta.get("completion_tokens")
    if _is_count(count):
        output.token_count = count
    if ids and output.tokens and _is_count(count):
        is_all = len(ids) == count
    else:
        is_all = isinstance(text, str) and text.startswith(output.text)
    if isinstance(text, str):
        output.text = text if is_all else output.text + text
    # [logprob, token id, text or null] per token.
    pairs = [pair for pair in _items(meta.get("output_token_logprobs")) if isinstance(pair, list) and len(pair) >= 2]
    if pairs:
        logprobs = [_number(pair[0]) for pair in pairs]
        output.logprobs = logprobs if is_all or len(pairs) == count else output.logprobs + logprobs
    ids = ids or _ids([pair[1] for pair in pairs])
    output.tokens = ids if is_all or len(ids) == count else output.tokens + ids
    finish = meta.get("finish_reason")
    finish = finish.get("type") if isinstance(finish, dict) else finish
    output.finish_reason = finish if isinstance(finish, str) else output.finish_reason


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ids(value: Any) -> list[int | str]:
    return [item for item in _items(value) if isinstance(item, int) and not isinstance(item, bool)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
