"""The page as one HTML text that loads nothing: it contains the data, style, script and chart library.

The chart library is plotly.js, which takes 4.8 MB in the Python package. gzip and base64 reduce it to 2 MB; the page
unpacks it when it opens. The page's Content-Security-Policy allows only the two scripts whose hashes it names, and
forbids every request, whatever a name in the data contains.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import time
from functools import cache
from importlib.resources import files

from grafter.analysis.report.encoding import encode_page
from grafter.analysis.report.page_data import PageData
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
