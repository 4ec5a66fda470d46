"""Speed of attribution beside its peers, in one run: `python benchmarks/attribution.py --help`.

One 224 x 224 image, every label (14 unless told otherwise), ResNet-50, DenseNet-121 and B-cos ResNet-50. A peer
explains one label per call; it is timed for `--peer-labels` labels and counted for all. Peers get the same frozen
network in channels-last order and their best batch size. The bound is the time of the forward and backward passes that
a method can't avoid, alone, in batches of 8. Ours, peer and bound alternate, so all meet the same load.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

import cxrkit
from cxrkit.models import calibrate, create

SIZE = 224


@dataclass
class Row:
    """A method with its peer (label -> None, or None where there is none) and the passes it can't avoid."""

    method: str
    peer: str
    call: Callable[[int], object] | None
    options: dict = field(default_factory=dict)
    forwards: int = 1
    backwards: float = 1  # per forward and label
    text: str = ""


def network(name: str, labels: int) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=labels)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def image() -> Tensor:
    """A smooth image with noise, three equal channels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 1, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    noise = torch.rand(1, 1, SIZE, SIZE, generator=generator)
    return (0.9 * smooth + 0.1 * noise).repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)


def captum_rows(model: nn.Module, x: Tensor, arguments) -> list[Row]:
    from captum.attr import GuidedBackprop, InputXGradient, IntegratedGradients, NoiseTunnel, Occlusion, Saliency

    def by(method, **options):
        return lambda label: method.attribute(x.clone().requires_grad_(), target=label, **options)

    steps, samples = arguments.steps, arguments.samples
    window, stride = arguments.window, arguments.stride
    places = -(-(SIZE - window) // stride) + 1
    occlusion = by(
        Occlusion(model),
        sliding_window_shapes=(3, window, window),
        strides=(3, stride, stride),
        perturbations_per_eval=8,
    )
    smooth = by(NoiseTunnel(Saliency(model)), nt_samples=samples, nt_samples_batch_size=8, nt_type="smoothgrad")
    path = by(IntegratedGradients(model), n_steps=steps, internal_batch_size=8)
    return [
        Row("saliency", "captum", by(Saliency(model), abs=False)),
        Row("input_x_gradient", "captum", by(InputXGradient(model))),
        Row("guided_backprop", "captum", by(GuidedBackprop(model))),
        Row("deeplift", "none that is right for it", None, forwards=2, backwards=0.5),
        Row("integrated_gradients", "captum", path, {"n_steps": steps}, steps, text=f"{steps} steps"),
        Row("smoothgrad", "captum", smooth, {"n_samples": samples}, samples, text=f"{samples} samples"),
        Row(
            "occlusion",
            "captum",
            occlusion,
            {"window": window, "stride": stride},
            places**2 + 1,
            0,
            f"{window} px every {stride}",
        ),
    ]


def cam_rows(model: nn.Module, x: Tensor, arguments) -> list[Row]:
    import pytorch_grad_cam as peers
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    name, channels = ("layer4", 2048) if hasattr(model, "layer4") else ("features", 1024)
    trainable = network(arguments.network, arguments.labels).requires_grad_(True)  # grad-cam needs it

    def by(peer, **options):
        def call(label):
            with peer(trainable, [trainable.get_submodule(name)]) as explain:
                explain.batch_size = 8
                return explain(x, [ClassifierOutputTarget(label)])

        return call

    layer = {"layer": name}
    return [
        Row("gradcam", "grad-cam", by(peers.GradCAM), layer, backwards=0),
        Row("layercam", "grad-cam", by(peers.LayerCAM), layer, backwards=0),
        Row("gradcam_plus_plus", "grad-cam", by(peers.GradCAMPlusPlus), layer, backwards=0),
        Row("normgrad", "none", None, layer, backwards=0),
        Row("scorecam", "grad-cam", by(peers.ScoreCAM), layer, channels + 1, 0, f"{channels} channels"),
    ]


def path_rows(model: nn.Module, x: Tensor, arguments) -> list[Row]:
    import saliency.core as peers

    quantile = np.quantile
    # Guided IG of the package uses a keyword that NumPy 2 dropped.
    peers.guided_ig.np.quantile = lambda *a, interpolation=None, **k: quantile(
        *a, **k, method=interpolation or "linear"
    )
    array = x[0].permute(1, 2, 0).numpy()

    def gradients(images, call_model_args=None, expected_keys=None):
        inputs = torch.tensor(np.asarray(images, np.float32)).permute(0, 3, 1, 2).requires_grad_()
        scores = model(inputs)[:, call_model_args["label"]].sum()
        gradient = torch.autograd.grad(scores, inputs)[0]
        return {peers.base.INPUT_OUTPUT_GRADIENTS: gradient.permute(0, 2, 3, 1).numpy()}

    def by(method, **options):
        return lambda label: method.GetMask(array, gradients, {"label": label}, **options)

    steps = arguments.steps
    guided = by(peers.GuidedIG(), x_steps=steps, x_baseline=np.zeros_like(array), max_dist=0.02, fraction=0.25)
    return [
        Row("guided_ig", "saliency", guided, {"n_steps": steps}, steps, -1, f"{steps} steps"),
        Row(
            "blur_ig",
            "saliency",
            by(peers.BlurIG(), steps=steps, batch_size=8),
            {"n_steps": steps},
            steps,
            text=f"{steps} steps",
        ),
        Row(
            "xrai",
            "saliency",
            by(peers.XRAI(), batch_size=8, extra_parameters=peers.XRAIParameters(steps=steps)),
            {"n_steps": steps},
            2 * steps,
            text=f"2 x {steps} steps",
        ),
    ]


def relevance_rows(model: nn.Module, x: Tensor, arguments) -> list[Row]:
    import zennit.attribution
    import zennit.composites
    import zennit.torchvision

    resnet = hasattr(model, "layer4")
    canonizers = [zennit.torchvision.ResNetCanonizer()] if resnet else []

    def lrp(label):
        composite = zennit.composites.EpsilonPlus(canonizers=canonizers)
        seed = torch.eye(arguments.labels)[[label]]
        with zennit.attribution.Gradient(model, composite) as explain:
            explain(x.clone().requires_grad_(), seed)

    peer = ("zennit", lrp) if resnet else ("none that is right for it", None)
    return [Row("lrp", *peer), Row("rap", "none", None)]


def bcos_rows(arguments) -> tuple[nn.Module, Tensor, list[Row]]:
    """The peer is the same network on the package's own layers."""
    import bcos.models
    from bcos.modules import norms

    names = [f"label {i}" for i in range(arguments.labels)]
    model = calibrate(create("bcos_resnet50", names).eval(), torch.rand(2, 1, SIZE, SIZE)).requires_grad_(False)
    norm = norms.NoBias(norms.BatchNormUncentered2d)
    peer = bcos.models.resnet50(num_classes=arguments.labels, norm_layer=norm).eval().requires_grad_(False)
    peer.load_state_dict(model.network.state_dict())
    peer.to(memory_format=torch.channels_last)
    x = image()[:, :1].contiguous()
    six = model.encode(x).detach()

    def explain(label):
        peer.explain(six.clone().requires_grad_(), idx=label)

    return model, x, [Row("bcos", "bcos", explain)]


