"""The page in a real browser: it opens, sorts, filters, hovers, is usable by keyboard and on a phone, fetches nothing.

The browser is what CHROMIUM names, else chromium, chromium-browser or google-chrome on PATH; playwright only drives it.
One browser and two open pages serve all tests of a process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright
from report_parts import ADDED, ALONE, LAYERS, layers, record, write_dumps, write_run

from grafter.analysis.report.page_data import PageData, PagePoint
from grafter.analysis.report.writing import make_page, write_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# An older browser cannot unpack the charts, which are what takes time to open.
NO_CHARTS = "delete window.DecompressionStream"
EVIL = "</script><img src=x onerror='window.pwned=1'><b>bold</b>&amp;"


def find_browser() -> str:
    """Its path; skips where there is none, and says what was looked for."""
    named = os.environ.get("CHROMIUM")
    found = named if named else next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is on PATH, and CHROMIUM does not name one")
    if shutil.which(found) is None:
        pytest.fail(f"CHROMIUM={found} is no program")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@dataclass
class Opened:
    """An open page; `faults` is what the console said, what was thrown, and what was asked for but the file itself."""

    page: Page
    faults: list[str] = field(default_factory=list)


def open_page(browser: Browser, path: Path, *, before: str = "", **options: Any) -> Opened:
    # Without smooth scrolling, under which a mouse would miss.
    usual = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
    page = browser.new_context(**{**usual, **options}).new_page()
    opened = Opened(page)
    page.on("console", lambda message: opened.faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: opened.faults.append(f"error: {error}"))
    page.on("request", lambda request: request.url != path.as_uri() and opened.faults.append(f"asked: {request.url}"))
    if before:
        page.add_init_script(before)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=true]")
    return opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `grafter locate`: two steps of four layers, dumps of the first; and a failed point whose name is an attack."""
    out = tmp_path_factory.mktemp("report")
    evil = [
        record(role, 100, layer=9, name=EVIL, outcome="failed", reason=f"reason {EVIL}", call_site=EVIL, tags={EVIL: 1})
        for role in ("baseline", "target")
    ]
    write_dumps(write_run(out / "alone", [*layers(ALONE), *evil], command=["python", EVIL]))
    write_run(out / "grafted", layers(ADDED, direction="b2t"))
    write_page(make_page([out]), out / "report.html")
    return out / "report.html"


@pytest.fixture(scope="module")
def shared_desk(browser: Browser, report: Path) -> Opened:
    return open_page(browser, report, color_scheme="light")


@pytest.fixture
def desk(shared_desk: Opened) -> Iterator[Page]:
    """The page in a wide, light window. No test may leave a fault behind."""
    yield shared_desk.page
    assert shared_desk.faults == []


@pytest.fixture(scope="module")
def shared_phone(browser: Browser, report: Path) -> Opened:
    screen = {"width": 360, "height": 740}
    return open_page(browser, report, color_scheme="dark", viewport=screen, is_mobile=True, has_touch=True)


@pytest.fixture
def phone(shared_phone: Opened) -> Iterator[Page]:
    """The page on a narrow, dark touch screen."""
    yield shared_phone.page
    assert shared_phone.faults == []


def column(page: Page, name: str) -> list[str]:
    """The texts of one column of the table, from the top."""
    return page.locator(f'#table tbody td[data-name="{name}"]').all_inner_texts()


def test_it_opens_with_what_failed_first_and_the_verdict_after_it(desk: Page) -> None:
    """All charts are drawn, nothing but the file is asked for, and the console stays silent."""
    heads = desk.locator("main section:visible h2").all_inner_texts()
    assert heads[:3] == ["What was skipped or failed", "Verdict", "Divergence over layers"]
    assert "reason" in desk.inner_text("#findings") and "goes wrong in layers.out layer_id=2" in desk.inner_text(
        "#verdict"
    )
    for chart in ("divergence", "adds", "heatmap", "histogram", "timings"):
        assert desk.locator(f"#{chart}-chart svg.main-svg").count() > 0, chart
    assert "node1" in desk.inner_text("#environment") and "≠" in desk.evaluate(
        "getComputedStyle(document.querySelector('.differs th'), '::before').content"
    )
    marked = desk.locator("#environment .differs th").all_inner_texts()
    assert "command" in marked and "GRAFTER_ROLE" not in marked and "GRAFTER_ROLE" in desk.inner_text("#environment")


def test_headers_sort_and_say_so(desk: Page) -> None:
    """A figure's header sorts from the largest on, then from the smallest; by mouse, by key; what is absent is last."""
    rel = desk.get_by_role("button", name="rel", exact=True)
    rel.click()
    head = desk.locator('#table th[data-name="rel"]')
    assert head.get_attribute("aria-sort") == "descending"
    assert column(desk, "rel") == ["1.8e-6", "1.8e-6", "1.4e-6", "1.4e-6", "2.0e-14", "2.0e-14", "0", "0", ""]
    rel.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(desk, "rel")[:3] == ["0", "0", "2.0e-14"] and column(desk, "rel")[-1] == ""
    desk.locator('#table th[data-name="label"] button').press("Space")
    assert head.get_attribute("aria-sort") == "none"
    desk.get_by_role("button", name="#", exact=True).click()
    assert column(desk, "order") == [str(n) for n in range(2 * LAYERS + 1)]


