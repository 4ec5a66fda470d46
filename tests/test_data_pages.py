"""The book's pages on data say what the manifests say. `python tests/test_data_pages.py` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxrkit.data import cards, sources

FOLDER = Path(__file__).resolve().parents[1] / "book" / "data"


@pytest.mark.parametrize("name", sources())
def test_a_source_has_a_page_made_from_its_manifest(name):
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert text == cards.page(name), "the manifest changed: python tests/test_data_pages.py writes the pages anew"
    assert "Not a medical device" in text


@pytest.mark.parametrize("name", sources())
def test_a_manifest_tells_what_a_reader_needs(name):
    card = sources()[name]
    needed = ("title", "description", "licence", "get", "labels", "boxes", "splits", "checksums", "options")
    assert [key for key in needed if key not in card] == []


def test_text_of_a_manifest_is_text(monkeypatch):
    hostile = {"title": "<b>a</b>", "description": "x_y [z](http://a) {raw}", "traps": ["| * `code_1` $5"]}
    monkeypatch.setattr(cards, "sources", lambda: {"odd": hostile})
    page = cards.page("odd")
    assert r"\<b\>a\</b\>" in page
    assert r"x\_y \[z\](http://a) \{raw\}" in page
    assert r"- | \* `code_1` \$5" in page


if __name__ == "__main__":
    for path in cards.write_pages(FOLDER):
        print(path.name)
