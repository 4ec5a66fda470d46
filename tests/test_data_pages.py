"""The book's pages on data say what the manifests say. `python tests/test_data_pages.py` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from book.tools import data_pages
from cxrkit.data import sources
from cxrkit.markdown import escaped
from cxrkit.study import method_pages

FOLDER = Path(__file__).resolve().parents[1] / "book" / "data"


@pytest.mark.parametrize("name", sources())
def test_a_source_has_a_page_made_from_its_manifest(name):
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert text == data_pages.page(name), "the manifest changed: python tests/test_data_pages.py writes the pages anew"
    assert "Not a medical device" in text


@pytest.mark.parametrize("name", sources())
def test_a_manifest_tells_what_a_reader_needs(name):
    card = sources()[name]
    needed = ("title", "description", "licence", "get", "labels", "boxes", "splits", "checksums", "options")
    assert [key for key in needed if key not in card] == []


def test_text_of_a_manifest_is_text(monkeypatch):
    hostile = {"title": "<b>a</b>", "description": "x_y [z](http://a) {raw}", "traps": ["| * `code_1` $5"]}
    monkeypatch.setattr(data_pages, "sources", lambda: {"odd": hostile})
    page = data_pages.page("odd")
    assert r"\<b\>a\</b\>" in page
    assert r"x\_y \[z\](http://a) \{raw\}" in page
    assert r"- | \* `code_1` \$5" in page


@pytest.mark.parametrize(
    "hostile",
    [
        "<img src=x onerror=alert(1)>",
        "`` ` <img src=x> `",
        "$`$<img src=x>`",
        "![a](http://a) <http://b>",
        "a|`b|c`\n<b>",
    ],
)
def test_names_from_data_are_text_in_markdown(hostile):
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark").enable("table")
    table = method_pages.as_markdown(pd.DataFrame({"label": [hostile], hostile: [1]}).set_index("label")).data
    for page in (escaped(hostile), table):
        html = reader.render(page)
        assert not re.search("<(img|a|b|script)[ >]", html), html
    assert html.count("<td>") == 2
    assert reader.renderInline(escaped("a_b <c> `d` $e$")) == "a_b &lt;c&gt; `d` $e$"


def test_formulas_and_code_of_a_table_stay():
    page = method_pages.as_markdown(
        pd.DataFrame({"name": ["a_b"], "formula": [r"$\|x\|_2 | y$ and `a_b`"]}).set_index("name")
    )
    assert page.data.splitlines()[-1] == r"| a\_b | $\Vert x\Vert _2 \vert  y$ and `a_b` |"


if __name__ == "__main__":
    for path in data_pages.write_pages(FOLDER):
        print(path.name)
