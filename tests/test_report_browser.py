"""The page of `make report` in a browser: keys, panels, themes, narrow windows, paper.

Skipped where playwright or a Chromium is missing: it downloads neither. `chromium` on the PATH, or playwright's own, will do.
What comes a moment later is awaited with `expect`: `wait_for_function` evaluates a string again and again, which the page's
Content-Security-Policy forbids from the second time on.
"""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import HOSTILE, SPEC, fill, picture, render

pytestmark = pytest.mark.usefixtures("sample_records")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (it comes with .[dev])")
expect = api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
FIRST = 'a[href="#cell-2.1-0-0"]'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = next(filter(None, map(shutil.which, NAMES)), None) or (str(own) if own.exists() else None)
        if found is None:
            pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is on the PATH, and playwright has none of its own")
        launched = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    fill(folder, device=HOSTILE)
    picture(folder, "cpu")
    columns = [column | {"scales": ["cpu"]} for column in SPEC["columns"]]
    path = folder / "cpu.html"
    path.write_text(render(folder, spec=SPEC | {"columns": columns, "note": HOSTILE}), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page in a window; at the end, nothing may have gone to the console, to the network, or been run."""
    heard: list[str] = []
    contexts: list[Any] = []

    def opened(viewport: dict[str, int] = DESKTOP, place: str = "", **how: Any) -> Any:
        contexts.append(browser.new_context(viewport=viewport, **how))
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url) if request.url.startswith("http") else None)
        page.goto(f"{file.as_uri()}{place}")
        return page

    yield opened
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hacked") is None
        context.close()
    assert heard == []


def test_a_cell_opens_by_keyboard_and_closes_back_to_itself(visit: Any) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.focus(FIRST)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("A only, 5: 22.60")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    panel = page.locator("dialog[open]")
    assert panel.locator("h2").inner_text() == "A only · 5"
    for _ in range(25):
        page.keyboard.press("Tab")  # leaves the panel for the browser's own buttons at most
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    expect(page.locator(":focus")).to_have_count(1)  # those hand the focus back a moment later
    page.focus("#close")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#panel-title")).to_have_text("A only · 1")
    page.keyboard.press("Escape")
    expect(page.locator('a[href="#cell-2.1-1-0"]')).to_be_focused()  # `close` is heard a moment later
    assert panel.count() == 0
    assert page.evaluate("location.hash") == ""


def test_a_panel_shows_the_record_as_text(visit: Any) -> None:
    page = visit(place="#cell-2.1-0-0")
    panel = page.locator("dialog[open]")
    assert panel.locator("details.run").count() == 2
    assert panel.locator("details.run[open] svg path.line").count() == 1
    text = panel.inner_text()
    for expected in (HOSTILE, "method=ce data.per_class=1 seed=0", "0123456789ab", "36 s (30 s of CPU)", "718,692", "n=2"):
        assert expected in text, expected
    panel.get_by_text("Config").first.click()
    assert "passes: 60" in panel.inner_text()
    panel.locator("a", has_text="run 979a2a3fc1fe").first.click()
    expect(page.locator("#panel-title")).to_have_text("run 979a2a3fc1fe")
    assert "63.9" in panel.inner_text()
    page.go_back()
    expect(page.locator("#panel-title")).to_have_text(re.compile("^Cross-Entropy"))
    page.go_back()
    page.goto(page.url.split("#")[0] + "#table-2.1")
    expect(page.locator("dialog[open]")).to_have_count(0)


def test_an_empty_cell_gives_its_command(visit: Any) -> None:
    page = visit(place="#cell-2.1-1-2")
    panel = page.locator("dialog[open]")
    assert "Not run yet. Run:" in panel.inner_text()
    assert panel.locator("pre.command").first.inner_text().endswith("method=a data.per_class=500 seed=0")
    panel.get_by_text("Copy").first.click()
    expect(page.locator(".copy").first).to_have_text(re.compile("^(Copied|Selected)$"))


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_its_window_and_is_legible_in_both_schemes(visit: Any, viewport: dict[str, int], scheme: str) -> None:
    page = visit(viewport, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    shot = np.array(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    assert (np.median(shot) > 230) == (scheme == "light")
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 20
    assert min(contrasts.values()) >= 4.5, sorted(contrasts.items(), key=lambda item: item[1])[:3]


# WCAG 2's contrast of every text with what is painted behind it: {text: ratio}
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  for (const element of document.querySelectorAll("header *, nav *, main *, footer *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || !element.checkVisibility() || element.closest(".hidden")) continue;
    let behind = element;
    while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map((c) => light(rgba(c)));
    found[text.slice(0, 60)] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
}"""


def test_wide_tables_scroll_in_their_box_behind_the_first_column(visit: Any) -> None:
    page = visit(PHONE)
    head = page.locator(".thesis-table tbody th").first
    before = head.bounding_box()["x"]
    box = page.locator(".scroll:has(.thesis-table)")
    box.evaluate("box => { box.scrollLeft = 200; }")
    assert box.evaluate("box => box.scrollLeft") > 50
    assert abs(head.bounding_box()["x"] - before) <= 4


def test_a_panel_fits_a_phone(visit: Any) -> None:
    panel = visit(PHONE, "#cell-2.1-0-0").locator("dialog[open]").bounding_box()
    assert panel["x"] >= 0
    assert panel["x"] + panel["width"] <= PHONE["width"]


def test_a_figure_opens_enlarged_and_closes_back_to_itself(visit: Any) -> None:
    page = visit()
    small = page.locator("#figure-2\\.1 .zoom")
    width = small.locator("img").bounding_box()["width"]
    small.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("#zoom[open]")
    expect(dialog).to_have_count(1)
    assert dialog.locator("img").bounding_box()["width"] > 1.2 * width
    assert dialog.get_attribute("aria-labelledby") == "zoom-title"
    assert dialog.locator("h2").inner_text() == small.locator("xpath=..").locator("h3 + p").inner_text()
    page.keyboard.press("Escape")
    expect(page.locator("#zoom[open]")).to_have_count(0)
    expect(small).to_be_focused()
    small.click()
    expect(page.locator("#zoom[open]")).to_have_count(1)
    page.click("#zoom-close")
    expect(page.locator("#zoom[open]")).to_have_count(0)


def test_the_contents_mark_where_one_is(visit: Any) -> None:
    page = visit()
    here = page.locator("nav [aria-current]")
    expect(here).to_have_attribute("href", "#overview")
    for target in ("table-2.1", "figure-2.1", "coverage"):
        page.evaluate("id => document.getElementById(id).scrollIntoView()", target)
        expect(here).to_have_attribute("href", f"#{target}")
        assert here.count() == 1
        assert here.bounding_box()["height"] > 0
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_where_numbers_come_from_is_folded_at_first(visit: Any) -> None:
    page = visit()
    shown = page.locator("body").inner_text()
    for folded in ("01234567", "Computed by", "979a2a3fc1fe", f"32 on {HOSTILE}"):
        assert folded not in shown, folded
    assert page.locator("details.origin").count() >= 4
    assert page.locator("details.origin[open]").count() == 0
    page.locator("#table-2\\.1 details.origin summary").click()
    assert "Computed by" in page.locator("#table-2\\.1").inner_text()


def test_a_count_opens_its_claims(visit: Any) -> None:
    page = visit()
    page.evaluate("document.getElementById('verdict-holds').open = false")
    page.click(".tally a[href='#verdict-holds']")
    expect(page.locator("#verdict-holds")).to_have_attribute("open", "")
    page.click("#verdict-holds li a")
    assert page.evaluate("document.querySelector(':target').id") == "about-2.1-a"


def test_a_panel_of_a_cell_in_a_fold_closes_back_to_its_cell(visit: Any) -> None:
    page = visit()
    fold = "const box = document.querySelector('.scroll:has(.thesis-table)'), fold = document.createElement('details')"
    page.evaluate(f"() => {{ {fold}; box.replaceWith(fold); fold.append(box); location.hash = 'cell-2.1-0-0'; }}")
    expect(page.locator("#panel[open]")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(FIRST)).to_be_focused()


def test_the_theme_button_overrules_the_system(visit: Any) -> None:
    page = visit(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    for theme in ("light", "dark"):
        page.click("#theme")
        expect(page.locator("#theme")).to_have_text(f"Theme: {theme}")
    assert page.evaluate(background) != light


def test_the_chosen_theme_outlives_a_reload(visit: Any) -> None:
    page = visit(color_scheme="light")
    button = page.locator("#theme")
    for pause in (0, 500, 5_000):  # ms. Storage is another process's: on a busy machine a reload overtakes what a click wrote.
        for _ in ("auto", "light", "dark"):
            if button.inner_text() != "Theme: dark":
                button.click()
        page.wait_for_timeout(pause)
        page.reload()
        if button.inner_text() == "Theme: dark":
            return
    pytest.fail("the theme is forgotten however long one waits before the reload")


def test_on_paper_everything_is_open_and_nothing_is_a_panel(visit: Any) -> None:
    page = visit(color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav, #theme, dialog").evaluate_all("all => all.every(one => !one.checkVisibility())")
    assert page.locator("main details").evaluate_all("all => all.every(one => one.open)")
    register = page.locator(".register").inner_text()
    assert "method=ce data.per_class=5 seed=0" in register
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#records details[open]").count() == 0