def test_search_and_filters_narrow_the_table(desk: Page) -> None:
    """All words must be there, wherever; the count is announced; a finding lists its own points."""
    desk.fill("#search", "layer_id=2 LAYERS")
    assert column(desk, "label") == ["layers.out layer_id=2"] * 2
    assert desk.inner_text("#table-count") == "2 of 9 points"
    desk.select_option("#step", "1")
    assert column(desk, "step") == ["1"]
    desk.fill("#search", "")
    desk.select_option("#step", "")
    desk.select_option("#outcome", "failed")
    assert column(desk, "outcome") == ["failed"]
    desk.select_option("#outcome", "")
    assert desk.locator("#table tbody tr").count() == 2 * LAYERS + 1


def test_a_point_in_a_chart_tells_its_details_and_is_chosen_by_a_click(desk: Page) -> None:
    """Hovering shows label, step and measures; a click goes to that point's facts."""
    marker = desk.locator("#divergence-chart .scatterlayer .trace").nth(0).locator(".points path").nth(3)
    marker.scroll_into_view_if_needed()
    marker.hover(force=True)
    label = desk.locator("#divergence-chart .hovertext", has_text="layers.out layer_id=3")
    label.wait_for()
    text = label.text_content() or ""
    assert "rel 1.40e-6" in text and "step" in text
    box = marker.bounding_box()
    assert box is not None
    desk.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    desk.locator("#point-facts dd", has_text="layers.out layer_id=3").wait_for()


def test_a_chosen_point_shows_where_it_differs(desk: Page) -> None:
    """From the table: its facts, a heatmap of any two dims, the histogram, and the row that is marked."""
    desk.locator('#table tbody tr[data-order="2"] button').click()
    assert desk.locator('#table tr[aria-current="true"]').get_attribute("data-order") == "2"
    assert desk.evaluate("document.activeElement.id") == "point-head"
    assert "1.8" in desk.inner_text("#point-facts")
    dims = desk.get_by_label("Dims of the heatmap")
    assert dims.locator("option").all_inner_texts() == ["s by h", "b by h", "b by s"]
    assert "s" in desk.locator("#heatmap-chart .ytitle").text_content()
    dims.select_option("2")
    desk.wait_for_function("document.querySelector('#heatmap-chart .xtitle').textContent === 's'")
    assert "baseline" in desk.locator("#histogram-chart .legend").text_content()
    # A point of the second step, of which there is no dump.
    desk.locator('#table tbody tr[data-order="6"] button').click()
    assert desk.locator("#heatmap-figure").is_hidden() and "No picture" in desk.inner_text("#pictures-note")


def test_names_with_html_in_them_stay_text(desk: Page) -> None:
    """In findings, table, facts, selects, environment and hover labels: no element, no script, no entity."""
    assert desk.evaluate("window.pwned") is None
    assert desk.locator("main img").count() == 0 and desk.locator("#table b, #point b").count() == 0
    assert EVIL in desk.inner_text("#findings")
    row = desk.locator(f'#table tr[data-order="{LAYERS}"]')
    assert row.locator("button").inner_text().startswith(EVIL)
    row.locator("button").click()
    assert EVIL in desk.inner_text("#point-facts") and EVIL in desk.inner_text("#environment")
    assert any(EVIL[:20] in text for text in desk.locator("#divergence-controls option").all_inner_texts())
    mark = desk.locator("#divergence-chart .scatterlayer .trace").last.locator(".points path").first
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    label = desk.locator("#divergence-chart .hovertext", has_text="bold")
    label.wait_for()
    assert "<b>bold</b>&amp;" in (label.text_content() or "")
    assert desk.evaluate("window.pwned") is None


def test_the_theme_follows_the_system_until_it_is_chosen(desk: Page) -> None:
    """A button goes through auto, light and dark, and charts follow."""
    button = desk.locator("#theme")
    background = "getComputedStyle(document.body).backgroundColor"
    tick = "getComputedStyle(document.querySelector('#divergence-chart .xtick text')).fill"
    light, light_tick = desk.evaluate(background), desk.evaluate(tick)
    assert button.inner_text() == "Theme: auto"
    button.click()
    assert button.inner_text() == "Theme: light" and desk.evaluate(background) == light
    button.press("Enter")
    assert button.inner_text() == "Theme: dark" and desk.evaluate(background) != light
    desk.wait_for_function(f"{tick} !== '{light_tick}'")
    button.click()
    assert desk.evaluate(background) == light
    desk.emulate_media(color_scheme="dark")
    desk.wait_for_selector("html[data-theme=dark]")
    desk.emulate_media(color_scheme="light")
    desk.wait_for_selector("html[data-theme=light]")


