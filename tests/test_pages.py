"""The foot of a page, and the list of pages that changed."""

from __future__ import annotations

import json

from book.tools import build as book
from book.tools import pages


def notebook(folder, source="seed = 0\nname = '<b>'  # text\n"):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source.splitlines(keepends=True)}
    path = folder / "notebooks" / "page.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"cells": [cell]}))
    return path


def test_the_foot_tells_how_a_page_was_made(tmp_path):
    text = pages.foot(notebook(tmp_path), tmp_path, 12.3)
    assert "notebooks/page.ipynb" in text
    assert "seed = 0, name = &#x27;&lt;b&gt;&#x27;" in text
    assert "in 12 s" in text
    assert "papermill notebooks/page.ipynb out.ipynb -p seed VALUE" in text
    assert "<dt>commit</dt>" not in text  # no checkout
    assert str(tmp_path) not in text


def test_a_page_of_prose_has_no_parameters(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Page\n")
    assert pages.parameters_of(path) == {}
    assert "papermill" not in pages.foot(path, tmp_path)


def test_changed_new_and_lost_pages_are_told_apart(tmp_path):
    html = tmp_path / "_build" / "html"
    html.mkdir(parents=True)
    for name, text in {"a": "one", "b": "two", "c": "three"}.items():
        (html / f"{name}.html").write_text(f"<head>{name}</head><article>{text}</article>")
    before = book.contents(html)
    (html / "a.html").write_text("<head>other head</head><article>one</article>")
    (html / "b.html").write_text("<article>changed</article>")
    (html / "c.html").unlink()
    (html / "d.html").write_text("<article>new</article>")
    assert book.changes(before, book.contents(html)) == {"changed": ["b.html"], "new": ["d.html"], "gone": ["c.html"]}
