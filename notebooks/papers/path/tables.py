"""Paper `path` beside our runs: its table of networks, scores by method, claims, and what printed digits tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

import cxrkit.data
from cxrkit.errors import ParameterError
from cxrkit.metrics import bootstrap
from cxrkit.study import claims, report, runs
from cxrkit.study.published import table
from cxrkit.study.study import Study
from papers.path.measure import METHODS

__all__ = [
    "NETWORKS",
    "TITLES",
    "agreement",
    "decided",
    "denominators",
    "frames",
    "judged",
    "leak",
    "models",
    "name_of",
    "pairs",
    "per_method",
    "verdicts",
]

# What the paper's Table 3 calls the same networks.
NETWORKS = {
    "VGG16": "vgg16",
    "VGG19": "vgg19",
    "ResNet50": "resnet50",
    "ResNet50V2": "resnet50_v2",
    "InceptionV3": "inception_v3",
    "Xception": "xception",
    "EfficientNetB0": "efficientnet_b0",
    "DenseNet121": "densenet121",
    "InceptionResNetV2": "inception_resnet_v2",
}
TITLES = METHODS | {"both": "XRAI and Blur IG"}
_PRINTED = {name: printed for printed, name in NETWORKS.items()}
_MEANS = ("area", "kept", "chance_iou", "best_iou")


# From runs to tables


def name_of(run: runs.Run) -> str:
    """The name of a run's network as the paper prints it."""
    return _PRINTED.get(run.parameters.model, run.parameters.model)


def pairs(study: Study) -> list[tuple[runs.Run, runs.Run]]:
    """The finished pairs (training run, its scores) of a grid. Raises ParameterError where there is none."""
    if both := study.pairs("path_measure"):
        return both
    raise ParameterError(f"grid {study.name!r} holds no finished run of measure.ipynb")


def frames(study: Study, frame: str) -> pd.DataFrame:
    """One frame of every scores run of a grid, with its network and seed as columns."""
    parts = [
        scores.frame(frame).assign(network=name_of(train), seed=train.parameters.seed) for train, scores in pairs(study)
    ]
    return pd.concat(parts, ignore_index=True)


def decided(predictions: pd.DataFrame) -> pd.DataFrame:
    """One class per image: image_id, patient_id, truth, predicted (highest probability), right.

    `predictions` as `training.predict` gives them. An image of several labels has the first of them as truth, and is
    right where the predicted label is one of them; one of no label has the truth "none".
    """
    keys = ["image_id", "patient_id"]
    order = list(dict.fromkeys(predictions["label"]))
    wide = {
        column: predictions.pivot_table(column, keys, "label", sort=False)[order]
        for column in ("probability", "target")
    }
    names, target = np.asarray(order), wide["target"].fillna(0).to_numpy() > 0.5
    place = wide["probability"].to_numpy().argmax(1)
    frame = wide["target"].index.to_frame(index=False)
    return frame.assign(
        truth=np.where(target.any(1), names[target.argmax(1)], "none"),
        predicted=names[place],
        right=target[np.arange(len(place)), place],
    )


def models(study: Study) -> pd.DataFrame:
    """The paper's Table 3 beside our networks: accuracy of ours in percent with its 95 % interval, and of the class
    that is most frequent; a row per published network, then others of the grid."""
    rows = []
    ours = pd.concat([decided(run.frame("predictions")).assign(network=name_of(run)) for run in study.trained])
    for network, one in ours.groupby("network", sort=False):
        found = bootstrap(one["right"].astype(float), one["patient_id"].astype(str), n=2000)
        mean, low, high = (100 * value for value in found)
        most = 100 * one["truth"].value_counts(normalize=True).iloc[0]
        rows.append({"network": network, "ours": mean, "low": low, "high": high, "largest class": most})
    names = {"model": "network", "params_m": "parameters (M)", "top1_brain": "MRI, paper", "top1_covid": "COVID, paper"}
    printed = table("path/tab3_models").rename(columns=names)[list(names.values())]
    for column in ("MRI, paper", "COVID, paper"):
        printed[column] = 100 * pd.to_numeric(printed[column], errors="coerce")
    others = [row["network"] for row in rows if row["network"] not in NETWORKS]
    ours = pd.DataFrame(rows).set_index("network").reindex([*printed["network"], *others])
    return printed.set_index("network").reindex(ours.index).join(ours).rename_axis("network").reset_index()


def per_method(
    study: Study, frame: str, value: str, by: Sequence[str] = ("network", "method"), **where: object
) -> pd.DataFrame:
    """Mean of a column of one frame with its 95 % interval (patients resampled): a row per network and method.

    `where`: columns that must have a value, such as `fraction=0.3, right=True`. Further columns: n (maps with a value),
    degenerate (without one), patients, spread (standard deviation over maps), and the means of area, kept, chance_iou
    and best_iou where the frame has them. Where the frame scores several outputs of a map, ask for one of them.
    """
    found, by = frames(study, frame), list(by)
    for column, wanted in where.items():
        found = found[np.isclose(found[column], wanted) if isinstance(wanted, float) else found[column] == wanted]
    groups = found.groupby(by, sort=False)
    scores = report.means(found, value, by, n=2000).set_index(by)
    scores = scores.assign(n=groups[value].count(), spread=groups[value].std(ddof=0))
    scores = scores[[value, "low", "high", "n", "degenerate", "patients", "spread"]]
    scores = scores.join(groups[[column for column in _MEANS if column in found]].mean()).reset_index()
    return scores.assign(method=scores["method"].map(TITLES)) if "method" in scores else scores


