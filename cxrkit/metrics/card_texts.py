"""The cards of all metrics, a tuple for each question: what each number means, and what moves it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARTEFACTS", "CLASSIFICATION", "FAITHFULNESS", "LOCALISATION", "PROFILES", "SANITY", "MetricCard"]


@dataclass(frozen=True)
class MetricCard:
    """What a metric says.

    ``functions`` are those of `cxrkit.metrics` that compute it; ``range`` its bounds; ``better`` is "higher", "lower"
    or "neither"; ``chance`` what an uninformed map or classifier scores; ``equation`` is TeX; ``source`` the paper or
    its key; ``changes`` names what moves the score, and so the ranking, without a better map or network.
    """

    name: str
    functions: tuple[str, ...]
    meaning: str
    range: tuple[float, float]
    better: str
    chance: str
    equation: str
    source: str
    changes: str


INFINITY = float("inf")

# s: map, s⁺ = max(s, 0), M: mask, a: its share of the image, p: the share predicted by a thresholded map.
LOCALISATION = (
    MetricCard(
        "epg_precision",
        ("energy_pointing_game", "threshold_sweep", "energy_pointing_game_boxes", "epg_split"),
        "share of a map's positive energy that lies in the boxes",
        (0, 1),
        "higher",
        "share of the image inside the boxes",
        r"\sum_M s^+ \big/ \sum s^+",
        "bcos, Eq. 2",
        "size of the boxes; the threshold; a constant added to the map; min-max scaling, which lifts the background",
    ),
    MetricCard(
        "epg_recall",
        ("energy_pointing_game", "threshold_sweep", "energy_pointing_game_boxes"),
        "share of the energy inside the boxes that is positive",
        (0, 1),
        "higher",
        "the same share over the whole image",
        r"\sum_M s^+ \big/ \sum_M |s|",
        "bcos, Eq. 3",
        "any map without negative values scores 1, wherever it points; falls with the threshold; the logit bias of "
        "B-cos networks",
    ),
    MetricCard(
        "epg_signed",
        ("energy_pointing_game",),
        "share of a map's signed sum that lies in the boxes",
        (-INFINITY, INFINITY),
        "neither",
        "share of the image inside the boxes",
        r"\sum_M s \big/ \sum s",
        "bcos, Eq. 1; Score-CAM",
        "grows without bound where positive and negative parts cancel",
    ),
    MetricCard(
        "pointing_game",
        ("pointing_game",),
        "is the maximum within a tolerance of the boxes",
        (0, 1),
        "higher",
        "share of the image within the tolerance of the boxes",
        r"\min_{q \in M} \lVert q - \arg\max s \rVert < \tau",
        "normgrad",
        "tolerance in pixels against the input size; smoothing, which draws the maxima of noise to the border; a "
        "single pixel decides; ties go to the first",
    ),
    MetricCard(
        "hit_rate",
        ("hit_rate",),
        "is the maximum inside the boxes",
        (0, 1),
        "higher",
        "share of the image inside the boxes",
        r"\arg\max s \in M",
        "Saporta et al. 2022",
        "size of the boxes; smoothing; a single pixel decides; ties go to the first",
    ),
    MetricCard(
        "iou",
        ("mask_iou", "mean_iou", "iou_sweep", "intersection_over_union"),
        "overlap of the thresholded map with the boxes",
        (0, 1),
        "higher",
        "that of a region of the same size placed without knowledge",
        r"|P \cap M| \big/ |P \cup M|,\quad P = \{s^+ \ge T \max s\};\quad \text{chance } ap / (a + p - ap)",
        "relevance",
        "the threshold; one hot pixel, unless a percentile sets the scale; sparse maps never fill a box; resolution of "
        "the map",
    ),
    MetricCard(
        "iou_two_class",
        ("mask_iou", "mean_iou", "iou_sweep", "intersection_over_union"),
        "mean of the overlaps of finding and background",
        (0, 1),
        "higher",
        "that of a region of the same size placed without knowledge; almost 0.5 for an empty map and a small box",
        r"\tfrac12 \left(\mathrm{IoU}(P, M) + \mathrm{IoU}(\bar P, \bar M)\right)",
        "relevance, Table 2",
        "sparse maps win by their background; rises with the threshold for small boxes",
    ),
)

# TP, FP, FN, TN: counts of one label's images at the cutoff; π: its prevalence; q: the share predicted.
CLASSIFICATION = tuple(
    MetricCard(name, (function,), meaning, (0, 1), better, chance, equation, source, changes)
    for name, function, meaning, better, chance, equation, source, changes in (
        (
            "accuracy",
            "classification_report",
            "share of right decisions",
            "higher",
            "prevalence of the commoner class, reached by always naming it",
            r"(TP + TN) / N",
            "bcos, appendix A",
            "prevalence; micro averages are ruled by the many absent labels",
        ),
        (
            "precision",
            "classification_report",
            "share of the predicted that have the finding",
            "higher",
            "prevalence",
            r"TP / (TP + FP)",
            "bcos, appendix A",
            "prevalence; the cutoff; undefined without predictions, which papers count as 0",
        ),
        (
            "recall",
            "classification_report",
            "share of the findings that are predicted",
            "higher",
            "share of images predicted",
            r"TP / (TP + FN)",
            "bcos, appendix A",
            "the cutoff alone can bring it to 1",
        ),
        (
            "specificity",
            "classification_report",
            "share of images without the finding that are left alone",
            "higher",
            "share of images not predicted",
            r"TN / (TN + FP)",
            "covid",
            "the cutoff alone can bring it to 1; high for rare labels",
        ),
        (
            "f1",
            "classification_report",
            "harmonic mean of precision and recall",
            "higher",
            "2 prevalence / (1 + prevalence), by predicting everything",
            r"2 TP / (2 TP + FP + FN)",
            "bcos, appendix A",
            "prevalence; the cutoff; micro or macro; the mean of F1 is not the F1 of the means",
        ),
        (
            "auc",
            "classification_report",
            "chance that an image with the finding gets a higher probability than one without",
            "higher",
            "0.5",
            r"P(\hat p_+ > \hat p_-) + \tfrac12 P(\hat p_+ = \hat p_-)",
            "bcos, appendix A",
            "blind to calibration and to the cutoff; easy negatives raise it",
        ),
        (
            "average_precision",
            "classification_report",
            "area under precision against recall",
            "higher",
            "prevalence",
            r"\sum_k (R_k - R_{k-1}) P_k",
            "scikit-learn",
            "prevalence",
        ),
        (
            "brier",
            "calibration_report",
            "mean squared distance of probability and outcome",
            "lower",
            "prevalence (1 - prevalence), by always saying the prevalence",
            r"\tfrac1N \sum (\hat p - y)^2",
            "Brier 1950",
            "prevalence: rare labels score low whatever the network knows",
        ),
        (
            "ece",
            "calibration_report",
            "mean distance of probability and frequency, bin by bin",
            "lower",
            "0, by always saying the prevalence: it measures honesty, not knowledge",
            r"\sum_b \tfrac{n_b}{N} |\bar p_b - \bar y_b|",
            "Pakdaman Naeini et al. 2015",
            "number of bins; few images make it too high",
        ),
    )
)

ARTEFACTS = (
    MetricCard(
        "grid_energy",
        ("grid_energy",),
        "share of a map's energy at the sampling frequencies of the strides",
        (0, 1),
        "lower",
        "share of the spectrum's bins for white noise; that of an even spectrum for a map",
        r"\sum_{f \in G} |\hat s(f)|^2 \big/ \sum_{f \ne 0} |\hat s(f)|^2",
        "own, for bcos",
        "edges along the axes; up-sampled maps carry the grid of their up-sampling; strides too coarse for the map",
    ),
)

FAITHFULNESS = (
    MetricCard(
        "insertion",
        ("insertion",),
        "area under the score while pixels come back in the order of the map",
        (0, 1),
        "higher",
        "the area of a random map: put one beside it",
        r"\int_0^1 f(x_t) \, dt",
        "Petsiuk et al. 2018",
        "baseline, steps, probability or logit, ties, the map's resolution, the score of the whole image",
    ),
    MetricCard(
        "deletion",
        ("deletion",),
        "area under the score while pixels go in the order of the map",
        (0, 1),
        "lower",
        "the area of a random map: put one beside it",
        r"\int_0^1 f(x_t) \, dt",
        "Petsiuk et al. 2018",
        "as insertion; black edges lower a score by themselves",
    ),
    MetricCard(
        "pixel_flipping",
        ("pixel_flipping",),
        "mean fall of the score while regions are changed, most relevant first",
        (-INFINITY, INFINITY),
        "higher",
        "that of a random map, seldom 0",
        r"\frac{1}{K+1} \sum_{k=0}^{K} \big(f(x^{(0)}) - f(x^{(k)})\big)",
        "Samek et al. 2017; Bach et al. 2015",
        "size of the regions, steps, what they are changed to, probability or logit",
    ),
    MetricCard(
        "completeness_gap",
        ("completeness_gap",),
        "sum of a map less what its method promises",
        (-INFINITY, INFINITY),
        "neither",
        "none: best is 0",
        r"\sum_p s_p - \text{promised}",
        "Sundararajan et al. 2017; bcos",
        "what is promised, baseline, size of the score; complete isn't right",
    ),
    MetricCard(
        "baseline_sensitivity",
        ("baseline_sensitivity",),
        "how alike maps from different baselines are",
        (-1, 1),
        "higher",
        "0 by correlation",
        r"\operatorname{corr}(s_b, s_{b'})",
        "own; the question is of Sturmfels et al. 2020",
        "which baselines, which measure",
    ),
    MetricCard(
        "class_sensitivity",
        ("class_sensitivity",),
        "how alike the maps of different labels of one image are",
        (-1, 1),
        "lower",
        "0 by correlation; labels that share evidence are alike with reason",
        r"\operatorname{corr}(s_j, s_k)",
        "after Rebuffi et al. 2020",
        "labels that occur together, which measure",
    ),
)

SANITY = (
    MetricCard(
        "map_correlation",
        ("map_correlation",),
        "Pearson correlation of two maps",
        (-1, 1),
        "neither",
        "0",
        r"\operatorname{corr}(s, s')",
        "Pearson",
        "a few strong pixels",
    ),
    MetricCard(
        "rank_correlation",
        ("rank_correlation",),
        "Spearman correlation of two maps, of values or of sizes",
        (-1, 1),
        "lower",
        "0; lower is better between a trained and a randomised network",
        r"\operatorname{corr}(\operatorname{rank} s, \operatorname{rank} s')",
        "Adebayo et al. 2018",
        "quiet areas count as much as loud ones; ties; sign",
    ),
    MetricCard(
        "structural_similarity",
        ("structural_similarity",),
        "structural similarity of two maps, each divided by its largest size",
        (-1, 1),
        "lower",
        "no fixed number; lower is better between a trained and a randomised network",
        r"\frac{(2\mu\mu' + c_1)(2\sigma_{ss'} + c_2)}{(\mu^2 + \mu'^2 + c_1)(\sigma^2 + \sigma'^2 + c_2)}",
        "Wang et al. 2004, Eq. 13; Adebayo et al. 2018",
        "scaling, window, sparsity: two sparse maps look alike",
    ),
    MetricCard(
        "map_distance",
        ("map_distance",),
        "distance of two maps over the sum of their norms",
        (0, 1),
        "neither",
        "0.71 for independent maps of equal norm",
        r"\lVert s - s' \rVert / (\lVert s \rVert + \lVert s' \rVert)",
        "own",
        "the scale of the maps",
    ),
    MetricCard(
        "repeatability",
        ("repeatability",),
        "spread of a score over training seeds",
        (0, INFINITY),
        "lower",
        "none: a score at chance repeats well too",
        r"\operatorname{std}_{\text{seeds}} \bar a",
        "normgrad",
        "ddof, number of seeds",
    ),
    MetricCard(
        "difference_of_means",
        ("difference_of_means", "reproducibility"),
        "distance of a score's means under two networks",
        (0, INFINITY),
        "lower",
        "none: 0 if both networks are at chance",
        r"|\bar a - \bar b|",
        "normgrad; interval: own",
        "which images both networks score, how many patients; two equally bad methods score 0",
    ),
)

PROFILES = (
    MetricCard(
        "neuron_activation_profiles",
        ("neuron_activation_profiles",),
        "what a layer does more in one group of images than in the mean of the groups",
        (-INFINITY, INFINITY),
        "neither",
        "0",
        r"\bar F_g - \tfrac{1}{|G|} \sum_{g'} \bar F_{g'}",
        "covid",
        "which groups there are: a border that goes with a group shows up as readily as disease",
    ),
    MetricCard(
        "inactive_feature_maps",
        ("inactive_feature_maps",),
        "share of a layer's maps that are constant in space (or zero) for every image, in percent",
        (0, 100),
        "neither",
        "none",
        r"100 \, |\{k : \max A_k - \min A_k \le 10^{-30} \ \forall x\}| / K",
        "covid",
        "definition, images, layer before or after its ReLU",
    ),
)