def passes(model: nn.Module, x: Tensor, row: Row, labels: int) -> Callable[[], None]:
    """The bound: forwards in batches of 8 with one backward per label; -1 backwards: one pair per label of its own."""

    def run() -> None:
        with ExitStack() as stack:
            alone(stack)

    def alone(stack: ExitStack) -> None:
        own = row.backwards < 0
        if hasattr(model, "encode"):  # B-cos: in explanation mode
            inputs, logits_of = model.encode(x).detach(), model.classify
            stack.enter_context(model.network.explanation_mode())
        else:
            inputs, logits_of = x, model
        count = row.forwards * (labels if own else 1)
        for batch in inputs.expand(count, -1, -1, -1).split(8):
            leaf = batch.clone(memory_format=torch.channels_last).requires_grad_(row.backwards != 0)
            with torch.set_grad_enabled(row.backwards != 0):
                logits = logits_of(leaf)
            if own:
                torch.autograd.grad(logits[:, 0].sum(), leaf)
            elif row.backwards:
                done = max(1, round(row.backwards * labels)) if row.forwards > 1 else labels
                for j in range(done):
                    torch.autograd.grad(logits[:, j].sum(), leaf, retain_graph=j + 1 < done)

    return run


def measure(row: Row, model: nn.Module, x: Tensor, arguments, clock: Callable[[], float]) -> dict[str, float]:
    """Shortest seconds of ours, peer and bound, for all labels."""
    labels, timed = arguments.labels, min(arguments.peer_labels, arguments.labels)

    def ours():
        cxrkit.attribute(model, x, row.method, **row.options)

    def peer():
        for label in range(timed):
            row.call(label)

    calls = {"ours": (ours, 1.0), "bound": (passes(model, x, row, labels), 1.0)}
    if row.call is not None:
        calls["peer"] = (peer, labels / timed)
    times = dict.fromkeys(calls, float("inf"))
    short = row.forwards <= 2
    for turn in range(arguments.rounds + 1 if short else 1):
        for name, (call, factor) in calls.items():
            start = clock()
            call()
            if turn or not short:  # short ones get a turn to warm up
                times[name] = min(times[name], factor * (clock() - start))
    return times


