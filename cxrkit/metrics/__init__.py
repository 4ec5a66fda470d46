"""From maps and boxes to numbers: where a map points, how a classifier does, how sure a mean is.

Image-level metrics take maps ``[..., H, W]`` and masks ``[..., H, W]`` and keep the leading shape; what has no
answer is nan, never a number that looks like one. One module per question: `localisation`, `classification`,
`artefacts`, `statistics`.
"""

from __future__ import annotations

from cxrkit.metrics.artefacts import (
    grid_bin_share,
    grid_energy,
    isotropic_grid_energy,
    power_spectrum,
    radial_profile,
)
from cxrkit.metrics.classification import classification_report
from cxrkit.metrics.localisation import (
    chance_level,
    class_agnostic,
    energy_pointing_game,
    energy_pointing_game_boxes,
    epg_split,
    gaussian_smoothing,
    intersection_over_union,
    mask_iou,
    pointing_game,
    threshold_sweep,
)
from cxrkit.metrics.statistics import Interval, bootstrap, difference_of_means

__all__ = [
    "Interval",
    "bootstrap",
    "chance_level",
    "class_agnostic",
    "classification_report",
    "difference_of_means",
    "energy_pointing_game",
    "energy_pointing_game_boxes",
    "epg_split",
    "gaussian_smoothing",
    "grid_bin_share",
    "grid_energy",
    "intersection_over_union",
    "isotropic_grid_energy",
    "mask_iou",
    "pointing_game",
    "power_spectrum",
    "radial_profile",
    "threshold_sweep",
]
