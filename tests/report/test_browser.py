"""The page in a real browser, headless: run where Playwright and a Chromium are installed.

CONTRIBUTING.md says how to install them; METALGEN_BROWSER names another Chromium.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_samples import (
    DEFAULT,
    HOSTILE,
    OTHER,
    PROBLEM,
    THIRD,
    database,
    final,
    modelled,
    records,
    row,
)

from metalgen.report.page import write_report
from metalgen.report.sources import read_sources
from metalgen.tuning.sessions.modelled import model_version

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs Playwright: pip install playwright"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCREENS = [(1280, "light"), (1280, "dark"), (320, "light"), (360, "dark")]


def executable(chromium: Any) -> str:
    """A Chromium of this machine; skips where there is none."""
    found = os.environ.get("METALGEN_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found and Path(chromium.executable_path).exists():
        found = chromium.executable_path
    if not found:
        pytest.skip("needs a Chromium: none of " + ", ".join(NAMES) + ", nor METALGEN_BROWSER")
    return str(found)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        path = executable(playwright.chromium)
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
        running = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of picture, and with hostile texts."""
    folder = tmp_path_factory.mktemp("page")
    race = {"default_seconds": 1.8e-3, "mlx_seconds": 1.5e-3}
    rows = [row(DEFAULT, 2e-3), row(THIRD, None, status="runtime", detail=HOSTILE, os=HOSTILE)]
    rows += [
        row(
            dataclasses.replace(OTHER, bq=8 * n, simdgroups=n, load_width=2 << n % 3),
            2e-3 - n * 5e-5,
        )
        for n in range(1, 25)
    ]
    rows += [final(OTHER, 1.2e-3, **race), final(DEFAULT, 1.8e-3, detail=HOSTILE, **race)]
    notes = {PROBLEM.key: {"noise_floor": 0.0042, "drift": [0.001], "outliers": 2}}
    measured = database(folder / "measured.db", rows, notes)
    policy = json.dumps({"model": model_version(), "ranked": 4185})
    words = "x" * 300  # without a place to break
    others = [
        modelled(OTHER, 0.123e-3, policy=policy, verified=True),
        modelled(DEFAULT, 0.125e-3, policy=policy),
        row(OTHER, 3e-3, chip="M1", cores=8, policy=HOSTILE, os=words),
        row(DEFAULT, 4e-3, chip="M1", cores=8, policy=HOSTILE, os=words),
    ]
    write_report(
        folder / "report.html", read_sources([measured, records(folder / "r.jsonl", others)])
    )
    return folder / "report.html"


@dataclasses.dataclass
class Visit:
    """A page that is open, what it asked for, and what it complained of."""

    page: Any
    requests: list[str]
    messages: list[str]


@pytest.fixture(scope="module", params=SCREENS, ids=lambda screen: f"{screen[1]}-{screen[0]}")
def visit(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Iterator[Visit]:
    width, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    found = Visit(page, [], [])
    page.on("request", lambda r: found.requests.append(r.url))
    page.on("console", lambda m: found.messages.append(m.text))
    page.on("pageerror", lambda e: found.messages.append(str(e)))
    page.on("dialog", lambda d: (found.messages.append(d.message), d.dismiss()))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    yield found
    context.close()


def test_the_page_asks_for_nothing_and_complains_of_nothing(visit: Visit, page_file: Path):
    visit.page.wait_for_timeout(200)
    assert visit.requests == [page_file.as_uri()]
    assert visit.messages == []


def test_the_numbers_are_in_the_document_and_can_be_seen(visit: Visit):
    for selector, text in (
        ("#measured td.best >> nth=0", "1.200 ms"),
        ("#measured td.gain >> nth=0", "1.50×"),
        ("#modelled td.best", "0.1230 ms"),
        ("#modelled td.gain", "1.02×"),
        ("#measured .heat td.won >> nth=0", "1.200"),
    ):
        cell = visit.page.locator(selector)
        assert text in cell.inner_text(), selector
        box = cell.bounding_box()
        assert box["width"] > 20 and box["height"] > 10, selector
    assert HOSTILE in visit.page.locator("body").inner_text()


OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(e => {
    if (e.closest('svg, .scroll, thead, .swatch') || !e.getClientRects().length) return false;
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 0.5 || box.left < -0.5 || e.scrollWidth > e.clientWidth + 1
        && getComputedStyle(e).display !== 'inline' && e.clientWidth > 0;
}).map(e => e.outerHTML.slice(0, 120))"""
OVERLAPPING = """() => [...document.querySelectorAll('svg.chart')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')]
        .map(t => [t.textContent, t.getBoundingClientRect()]);
    const hit = (a, b) => a.left < b.right && b.left < a.right
        && a.top < b.bottom && b.top < a.bottom;
    return boxes.flatMap(([s, a], i) =>
        boxes.slice(i + 1).filter(([, b]) => hit(a, b)).map(([t]) => [s, t]));
})"""
OUTSIDE = """() => [...document.querySelectorAll('svg.chart')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('path, text')].filter(e => {
        const b = e.getBoundingClientRect();
        return b.right > frame.right + 1 || b.left < frame.left - 1
            || b.bottom > frame.bottom + 1 || b.top < frame.top - 1;
    }).map(e => e.outerHTML.slice(0, 120));
})"""


def test_nothing_is_cut_off_and_no_labels_overlap(visit: Visit):
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert visit.page.evaluate(OVERFLOWING) == []
    assert visit.page.evaluate(OVERLAPPING) == []
    assert visit.page.evaluate(OUTSIDE) == []


LOW_CONTRAST = """() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgb = color => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const under = e => {
        for (; e; e = e.parentElement) {
            const color = rgb(getComputedStyle(e).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll('body *')].filter(e =>
        [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !e.closest('svg')
    ).map(e => {
        const [a, b] = [luminance(rgb(getComputedStyle(e).color)), luminance(under(e))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 100)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


def test_text_stands_out_from_its_background_as_wcag_asks(visit: Visit):
    assert visit.page.evaluate(LOW_CONTRAST) == []


def test_measured_and_modelled_look_different_without_color(visit: Visit):
    style = "e => [getComputedStyle(e).borderTopStyle, e.innerText]"
    badges = [
        visit.page.locator(f"#{kind} .badge >> nth=0").evaluate(style)
        for kind in ("measured", "modelled")
    ]
    assert badges == [["solid", "measured"], ["dashed", "modelled"]]
    dashes = "e => getComputedStyle(e).strokeDasharray"
    line = "svg.chart .line >> nth=0"
    assert visit.page.locator(f"#measured {line}").evaluate(dashes) == "none"
    assert visit.page.locator(f"#modelled {line}").evaluate(dashes) != "none"


def test_everything_is_there_without_scripts_and_links_unfold_their_result(
    browser: Any, page_file: Path
):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    target = page.locator("#result-1 p >> nth=0")
    page.locator("a[href='#result-1']").click()
    target.wait_for(state="visible", timeout=5000)
    assert "1.50× the default schedule's speed" in target.inner_text()
    context.close()
