"""From images to logits: classifiers, anti-aliased down-sampling, random networks, weights on disk."""

from __future__ import annotations

from cxrkit.models.bcos import calibrate
from cxrkit.models.classifier import Classifier
from cxrkit.models.downsample import BlurPool, FLCPool
from cxrkit.models.inventory import table, weights_table
from cxrkit.models.networks import NETWORKS
from cxrkit.models.randomise import randomised
from cxrkit.models.storage import load, save
from cxrkit.models.weights import CHEXNET_LABELS
from cxrkit.models.zoo import create

__all__ = [
    "CHEXNET_LABELS",
    "NETWORKS",
    "BlurPool",
    "Classifier",
    "FLCPool",
    "calibrate",
    "create",
    "load",
    "randomised",
    "save",
    "table",
    "weights_table",
]
