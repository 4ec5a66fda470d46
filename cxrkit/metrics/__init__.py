"""From maps and boxes to numbers: where a map points, how a classifier does, how sure a mean is.

Image-level metrics take maps ``[..., H, W]`` and masks ``[..., H, W]`` and keep the leading shape; what has no
answer is nan, never a number that looks like one. One module per question: `localisation`, `pointing`, `overlap`,
`faithfulness`, `sanity`, `profiles`, `classification`, `artefacts`, `statistics`. `scores` asks all questions of place
in one pass, `boxes` holds what papers and their code differ in, `cards` says what each number means.
"""

from __future__ import annotations

from cxrkit.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    accumulator="Accumulator",
    artefacts="grid_energy isotropic_grid_energy power_spectrum",
    boxes="class_agnostic energy_pointing_game_boxes explained_maps",
    cards="METRICS MetricCard metric_card",
    classification="classification_report hard_vote operating_cutoffs soft_vote",
    faithfulness="CompletenessGap Curve completeness_gap deletion insertion",
    localisation="chance_level energy_pointing_game threshold_sweep",
    overlap="intersection_over_union iou_chance iou_sweep mask_iou mean_iou",
    pointing="gaussian_smoothing hit_rate pointing_chance pointing_game",
    profiles="inactive_feature_maps neuron_activation_profiles rank_feature_maps",
    sanity="map_correlation map_distance randomised rank_correlation reproducibility",
    scores="LocalisationScores localisation_scores",
    statistics="Interval Spread bootstrap compare difference_of_means holm over_seeds",
)
