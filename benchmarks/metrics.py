"""Speed of the metrics beside plain arithmetic, in one run: `python benchmarks/metrics.py --help`.

All localisation scores of many 224 x 224 maps and their chance levels: `localisation_scores` in one pass against the
papers' arithmetic, image by image and score by score in NumPy (smoothing by PyTorch's convolution, distances by SciPy).
Both give the same numbers; the largest difference is printed. The bootstrap of 1 000 resamples over 10 000 images of as
many patients: ours against scipy.stats.bootstrap, and one table of 47 scores against 47 single calls. The plain side
scores `--plain` of the maps and is counted for all. Each time is the best of the rounds; the sides alternate, so both
meet the same load.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage, stats
from torch import Tensor
from torch.nn import functional as F

import cxrkit

SIZE = 224
TOLERANCE = 15
WINDOW = np.exp(-np.square(np.arange(-5, 6)) / 2)
KERNEL = np.outer(WINDOW, WINDOW) / WINDOW.sum() ** 2


def subjects(count: int) -> tuple[Tensor, Tensor]:
    """Signed maps, smooth with noise, and masks of one or two boxes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 1, 14, 14, generator=generator)
    maps = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")[:, 0]
    maps += 0.3 * torch.randn(count, SIZE, SIZE, generator=generator)
    corner = torch.randint(0, SIZE - 70, (count, 2, 2), generator=generator).numpy()
    side = torch.randint(20, 70, (count, 2, 2), generator=generator).numpy()
    boxes = np.concatenate([corner, corner + side], -1).reshape(-1, 4)
    masks = cxrkit.data.geometry.box_masks(boxes, SIZE).reshape(count, 2, SIZE, SIZE)
    return maps, masks.any(1)


def plain_precision(values: np.ndarray, mask: np.ndarray, threshold: float) -> float:
    """Energy-based pointing game (paper `bcos`, Eq. 2)."""
    positive = np.where(values > 0, values, 0)
    kept = np.where(positive >= threshold * positive.max(), positive, 0)
    return (kept * mask).sum() / kept.sum()


def plain_recall(values: np.ndarray, mask: np.ndarray, threshold: float) -> float:
    """The same, as recall (Eq. 3)."""
    positive, negative = np.where(values > 0, values, 0), np.where(values < 0, values, 0)
    kept = np.where(positive >= threshold * positive.max(), positive, 0)
    return (kept * mask).sum() / ((positive + np.abs(negative)) * mask).sum()


def plain_pointing(values: np.ndarray, mask: np.ndarray, tolerance: float) -> float:
    """Distance of every pixel to the maximum (paper `normgrad`)."""
    row, column = np.unravel_index(values.argmax(), values.shape)
    rows, columns = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
    return float((mask & ((rows - row) ** 2 + (columns - column) ** 2 < tolerance**2)).any())


def plain_overlap(
    values: np.ndarray, mask: np.ndarray, threshold: float, average: str, percentile: float
) -> tuple[float, float]:
    """IoU of the foreground or of two classes (paper `relevance`), and that of a region of the same size by chance."""
    clipped = np.where(values > 0, values, 0)
    scaled = clipped / (np.percentile(clipped, percentile) if percentile < 100 else clipped.max())
    predicted = np.where(scaled >= threshold, scaled, 0) > 0
    foreground = (predicted & mask).sum() / (predicted | mask).sum()
    area, share = mask.mean(), predicted.mean()
    chance = area * share / (area + share - area * share)
    if average == "foreground":
        return foreground, chance
    background = (~predicted & ~mask).sum() / (~predicted | ~mask).sum()
    return (foreground + background) / 2, (chance + (1 - area) * (1 - share) / (1 - area * share)) / 2


