"""`make fuzz NETWORKS=3000 SEED=0`: thousands of random networks, every method, one line of result."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch

from fuzz import policy

_PART = 5  # networks that a process takes at a time

_ABOUT = """R, F, W and E count pairs of a network and a method: right (the map equals an independent slow one), refused
(with a cause, where the method can't be right or where that isn't asked), wrong (another map, or the refusal of a
network that the method is right for, or a map where there is no rule), and foreign (any exception but the package's
own). C counts networks whose parameters, buffers, flags, gradients, hooks or attributes, or whose images, or torch's
global state, differ after a call by a single bit. The status is 1 unless W, E and C are 0."""


@dataclass
class Tally:
    kinds: Counter = field(default_factory=Counter)
    causes: Counter = field(default_factory=Counter)
    methods: dict[str, set[str]] = field(default_factory=dict)  # that refused for a cause
    unchecked: Counter = field(default_factory=Counter)
    networks: int = 0
    changed: int = 0
    failures: int = 0  # of this program itself

    def add(self, seed: int, trial) -> list[str]:
        """Count one network; the lines to print about it."""
        lines = []
        self.networks += 1
        self.changed += trial.is_changed
        for verdict in trial.verdicts:
            interrupted = verdict.method.startswith("interrupted")
            if not interrupted or verdict.kind == "foreign":
                self.kinds[verdict.kind] += 1
            if verdict.kind == "refused":
                cause = policy.cause(verdict.told)
                self.causes[cause] += 1
                self.methods.setdefault(cause, set()).add(verdict.method)
            if not verdict.is_checked:
                self.unchecked[verdict.method] += 1
            if verdict.kind in ("wrong", "foreign"):
                lines.append(f"  {verdict.kind}: {verdict.method}({_options(verdict.options)}): {_short(verdict.told)}")
            if verdict.changed:
                lines.append(f"  changed by {verdict.method}: {'; '.join(verdict.changed[:3])}")
        if lines:
            lines.insert(0, f"seed {seed}; again: make fuzz NETWORKS=1 SEED={seed}")
            lines.append(f"  the network: {', '.join(sorted(trial.features))}")
        return lines

    def result(self) -> str:
        r, f, w, e = (self.kinds[kind] for kind in ("right", "refused", "wrong", "foreign"))
        return f"networks {self.networks}: right {r}, refused {f}, wrong {w}, foreign {e}, changed {self.changed}"


def _options(options: dict) -> str:
    told = {k: "…" if isinstance(v, torch.Tensor) else v for k, v in options.items() if v is not None}
    return ", ".join(f"{name}={value!r}" for name, value in told.items())


def _short(text: str) -> str:
    return " ".join(text.split())[:400]


def _tried(seeds: list[int], only: set[str] | None) -> list:
    """Trials of these seeds, in a process of their own; the text of an exception where this program fails itself."""
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    from fuzz.trial import try_network

    found = []
    for seed in seeds:
        try:
            found.append((seed, try_network(seed, only)))
        except Exception:
            found.append((seed, traceback.format_exc()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__, epilog=_ABOUT)
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first network's; the others follow")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--failures", type=int, default=200, help="how many networks with failures to print")
    chosen = parser.parse_args()
    seeds = range(chosen.seed, chosen.seed + chosen.networks)
    parts = [list(seeds[i : i + _PART]) for i in range(0, len(seeds), _PART)]
    only = set(chosen.methods) if chosen.methods else None
    tally, start = Tally(), time.monotonic()
    for found in _in_parallel(parts, only, chosen.processes):
        for seed, trial in found:
            if isinstance(trial, str):
                tally.failures += 1
                print(f"seed {seed}: this program failed\n{trial}", flush=True)
                continue
            lines = tally.add(seed, trial)
            if lines and chosen.failures > 0:
                chosen.failures -= 1
                print("\n".join(lines), flush=True)
        _progress(tally, chosen.networks, time.monotonic() - start)
    _report(tally)
    bad = tally.kinds["wrong"] + tally.kinds["foreign"] + tally.changed + tally.failures
    return int(bad > 0)


def _in_parallel(parts: list[list[int]], only: set[str] | None, processes: int):
    if processes == 1 or len(parts) == 1:
        yield from (_tried(part, only) for part in parts)
        return
    with ProcessPoolExecutor(processes) as pool:
        for done in as_completed([pool.submit(_tried, part, only) for part in parts]):
            yield done.result()


def _progress(tally: Tally, networks: int, seconds: float) -> None:
    if sys.stderr.isatty() or tally.networks % 100 < _PART:
        left = seconds / max(tally.networks, 1) * (networks - tally.networks)
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{tally.result()}; {seconds:.0f} s, {left:.0f} s left", file=sys.stderr, end=end, flush=True)


def _report(tally: Tally) -> None:
    pairs = sum(tally.kinds.values())
    print(f"\nrefused, by cause ({tally.kinds['refused']} of {pairs} pairs):")
    for cause, count in tally.causes.most_common(80):
        methods = sorted(tally.methods[cause])
        told = ", ".join(methods) if len(methods) < 4 else f"{len(methods)} methods"
        print(f"  {count / max(pairs, 1):7.2%} {count:6d}  {cause} ({told})")
    rest = sum(count for _, count in tally.causes.most_common()[80:])
    if rest:
        print(f"  {rest / pairs:7.2%} {rest:6d}  {len(tally.causes) - 80} rarer causes")
    unchecked = ", ".join(f"{method} {count}" for method, count in tally.unchecked.most_common()) or "none"
    print(f"counted as right without a comparison, since no map is determined: {unchecked}")
    if tally.failures:
        print(f"this program failed on {tally.failures} networks")
    print(tally.result())


if __name__ == "__main__":
    sys.exit(main())
