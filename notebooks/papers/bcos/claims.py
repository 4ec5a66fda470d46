"""The claims of paper `bcos` as differences of our runs, with verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.study import comparison, runs
from cxrkit.study.claims import Claim, Measured, measured, too_little
from cxrkit.study.claims import table as claim_table
from cxrkit.study.published import table
from cxrkit.study.report import view as view_of
from cxrkit.study.study import Study
from papers.bcos.tables import (
    EXPLANATIONS,
    PUBLISHED,
    cells,
    difference,
    network,
    predictions,
    regime,
    regime_of,
    scores_of,
)

__all__ = ["claims"]

Place = tuple[str, ...]  # network, method, and the regime where it isn't plain

# Text, a, b: the EPG of a is compared with that of b.
_ONE: Sequence[tuple[str, Place, Place]] = (
    (
        "FLC raises the EPG of B-cos explanations",
        ("B-cos + FLC", "bcos"),
        ("B-cos", "bcos"),
    ),
    (
        "BlurPool raises the EPG of B-cos explanations",
        ("B-cos + BlurPool", "bcos"),
        ("B-cos", "bcos"),
    ),
    (
        "B-cos + FLC beats LayerCAM on the baseline",
        ("B-cos + FLC", "bcos"),
        ("Baseline", "layercam"),
    ),
    (
        "Plain B-cos falls behind LayerCAM on the baseline",
        ("B-cos", "bcos"),
        ("Baseline", "layercam"),
    ),
    (
        "With FLC, B-cos explanations beat LayerCAM on the same network",
        ("B-cos + FLC", "bcos"),
        ("B-cos + FLC", "layercam"),
    ),
)
_MANY: Sequence[tuple[str, Place, Place]] = (
    (
        "With fourteen labels, FLC raises the EPG of B-cos explanations",
        ("B-cos + FLC", "bcos"),
        ("B-cos", "bcos"),
    ),
    (
        "With fourteen labels, B-cos + FLC beats LayerCAM on the baseline",
        ("B-cos + FLC", "bcos"),
        ("Baseline", "layercam"),
    ),
    (
        "With fourteen labels, plain B-cos beats LayerCAM on the baseline",
        ("B-cos", "bcos"),
        ("Baseline", "layercam"),
    ),
)
_BCOS = ("B-cos", "B-cos + FLC", "B-cos + BlurPool")


def claims(study: Study, view_name: str = "binary", many: str = "multilabel") -> pd.DataFrame:
    """The paper's claims as differences: published, ours with interval (percent), patients, and a plain verdict.

    `view_name`: the view or data set with one label, `many`: the one with several. A claim about networks that the grid
    lacks is left out; one about a network that learnt too little isn't judged (see `claims.too_little`).
    """
    one = View(study, view_name)
    several = View(study, many)
    made = [
        *_of_maps(one, _ONE, "bcos/tab3_rsna_epg_antialiasing", "bcos/tab2_rsna_epg"),
        *_of_training(one),
    ]
    made += [*_of_threshold(one), *_of_grids(one), *_of_accuracy(one)]
    if many != view_name:
        made += [
            *_of_maps(several, _MANY, "bcos/tab7_vinbig_epg"),
            *_of_many(several),
        ]
    return claim_table(made)


@dataclass(frozen=True)
class View:
    """A grid and one of its views: makes claims, and bars those that rest on a network that learnt too little."""

    study: Study
    view_name: str
    known: dict[tuple[str, str], str] = field(default_factory=dict, compare=False)  # many claims are about one network

    def claim(
        self,
        text: str,
        gap: float,
        places: Sequence[Place],
        ours: Callable[[], Measured],
        printed: str = "",
    ):
        """The claim, or nothing where the grid lacks one of `places`: (network, method) or (network, method, regime),
        plain when not said."""
        try:
            found = ours()
        except ParameterError:  # a small grid holds no such pair
            return
        barred = next(filter(None, (self.barred(place) for place in places)), "")
        yield Claim(text, gap, found, printed, synthetic=self.study.synthetic, barred=barred)

    def barred(self, place: Place) -> str:
        """Why a network tests nothing; empty where it learnt."""
        title, _, how = (*place, "plain")[:3]
        if (title, how) not in self.known:
            trained = [train for train, _ in cells(self.study).get((self.view_name, title, how), [])]
            why = too_little(pd.concat([predictions(run) for run in trained])) if trained else ""
            self.known[title, how] = f"{title} ({how}) learnt too little: {why}" if why else ""
        return self.known[title, how]

    def between(self, a: Place, b: Place, **options) -> Callable[[], Measured]:
        return lambda: difference(self.study, self.view_name, a, b, **options)


def _of_maps(view: View, said: Sequence[tuple[str, Place, Place]], *tables: str) -> Iterator[Claim]:
    published = pd.concat([table(one) for one in tables]).to_dict("records")
    paper = {
        (
            PUBLISHED[cell["variant"]],
            EXPLANATIONS[cell["explanation"]],
            regime_of(cell),
        ): cell["epg_mean"]
        for cell in published
    }
    for text, a, b in said:
        yield from view.claim(
            text,
            paper[(*a, "plain")] - paper[(*b, "plain")],
            (a, b),
            view.between(a, b),
        )


def _of_training(view: View) -> Iterator[Claim]:
    cells_ = table("bcos/tab3_rsna_epg_antialiasing").query("explanation == 'Inherent'").to_dict("records")
    published = {(PUBLISHED[cell["variant"]], regime_of(cell)): cell["epg_mean"] for cell in cells_}
    for title in _BCOS:
        gain = published[(title, "both")] - published[(title, "plain")]
        text = f"Augmentation and oversampling {'raise' if gain > 0 else 'lower'} the EPG of {title}"
        both, plain = (title, "bcos", "both"), (title, "bcos")
        yield from view.claim(text, gain, (both, plain), view.between(both, plain))


def _of_threshold(view: View) -> Iterator[Claim]:
    for title in _BCOS:
        place = (title, "bcos")
        text = f"The EPG of {title} grows with the threshold, up to 0.7 of the maximum"
        ours = view.between(place, place, thresholds=(0.7, 0.0))
        yield from view.claim(text, 1, (place,), ours, "Fig. 3")


def _of_grids(view: View) -> Iterator[Claim]:
    """Energy at the grid's frequencies beyond that of a smooth spectrum, in percent of all energy."""
    plain = ("B-cos", "bcos")

    def beyond_smooth() -> Measured:
        scores = scores_of(view.study, view.view_name, plain)
        return measured(scores["excess"].to_numpy(), scores["patient_id"].to_numpy())

    yield from view.claim("Maps of plain B-cos show a grid", 1, (plain,), beyond_smooth, "Fig. 4")
    for title in _BCOS[1:]:
        place = (title, "bcos")
        ours = view.between(place, plain, column="excess")
        yield from view.claim(f"{title} takes the grid away", -1, (place, plain), ours, "Fig. 4")


