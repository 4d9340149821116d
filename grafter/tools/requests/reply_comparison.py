"""Compares two replies to one request, and sums up a whole replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from grafter.tools.requests.answers import Output, Reply, ServerAnswer, read_answer
from grafter.tools.requests.reading import RecordedRequest, RequestPlace

ReplyVerdict = Literal["same", "different", "failed", "not_compared", "not_sent"]

EXIT_SAME, EXIT_DIFFERENT, EXIT_COULD_NOT = 0, 1, 2
_SHOWN = 40
# Fields that servers set to new values for every answer.
_VOLATILE = frozenset({"id", "created", "created_at", "request_id"})


@dataclass
class ReplayOutcome:
    """The outcome of one request that was sent again, or could not be.

    first_char, first_token: where the worst output first differs, from 0.
    logprob: the largest difference of logprobs before that.
    forced: the output's length in tokens, if it was forced.
    late: seconds after its time that it was sent.
    statuses, seconds: per server.
    """

    number: int
    id: str
    verdict: ReplyVerdict
    path: str = ""
    reasons: list[str] = field(default_factory=list)
    first_char: int | None = None
    first_token: int | None = None
    logprob: float | None = None
    forced: int | None = None
    statuses: list[int | None] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    late: float = 0.0


@dataclass(frozen=True)
class ReplaySummary:
    """The result of a replay: counts by verdict, a sentence, and the exit code.

    exit_code: 0 all same, 1 something differs or failed, 2 it could not be judged.
    """

    counts: dict[str, int]
    exit_code: int
    sentence: str


def recorded_reply(recorded: RecordedRequest) -> Reply | None:
    """The recording's answer; None if it has no complete one."""
    output = recorded.output
    if recorded.state != "finished" or output is None:
        return None
    if isinstance(output, dict) and "status" in output and "kind" in output:
        if "kept_bytes" in output:
            return None
        status = output["status"]
        return Reply(status if isinstance(status, int) else None, str(output["kind"]), output.get("body"))
    return Reply(None, "text" if isinstance(output, str) else "json", output)


def judge(
    place: RequestPlace, api: str, replies: Sequence[Reply], recorded: Reply | None, tolerance: float
) -> ReplayOutcome:
    """The outcome for one request: one reply is compared with the recorded one, or the second of two with the first.

    tolerance: the largest allowed difference of logprobs.
    """
    outcome = ReplayOutcome(place.number, place.id, "same")
    outcome.statuses = [reply.status for reply in replies]
    outcome.seconds = [reply.seconds for reply in replies]
    for name, reply in zip(("A", "B"), replies, strict=False):
        if reply.error is not None:
            outcome.reasons.append(f"{name}: {reply.error}")
        elif (reply.status or 0) >= 400 and (recorded is None or reply.status != recorded.status):
            outcome.reasons.append(f"{name}: status {reply.status}: {_short(reply.body)}")
    if outcome.reasons:
        outcome.verdict = "failed"
        return outcome
    expected = recorded if len(replies) == 1 else replies[0]
    if expected is None:
        outcome.verdict = "not_compared"
        outcome.reasons.append("the recording has no complete answer to compare with")
        return outcome
    try:
        _compare(outcome, expected, replies[-1], api, tolerance)
    except RecursionError:
        outcome.reasons.append("they are nested too deeply to be compared")
    outcome.verdict = "different" if outcome.reasons else "same"
    return outcome


def _compare(outcome: ReplayOutcome, expected: Reply, got: Reply, api: str, tolerance: float) -> None:
    if expected.status is not None and expected.status != got.status:
        outcome.reasons.append(f"status {expected.status}, {got.status}")
        return
    if (got.status or 0) >= 400:
        return  # The recorded error again; its text may contain a time or an id.
    a, b = (read_answer(reply.body, api, reply.kind == "events") for reply in (expected, got))
    if a is None and b is None:
        difference = _first_difference(_settled(expected.body), _settled(got.body), "")
        outcome.reasons += [difference] if difference is not None else []
    elif a is None or b is None:
        outcome.reasons.append("only one of them is an answer of this API")
    else:
        _compare_answers(outcome, a, b, tolerance)


