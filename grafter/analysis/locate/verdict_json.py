"""A verdict as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from grafter.analysis.locate.verdict import Verdict


def verdict_as_json(verdict: Verdict) -> str:
    """The verdict as one JSON object; an infinite difference (NaN or Inf that do not match) is the string "inf"."""
    content = dataclasses.asdict(verdict) | {"guilty": list(verdict.guilty), "exit_code": verdict.exit_code}
    return json.dumps(_without_infinities(content), indent=1, ensure_ascii=False, allow_nan=False)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return value
