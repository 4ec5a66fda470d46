"""Relevance propagation: the logit shared out, layer by layer, down to the pixels.

Layers pass on what they get, so that a map sums to its logit. The rules of all operations but those with weights are
in `propagation`; what has none (attention, layer norm, products of two signals) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from cxrkit.attribution.operations import OPERATIONS, traced
from cxrkit.attribution.propagation import Back, Layer, Propagation, Shares, last_rules, reciprocal
from cxrkit.attribution.registry import check_choice, method
from cxrkit.attribution.target import Explained, network_errors
from cxrkit.errors import AttributionError, ParameterError

__all__ = ["lrp", "rap"]

_NORMS = {"paper": "pass", "authors": "drop", "corrected": "pass"}  # what batch norm does, by protocol
_TOLERANCE = 0.01  # rounding comes to 0.0001, in RAP to 0.001; what is lost to biases is more


@method("relevance", unfit=OPERATIONS["relevance"]["unfit"])
def lrp(
    explained: Explained,
    images: Tensor,
    *,
    rule: str = "alpha_beta",
    alpha: float = 1.0,
    beta: float = 0.0,
    epsilon: float = 1e-6,
    first_layer: str = "same",
    protocol: str = "corrected",
    check: bool = True,
) -> Tensor:
    """Layer-wise relevance propagation from the logit to the encoded image, summed over its channels. [B, L, H, W],
    in logits.

    `rule="alpha_beta"` shares a neuron's relevance by its positive (times `alpha`) and negative contributions (times
    `beta` = `alpha` - 1); biases get nothing and norms pass it on, so a map sums to its logit. With beta 0 maps have
    the sign of the logit, but for residual sums of both signs, and are much the same for every label.
    `rule="epsilon"` shares by all contributions over the neuron's value moved `epsilon` away from 0; biases, norms'
    shifts and epsilon absorb their part. As epsilon vanishes it is the encoded input times its gradient in a network
    of rectifiers. `first_layer`: "same", or "zb" for the z^B rule with the lowest and highest value of the encoded
    image.

    `protocol="paper"` takes the formula of alpha and beta at its word: a neuron without positive contribution loses its
    relevance (0/0 = 0), averages share by signed terms, which explodes where these cancel. "corrected" shares by the
    contributions that there are, and averages by the size of terms. "authors" is as "paper", with what the published
    code does: signed inputs get the relevance twice, once by the positive and once by the negative ones, and batch norm
    drops that of inputs which are exactly 0. With `check`, AttributionError where a map of "alpha_beta" in the
    corrected protocol is off its logit by more than 1 %; always for operations without a rule.

    Depthwise convolutions behind ReLUs (EfficientNet-Lite, MobileNet) hold many filters that have nothing but a bias:
    with ImageNet weights, 60 to 65 % of the logits of radiographs stay there (up to 90 % after training on them), and
    the map is refused. No setting keeps the logit: whatever alpha and beta, there is no contribution to weigh; the
    epsilon rule, which isn't checked, has maps that sum to anything from -340 to 130 times the logit there, and to
    nothing with an epsilon of 0.25. `check=False` returns the part that reaches the pixels, much the same for every
    alpha and beta.

    Source: paper `relevance`, Eq. 1 and 2; Bach et al. 2015, Eq. 58 and 60.
    """
    check_choice("rule of lrp:", rule, ("alpha_beta", "epsilon"))
    check_choice("first_layer", first_layer, ("same", "zb"))
    check_choice("protocol", protocol, _NORMS)
    if rule == "alpha_beta" and not (beta >= 0 and abs(alpha - beta - 1) < 1e-6):
        raise ParameterError(f"alpha - beta must be 1, with beta at least 0; got alpha={alpha!r}, beta={beta!r}")
    if not 0 < epsilon < float("inf"):
        raise ParameterError(f"epsilon must be a positive number; got {epsilon!r}")
    box = first_layer == "zb"
    if rule == "epsilon":
        return _maps(explained, images, "lrp", partial(_epsilon, epsilon=epsilon), box, "share", check=False)
    weighted = partial(_alpha_beta, alpha=alpha, beta=beta, protocol=protocol)
    if protocol != "corrected":
        return _maps(explained, images, "lrp", weighted, box, _NORMS[protocol], check=False)
    return _maps(explained, images, "lrp", weighted, box, "pass", check, by_size=("averages",))


@method("relevance", unfit=OPERATIONS["relevance"]["unfit"])
def rap(explained: Explained, images: Tensor, *, protocol: str = "corrected", check: bool = True) -> Tensor:
    """Relative attributing propagation from the logit to the encoded image, summed over its channels. [B, L, H, W],
    in logits.

    The last layer with weights (a linear head; a convolution before the pooling where the head is one) shares the
    logit by the size of the contributions, whatever their sign. Every layer before it shares by positive
    contributions over their sum P, and by negative ones over P + N, then subtracts the excess in equal parts. Layers
    that read the image follow the z^B rule, without that shift. The map sums to the logit; where the logit is negative
    all signs are reversed, so the map of such a label shows the opposite.

    `protocol="paper"` subtracts what came through negative contributions from all neurons that aren't 0, loses the
    relevance of neurons without positive contribution, and shares at sums and averages by signed terms: in networks
    with residual sums such a map is at the mercy of rounding: in a ResNet-50, maps of an image in single and double
    precision correlated by 0.3. "corrected" subtracts what is really too much from those that got something, and shares
    at sums and averages by size. "authors" is the published code: signed sums and averages, the shift of "corrected",
    and in convolutions negative relevance takes the shares of the negative contributions in place of the positive ones;
    for networks of rectifiers alone. With `check`, AttributionError where a map of the corrected protocol is off its
    logit by more than 1 %; always for operations without a rule.

    The shift restores the sum over an image, not at each place. So the sum holds whatever the rule does, and positive
    and negative relevance grow from layer to layer: at 224 pixels and with random weights to 10 times the logit in a
    ResNet-18 and 40 000 times in an EfficientNet-B0, in an EfficientNet-Lite0 of ImageNet to 300 to 1300 times.

    Strided convolutions read some pixels more often than others, which shows as a lattice, in maps of LRP too. It is
    the rule's (maps in double precision and by a slow implementation are the same), and the first layer's: windows of
    3 x 3 in steps of 2, as in EfficientNet and MobileNet, read the pixels of each 2 x 2 square one, two, two and four
    times. Depthwise convolutions, gates and SiLU have no part in it. Sums over the first layers' step are free of it
    and keep the total: `torch.nn.functional.avg_pool2d(maps, 2, divisor_override=1)`, with 4 in place of 2 for ResNet
    and DenseNet, which go on with a max-pool. Source: paper `relevance`, Eq. 3 to 6; Nam et al. 2020.
    """
    check_choice("protocol", protocol, _NORMS)
    parts = []
    for part in images.split(max(1, explained.batch // 2)):  # its graph takes twice the memory of other methods'
        weighted = partial(_Influence, protocol=protocol, images=len(part))
        if protocol != "corrected":
            parts.append(_maps(explained, part, "rap", weighted, True, _NORMS[protocol], check=False))
        else:
            parts.append(_maps(explained, part, "rap", weighted, True, "pass", check, by_size=("averages", "sums")))
        explained.first_row += len(part)
    return torch.cat(parts)


def _maps(
    explained: Explained,
    images: Tensor,
    name: str,
    weighted: Callable[[Layer], Back],
    box: bool,
    norms: str,
    check: bool,
    by_size: Collection[str] = (),
) -> Tensor:
    """One forward pass under the rules, and one backward pass of relevance per label."""
    with torch.no_grad():
        encoded = explained.encode(images)
    inputs = encoded.detach().clone().requires_grad_()

    def run(lost: dict[str, float] | None = None) -> Tensor:
        propagation = Propagation(explained.model, inputs, weighted, box, norms, by_size, lost)
        logits, _ = traced(explained.model, explained.classify, inputs, propagation)
        propagation.check_logits(logits)
        if box and not propagation.first_layers:
            raise AttributionError(f"{name}: no layer with weights reads the image itself, as the z^B rule needs")
        for last in last_rules(logits, _Influence):
            last.is_last = True
        return logits

    logits = run()
    fixed = logits.detach()
    chosen = explained.indices(fixed.shape[1])
    maps = []
    for done, label in enumerate(explained.steps(chosen), start=1):
        start = torch.zeros_like(fixed)
        start[:, label] = fixed[:, label]
        with network_errors():
            (relevance,) = torch.autograd.grad(logits, inputs, start, retain_graph=done < len(chosen))
        maps.append(relevance.sum(1))
    maps = torch.stack(maps, 1)
    if check and (wrong := _unconserved(maps, fixed[:, chosen])):
        image, label = wrong
        start, lost = torch.zeros_like(fixed), {}
        start[image, chosen[label]] = fixed[image, chosen[label]]
        torch.autograd.grad(run(lost), inputs, start)
        sums = maps[image, label].sum().item(), fixed[image, chosen[label]].item()
        raise _refusal(explained, name, image, chosen[label], sums, lost)
    return maps


def _alpha_beta(layer: Layer, alpha: float, beta: float, protocol: str) -> Back:
    """Shares of the positive contributions times alpha, less those of the negative ones times beta."""
    if protocol == "authors":
        sides = [(Shares(t), f) for sign, f in ((1, alpha), (-1, -beta)) if f for t in layer.signed_terms(sign)]
        pairs = [(side, factor * reciprocal(side.total)) for side, factor in sides]
    else:
        pairs = _two_sides(layer, alpha, beta, lone=protocol == "corrected")

    def back(relevance: Tensor) -> Tensor:
        scaled = [(side, relevance * per_unit) for side, per_unit in pairs]
        first, *others = (side(values) for n, (side, values) in enumerate(scaled) if n == 0 or values.any())
        return sum(others, first)

    return back


def _two_sides(layer: Layer, alpha: float, beta: float, lone: bool) -> list[tuple[Shares, Tensor]]:
    """Positive and negative contributions with what multiplies the relevance; with `lone`, a side that is without
    the other counts once.
    """
    up = Shares(*layer.signed_terms(1))
    of_up = reciprocal(up.total)
    if not beta and not (lone and (of_up == 0).any()):
        return [(up, alpha * of_up)]
    down = Shares(*layer.signed_terms(-1))
    of_down = reciprocal(down.total)
    if not lone:
        return [(up, alpha * of_up), (down, -beta * of_down)]
    per_up = torch.where(of_down == 0, of_up, alpha * of_up)
    per_down = torch.where(of_up == 0, of_down, -beta * of_down)
    return [(up, per_up), (down, per_down)] if per_down.any() else [(up, per_up)]


def _epsilon(layer: Layer, epsilon: float) -> Back:
    """Shares of all contributions in the value, bias and all, which is moved away from 0 by epsilon."""
    part = layer.contributions()
    per_unit = 1 / torch.where(layer.value >= 0, layer.value + epsilon, layer.value - epsilon)
    return lambda relevance: part(relevance * per_unit)


class _Influence:
    """Relative attributing propagation through one layer with weights."""

    def __init__(self, layer: Layer, protocol: str, images: int):
        if len(layer.input) != images:
            raise AttributionError(
                f"layer {layer.name}: rap needs the images along the first dimension of a layer's input, to share its "
                f"shift within each; that dimension is {len(layer.input)} for {images} images"
            )
        if protocol == "authors" and layer.input.min() < 0:
            raise AttributionError(
                f"layer {layer.name}: the published code of rap multiplies relevance where a layer's inputs are "
                "negative; protocol='corrected' is right for this network"
            )
        self.is_last = False  # whether the logits come from here
        self.protocol = protocol
        self.slips = protocol == "authors" and layer.operation != "linear"
        self.input = layer.input
        self.up, self.down = (Shares(*layer.signed_terms(sign)) for sign in (1, -1))
        self.of_up = reciprocal(self.up.total)
        self.of_both = reciprocal(self.up.total - self.down.total)

    def __call__(self, relevance: Tensor) -> Tensor:
        by_both = relevance * self.of_both
        if self.is_last:
            return self.up(by_both) - self.down(by_both)
        positive = relevance.clamp(min=0) if self.slips else relevance
        through_down = -self.down(by_both)
        if self.slips:
            through_down += self.down(relevance.clamp(max=0) * reciprocal(self.down.total))
        found = self.up(positive * self.of_up) + through_down
        if self.protocol == "paper":
            return _shifted(found, _per_image(through_down), self.input != 0)
        return _shifted(found, _per_image(found) - _per_image(relevance), found != 0)


def _per_image(values: Tensor) -> Tensor:
    # The positive and negative parts are many times their sum, which single precision would lose.
    return values.flatten(1).sum(1, dtype=torch.float64)


def _shifted(values: Tensor, excess: Tensor, where: Tensor) -> Tensor:
    """Values [B, ...] less each image's excess [B], in equal parts over the places of `where` [B, ...]."""
    part = (excess / where.flatten(1).sum(1).clamp(min=1)).to(values.dtype)
    return values - where * part.view(-1, *[1] * (values.ndim - 1))


