"""From images to logits: classifiers, anti-aliased down-sampling, weights on disk."""

from __future__ import annotations

from cxrkit.models.bcos import calibrate
from cxrkit.models.classifier import Classifier
from cxrkit.models.downsample import BlurPool, FLCPool
from cxrkit.models.storage import load, save
from cxrkit.models.zoo import NETWORKS, create

__all__ = ["NETWORKS", "BlurPool", "Classifier", "FLCPool", "calibrate", "create", "load", "save"]
