"""From maps and boxes to numbers: where a map points, how a classifier does, how sure a mean is.

Image-level metrics take maps ``[..., H, W]`` and masks ``[..., H, W]`` and keep the leading shape; what has no
answer is nan, never a number that looks like one. One module per question: `localisation`, `pointing`, `overlap`,
`faithfulness`, `sanity`, `profiles`, `classification`, `artefacts`, `statistics`. `scores` asks all questions of place
in one pass, `boxes` holds what papers and their code differ in, `cards` says what each number means.
"""

from __future__ import annotations

from cxrkit.metrics.accumulator import (
    Accumulator,
)
from cxrkit.metrics.artefacts import (
    grid_bin_share,
    grid_energy,
    isotropic_grid_energy,
    power_spectrum,
    radial_profile,
)
from cxrkit.metrics.boxes import (
    class_agnostic,
    energy_pointing_game_boxes,
    epg_split,
    explained_maps,
)
from cxrkit.metrics.cards import (
    METRICS,
    MetricCard,
    metric_card,
    metric_cards,
)
from cxrkit.metrics.classification import (
    calibration_report,
    classification_report,
    hard_vote,
    operating_cutoffs,
    reliability,
    soft_vote,
)
from cxrkit.metrics.faithfulness import (
    CompletenessGap,
    Curve,
    baseline_sensitivity,
    class_sensitivity,
    completeness_gap,
    deletion,
    insertion,
    pixel_flipping,
)
from cxrkit.metrics.localisation import (
    chance_level,
    energy_pointing_game,
    threshold_sweep,
)
from cxrkit.metrics.overlap import (
    intersection_over_union,
    iou_chance,
    iou_sweep,
    mask_iou,
    mean_iou,
)
from cxrkit.metrics.pointing import (
    gaussian_smoothing,
    hit_rate,
    pointing_chance,
    pointing_game,
)
from cxrkit.metrics.profiles import (
    inactive_feature_maps,
    neuron_activation_profiles,
    rank_feature_maps,
)
from cxrkit.metrics.sanity import (
    map_correlation,
    map_distance,
    randomised,
    rank_correlation,
    repeatability,
    reproducibility,
    structural_similarity,
)
from cxrkit.metrics.scores import (
    LocalisationScores,
    localisation_scores,
)
from cxrkit.metrics.statistics import (
    Interval,
    Spread,
    bootstrap,
    compare,
    difference_of_means,
    holm,
    over_seeds,
)

__all__ = [
    "METRICS",
    "Accumulator",
    "CompletenessGap",
    "Curve",
    "Interval",
    "LocalisationScores",
    "MetricCard",
    "Spread",
    "baseline_sensitivity",
    "bootstrap",
    "calibration_report",
    "chance_level",
    "class_agnostic",
    "class_sensitivity",
    "classification_report",
    "compare",
    "completeness_gap",
    "deletion",
    "difference_of_means",
    "energy_pointing_game",
    "energy_pointing_game_boxes",
    "epg_split",
    "explained_maps",
    "gaussian_smoothing",
    "grid_bin_share",
    "grid_energy",
    "hard_vote",
    "hit_rate",
    "holm",
    "inactive_feature_maps",
    "insertion",
    "intersection_over_union",
    "iou_chance",
    "iou_sweep",
    "isotropic_grid_energy",
    "localisation_scores",
    "map_correlation",
    "map_distance",
    "mask_iou",
    "mean_iou",
    "metric_card",
    "metric_cards",
    "neuron_activation_profiles",
    "operating_cutoffs",
    "over_seeds",
    "pixel_flipping",
    "pointing_chance",
    "pointing_game",
    "power_spectrum",
    "radial_profile",
    "randomised",
    "rank_correlation",
    "rank_feature_maps",
    "reliability",
    "repeatability",
    "reproducibility",
    "soft_vote",
    "structural_similarity",
    "threshold_sweep",
]