def plain(maps: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """All scores and chance levels, image by image."""
    kernel = torch.as_tensor(KERNEL, dtype=torch.float32)[None, None]
    rows = []
    for values, mask in zip(maps, masks, strict=True):
        row = {"epg_signed": (values * mask).sum() / values.sum()}
        row |= dict.fromkeys(("chance epg_signed", "chance hit_rate"), mask.mean())
        for threshold in [step / 10 for step in range(10)]:
            row[f"epg_precision@{threshold:g}"] = plain_precision(values, mask, threshold)
            row[f"epg_recall@{threshold:g}"] = plain_recall(values, mask, threshold)
            row[f"chance epg_precision@{threshold:g}"] = row["chance hit_rate"]
            row[f"chance epg_recall@{threshold:g}"] = plain_recall(values, np.ones_like(mask), threshold)
        padded = F.pad(torch.from_numpy(values)[None, None], (5, 5, 5, 5), mode="reflect")
        row["pointing_game"] = plain_pointing(F.conv2d(padded, kernel)[0, 0].numpy(), mask, TOLERANCE)
        row["chance pointing_game"] = (ndimage.distance_transform_edt(~mask) < TOLERANCE).mean()
        row["hit_rate"] = plain_pointing(values, mask, 1)
        for name, average in (("iou", "foreground"), ("iou_two_class", "two_class")):
            for percentile, of in ((100, ""), (99, " of p99")):
                scores = {t: plain_overlap(values, mask, t, average, percentile) for t in (0.1, 0.2, 0.3, 0.4, 0.5)}
                scores["mean"] = np.mean(list(scores.values()), axis=0)
                for threshold, (score, chance) in scores.items():
                    row |= {f"{name}@{threshold}{of}": score, f"chance {name}@{threshold}{of}": chance}
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def best(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Shortest time in seconds of each call, taken in turns, after a warm-up turn."""
    times = {name: float("inf") for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                times[name] = min(times[name], clock() - start)
    return times


def localisation(arguments, clock: Callable[[], float]) -> tuple[str, float, float, str]:
    maps, masks = subjects(arguments.maps)
    few, few_masks = maps[: arguments.plain].numpy(), masks[: arguments.plain].numpy()
    expected = plain(few, few_masks)
    found = cxrkit.metrics.localisation_scores(maps[: arguments.plain], masks[: arguments.plain])
    ours = found.values | {f"chance {name}": level for name, level in found.chance.items()}
    gap = {name: np.abs(ours[name].numpy() / expected[name] - 1).max() for name in ours if expected[name].all()}
    gap |= {name: np.abs(ours[name].numpy() - expected[name]).max() for name in ours if name not in gap}
    worst = max(gap, key=gap.get)
    on_device = maps.to(arguments.device), masks.to(arguments.device)
    times = best(
        {
            "ours": lambda: cxrkit.metrics.localisation_scores(*on_device),
            "plain": lambda: plain(few, few_masks),
        },
        arguments.rounds,
        clock,
    )
    text = f"all {len(found.values)} localisation scores, {arguments.maps} maps"
    note = f"NumPy, image by image; largest difference {gap[worst]:.1e} ({worst})"
    return text, times["ours"], times["plain"] * arguments.maps / len(few), note


def bootstraps(arguments, clock: Callable[[], float]) -> list[tuple[str, float, float, str]]:
    generator = np.random.default_rng(0)
    table = generator.random((arguments.images, 47))
    patients = np.arange(arguments.images)
    options = {"n_resamples": 1000, "method": "percentile", "batch": 100, "rng": 0}
    one = best(
        {
            "ours": lambda: cxrkit.metrics.bootstrap(table[:, 0], patients),
            "scipy": lambda: stats.bootstrap((table[:, 0],), np.mean, **options),
        },
        arguments.rounds,
        clock,
    )
    gathered = cxrkit.metrics.Accumulator()
    gathered.add({f"score {column}": table[:, column] for column in range(47)}, patients)
    many = best(
        {
            "ours": gathered.table,
            "singly": lambda: [cxrkit.metrics.bootstrap(column, patients) for column in table.T],
        },
        1,
        clock,
    )
    return [
        (f"bootstrap, 1000 x {arguments.images} images", one["ours"], one["scipy"], "scipy.stats.bootstrap"),
        ("the same of 47 scores", many["ours"], many["singly"], "47 single calls of ours"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--maps", type=int, default=1000)
    parser.add_argument("--plain", type=int, default=50, help="maps that the plain side scores")
    parser.add_argument("--images", type=int, default=10_000, help="images of the bootstrap")
    parser.add_argument("--device", default="cpu", help="where our localisation scores are computed")
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of wall time, for a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def clock() -> float:
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return time.process_time() if arguments.cpu else time.perf_counter()

    print(f"torch {torch.__version__}, {arguments.threads} threads, seconds, best of {arguments.rounds}")
    print(f"{'metric':44}{'ours':>8}{'peer':>8}{'peer/ours':>11}  peer")
    for text, ours, peer, name in [localisation(arguments, clock), *bootstraps(arguments, clock)]:
        print(f"{text:44}{ours:8.3f}{peer:8.3f}{peer / ours:11.1f}  {name}")


if __name__ == "__main__":
    main()