def judged(study: Study) -> dict[str, bool]:
    """What `per_method` asks of overlap: that the predicted class is right; nothing where no image was (barely trained
    networks)."""
    return {"right": True} if frames(study, "overlap")["right"].any() else {}


def agreement(study: Study) -> pd.DataFrame:
    """Full against fast XRAI per network: correlation of the maps, IoU of their top 30 %, shares kept in percent,
    and seconds per image."""
    found = frames(study, "variants").assign(kept=lambda rows: 100 * rows["kept_full"]).groupby("network", sort=False)
    cost = frames(study, "cost").groupby(["method", "network"])["seconds"].mean()
    names = {"correlation": "correlation", "iou": "IoU of the tops", "kept": "kept, %"}
    scores = found[list(names)].mean().rename(columns=names)
    scores.insert(0, "images", found.size())
    return scores.assign(**{"full, s": cost.get("xrai"), "fast, s": cost.get("xrai_fast")}).reset_index()


# Claims


def verdicts(study: Study) -> pd.DataFrame:
    """The paper's claims as differences of our numbers, in percent points, from `claims.csv`; see
    `cxrkit.study.claims`. Overlap is taken where the predicted class is right: only then does the map explain the class
    that the mask is of."""
    trained = [train for train, _ in pairs(study)]
    mri = all(train.parameters.dataset == "brain_mri" for train in trained)

    def decisions(kind: str, suits: bool) -> pd.DataFrame:
        if not suits:
            raise ParameterError(f"the grid has no {kind}")
        parts = [decided(train.frame("predictions")).assign(network=name_of(train)) for train in trained]
        return pd.concat(parts).astype({"right": float})

    tables = {
        "tops": _tops,
        "baselines": lambda of: frames(of, "baselines").assign(moved=lambda rows: 1 - rows["similarity"]),
        "stability": lambda of: frames(of, "stability"),
        "embedding": lambda of: frames(of, "embedding").astype({"same": float}),
        "MRI": lambda of: decisions("MRI", mri),
        "radiographs": lambda of: decisions("radiographs", not mri),
    }
    there = {name_of(train) for train in trained}
    return claims.verdicts("path", study, tables, expert="DenseNet121" if "DenseNet121" in there else "")


def _tops(study: Study) -> pd.DataFrame:
    table = frames(study, "overlap").query("output == 'probability' and right")
    return table.assign(fraction=table["fraction"].round(6), gain=table["iou"] - table["chance_iou"])


# What printed digits and a split tell


def denominators(values: Sequence[float], digits: int = 6, most: int = 4000) -> list[int]:
    """All n up to `most` for which every value, printed with `digits` decimals, is a share k / n: smallest first."""
    values = [float(value) for value in values]
    half = 0.5 * 10**-digits * (1 + 1e-9)
    return [n for n in range(1, most + 1) if all(abs(round(v * n) / n - v) <= half for v in values)]


def leak(
    conspicuity: float,
    images: int = 300,
    size: int = 32,
    images_per_patient: tuple[int, int] = (6, 10),
    seed: int = 0,
) -> pd.DataFrame:
    """What a split of images instead of patients is worth: five-fold accuracy of simple classifiers on the phantom.

    Three exclusive diagnoses, one a patient, who has several images. Conspicuity 0 leaves nothing to be found. The
    classifiers look at principal components of the pixels, fitted on the training folds: "neighbour" takes the class of
    the image in the most similar direction (60 components), "logistic" is a logistic regression (100 components).
    Columns: split ("by image", "by patient"), classifier, accuracy with its 95 % interval (patients resampled), largest
    class, images, patients.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    options = {"view": "diagnosis", "images": images, "images_per_patient": images_per_patient, "seed": seed}
    data = cxrkit.data.load("phantom", size=size, conspicuity=conspicuity, **options)
    batch = data.batch(range(len(data)))
    pixels, truth = batch.images.flatten(1).numpy(), batch.targets.argmax(1).numpy()
    patients, own = np.unique(batch.patient_ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    folds = {"by image": rng.permutation(images) % 5, "by patient": (rng.permutation(len(patients)) % 5)[own]}
    classifiers = {
        "neighbour": (60, KNeighborsClassifier(1, metric="cosine")),
        "logistic": (100, LogisticRegression(max_iter=3000)),
    }
    rows = []
    for split, fold in folds.items():
        for title, (components, classifier) in classifiers.items():
            right = np.zeros(images)
            for number in range(5):
                test = fold == number
                space = PCA(components, whiten=True, random_state=0).fit(pixels[~test])
                classifier.fit(space.transform(pixels[~test]), truth[~test])
                right[test] = classifier.predict(space.transform(pixels[test])) == truth[test]
            mean, low, high = bootstrap(right, own, n=2000)
            rows.append({"split": split, "classifier": title, "accuracy": mean, "low": low, "high": high})
    largest = {"largest class": np.bincount(truth).max() / images}
    return pd.DataFrame(rows).assign(**largest, images=images, patients=len(patients))


STORED = {
    "Networks": lambda study: models(study).dropna(subset="ours"),
    "Precision of the strongest 30 %": lambda study: per_method(
        study, "overlap", "precision", fraction=0.3, output="probability", **judged(study)
    ),
    "Claims": verdicts,
}
