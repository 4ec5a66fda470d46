"""The book as a reader opens it: built by the plain tool, opened from disk in a browser, nothing fetched from
elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from book.tools.build import as_one

PROJECT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """Folder of the built pages: the one that CXRKIT_BOOK names, or one built here with the tiny grid."""
    if built := os.environ.get("CXRKIT_BOOK"):
        return Path(built).resolve()
    output = tmp_path_factory.mktemp("book")
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [str(tool), "build", str(PROJECT), "--path-output", str(output)]
    outcome = subprocess.run(
        [*command, "--warningiserror", "--keep-going"], capture_output=True, text=True, cwd=PROJECT
    )
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-6000:]
    return output / "_build" / "html"


def test_notebooks_say_and_show_what_they_should(book):
    """nbval compares what the build has executed, and runs the live pages, which it leaves out."""
    if "CXRKIT_BOOK" in os.environ:
        pytest.skip("the book that CXRKIT_BOOK names may be of other sources")
    options = ["-p", "no:cacheprovider", "--nbval-lax", "--executed", str(book.parent / "jupyter_execute")]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", *options, "notebooks"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-6000:]


def is_ours(message) -> bool:
    """An error, but for two of the theme's: it preloads fonts in a way that browsers refuse for files, and on a first
    visit it finds no stored colour mode."""
    text = message.text + message.location.get("url", "")
    return message.type == "error" and "fontawesome" not in text and "invalid theme mode" not in text


@pytest.fixture
def page(browser):
    """A page that records every request and every error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.requested, page.errors = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("console", lambda message: page.errors.append(message.text) if is_ours(message) else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    context.close()


def pixels(page) -> str:
    return page.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")


def chooser(page, name: str):
    """The first list of that caption; a caption's element holds the list's entries too, so only its start counts."""
    return page.locator(".cxr label").filter(has_text=re.compile(f"^{name}")).first.locator("select")


def test_label_and_method_change_the_picture(book, page):
    page.goto((book / "notebooks" / "compare.html").as_uri())
    page.wait_for_selector("canvas")
    page.wait_for_timeout(500)
    seen = {pixels(page)}
    label = chooser(page, "Label")
    for value in label.locator("option").evaluate_all("options => options.map(o => o.value)"):
        label.select_option(value)
        page.wait_for_timeout(200)
        seen.add(pixels(page))
    assert len(seen) >= 3
    present = label.locator("option").filter(has_text="(present)").first
    label.select_option(present.get_attribute("value"))  # its maps are kept for every method
    seen = set()
    method = chooser(page, "Method")
    for value in method.locator("option").evaluate_all("options => options.map(o => o.value)"):
        method.select_option(value)
        page.wait_for_timeout(200)
        seen.add(pixels(page))
    assert len(seen) >= 2
    assert page.errors == []
    assert [url for url in page.requested if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_whole_book_on_one_page_without_reading_it_again(book, page):
    if "CXRKIT_BOOK" in os.environ:
        pytest.skip("the book that CXRKIT_BOOK names may be of other sources, which would be read again")
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [str(tool), "build", str(PROJECT), "--path-output", str(book.parent.parent), "--builder", "singlehtml"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-6000:]
    assert "Executing notebook" not in outcome.stdout + outcome.stderr
    page.goto(as_one(book.parent / "singlehtml").as_uri())
    page.wait_for_load_state("load")
    assert page.locator("figure img").count() > 50
    assert "LRP" in page.locator("article").inner_text()
    named = page.evaluate("""() => [...document.querySelectorAll("article a[href^='#']")]
        .map((link) => decodeURIComponent(link.hash.slice(1)))
        .filter((name) => name && !document.getElementById(name) && !document.getElementsByName(name).length)""")
    assert named == []
    assert {url.split(":")[0] for url in page.requested} <= {"file", "data", "blob"}


def test_the_search_finds_pages_from_disk(book, page):
    page.goto((book / "search.html").as_uri() + "?q=occlusion")
    page.get_by_text(re.compile(r"found \d+ page")).wait_for()
    page.wait_for_timeout(500)
    assert page.locator("#search-results li").count() > 2
    assert page.errors == []
    assert {url.split(":")[0] for url in page.requested} == {"file"}


def test_formulas_are_set_offline(book, page):
    page.goto((book / "notebooks" / "explain.html").as_uri())
    page.wait_for_selector("mjx-container", timeout=20_000)
    assert page.errors == []


def test_every_page_says_what_it_is_not(book):
    for path in pages_of(book):
        assert "Not a medical device" in path.read_text(encoding="utf-8"), path.name


def pages_of(book: Path) -> list[Path]:
    """Every page but those that Sphinx makes for itself and the one that only leads on."""
    left_out = {book / name for name in ("genindex.html", "search.html", "index.html")}
    return sorted(path for path in book.rglob("*.html") if "_static" not in path.parts and path not in left_out)


class Links(HTMLParser):
    """What a page points to, and the places in it that others may point to."""

    def __init__(self, text: str):
        super().__init__()
        self.targets, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.targets += [named[name] for name in ("href", "src") if named.get(name)]
        self.places |= {named[name] for name in ("id", "name") if named.get(name)}


def test_every_link_inside_the_book_leads_somewhere(book):
    found = {
        path: Links(path.read_text(encoding="utf-8")) for path in book.rglob("*.html") if "_static" not in path.parts
    }
    broken = []
    for path, links in found.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue  # data inside the page, or another site's address that a reader may follow
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            missing = not place.exists() or (
                parts.fragment and place in found and unquote(parts.fragment) not in found[place].places | {"", "top"}
            )
            if missing and target != "#":
                broken.append(f"{path.relative_to(book)}: {target}")
    assert broken == []


SCROLL = """(top) => new Promise((done) => {
  scrollTo({ top, behavior: "instant" });
  requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done)));
})"""


# Of what axe judges, only contrast depends on the scheme, so nothing else is judged again in the dark.
ALL = {"resultTypes": ["violations"]}
CONTRAST = ALL | {"runOnly": ["color-contrast"]}
MENU = {"exclude": [[".bd-sidebar-primary"]]}  # a hundred links, the same on every page


def complaints(page, options, context=None) -> list[str]:
    """The serious violations that axe finds on a page."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context, options).response["violations"]
    serious = [violation for violation in found if violation["impact"] in ("serious", "critical")]
    return [f"{each['id']}: {[node['target'][0] for node in each['nodes']][:3]}" for each in serious]


def test_pages_are_accessible_and_ask_for_nothing_from_elsewhere(book, page):
    pages, found = pages_of(book), []
    assert len(pages) > 10
    for path in [*pages, book / "genindex.html", book / "search.html"]:
        page.emulate_media(color_scheme="light")
        page.goto(path.as_uri())
        page.wait_for_load_state("load")
        if path not in pages:
            continue
        page.evaluate("document.querySelectorAll('details[class^=cxr-]').forEach((each) => { each.open = true; })")
        page.add_style_tag(content="*, ::before, ::after { transition: none !important; }")  # colours change at once
        context = None if path == pages[0] else MENU
        found += [f"{path.relative_to(book)}: {each}" for each in complaints(page, ALL, context)]
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        found += [f"{path.relative_to(book)}, dark: {each}" for each in complaints(page, CONTRAST, context)]
    assert found == []
    assert {url for url in page.requested if not url.startswith(("file:", "data:", "blob:"))} == set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_appears_on_the_way_up_is_accessible(book, page, scheme):
    """On narrow screens the theme offers a button back to the top to who scrolls upwards."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto((book / "notebooks" / "phantom.html").as_uri())
    page.wait_for_load_state("load")
    for place in (1500, 900):
        page.evaluate(SCROLL, place)
    page.locator("#pst-back-to-top").wait_for()
    assert complaints(page, ALL) == []


BROKEN_NUMBERS = """() => [...document.querySelectorAll(".bd-article td")].filter((cell) => {
  if (!/^[-−+]?[\\d.,]+$/.test(cell.textContent.trim())) return false;
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), range = document.createRange();
  while (!texts.nextNode().textContent.trim());
  range.selectNode(texts.currentNode);
  return range.getClientRects().length > 1;
}).length"""


def test_pages_fit_a_phone(book, browser):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page, wide, broken = context.new_page(), [], []
    for path in pages_of(book):
        page.goto(path.as_uri())
        page.wait_for_load_state("load")
        if (width := page.evaluate("document.documentElement.scrollWidth")) > 390:
            wide.append(f"{path.relative_to(book)}: {width}")
        if cells := page.evaluate(BROKEN_NUMBERS):
            broken.append(f"{path.relative_to(book)}: {cells} numbers over two lines")
    context.close()
    assert wide == []
    assert broken == []


def test_every_page_tells_how_it_was_made(book):
    for path in pages_of(book):
        text = path.read_text(encoding="utf-8")
        assert "How this page was made" in text, path.name
        assert "jupyter lab notebooks/" in text or path.parent.name != "notebooks", path.name


def test_every_plot_has_its_data(book):
    """Drawings of an idea, on the pages of the papers, show none."""
    bare = []
    for path in pages_of(book):
        figures = re.findall(r"<figure[^>]*>(?:(?!</figure>).)*cxr-save.*?</figure>", path.read_text("utf-8"), re.S)
        bare += [f"{path.stem} {place}" for place, figure in enumerate(figures) if "Data (" not in figure]
    assert [name for name in bare if not name.startswith("paper ")] == []


def test_comparison_pages_stay_below_three_megabytes(book):
    assert (book / "notebooks" / "compare.html").stat().st_size < 3_000_000
