"""A progress bar for long work: after two seconds, and only where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]

_DELAY = 2.0  # seconds before a bar appears: shorter work shows none


@contextmanager
def progress_bar(shown: bool | Callable[[float], None] | None, description: str) -> Iterator[Callable[[float], None]]:
    """A function to call with the share of the work that is done, from 0 to 1.

    `shown`: True, False, None for a terminal or a notebook that a person runs, or a function that is told the share.
    """
    if callable(shown):
        yield shown
        return
    if shown is False or (shown is None and not _watched()):
        yield lambda share: None
        return
    from tqdm.auto import tqdm

    # The bar counts in thousandths: methods differ in what one step of them is.
    bar = tqdm(total=1000, desc=description, delay=_DELAY, leave=False, bar_format=_FORMAT)
    try:
        yield lambda share: bar.update(int(1000 * share) - bar.n)
    finally:
        bar.close()


_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"


def _watched() -> bool:
    """Whether standard error is a terminal, or the cell was started from a front end that could ask something."""
    if "IPython" in sys.modules:
        kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
        if kernel is not None:  # papermill, nbval and book builds allow no input
            return bool(getattr(kernel, "_allow_stdin", False))
    return sys.stderr is not None and sys.stderr.isatty()
