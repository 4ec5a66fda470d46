"""Speed of attribution beside its peers, in one run: `python benchmarks/attribution.py --help`.

One 224 x 224 image. ResNet-50 with one label against captum and grad-cam; B-cos ResNet-50 with 14 labels against
`explain` of the package bcos. The bound of a method is the time of its forward and backward passes alone. Each time is
the best of the rounds after one warm-up (integrated gradients: one round); ours and the peer alternate, so both meet
the same load.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import cxrkit
from cxrkit.models import calibrate, create


def best(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float], warm: bool = True
) -> dict[str, float]:
    """Shortest time in seconds of each call, taken in turns, after a warm-up turn if `warm`."""
    times = {name: float("inf") for name in calls}
    for turn in range(rounds + warm):
        for name, call in calls.items():
            start = clock()
            call()
            if turn or not warm:
                times[name] = min(times[name], clock() - start)
    return times


def passes(model: nn.Module, inputs: Tensor, labels: int, forwards: int = 1) -> None:
    """The bound: `forwards` images, in batches of 8, with one backward per label, weights frozen, nothing else."""
    for batch in inputs.repeat(forwards, 1, 1, 1).split(8):
        leaf = batch.clone().requires_grad_()
        logits = model(leaf)
        for j in range(labels):
            torch.autograd.grad(logits[:, j].sum(), leaf, retain_graph=j + 1 < labels)


def resnet_rows(rounds: int, clock: Callable[[], float]) -> list[tuple[str, str, dict[str, float]]]:
    """ResNet-50, one label: name, peer and times of each method."""
    import captum.attr
    import torchvision  # after cxrkit, which lets it load beside a CPU build of torch
    from pytorch_grad_cam import GradCAM, LayerCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = torchvision.models.resnet50(weights=None, num_classes=14).eval()
    frozen = torchvision.models.resnet50(weights=None, num_classes=14).eval().requires_grad_(False)
    x = torch.rand(1, 3, 224, 224)

    def ours(method, **options):
        return lambda: cxrkit.attribute(model, x, method, labels=[0], **options)

    def by_captum(peer, **options):
        return lambda: peer(model).attribute(x.clone().requires_grad_(), target=0, **options)

    def by_grad_cam(peer):
        def call():
            with peer(model, [model.layer4]) as explain:
                return explain(x, [ClassifierOutputTarget(0)])

        return call

    steps = {"n_steps": 50}
    peers = [
        ("saliency", "captum", by_captum(captum.attr.Saliency, abs=False), {}, 1),
        ("input_x_gradient", "captum", by_captum(captum.attr.InputXGradient), {}, 1),
        (
            "integrated_gradients",
            "captum, batches of 10",
            by_captum(captum.attr.IntegratedGradients, internal_batch_size=10, **steps),
            steps,
            50,
        ),
        ("gradcam", "grad-cam", by_grad_cam(GradCAM), {"layer": "layer4"}, 0),
        ("layercam", "grad-cam", by_grad_cam(LayerCAM), {"layer": "layer4"}, 0),
    ]
    rows = []
    for method, peer, call, options, forwards in peers:

        @torch.no_grad()
        def forward():
            frozen(x)

        bound = (lambda n=forwards: passes(frozen, x, 1, n)) if forwards else forward
        long = forwards > 1  # the short ones have warmed everything up
        rows.append(
            (
                method,
                peer,
                best(
                    {"ours": ours(method, **options), "peer": call, "bound": bound},
                    1 if long else rounds,
                    clock,
                    not long,
                ),
            )
        )
    return rows


def bcos_rows(rounds: int, clock: Callable[[], float]) -> list[tuple[str, str, dict[str, float]]]:
    """B-cos ResNet-50, 14 labels: times of the contribution maps."""
    labels = [f"label {i}" for i in range(14)]
    model = calibrate(create("bcos_resnet50", labels).eval(), torch.rand(2, 1, 224, 224))
    frozen = calibrate(create("bcos_resnet50", labels).eval(), torch.rand(2, 1, 224, 224)).requires_grad_(False)
    x = torch.rand(1, 1, 224, 224)
    six = model.encode(x).detach()

    def explain():
        for j in range(14):
            model.network.explain(six.clone().requires_grad_(), idx=j)

    def bound():
        with frozen.network.explanation_mode():
            passes(frozen.network, six, 14)

    calls = {"ours": lambda: cxrkit.attribute(model, x, "bcos"), "peer": explain, "bound": bound}
    return [("bcos, 14 labels", "bcos, 14 x explain", best(calls, rounds, clock))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of wall time, for a busy machine")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} threads, seconds, best of {arguments.rounds}")
    print(f"{'method':22}{'ours':>8}{'peer':>8}{'bound':>8}{'peer/ours':>11}{'ours/bound':>12}  peer")
    for method, peer, t in resnet_rows(arguments.rounds, clock) + bcos_rows(arguments.rounds, clock):
        times = f"{t['ours']:8.3f}{t['peer']:8.3f}{t['bound']:8.3f}"
        print(f"{method:22}{times}{t['peer'] / t['ours']:11.2f}{t['ours'] / t['bound']:12.2f}  {peer}")


if __name__ == "__main__":
    main()
