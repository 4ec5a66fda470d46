"""What is known of a network without the package: its operations, its layers' maps, whether it runs at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuzz import maps, oracles, policy
from fuzz.algebra import Listing
from fuzz.building import has_no_map
from fuzz.handing import Case, make_case
from fuzz.oracles import Subject
from fuzz.weights import Recomputed


class GeneratorError(Exception):
    """The network written in torch isn't the network of the plan: a fault of this harness."""


class Known:
    """What is known of a case without the package: kinds of operations, layers' maps, whether it runs at all."""

    def __init__(self, case: Case):
        self.case = case
        listing = Listing()
        with torch.no_grad():
            self.logits = case.plan.forward(listing, case.plan.images)
        self.kinds = listing.kinds
        self.layers: list[maps.LayerMap] = []
        self.names: dict[str, torch.nn.Module] = {}  # of the layers in `layers`, with all their names
        self.failure: str | None = None  # of the network itself
        self.is_unknown = False  # whether nothing is known of the network's layers
        self.misled = False  # by a fault of torch: even the network's own gradient of one image is wrong
        self.forward: Callable[[Tensor], Tensor] | None = None
        if any(f.startswith("random") for f in case.features):
            return
        if "quantized" in case.features:
            network = make_case(case.plan.seed).network.eval()
            self.forward = lambda x: torch.cat([network(image[None].float()).double() for image in x])
            return
        self._run()

    def _run(self) -> None:
        try:
            network = fresh(self.case).double()
            self.names = dict(network.named_modules(remove_duplicate=False))
            self.layers = maps.layer_maps(network, self.case.plan.images, logits_of, has_no_map(network))
            logits = torch.cat([logits_of(network(image[None].clone())).detach() for image in self.case.plan.images])
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            self.is_unknown = True
            return
        if not torch.allclose(logits, self.logits, rtol=1e-5, atol=1e-6 * float(1 + self.logits.abs().max())):
            raise GeneratorError(f"logits {logits.tolist()} instead of {self.logits.tolist()}")
        self.misled = self._is_misled()
        if policy.must_refuse_everything(self.case):
            return
        try:  # as it was handed over
            image = self.case.images[:1].detach().clone().to(self.case.dtype).requires_grad_()
            logits_of(fresh(self.case)(image * 1)).sum().backward()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]

    def _is_misled(self) -> bool:
        """As of torch 2.13, which gives an instance norm of one image a wrong gradient in some memory layouts."""
        if not any("instance norm" in f for f in self.case.features):
            return False
        network = fresh(self.case).float()
        subject = Subject(self.case.plan, list(range(self.case.plan.outputs)), "logit")
        own = Subject(
            self.case.plan, subject.labels, "logit", lambda x: torch.cat([logits_of(network(i[None] * 1)) for i in x])
        )
        own.images = subject.images.float()
        right = oracles.saliency(subject)
        return float((oracles.saliency(own) - right).abs().max()) > 0.01 * float(right.abs().max())


def logits_of(outputs) -> Tensor:
    """[1, L] from what a network puts out for one image, in any of the forms that `handing` knows."""
    if isinstance(outputs, dict):
        outputs = outputs["logits"]
    elif isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    return outputs[:, None] if outputs.ndim == 1 else outputs


def fresh(case: Case) -> torch.nn.Module:
    """A network equal to the case's, in evaluation mode, without recomputation and hooks of the backward pass."""
    network = make_case(case.plan.seed).network
    for module in network.modules():
        module._backward_hooks.clear()
        if isinstance(module, Recomputed):
            module.is_plain = True
    return network.eval()
