"""The fuzz harness itself: its networks, its oracles against other libraries, what it notices."""

from __future__ import annotations

import warnings

import captum.attr
import pytest
import torch
from fuzz import oracles
from fuzz.algebra import Guided, NoRule, Plain
from fuzz.drawing import draw_plan
from fuzz.handing import make_case
from fuzz.known import Known
from fuzz.oracles import Subject
from fuzz.policy import cause, complaint
from fuzz.relevance import Relevance
from fuzz.state import Before
from fuzz.steps import Act, AvgPool, BatchNorm, Conv, Copy, Linear, MaxPool, Plan
from fuzz.trial import try_network
from torch import nn


def test_a_seed_makes_the_same_network_again():
    for seed in range(0, 60, 7):
        first, second = make_case(seed), make_case(seed)
        assert first.features == second.features
        for a, b in zip(first.network.state_dict().values(), second.network.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert {id(p) for p in first.network.parameters()}.isdisjoint(id(p) for p in second.network.parameters())


def test_networks_differ():
    kinds = {type(step).__name__ for seed in range(300) for step in draw_plan(seed).everything()}
    names = {step.name for seed in range(300) for step in draw_plan(seed).everything() if isinstance(step, Act)}
    assert len(kinds) >= 16
    assert len(names) >= 20


def test_the_network_in_torch_computes_what_its_plan_says():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = [Known(make_case(seed)) for seed in range(60)]  # raises where they differ
    assert sum(k.failure is None for k in known) > 50
    assert sum(bool(k.layers) for k in known) > 40


class Apart(nn.Module):
    """Keeps captum's rules of a ReLU and of the max-pool behind it apart."""

    def forward(self, x):
        return x.clone()


def by_hand(act: str = "relu"):
    """A plan of few steps, and the same as modules that captum is right for."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    steps = [
        Conv(normal(4, 2, 3, 3), normal(4), (1, 1), (1, 1)),
        BatchNorm(normal(4), normal(4).square() + 0.5, normal(4), normal(4)),
        Act(act),
        MaxPool(2, 2),
        Conv(normal(3, 4, 3, 3) / 3, normal(3)),
        Act(act),
        AvgPool(None),
        Copy("flatten"),
        Linear(normal(2, 3), normal(2)),
    ]
    images = torch.rand(2, 2, 10, 12, generator=draw, dtype=torch.float64)
    plan = Plan(0, images, steps, outputs=2)
    conv1, norm, _, _, conv2, *_, head = steps
    modules = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Apart(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 2),
    ).double()
    for place, step in ((0, conv1), (5, conv2), (9, head)):
        modules[place].weight.data, modules[place].bias.data = step.weight, step.bias
    modules[1].running_mean, modules[1].running_var = norm.mean, norm.variance
    modules[1].weight.data, modules[1].bias.data = norm.weight, norm.bias
    return Subject(plan, [0, 1], "logit"), modules.eval()


def captum_maps(explainer, images, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.stack(
            [explainer.attribute(images, target=label, **options).sum(1) for label in (0, 1)], 1
        ).detach()


def test_gradients_are_those_of_captum():
    subject, network = by_hand()
    x = subject.images
    close = torch.testing.assert_close
    close(oracles.saliency(subject), captum_maps(captum.attr.Saliency(network), x, abs=False))
    close(oracles.input_x_gradient(subject), captum_maps(captum.attr.InputXGradient(network), x))
    close(oracles.guided_backprop(subject), captum_maps(captum.attr.GuidedBackprop(network), x))
    close(
        oracles.integrated_gradients(subject, n_steps=7),
        captum_maps(captum.attr.IntegratedGradients(network), x, n_steps=7, method="gausslegendre"),
        rtol=1e-5,
        atol=1e-9,
    )
    close(oracles.deeplift(subject), captum_maps(captum.attr.DeepLift(network), x, baselines=torch.zeros_like(x)))


def test_relevance_without_epsilon_is_input_times_gradient():
    subject, _ = by_hand()
    found = oracles.lrp(subject, rule="epsilon", epsilon=1e-12)
    torch.testing.assert_close(found, oracles.input_x_gradient(subject), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["lrp", "rap"])
def test_relevance_is_kept(method):
    subject, _ = by_hand()
    for step in subject.plan.steps:
        if isinstance(step, Conv):
            step.bias = None
    maps = getattr(oracles, method)(subject)
    torch.testing.assert_close(maps.sum((2, 3)), subject.scores(subject.images), rtol=1e-8, atol=1e-8)


def test_where_there_is_no_rule():
    subject, _ = by_hand("tanh")
    with pytest.raises(NoRule):
        subject.plan.forward(Guided(), subject.images)
    subject, _ = by_hand("sigmoid")
    ops = Relevance("lrp")
    with pytest.raises(NoRule):
        subject.plan.forward(ops, ops.image(subject.images))
    assert subject.plan.forward(Plain(), subject.images).shape == (2, 2)


CHANGES = {
    "a weight": lambda n: n[0].weight.data.view(-1)[0].add_(1e-3),
    "a weight's object": lambda n: setattr(n[0], "weight", nn.Parameter(n[0].weight.data.clone())),
    "a buffer": lambda n: n[1].num_batches_tracked.add_(1),
    "a flag": lambda n: n[1].train(),
    "requires_grad": lambda n: n[0].bias.requires_grad_(False),
    "a gradient": lambda n: setattr(n[0].bias, "grad", torch.zeros(2)),
    "a gradient's value": lambda n: n[0].weight.grad.view(-1)[0].add_(1),
    "a hook": lambda n: n[0].register_forward_hook(lambda *args: None),
    "an attribute": lambda n: setattr(n[0], "seen", 1),
    "a forward": lambda n: setattr(n[1], "forward", lambda x: x),
    "a module": lambda n: setattr(n, "0", nn.Identity()),
    "random numbers": lambda n: torch.rand(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_network_is_noticed(change):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before = Before(network, torch.zeros(1))
    network(torch.rand(1, 1, 5, 5, generator=torch.Generator()))
    assert before.changes() == []
    CHANGES[change](network)
    assert before.changes()


def test_changes_of_torch_are_noticed():
    before = Before(nn.Identity())
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.no_grad():
            assert len(before.changes()) == 4
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert before.changes() == []


@pytest.mark.parametrize(
    "seeds", [*(range(s, s + 4) for s in range(20_000, 20_040, 4)), (327, 1007, 1017, 1048, 8131, 8149)]
)
def test_no_map_is_silently_wrong(seeds):
    """A sample of `make fuzz`, and networks that once were among its failures."""
    for seed in seeds:
        for verdict in try_network(seed).verdicts:
            told = f"seed {seed}, {verdict.method}({verdict.options}): {verdict.told} {verdict.changed}"
            assert verdict.kind in ("right", "refused"), told
            assert not verdict.changed, told


def test_words_of_refusals():
    assert complaint("") is not None
    assert complaint("layer s0 runs more than once in a forward pass; name another: layer=") is None
    first, second = (
        cause(f"lrp: image {n}, label 'a': relevance sums to {n}.5, the logit is 1e-{n}. Either") for n in (1, 2)
    )
    assert first == second