def _of_accuracy(view: View) -> Iterator[Claim]:
    rsna = {regime_of(cell): cell["auc_mean"] for cell in table("bcos/tab1_rsna_classification").dropna(
        subset="auc_mean").to_dict("records")}  # fmt: skip
    for how, text in (
        ("augmented", "Light augmentation raises the AUC"),
        ("oversampled", "Oversampling alone does not"),
    ):
        places = (("B-cos", "", "plain"), ("B-cos", "", how))
        yield from view.claim(
            f"{text} (B-cos)",
            rsna[how] - rsna["plain"],
            places,
            _areas(view, places),
        )


def _of_many(view: View) -> Iterator[Claim]:
    base, bcos = table("bcos/tab6_vinbig_classification")["auc_mean"]
    text = "With fourteen labels, B-cos loses a little AUC to the baseline"
    places = (("Baseline", "", "plain"), ("B-cos", "", "plain"))
    yield from view.claim(text, bcos - base, places, _areas(view, places))


def _areas(view: View, places: Sequence[Place]) -> Callable[[], Measured]:
    """AUC of the second less that of the first, on the same test images; the first fold and seed."""

    def ours() -> Measured:
        trained = {
            (network(run.parameters), regime(run.parameters)): run
            for run in reversed(view.study.trained)
            if view_of(run.parameters) == view.view_name
        }
        pair: list[runs.Run | None] = [trained.get((title, how)) for title, _, how in places]
        if None in pair:
            raise ParameterError(f"grid {view.study.name!r} lacks one of {places}")
        row = comparison.scores((pair[0], pair[1])).loc["macro"]
        patients = set.intersection(*(set(run.frame("predictions")["patient_id"]) for run in pair))
        return Measured(row["difference"], row["low"], row["high"], len(patients))

    return ours