def _unconserved(maps: Tensor, logits: Tensor) -> tuple[int, int] | None:
    """The first image and label whose map doesn't sum to the logit."""
    total, expected = maps.double().sum((2, 3)), logits.double()
    wrong = (~((total - expected).abs() <= _TOLERANCE * expected.abs())).nonzero()
    return tuple(wrong[0].tolist()) if len(wrong) else None


def _refusal(explained: Explained, name: str, image: int, label: int, sums: tuple, lost: dict) -> AttributionError:
    """Why the map of an image and label (an index of all outputs) can't be kept: `lost` as in `Propagation`."""
    total, logit = sums
    told = explained.names[label] if explained.names else label
    layer = max(lost, key=lambda layer: abs(lost[layer]))
    if abs(lost[layer]) > abs(logit):
        cause = f"sums that all but cancel made relevance grow, most in layer {layer or 'network'}"
    else:
        cause = (
            f"{sum(lost.values()) / logit:.0%} of it stays where neurons have nothing but a bias to share it by, most "
            f"in layer {layer or 'network'} (such as filters of one channel, behind a ReLU that is 0 all over them)"
        )
    return AttributionError(
        f"{name}: image {explained.first_row + image}, label {told!r}: "
        f"relevance sums to {total:.4g}, the logit is {logit:.4g}: {cause}; check=False returns what reaches the pixels"
    )
