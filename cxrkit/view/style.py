"""One look for every figure: sizes, colours that colour-blind readers tell apart, alternative text."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxrkit.view.figure_data import LARGEST_DATA, drawn, packed
from cxrkit.view.series import svg_chart

__all__ = [
    "COLOURS",
    "MARKERS",
    "OUTLINE",
    "POSITIVE",
    "RIM",
    "SIGNED",
    "WIDTH",
    "Picture",
    "describe",
    "new_figure",
    "style",
    "to_html",
]

_PHONE = 300  # CSS pixels: a text's width on a phone
_SIDEWAYS = 'style="overflow-x:auto;max-width:100%"'
_WORDS = 7  # of a figure's description that name its files
WIDTH = 7.6  # inches, the width of a page's text
LEGIBLE = 0.75  # of its full width: a chart that is drawn smaller is hard to read
CSS_DPI, PNG_DPI = 100, 180
SIGNED, POSITIVE, GREY = "RdBu_r", "magma", "gray"
INK, SOFT, RULE = "#1d2530", "#586373", "#d9dee6"
# Okabe and Ito's palette without its yellow, which is too pale on white; the order keeps neighbours far apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Black with a white rim shows on a dark image, on a pale map and on a saturated one.
RIM, OUTLINE = {"colors": "white", "linewidths": 2.6}, {"colors": "black", "linewidths": 1.1}

# In a page a chart takes these from the page, light or dark; elsewhere they are what they are.
_NAMED = {INK: "ink", SOFT: "soft", RULE: "rule", "#000000": "ink", "#ffffff": "paper"}
# The links borrow the picture's own bytes when they are used, so that the page doesn't hold them twice.
_SAVE_PNG = "this.href=this.closest('figure').querySelector('img').src"
_SAVE_SVG = (
    "const i=this.closest('figure').querySelector('img'),c=document.createElement('canvas');c.width=2*i.naturalWidth;"
    "c.height=2*i.naturalHeight;c.getContext('2d').drawImage(i,0,0,c.width,c.height);this.href=c.toDataURL()"
)


class Picture(Figure):
    """A matplotlib figure that shows itself in a page with alternative text, and never opens a window.

    ``alt_text``: a sentence that says what is to be seen; ``data``: what was drawn, a table or arrays by name;
    ``least_width``: CSS pixels below which the picture scrolls sideways instead of shrinking. Set the first two with
    :func:`describe`.
    """

    alt_text: str = ""
    data: pd.DataFrame | Mapping[str, np.ndarray] | None = None
    least_width: int = 0

    def _repr_html_(self) -> str:
        return to_html(self)


@contextmanager
def style() -> Iterator[None]:
    """The settings of matplotlib for our figures; those of the caller are back afterwards."""
    with matplotlib.rc_context(_settings()):
        yield


@cache
def _settings() -> matplotlib.RcParams:
    return matplotlib.rc_params_from_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)


def new_figure(width: float, height: float) -> Picture:
    """An empty figure of so many inches, white also on a dark page; call inside :func:`style`."""
    figure = Picture(figsize=(width, height), layout="constrained", facecolor="white", dpi=CSS_DPI)
    figure.get_layout_engine().set(w_pad=0.055, h_pad=0.055)
    figure.least_width = round(LEGIBLE * width * CSS_DPI)
    return figure


def describe(figure: Figure, text: str, data: pd.DataFrame | Mapping[str, np.ndarray] | None = None) -> Figure:
    """Give a figure its alternative text (plain, one line) and the data that a reader may take along; returns it.

    ``data``: by default what can be read off the figure's panels; an empty mapping for a drawing that shows none.
    """
    figure.alt_text = " ".join(str(text).split())
    figure.data = drawn(figure) if data is None else data
    return figure


def to_html(figure: Figure) -> str:
    """The figure as an ``img`` element with its alternative text; the picture is inside, nothing is fetched.

    A chart is SVG, and answers to the pointer where the book's script runs; other figures are PNG. Two links below
    save the picture as PNG, and the data that it shows: a table as CSV, arrays as a NumPy archive. The files are named
    by the first words of the alternative text; the book puts the page's name before them.
    """
    content, kind, points, save = _picture(figure)
    width = round(figure.get_figwidth() * CSS_DPI)
    alt = html.escape(getattr(figure, "alt_text", ""), quote=True)
    least = getattr(figure, "least_width", 0)
    limit = f"max-width:max(100%,{least}px)" if least else "max-width:100%"
    # The class keeps the book's dark theme from dimming a picture whose colours mean something.
    picture = (
        f'<img class="dark-light" alt="{alt}" width="{width}" style="{limit};height:auto;border-radius:6px" '
        f'src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'
    )
    if least > _PHONE:
        picture = f'<div class="cxr-wide" tabindex="0" role="region" aria-label="{alt}" {_SIDEWAYS}>{picture}</div>'
    links = [
        f'<a class="cxr-save" href="#" download="{_name(figure)}.png" onclick="{save}">Picture</a>',
        _data_link(figure),
    ]
    chart = f'<script type="application/json">{points}</script>' if points else ""
    opened = '<figure class="cxr-chart" style="margin:0">' if chart else '<figure style="margin:0">'
    return (
        f'{opened}{picture}{chart}<figcaption style="font-size:12px;text-align:right">'
        f"Save: {' · '.join(filter(None, links))}</figcaption></figure>"
    )


def _picture(figure: Figure) -> tuple[bytes, str, str, str]:
    """Content and kind of the picture, a chart's points as JSON, and the script of the link that saves it."""
    with style():
        if (chart := svg_chart(figure)) is not None and len(chart[0]) <= LARGEST_DATA:
            content, points = chart
            for colour, name in _NAMED.items():
                content = content.replace(colour, f"var(--cxr-{name}, {colour})")
            return content.encode(), "svg+xml", points, _SAVE_SVG
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white")
    return png.getvalue(), "png", "", _SAVE_PNG


def _name(figure: Figure) -> str:
    words = re.findall(r"[^\W_]+", getattr(figure, "alt_text", ""))[:_WORDS]
    return "-".join(words).lower()[:60] or "figure"


def _data_link(figure: Figure) -> str:
    data = getattr(figure, "data", None)
    if data is None or not len(data):
        return ""
    ending, kind, content, remark = packed(data)
    if len(content) > LARGEST_DATA:
        return ""
    encoded, told = base64.b64encode(content).decode(), ", ".join(filter(None, (ending.upper(), remark)))
    return (
        f'<a class="cxr-save" download="{_name(figure)}.{ending}" href="data:{kind};base64,{encoded}">Data ({told})</a>'
    )
