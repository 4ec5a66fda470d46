"""Speed of the B-cos layers and of FLC pooling, each beside its peer in one run.

    python benchmarks/models.py [--threads 1] [--sizes 64 128] [--batch 32]

Peers: the layers of the `bcos` package in the same memory format, torchvision's ResNet, and FLC pooling by
Fourier transforms.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from cxrkit.models import Classifier, FLCPool, create

LABELS = tuple(f"label {i}" for i in range(14))


def package_bcos() -> Classifier:
    """B-cos ResNet-18 on the layers of the bcos package."""
    import bcos.models
    from bcos.modules import norms

    norm = norms.NoBias(norms.BatchNormUncentered2d)
    network = bcos.models.resnet18(num_classes=len(LABELS), norm_layer=norm)
    return Classifier(network, LABELS, "add_inverse").to(memory_format=torch.channels_last)


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Shortest of several runs, after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def training_step(model: Classifier, images: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(model(images), targets).backward()

    return step


def inference(model: Classifier, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    model.eval()

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def flc_by_transform(x: torch.Tensor) -> torch.Tensor:
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="forward"), dim=(-2, -1))
    top, left = height // 2 - height // 4, width // 2 - width // 4
    spectrum = spectrum[..., top : top + height // 2, left : left + width // 2]
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward").real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"images per second, batch {options.batch}, {options.threads} thread(s), torch {torch.__version__}")
    models = {
        "B-cos ResNet-18, bcos package": package_bcos(),
        "B-cos ResNet-18": create("bcos_resnet18", LABELS),
        "B-cos ResNet-18, FLC": create("bcos_resnet18", LABELS, antialias="flc"),
        "B-cos ResNet-18, BlurPool": create("bcos_resnet18", LABELS, antialias="blur"),
        "ResNet-18, torchvision": create("resnet18", LABELS),
    }
    print(f"{'network':32s}{'size':>6s}{'training':>10s}{'inference':>11s}")
    for size in options.sizes:
        images = torch.rand(options.batch, 1, size, size)
        targets = torch.rand(options.batch, len(LABELS)).round()
        for name, model in models.items():
            train = options.batch / seconds(training_step(model, images, targets), 3)
            run = options.batch / seconds(inference(model, images), 3)
            print(f"{name:32s}{size:6d}{train:10.1f}{run:11.1f}", flush=True)

    print(f"\nmilliseconds for FLC pooling of a batch of {options.batch}\n{'map':32s}{'transform':>10s}{'ours':>11s}")
    for channels, size in ((128, 56), (256, 28), (512, 14), (128, 16)):
        x = torch.rand(options.batch, channels, size, size).contiguous(memory_format=torch.channels_last)
        pool = FLCPool()
        times = [1e3 * seconds(lambda f=f, x=x: f(x)) for f in (flc_by_transform, pool)]
        print(f"{f'{channels} x {size} x {size}':32s}{times[0]:10.2f}{times[1]:11.2f}", flush=True)


if __name__ == "__main__":
    main()
