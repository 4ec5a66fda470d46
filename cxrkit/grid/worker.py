"""A worker process of the local engine: a job per line of its standard input, an outcome per line of its output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import sys
import threading

from cxrkit.grid.execute import Job, end_all, execute


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    while True:
        outcome = execute(Job(**json.loads(orders.get())))
        with contextlib.suppress(OSError):
            answers.write(json.dumps(dataclasses.asdict(outcome)).encode() + b"\n")
            answers.flush()


def _listen(orders: queue.Queue[bytes]) -> None:
    for line in sys.stdin.buffer:
        orders.put(line)
    end_all()  # the runner has closed its end, or died
    os._exit(0)


if __name__ == "__main__":
    main()