def test_it_prints_in_light_whatever_the_screen_has(phone: Page) -> None:
    """Paper is white: the charts are light while it prints, and as they were after it."""
    phone.evaluate(
        "addEventListener('beforeprint', () => { window.printed = document.documentElement.dataset.theme; })"
    )
    phone.pdf()
    assert phone.evaluate("window.printed") == "light"
    phone.wait_for_selector("html[data-theme=dark]")


def test_everything_is_reached_by_keyboard_and_shows_its_focus(desk: Page) -> None:
    """Tab goes through the page from top to bottom; each stop is visible where it is and has an outline."""
    # The first thing that can have the focus; from there as the keyboard goes.
    desk.evaluate("document.querySelector('a, button, input, select').focus()")
    for key in ("Tab", "Shift+Tab"):
        desk.keyboard.press(key)
    stops = []
    for _ in range(80):
        stop = desk.evaluate(
            """(() => { const e = document.activeElement, s = getComputedStyle(e), b = e.getBoundingClientRect();
            const name = e === document.body ? "" : e.id || e.className || e.textContent.slice(0, 30);
            return [name, s.outlineStyle, b.width * b.height > 0, b.top + scrollY]; })()"""
        )
        if stop[0] == "" or (stops and stop[0] == stops[0][0]):
            break
        stops.append(stop)
        desk.keyboard.press("Tab")
    names = [name for name, *_ in stops]
    assert names[0] == "skip"
    for wanted in ("theme", "search", "outcome", "step"):
        assert wanted in names
    assert names.count("choose") >= 5
    assert [stop for stop in stops if stop[1] == "none" or not stop[2]] == []
    # Below the header, focus only moves down the page, but for what stands side by side.
    tops = [top for name, _, _, top in stops[names.index("theme") + 1 :]]
    assert all(later >= earlier - 60 for earlier, later in pairwise(tops))


def test_a_phone_shows_all_of_it_without_scrolling_sideways(phone: Page) -> None:
    """Nothing is wider than the screen; a row of the table is a card; the system's dark scheme is taken."""
    assert phone.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    wide = phone.evaluate(
        """[...document.querySelectorAll('main *')].filter((e) => e instanceof HTMLElement)
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.tagName + '.' + e.className)"""
    )
    assert wide == []
    assert phone.evaluate("document.documentElement.dataset.theme") == "dark"
    assert phone.evaluate("getComputedStyle(document.querySelector('#table tbody tr')).display") == "flex"
    rel = phone.locator('#table tbody tr td[data-name="rel"]').first
    assert rel.evaluate("(e) => getComputedStyle(e, '::before').content") == '"rel "'
    phone.locator('#table tbody tr[data-order="2"] button').tap()
    assert "layers.out layer_id=2" in phone.inner_text("#point-facts")


def test_nothing_can_be_fetched_even_by_a_script_that_tries(browser: Browser, report: Path) -> None:
    """The page's policy refuses requests, images, inline handlers and new scripts."""
    page = open_page(browser, report, before=NO_CHARTS).page
    refused = page.evaluate(
        """async () => {
        const refused = new Set();
        document.addEventListener('securitypolicyviolation', (event) => refused.add(event.effectiveDirective));
        await fetch('https://example.invalid/').catch(() => {});
        document.body.insertAdjacentHTML('beforeend', '<img src="https://example.invalid/x.png" onerror="pwned=1">');
        const script = document.createElement('script');
        script.textContent = 'window.pwned = 1';
        document.body.append(script);
        await new Promise((resolve) => setTimeout(resolve, 100));
        return [...refused, String(window.pwned)].sort();
        }"""
    )
    assert refused == ["connect-src", "img-src", "script-src-attr", "script-src-elem", "undefined"]
    page.context.close()


def test_thousands_of_points_stay_usable_and_an_old_browser_keeps_the_tables(browser: Browser, tmp_path: Path) -> None:
    """A hundred rows at a time, turned by buttons; without the means to unpack the charts, all else still works."""
    points = tuple(
        PagePoint(
            order=n,
            label=f"layers.out layer_id={n % 50}",
            name="layers.out",
            tags={"layer_id": n % 50},
            step=n // 50,
            phase="forward",
            outcome="compared",
            layer=n % 50,
            difference={"rel": (n * 7919 % 5000) * 1e-9},
        )
        for n in range(5000)
    )
    data = PageData("run", "many", "s", ("baseline", "target"), points)
    write_page(data, tmp_path / "report.html")
    opened = open_page(browser, tmp_path / "report.html", before=NO_CHARTS)
    page = opened.page
    assert page.locator("#table tbody tr").count() == 100
    assert page.inner_text("#pager-place") == "1 to 100 of 5,000"
    page.get_by_role("button", name="rel", exact=True).click()
    assert column(page, "rel")[:2] == ["5.0e-6", "5.0e-6"]
    page.get_by_role("button", name="On").click()
    assert page.inner_text("#pager-place") == "101 to 200 of 5,000"
    page.fill("#search", "layer_id=17 step=3")
    assert page.inner_text("#table-count") == "11 of 5,000 points"
    assert "cannot unpack the charts" in page.inner_text("#divergence-chart")
    assert opened.faults == []
    page.context.close()
