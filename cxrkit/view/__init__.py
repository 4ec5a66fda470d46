"""From results to pictures: figures for a page, and a viewer that compares explanations, live or static."""

from __future__ import annotations

from cxrkit.lazy import lazily

# Figures need matplotlib, the widget needs anywidget, a page may need neither.
__getattr__, __dir__, __all__ = lazily(
    __name__,
    "charts export figures lab style viewer widget",
    viewer="Bundle static_html",
    widget="Explorer",
    style="describe to_html",
)