def report(title: str, rows: list[Row], model: nn.Module, x: Tensor, arguments, clock) -> None:
    print(f"\n{title}")
    print(f"{'method':22}{'ours':>9}{'peer':>9}{'bound':>9}{'peer/ours':>11}{'ours/bound':>12}  peer, setting")
    total = {"ours": 0.0, "peer": 0.0}
    for row in rows:
        if arguments.only and row.method not in arguments.only:
            continue
        t = measure(row, model, x, arguments, clock)
        peer, ratio = (
            (f"{t['peer']:9.2f}", f"{t['peer'] / t['ours']:11.2f}") if "peer" in t else (f"{'-':>9}", f"{'-':>11}")
        )
        note = ", ".join(part for part in (row.peer, row.text) if part)
        print(
            f"{row.method:22}{t['ours']:9.2f}{peer}{t['bound']:9.2f}{ratio}{t['ours'] / t['bound']:12.2f}  {note}",
            flush=True,
        )
        if "peer" in t:
            total = {name: total[name] + t[name] for name in total}
    if total["ours"]:
        print(
            f"{'all with a peer':22}{total['ours']:9.2f}{total['peer']:9.2f}{'':9}{total['peer'] / total['ours']:11.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2, help="timed turns of short methods")
    parser.add_argument("--labels", type=int, default=14)
    parser.add_argument("--peer-labels", type=int, default=1, help="labels for which a peer is timed")
    parser.add_argument("--steps", type=int, default=8, help="steps of path methods")
    parser.add_argument("--samples", type=int, default=8, help="samples of SmoothGrad")
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "densenet121", "bcos_resnet50"])
    parser.add_argument("--only", nargs="+", help="these methods only")
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of wall time, for a busy machine")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, seconds for {arguments.labels} labels of one image")
    for name in arguments.networks:
        arguments.network = name
        if name.startswith("bcos"):
            model, x, rows = bcos_rows(arguments)
        else:
            model, x = network(name, arguments.labels), image()
            rows = [
                row for make in (captum_rows, cam_rows, path_rows, relevance_rows) for row in make(model, x, arguments)
            ]
        report(name, rows, model, x, arguments, clock)


if __name__ == "__main__":
    main()
