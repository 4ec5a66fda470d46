"""Peak memory of attribution: `python benchmarks/memory.py --help`.

Each method in a process of its own: ResNet-50 (B-cos ResNet-50 for `bcos`), 8 images of 224 x 224, 14 labels. Peak of
the whole process, libraries and maps included. Methods with many passes run few of them: the peak doesn't depend on how
many.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

FEWER = {
    "integrated_gradients": {"n_steps": 2},
    "smoothgrad": {"n_samples": 2},
    "guided_ig": {"n_steps": 2},
    "blur_ig": {"n_steps": 2},
    "xrai": {"n_steps": 2},
    "occlusion": {"window": 100, "stride": 62},
    "scorecam": {"layer": "network.layer1.0.conv1"},  # 64 channels
}


def peak() -> float:
    """Peak of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def one(method: str, batch: int, labels: int) -> None:
    import torch

    import cxrkit
    from cxrkit.models import create

    name = "bcos_resnet50" if method == "bcos" else "resnet50"
    model = create(name, [f"label {i}" for i in range(labels)])
    images = torch.rand(batch, 1, 224, 224)
    with torch.no_grad():
        model(images[:1])
    before = peak()
    cxrkit.attribute(model, images, method, **FEWER.get(method, {}))
    print(f"{method:22}{before:9.2f}{peak():9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="all unless named")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--labels", type=int, default=14)
    parser.add_argument("--here", action="store_true", help="measure the one method in this process")
    arguments = parser.parse_args()
    if arguments.here:
        one(arguments.methods[0], arguments.batch, arguments.labels)
        return
    import cxrkit

    methods = arguments.methods or [card.name for card in cxrkit.attribution.methods()]
    print(f"{'method':22}{'model':>9}{'peak':>9}  GB, {arguments.batch} images, {arguments.labels} labels", flush=True)
    for method in methods:
        sizes = ["--batch", str(arguments.batch), "--labels", str(arguments.labels)]
        subprocess.run([sys.executable, __file__, method, "--here", *sizes], check=True)


if __name__ == "__main__":
    main()
