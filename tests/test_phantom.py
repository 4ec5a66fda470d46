"""The phantom: deterministic, consistent, physically sensible, and like real radiographs in two statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from book.tools.phantom_reference import reference_bands
from cxrkit.data import load
from cxrkit.errors import ParameterError
from cxrkit.phantom.anatomy import Grid, sample_anatomy, sample_frame
from cxrkit.phantom.case import draw, make_case
from cxrkit.phantom.findings import EDGE, FRAME, finding_box, finding_shape
from cxrkit.phantom.physics import BONE, METAL, SOFT, line_integral
from cxrkit.phantom.realism import grey_histogram, radial_power_spectrum, share_within
from cxrkit.phantom.source import load_phantom
from cxrkit.phantom.views import VIEWS

REFERENCE = Path(__file__).resolve().parents[1] / "book" / "phantom_reference.csv"
LOOKS = [(view, look) for view in VIEWS for look in VIEWS[view].prevalence]
DARKER = ("Pneumothorax", "Local artefact")


def case_of(view: str, look: str, seed: int = 0, patient: int = 0, image: int = 0, **settings):
    """An image that shows one look and nothing else."""
    spec = replace(VIEWS[view], healthy=0.0)
    shares = {name: float(name == look) for name in spec.prevalence}
    return make_case(spec, seed=seed, patient=patient, image=image, prevalence=shares, **settings)


def same(a, b) -> bool:
    return torch.equal(a.image, b.image) and torch.equal(a.truth, b.truth) and torch.equal(a.shortcut, b.shortcut)


def extent(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("view", VIEWS)
def test_same_seed_same_images(view):
    first, second = (load_phantom(view=view, images=6, seed=5, size=48) for _ in range(2))
    pd.testing.assert_frame_equal(first.table, second.table)
    pd.testing.assert_frame_equal(first.boxes, second.boxes)
    assert all(same(first[i], second[i]) for i in range(6))
    other = load_phantom(view=view, images=6, seed=6, size=48)
    assert not torch.equal(first[0].image, other[0].image)


def test_an_image_depends_neither_on_the_count_nor_on_the_order():
    few, many = load_phantom(images=5, size=40), load_phantom(images=40, size=40)
    pd.testing.assert_frame_equal(few.table, many.table.iloc[:5])
    expected = few.boxes
    pd.testing.assert_frame_equal(expected, many.boxes[many.boxes["image_id"].isin(few.table["image_id"])])
    backward = [many[i] for i in reversed(range(5))][::-1]
    assert all(same(few[i], backward[i]) for i in range(5))


def test_no_global_random_state_is_touched():
    np.random.seed(1)  # noqa: NPY002
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    load_phantom(images=3, size=32)[2]
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_before, torch.get_rng_state())


@pytest.mark.parametrize(("view", "look"), LOOKS)
def test_every_look_can_be_drawn_and_its_truth_lies_in_its_box(view, look):
    for seed in range(2):
        case = case_of(view, look, seed)
        assert case.findings
        for size in (32, 64, 96, 224):
            drawing = draw(case, size)
            assert drawing.image.shape == (size, size)
            assert drawing.image.dtype == np.float32
            assert 0 <= drawing.image.min() < drawing.image.max() <= 1
            for finding, (label, truth) in zip(case.findings, drawing.truth, strict=True):
                box = finding_box(finding, case.anatomy, case.frame)
                if box is None:
                    assert not truth.any()
                    continue
                assert label == look
                assert 0 <= min(box) < max(box) <= FRAME
                assert truth.any()
                scaled, seen = np.array(box) * size / FRAME, extent(truth)
                # Half a pixel each way for the raster, and one because a mask keeps whole pixels.
                assert (seen[:2] >= scaled[:2] - 1).all()
                assert (seen[2:] <= scaled[2:] + 1).all()
                assert np.abs(seen - scaled).max() <= 2


def test_boxes_bound_the_region_that_a_fine_drawing_finds():
    """Second, slow implementation: the shape on the whole nominal frame, its extreme pixels read off."""
    centres = (np.arange(FRAME) + 0.5) / FRAME
    worst = []
    for look in ("Consolidation", "Nodule/Mass", "Pleural effusion", "Pneumothorax", "Cardiomegaly", "ILD"):
        case = case_of("multilabel", look, seed=2)
        grid = Grid(case.anatomy, case.frame, centres, centres)
        for finding in case.findings:
            seen = extent(finding_shape(finding, case.anatomy, grid) >= EDGE)
            worst.append(np.abs(seen - np.array(finding_box(finding, case.anatomy, case.frame))).max())
    assert max(worst) <= 4.6  # one pixel at 224


@pytest.mark.parametrize(("view", "look"), LOOKS)
def test_a_finding_changes_attenuation_in_its_region_and_as_it_should(view, look):
    inside, outside, sign = 0.0, 0.0, 0.0
    for seed in range(3):
        case = case_of(view, look, seed)
        drawing, healthy = draw(case, 160, noise=False), draw(case.healthy(), 160, noise=False)
        true = np.any([mask for _, mask in drawing.truth], axis=0)
        change = drawing.attenuation - healthy.attenuation
        inside += np.abs(change[true]).sum()
        outside += np.abs(change[~true]).sum()
        sign += (drawing.image - healthy.image)[true].mean()
    assert outside / (inside + outside) < 0.05
    assert sign < 0 if look in DARKER else sign > 0


def test_at_conspicuity_zero_nothing_but_the_labels_remains():
    for view, look in LOOKS:
        case = case_of(view, look, seed=1, conspicuity=0.0)
        drawing, healthy = draw(case, 64, noise=False), draw(case.healthy(), 64, noise=False)
        np.testing.assert_array_equal(drawing.image, healthy.image)
        assert case.boxes() or look not in VIEWS[view].labels
    dataset = load_phantom(images=30, size=32, conspicuity=0.0)
    assert dataset.table[list(dataset.labels)].to_numpy().any()


def test_conspicuity_grows_the_change():
    changes = []
    for conspicuity in (0.3, 0.6, 1.0):
        case = case_of("multilabel", "Consolidation", conspicuity=conspicuity)
        change = draw(case, 64, noise=False).attenuation - draw(case.healthy(), 64, noise=False).attenuation
        changes.append(change.sum())
    assert 0 < changes[0] < changes[1] < changes[2]


def test_line_integral_is_beer_lamberts_exponent():
    from cxrkit.phantom.body import Thickness

    maps = [np.full((2, 2), value, dtype=np.float32) for value in (6.0, 15.0, 0.5, 0.3, 0.1)]
    expected = SOFT * (6.0 + 0.5 + 0.25 * 15.0) + BONE * 0.3 + METAL * 0.1
    np.testing.assert_allclose(line_integral(Thickness(*maps), 0.25), expected, rtol=1e-6)


def test_a_healthy_chest_has_plausible_tissue():
    rng = np.random.default_rng(0)
    anatomy = sample_anatomy(rng)
    centres = (np.arange(64) + 0.5) / 64
    from cxrkit.phantom.body import draw_body

    body = draw_body(anatomy, Grid(anatomy, sample_frame(rng, anatomy), centres, centres))
    for values in vars(body).values():
        assert values.dtype == np.float32
        assert values.min() >= 0
    assert 10 < body.lung.max() < 22
    assert 14 < np.median(body.soft[-8:, 24:40]) < 30


def test_patients_keep_their_anatomy_and_chronic_findings():
    dataset = load_phantom(images=60, size=32, images_per_patient=(2, 4))
    sizes = dataset.table.groupby("patient_id").size().iloc[:-1]
    assert set(sizes) == {2, 3, 4}
    chronic = sorted(VIEWS["multilabel"].chronic)
    assert (dataset.table.groupby("patient_id")[chronic].nunique() == 1).all().all()
    first, second = dataset.renderer.case(0), dataset.renderer.case(1)
    assert first.plain.apex == second.plain.apex
    assert first.frame != second.frame
    assert first.exposure != second.exposure
    assert not torch.equal(dataset[0].image, dataset[1].image)


def test_prevalence_and_healthy_share():
    dataset = load_phantom(images=500, images_per_patient=(1, 1), size=32)
    shares = dataset.table[list(dataset.labels)].mean()
    assert shares.between(0.08, 0.36).all()
    for label in dataset.labels:
        if label != "Lung Opacity":
            assert abs(shares[label] - VIEWS["multilabel"].prevalence[label]) < 0.06, label
    assert 0.25 < (dataset.table[list(dataset.labels)].sum(axis=1) == 0).mean() < 0.42
    assert load_phantom(images=50, size=32, prevalence={"Pneumothorax": 0.0}).table["Pneumothorax"].sum() == 0


def test_the_binary_view_is_like_rsna():
    dataset = load_phantom(view="binary", images=300, size=64)
    assert dataset.labels == ("Pneumonia",)
    positive = np.flatnonzero(dataset.table["Pneumonia"] == 1)
    assert abs(len(positive) / 300 - 0.22) < 0.06
    counts = dataset.boxes.groupby("image_id").size()
    assert counts.between(1, 4).all()
    assert set(counts.index) == set(dataset.table["image_id"].iloc[positive])
    area = np.mean([dataset[int(row)].mask.float().mean() for row in positive[:40]])
    assert 0.09 < area < 0.15
    assert load_phantom(view="binary", images=100, prevalence=0.5).table["Pneumonia"].mean() > 0.38


@pytest.mark.parametrize("view", ["multilabel", "covid"])
def test_parents_are_positive_where_a_child_is(view):
    dataset = load_phantom(view=view, images=150, size=40)
    assert dataset.hierarchy
    for child, parent in dataset.hierarchy.items():
        assert (dataset.table[parent] >= dataset.table[child]).all()
    order = list(dataset.labels)
    for row in range(0, 60, 3):
        sample = dataset[row]
        for child, parent in dataset.hierarchy.items():
            assert (sample.truth[order.index(parent)] | ~sample.truth[order.index(child)]).all()
            assert (sample.mask[order.index(parent)] | ~sample.mask[order.index(child)]).all()
        assert not sample.truth[sample.target == 0].any()


def test_the_covid_view_follows_the_papers_labels():
    dataset = load_phantom(view="covid", images=400, size=32)
    assert list(dataset.labels) == sorted(dataset.labels)
    table = dataset.table
    assert (table["No Finding"] + table["Pneumonia"] == 1).all()
    assert table["MERS"].sum() == 0  # as in the paper's data
    assert ((table["ARDS"] == 1) & (table["COVID-19"] == 1)).any()


def test_the_quality_view_has_a_small_artefact_near_the_centre_in_half_of_the_images():
    dataset = load_phantom(view="quality", images=200, images_per_patient=(1, 1), size=224)
    assert dataset.labels == ("Local artefact",)
    positive = dataset.table["Local artefact"].to_numpy() == 1
    assert abs(positive.mean() - 0.5) < 0.1
    assert set(dataset.boxes["image_id"]) == set(dataset.table["image_id"][positive])
    middle = (dataset.boxes[["x_min", "y_min"]].to_numpy() + dataset.boxes[["x_max", "y_max"]].to_numpy()) / 2
    assert np.abs(middle / FRAME - 0.5).max() < 0.2
    for row in np.flatnonzero(positive)[:12].tolist():
        truth = dataset[row].truth[0]
        assert 0.004 < truth.float().mean() < 0.05
        case = replace(dataset.renderer.case(row), noise=(0, 0, 0, 5))
        change = draw(case, 224, noise=False).attenuation - draw(case.healthy(), 224, noise=False).attenuation
        others = [mask for label, mask in draw(case, 224, noise=False).truth if label != "Local artefact"]
        if not others:
            assert (change[truth.numpy()] < -0.05).all()  # every true pixel is changed
            assert np.abs(change[~truth.numpy()]).max() < 0.2 * np.abs(change).max()


def test_the_objects_view_has_metal_on_half_of_the_images_and_a_box_for_each_object():
    dataset = load_phantom(view="objects", images=200, images_per_patient=(1, 1), size=224)
    assert dataset.labels == ("Foreign object",)
    positive = dataset.table["Foreign object"].to_numpy() == 1
    assert abs(positive.mean() - 0.5) < 0.1
    assert set(dataset.boxes["image_id"]) == set(dataset.table["image_id"][positive])
    assert dataset.boxes.groupby("image_id").size().between(1, 4).all()
    kinds = set()
    for row in np.flatnonzero(positive)[:24].tolist():
        case = replace(dataset.renderer.case(row), noise=(0, 0, 0, 5))
        drawing = draw(case, 224, noise=False)
        objects = [(finding, mask) for finding, (label, mask) in zip(case.findings, drawing.truth, strict=True)
                   if label == "Foreign object"]  # fmt: skip
        kinds |= {part.shape for finding, _ in objects for part in finding.parts}
        truth = np.any([mask for _, mask in objects], axis=0)
        assert 0.0005 < truth.mean() < 0.1
        if len(objects) == len(case.findings):
            change = drawing.attenuation - draw(case.healthy(), 224, noise=False).attenuation
            assert (change[truth] > 0).all()
            assert np.abs(change[~truth]).max() < 0.2 * change.max()
    assert kinds == {"slab", "specks", "line"}


def test_a_further_view_has_changed_no_image_of_the_others():
    """The place of a look in MAKERS seeds its findings: one inserted would draw every later look anew."""
    from cxrkit.phantom.repertoire import MAKERS

    known = "Cardiomegaly, Aortic enlargement, Consolidation, Infiltration, Lung Opacity, Pneumonia, Nodule/Mass, "
    known += "Calcification, Pleural effusion, Pleural thickening, Pneumothorax, Atelectasis, ILD, Pulmonary fibrosis, "
    known += "Other lesion, COVID-19, SARS, ARDS, Viral Pneumonia, Bacterial Pneumonia, Streptococcus, Klebsiella, "
    known += "Legionella, Chlamydophila, Pneumocystis, Local artefact, Foreign object"
    assert list(MAKERS) == known.split(", ")


def test_marker_follows_its_label_and_is_marked():
    marker = {"label": "Cardiomegaly", "rate": 0.9, "rate_without": 0.1}
    dataset, plain = load_phantom(images=240, size=48, marker=marker), load_phantom(images=240, size=48)
    planted = np.array([dataset.renderer.case(row).marker is not None for row in range(240)])
    positive = dataset.table["Cardiomegaly"].to_numpy() == 1
    assert planted[positive].mean() > 0.75
    assert planted[~positive].mean() < 0.22
    pd.testing.assert_frame_equal(dataset.boxes, plain.boxes)
    for row in np.flatnonzero(planted)[:8].tolist():
        with_marker, without = dataset[row], plain[row]
        spot = with_marker.shortcut
        assert 0 < spot.float().mean() < 0.03
        assert not without.shortcut.any()
        change = (with_marker.image - without.image)[0]
        assert change[spot].mean() > 0
        assert change[~spot].abs().mean() < 0.01
        assert torch.equal(with_marker.truth, without.truth)


def test_dark_borders_are_blank_and_move_boxes_and_truth_along():
    dataset = load_phantom(images=40, size=96, dark_borders={"label": "Consolidation", "share": 1.0})
    positive = dataset.table["Consolidation"].to_numpy() == 1
    assert positive.any()
    for row in range(40):
        sample = dataset[row]
        assert bool(sample.shortcut.any()) == bool(positive[row])
        if positive[row]:
            assert (sample.image[0][sample.shortcut] == 0).float().mean() > 0.85  # the rest is the edge
            assert 0.1 < sample.shortcut.float().mean() < 0.3
            assert not (sample.truth & sample.shortcut).any()
            outside = (sample.truth & ~sample.mask).sum(dim=(1, 2))
            assert (outside <= 3).all()


def test_a_crop_takes_boxes_and_truth_with_it():
    dataset = load_phantom(images=40, size=96, crop={"rate": 1.0})
    plain = load_phantom(images=40, size=96)
    nearer, larger = 0, 0
    for row in range(40):
        sample = dataset[row]
        outside = (sample.truth & ~sample.mask).sum(dim=(1, 2))
        assert (outside <= 4).all()
        frame, full = dataset.renderer.case(row).frame, plain.renderer.case(row).frame
        nearer += frame.width < 0.81 * full.width
        larger += int(sample.truth.sum()) > int(plain[row].truth.sum())
    assert nearer == 40
    assert larger > 15
    inside = dataset.boxes[["x_min", "y_min", "x_max", "y_max"]].to_numpy()
    assert inside.min() >= 0
    assert inside.max() <= FRAME


def test_load_knows_the_phantom():
    part = load("phantom", split="test", images=60, size=32, view="binary")
    assert part.name == "phantom"
    assert set(part.table["split"]) == {"test"}
    sample = part[0]
    assert sample.image.shape == (1, 32, 32)
    assert sample.truth.shape == sample.mask.shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"view": "lateral"}, "'lateral'"),
        ({"images": 0}, "images=0"),
        ({"images_per_patient": (3, 1)}, "images_per_patient"),
        ({"conspicuity": -1}, "conspicuity"),
        ({"prevalence": {"Fracture": 0.1}}, "'Fracture'"),
        ({"prevalence": {"ILD": 1.5}}, "'ILD'"),
        ({"prevalence": 0.2}, "several labels"),
        ({"marker": {"label": "Fracture"}}, "'Fracture'"),
        ({"marker": {"lable": "ILD"}}, "lable"),
        ({"crop": {"label": "ILD", "rate": 2}}, "crop"),
        ({"view": "covid", "prevalence": {"COVID-19": 0.9}}, "exclude"),
    ],
)
def test_wrong_parameters_are_named(options, word):
    with pytest.raises(ParameterError, match=word):
        load_phantom(**options)


def test_statistics_in_closed_form():
    image = np.zeros((8, 8))
    image[:2] = 0.99
    histogram = grey_histogram(image, bins=4)
    np.testing.assert_allclose(histogram, [0.75, 0, 0, 0.25])
    side = 64
    wave = 0.5 + 0.2 * np.cos(2 * np.pi * 9 * np.arange(side) / side)[None].repeat(side, axis=0)
    spectrum = radial_power_spectrum(wave)
    assert spectrum.shape == (side // 2 - 1,)
    assert spectrum.argmax() == 8  # nine cycles
    louder = radial_power_spectrum(0.5 + 2 * (wave - 0.5))
    np.testing.assert_allclose((louder - spectrum)[5:12], np.log10(4), atol=1e-6)


def test_the_phantom_lies_within_the_bands_of_real_radiographs():
    bands = pd.read_csv(REFERENCE)
    dataset = load_phantom(images=60, images_per_patient=(1, 1))
    images = np.stack([dataset[row].image[0].numpy() for row in range(60)])
    shares = share_within(images, bands)
    assert shares["grey_histogram"] >= 0.9
    assert shares["radial_power_spectrum"] >= 0.9
    assert share_within(1 - images, bands)["grey_histogram"] < 0.9  # a negative is told apart
    assert share_within(images**0.3, bands)["grey_histogram"] < 0.9
    noise = np.random.default_rng(0).normal(0, 0.05, images.shape)
    assert share_within(images + noise, bands)["radial_power_spectrum"] < 0.9


def test_reference_bands_come_from_a_folder(tmp_path):
    from PIL import Image

    for index in range(3):
        Image.fromarray(np.full((40, 50), 60 * index, dtype=np.uint8)).save(tmp_path / f"{index}.png")
    bands = reference_bands(tmp_path, size=32)
    grey = bands[bands["statistic"] == "grey_histogram"]
    assert (grey["p5"] <= grey["p95"]).all()
    assert len(bands) == 32 + 15


def test_the_stored_bands_are_those_of_the_real_set(shared_data, tmp_path):
    """Regenerated from a part of the set, the medians come out near the stored ones."""
    for path in sorted((shared_data / "nih" / "images").iterdir())[::12]:
        (tmp_path / path.name).symlink_to(path)
    again, stored = reference_bands(tmp_path), pd.read_csv(REFERENCE)
    assert list(again.columns) == list(stored.columns)
    spectrum = stored["statistic"] == "radial_power_spectrum"
    assert (again["p50"] - stored["p50"])[spectrum].abs().mean() < 0.15
    assert (again["p50"] - stored["p50"])[~spectrum].abs().mean() < 0.01
