"""What a B-cos network costs to train, beside its peers in one run.

    python benchmarks/models.py [--threads 2] [--batches 1 4 16] [--size 224] [--repeats 3] [--precisions float32]

The step is forward, loss and backward of B-cos ResNet-50 with FLC pooling, 14 labels. Its peer is the plain formulation
of the same network: the layers of the `bcos` package (patch norms by squares, sum and average pooling, weights rescaled
to length 1), maps in the order batch, channel, row, column, FLC pooling by a whole Fourier transform. Beside them stand
the same network without FLC pooling and the ordinary ResNet-50: their ratio is the price of being interpretable. All
take turns, the shortest time of each counts.

Precisions: on a CPU float32. On a GPU also TF32 (float32 numbers, products and convolutions with 10 bits of mantissa;
for convolutions it is PyTorch's default there) and bf16 (autocast). Each is compared with its like, and with what a
large product of matrices reaches in the same precision. "maps" is how far the totals of a B-cos network's maps are from
its logits, relative to these, where there are several precisions.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cxrkit.models import NETWORKS, Classifier, FLCPool, create
from cxrkit.train.devices import half_precision_errors

PRECISIONS = ("float32", "TF32", "bf16")
LABELS = tuple(f"label {i}" for i in range(14))


class FourierPool(nn.Module):
    """FLC pooling as it is written: there and back by whole two-dimensional transforms."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="forward"), dim=(-2, -1))
        top, left = height // 2 - height // 4, width // 2 - width // 4
        spectrum = spectrum[..., top : top + height // 2, left : left + width // 2]
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward").real


class Plain(nn.Module):
    """A network fed in the order batch, channel, row, column; weights as `like` has them."""

    def __init__(self, like: Classifier):
        super().__init__()
        import bcos.models
        from bcos.modules import BcosConv2d, norms

        # The package's own classes in the place of ours; all else, and the weights, stay.
        self.network = bcos.models.resnet50(
            num_classes=len(LABELS), norm_layer=norms.NoBias(norms.BatchNormUncentered2d), conv_layer=BcosConv2d
        )
        for name, module in like.network.named_modules():
            if isinstance(module, FLCPool):
                steps = name.rpartition(".")[0]
                layer = self.network.get_submodule(steps)
                layer.linear.stride = layer.stride = (1, 1)
                self.network.set_submodule(steps, nn.Sequential(layer, FourierPool()))
        self.network.load_state_dict(like.network.state_dict())
        self.network.logit_layer.logit_bias = like.logit_bias
        self.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        grey = images.expand(-1, 3, -1, -1)
        return self.network(torch.cat([grey, 1 - grey], 1))


def networks() -> dict[str, nn.Module]:
    ours = create("bcos_resnet50", LABELS, antialias="flc")
    return {
        "plain B-cos, FLC": Plain(ours),
        "B-cos, FLC": ours,
        "B-cos": create("bcos_resnet50", LABELS),
        "ResNet-50": create("resnet50", LABELS),
    }


def batch_of(size: int, count: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, size, size, generator=generator)
    return images.to(device), torch.rand(count, len(LABELS), generator=generator).round().to(device)


def allow_tf32(precision: str) -> None:
    """Say for products and for convolutions whether a GPU may round their factors; the two differ by default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "TF32"


def training_step(model: nn.Module, images: Tensor, targets: Tensor, precision: str = "float32") -> None:
    allow_tf32(precision)
    model.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = F.binary_cross_entropy_with_logits(model(images), targets)
    loss.backward()
    if images.is_cuda:
        torch.cuda.synchronize()


def in_turns(works: dict[Any, Callable[[], object]], repeats: int) -> dict[Any, float]:
    """Shortest of several times for each, after one that isn't counted; they take turns, so all meet the same load."""
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def flops_of_step(name: str, size: int, count: int, flc: bool) -> int:
    """Products of matrices and convolutions, forward and backward, counted on shapes alone; those of pools are left
    out.
    """
    with torch.device("meta"):
        model = create(name, LABELS).train()
    for layer_name in NETWORKS[name].strided if flc else ():  # FLC pooling needs numbers: an average stands in for it
        layer = model.network.get_submodule(layer_name)
        layer.linear.stride = layer.stride = (1, 1)
        model.network.set_submodule(layer_name, nn.Sequential(layer, nn.AvgPool2d(2)))
    encoded = model.encode(torch.empty(count, 1, size, size, device="meta"))
    with FlopCounterMode(display=False) as counter:
        model.classify(encoded).sum().backward()
    return counter.get_total_flops()


def peak_flops(device: str, precision: str) -> float:
    """What the device reaches on a large product of matrices in this precision: the shortest of several times."""
    allow_tf32(precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / in_turns({"": product}, 5)[""]


def map_error(model: nn.Module, size: int, device: str, precision: str) -> float:
    """How far the totals of maps are from the logits, relative to these; nan for networks whose maps promise none."""
    if getattr(model, "encoding", "") != "add_inverse":
        return float("nan")
    allow_tf32(precision)
    full, half, _ = half_precision_errors(model, batch_of(size, 4, device)[0], torch.bfloat16, device)
    return half if precision == "bf16" else full


def peak_memory(name: str, size: int, count: int, device: str, precision: str) -> None:
    """Print how much memory one step adds, in MiB, over the network itself; in a process of its own."""
    model = networks()[name].train().to(device)
    images, targets = batch_of(size, count, device)
    if device == "cuda":
        training_step(model, images, targets, precision)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training_step(model, images, targets, precision)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    training_step(model, images[:1, :, :64, :64], targets[:1], precision)  # what a first step sets up isn't counted
    before = _peak()
    training_step(model, images, targets, precision)
    print((_peak() - before) / 2**10)


def _peak() -> int:
    """The most memory that this process has held, in KiB; Linux' `ru_maxrss` begins with that of the parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured_memory(name: str, options: argparse.Namespace, count: int, device: str, precision: str) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--batches", str(count), "--size", str(options.size)]
    command += ["--device", device, "--precisions", precision]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def steps(options: argparse.Namespace, device: str) -> None:
    models = {name: model.train().to(device) for name, model in networks().items()}
    peaks = {precision: peak_flops(device, precision) for precision in options.precisions}
    reached = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {precision}" for precision, peak in peaks.items())
    print(f"\ntraining step, {options.size} x {options.size}; a large product reaches {reached}")
    each = [(name, precision) for precision in options.precisions for name in models]
    several = len(options.precisions) > 1
    errors = {(n, p): map_error(models[n], options.size, device, p) if several else float("nan") for n, p in each}
    columns = ("s / step", "images/s", "x plain", "x ResNet", "of peak", "maps")
    print(f"{'batch':>5s}  {'network':18s}{'precision':10s}" + "".join(f"{column:>10s}" for column in columns))
    for count in options.batches:
        images, targets = batch_of(options.size, count, device)
        times = in_turns(
            {(n, p): lambda n=n, p=p, i=images, t=targets: training_step(models[n], i, t, p) for n, p in each},
            options.repeats,
        )
        for (name, precision), best in times.items():
            architecture = "resnet50" if name == "ResNet-50" else "bcos_resnet50"
            share = flops_of_step(architecture, options.size, count, "FLC" in name) / best / peaks[precision]
            plain, ordinary = times["plain B-cos, FLC", precision] / best, best / times["ResNet-50", precision]
            error = errors[name, precision]
            maps = "–" if math.isnan(error) else f"{error:.0e}"
            print(
                f"{count:5d}  {name:18s}{precision:10s}{best:10.3f}{count / best:10.2f}{plain:10.2f}{ordinary:10.2f}"
                f"{share:10.0%}{maps:>10s}",
                flush=True,
            )


def memory(options: argparse.Namespace, device: str) -> None:
    count = max(options.batches)
    print(f"\nMiB that a step adds at batch {count}")
    for precision in options.precisions:
        for name in ("plain B-cos, FLC", "B-cos, FLC", "B-cos", "ResNet-50"):
            found = measured_memory(name, options, count, device, precision)
            print(f"{name:18s}{precision:10s}{found:9.0f}", flush=True)


def pooling(device: str) -> None:
    print(f"\nmilliseconds for FLC pooling of a batch of 16\n{'map':20s}{'transform':>10s}{'ours':>8s}")
    for channels, size in ((128, 56), (256, 28), (512, 14), (128, 16)):
        x = torch.rand(16, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
        pools = {"transform": FourierPool(), "ours": FLCPool()}
        times = in_turns({name: lambda p=pool, x=x: p(x).sum().item() for name, pool in pools.items()}, 5)
        milliseconds = [1e3 * times[name] for name in pools]
        print(f"{f'{channels} x {size} x {size}':20s}{milliseconds[0]:10.2f}{milliseconds[1]:8.2f}", flush=True)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16] + [64] * (device == "cuda"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=device)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: float32, on a GPU all")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.precisions = options.precisions or (PRECISIONS if options.device.startswith("cuda") else ("float32",))
    torch.set_num_threads(options.threads)
    if options.memory_of:
        peak_memory(options.memory_of, options.size, options.batches[0], options.device, options.precisions[0])
        return
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), shortest of {options.repeats}")
    steps(options, options.device)
    memory(options, options.device)
    pooling(options.device)


if __name__ == "__main__":
    main()
