"""The page as one HTML text that loads nothing: it contains the data, style, script and chart library.

The chart library is plotly.js, which takes 4.8 MB in the Python package. gzip and base64 reduce it to 2 MB; the page
unpacks it when it opens. The page's Content-Security-Policy allows only the two scripts whose hashes it names, and
forbids every request, whatever a name in the data contains.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.resources import files
from typing import Any

from grafter.analysis.report.page_data import OWN_FACTS, Finding, PageData, PagePoint
from grafter.errors import UsageError

_SCRIPTS = ("reading.js", "theme.js", "findings.js", "charts.js", "picture.js", "table.js", "page.js")


class MissingExtra(UsageError):
    """jinja2 or plotly is not installed."""


def render_page(page: PageData, made_at: float | None = None) -> str:
    """The whole page as HTML.

    `made_at`: seconds since 1970; default now. Raises MissingExtra without jinja2 and plotly.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise _missing("jinja2") from error
    plotly = _plotly_script()
    script = _page_script()
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_template("report.html.j2"))
    return template.render(
        title=f"grafter: {page.title}",
        made_at=time.strftime("%Y-%m-%d %H:%M", time.localtime(made_at)),
        script_hashes=" ".join(f"'sha256-{_digest(text)}'" for text in (plotly, script)),
        style=_template("report.css"),
        script=script,
        data=encode_page(page),
        plotly_packed=_packed_plotly(),
    )


def _missing(package: str) -> MissingExtra:
    return MissingExtra(
        f"the report needs {package}, which is not installed: pip install 'jinja2>=3.1' 'plotly>=6' (the page and its "
        "charts)."
    )


@cache
def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly") from error
    text: str = get_plotlyjs()
    return text


@cache
def _packed_plotly() -> str:
    # The archive has no timestamp, so the same page has the same bytes.
    return base64.b64encode(gzip.compress(_plotly_script().encode(), mtime=0)).decode()


@cache
def _page_script() -> str:
    parts = "\n".join(_template(name) for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


@cache
def _template(name: str) -> str:
    return (files("grafter.analysis.report") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# PageData as JSON for a `<script type="application/json">`: bounded in size, and unable to end the script element.
#
# Points are stored as columns and rows, which takes a third of the size of one object each. Numbers that are not
# finite are the texts "NaN", "Infinity" and "-Infinity".

MOST_POINTS = 20_000
MOST_FINDINGS = 300
# Names, tags and reasons come from programs, and from files that may be malicious.
_LONGEST_TEXT = 2_000
_MOST_ITEMS = 400

_COLUMNS = (
    "order", "label", "name", "layer", "step", "phase", "outcome", "direction", "reason", "notes", "difference",
    "nonfinite", "worst_index", "worst_values", "added", "floor", "inputs_rel", "guilty", "seconds",
    "size_bytes", "shape", "dtype", "leaf", "ranks", "call_site",
)  # fmt: skip


def encode_page(page: PageData) -> str:
    """The JSON text. It contains no `<`, `>` or `&`, so it is the same text in HTML and in JSON."""
    page = bound_page(page)
    content = {
        "kind": page.kind,
        "title": _plain(page.title),
        "source": _plain(page.source),
        "sides": _plain(page.sides),
        "findings": [_plain(asdict(finding)) for finding in page.findings],
        "verdict": _plain(asdict(page.verdict)) if page.verdict is not None else None,
        "columns": _COLUMNS,
        "rows": [[_plain(getattr(point, column)) for column in _COLUMNS] for point in page.points],
        "environments": [_plain(asdict(environment)) for environment in page.environments],
        "own_facts": OWN_FACTS,
        # We made these, so their size is bounded; only the words in them are not ours.
        "pictures": [
            {**asdict(picture), "leaf": _plain(picture.leaf), "why_none": _plain(picture.why_none)}
            for picture in page.pictures
        ],
        "pictures_note": _plain(page.pictures_note),
        "measured": page.measured,
        "adds_note": page.adds_note,
    }
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def bound_page(page: PageData) -> PageData:
    """At most MOST_POINTS points (those with problems, then the worst) and MOST_FINDINGS findings, with a note about
    the rest.
    """
    findings = list(page.findings)
    points: Sequence[PagePoint] = page.points
    if len(points) > MOST_POINTS:
        ranked = sorted(points, key=lambda point: (point.guilty, point.is_trouble, point.badness), reverse=True)
        points = sorted(ranked[:MOST_POINTS], key=lambda point: point.order)
        findings.insert(
            0,
            Finding(
                "note",
                f"the page shows {MOST_POINTS} of {len(page.points)} points: those with problems, then those that "
                "differ most. The ledgers hold all.",
            ),
        )
    if len(findings) > MOST_FINDINGS:
        left_out = len(findings) - MOST_FINDINGS
        findings = [*findings[:MOST_FINDINGS], Finding("note", f"{left_out} more are not shown here.")]
    return replace(page, points=tuple(points), findings=tuple(findings))


def _plain(value: Any) -> Any:
    """The value as JSON types, with bounded texts and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_TEXT else f"{value[: _LONGEST_TEXT - 1]}…"
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in list(value.items())[:_MOST_ITEMS]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value[:_MOST_ITEMS]]
    return value
