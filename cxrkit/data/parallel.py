"""One task for many rows in several processes; a row that brings its process down is found and named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch
from tqdm import tqdm

__all__ = ["CRASHED", "spread"]

CRASHED = "the process that read it died; the file, or the memory it needs, is beyond what the decoder can bear"
# Few rows are done sooner than processes start.
_FEW = 16
_task: Callable[[int], Any] | None = None


def spread(
    task: Callable[[int], Any], rows: Sequence[int], workers: int | None = None, progress: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield ``(row, task(row))`` in the order in which rows get done.

    ``task`` must be picklable where processes are spawned, and should return its errors: one that it raises ends the
    whole. A row during which its process dies (a decoder's crash, no memory) yields ``CRASHED``; the others are done
    all the same. ``workers``: processes; None: one a core; 0: none, everything is done here. ``progress``: a bar on
    standard error, where that is a terminal.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows = [int(row) for row in rows]
    if workers == 0 or len(rows) < _FEW or multiprocessing.current_process().daemon:
        results = ((row, task(row)) for row in rows)
    else:
        results = _isolated(task, rows, workers)
    yield from tqdm(results, total=len(rows), unit="image", disable=None if progress else True)


def _isolated(task: Callable, rows: list[int], workers: int) -> Iterator[tuple[int, Any]]:
    lost = yield from _pooled(task, rows, workers)
    for row in lost:  # which one is to blame shows when each has a process of its own
        died = yield from _pooled(task, [row], 1)
        if died:
            yield row, CRASHED


def _pooled(task: Callable, rows: Sequence[int], workers: int) -> Iterator[tuple[int, Any]]:
    """Yield the results of all rows; returns those that were under way when a process died."""
    # Linux forks, which needs no guarded main module, as PyTorch's own workers do; elsewhere the platform's way.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    waiting, running, lost = list(reversed(rows)), {}, []
    while waiting or running:
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(task,)) as pool:
            try:
                while waiting or running:
                    # Few rows are handed out at a time: a dying process takes all of them along.
                    while waiting and len(running) < 2 * workers:
                        running[pool.submit(_run, waiting[-1])] = waiting[-1]
                        waiting.pop()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                lost += running.values()
                running = {}
    return lost


def _begin(task: Callable[[int], Any]) -> None:
    global _task
    _task = task
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed can't say so; without this its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _run(row: int) -> Any:
    return _task(row)
