"""One task for many rows in several processes; a row that brings its process down is found and named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

__all__ = ["CRASHED", "cores", "spread", "with_bar"]

CRASHED = "the process that read it died; the file, or the memory it needs, is beyond what the decoder can bear"
_CHUNK = 32
# Few rows are done sooner than processes start.
_FEW = 16
_task: Callable[[int], Any] | None = None


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(task: Callable[[int], Any], rows: Sequence[int], workers: int | None = None) -> Iterator[tuple[int, Any]]:
    """Yield ``(row, task(row))`` in the order in which rows get done.

    ``task`` must be picklable where processes are spawned, and should return its errors: one that it raises ends the
    whole. A row during which its process dies (a decoder's crash, no memory) yields ``CRASHED``; the others are done
    all the same. ``workers``: processes; None: one a core; 0: none, everything is done here.
    """
    rows = [int(row) for row in rows]
    workers = cores() if workers is None else workers
    if workers == 0 or len(rows) < _FEW or multiprocessing.current_process().daemon:
        yield from ((row, task(row)) for row in rows)
        return
    size = max(1, min(_CHUNK, len(rows) // (4 * workers)))
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    lost = yield from _pooled(task, chunks, workers)
    # Which row of a lost chunk is to blame is found by trying each in a process of its own.
    for row in (row for chunk in lost for row in chunk):
        died = yield from _pooled(task, [[row]], 1)
        if died:
            yield row, CRASHED


def _pooled(task: Callable, chunks: Sequence[Sequence[int]], workers: int) -> Iterator[tuple[int, Any]]:
    """Yield results of all chunks; returns the chunks that were not done because a process died."""
    # Linux forks, which needs no guarded main module, as PyTorch's own workers do; elsewhere the platform's way.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    waiting, running, lost = list(reversed(chunks)), {}, []
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(task,))
    try:
        while waiting or running:
            # Few chunks are handed out at a time: a dying process takes all of them along.
            while waiting and len(running) < 2 * workers:
                chunk = waiting.pop()
                running[pool.submit(_run, chunk)] = chunk
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = False
            for future in done:
                chunk = running.pop(future)
                if _died(future):
                    broken = True
                    lost.append(chunk)
                else:
                    yield from future.result()
            if broken:
                lost += running.values()
                running = {}
                pool.shutdown(wait=True, cancel_futures=True)
                pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(task,))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return lost


def _died(future: Future) -> bool:
    return isinstance(future.exception(), BrokenProcessPool)


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


def _run(rows: Sequence[int]) -> list[tuple[int, Any]]:
    return [(row, _task(row)) for row in rows]


def with_bar(results: Iterator, total: int, progress: bool) -> Iterator:
    """The same results with a progress bar on standard error, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(results, total=total, unit="image", disable=None if progress else True)