def _settled(body: Any) -> Any:
    """A body without the fields that differ between any two answers."""
    return {key: value for key, value in body.items() if key not in _VOLATILE} if isinstance(body, dict) else body


def _compare_answers(outcome: ReplayOutcome, a: ServerAnswer, b: ServerAnswer, tolerance: float) -> None:
    if len(a.outputs) != len(b.outputs):
        outcome.reasons.append(f"{len(a.outputs)} outputs, {len(b.outputs)}")
        return
    for number, (one, other) in enumerate(zip(a.outputs, b.outputs, strict=True)):
        reasons = _compare_outputs(outcome, one, other, tolerance)
        outcome.reasons += [f"output {number}: {reason}" if number else reason for reason in reasons]


def _compare_outputs(outcome: ReplayOutcome, a: Output, b: Output, tolerance: float) -> list[str]:
    reasons = []
    char, token = _first_unequal(a.text, b.text), None
    if char is not None:
        reasons.append(f"text from character {char}: {_short(a.text[char:])}, {_short(b.text[char:])}")
        outcome.first_char = char if outcome.first_char is None else min(char, outcome.first_char)
    if a.tokens and b.tokens:
        token = _first_unequal(a.tokens, b.tokens)
    if token is not None:
        shown = [_short(tokens[token]) if token < len(tokens) else "the end" for tokens in (a.tokens, b.tokens)]
        reasons.append(f"token {token}: {', '.join(shown)}")
        outcome.first_token = token if outcome.first_token is None else min(token, outcome.first_token)
    if a.finish_reason != b.finish_reason and None not in (a.finish_reason, b.finish_reason):
        reasons.append(f"finish reason {a.finish_reason}, {b.finish_reason}")
    worst = _worst_logprob(a.logprobs[:token], b.logprobs[:token])
    if worst is not None:
        outcome.logprob = max(worst, outcome.logprob or 0.0)
        if not worst <= tolerance:
            reasons.append(f"logprobs by {worst:.3g}")
    return reasons


def _first_unequal(a: Sequence[Any], b: Sequence[Any]) -> int | None:
    if a == b:
        return None
    shared = min(len(a), len(b))
    return next((index for index in range(shared) if a[index] != b[index]), shared)


def _worst_logprob(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """The largest difference over the tokens that both have, None if there are none. Equal infinities differ by 0."""
    pairs = [(x, y) for x, y in zip(a, b, strict=False) if x is not None and y is not None]
    differences = [0.0 if x == y or (x != x and y != y) else abs(x - y) for x, y in pairs]
    # NaN on one side only is not equal to any number.
    return max((float("inf") if d != d else d for d in differences), default=None)


def _first_difference(a: Any, b: Any, path: str) -> str | None:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        parts: Iterable[tuple[str, Any, Any]] = ((f".{key}", a[key], b[key]) for key in a)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        parts = ((f"[{index}]", x, y) for index, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        return None if a == b else f"{path or 'body'}: {_short(a)}, {_short(b)}"
    return next((found for key, x, y in parts if (found := _first_difference(x, y, path + key)) is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def summarise(outcomes: Sequence[ReplayOutcome], server_count: int) -> ReplaySummary:
    """Sum up a replay to one server, or to two."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    compared = counts["same"] + counts["different"]
    if not compared:
        code, result = EXIT_COULD_NOT, "nothing could be compared"
    elif counts["different"] or counts["failed"]:
        code, result = EXIT_DIFFERENT, "not the same"
    elif counts["not_sent"]:
        code, result = EXIT_COULD_NOT, "every request that could be sent has the same answer"
    else:
        code, result = EXIT_SAME, "the same"
    against = "both servers" if server_count == 2 else "the recording and the server"
    listed = ", ".join(f"{counts[v]} {v.replace('_', ' ')}" for v in get_args(ReplyVerdict) if counts[v])
    return ReplaySummary(
        {str(verdict): count for verdict, count in counts.items()},
        code,
        f"{len(outcomes)} requests, {against}: {listed or 'none'}: {result}.",
    )
