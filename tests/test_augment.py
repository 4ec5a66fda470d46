"""Augmentation: what each strength does, alone, and that it is repeatable."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from cxrkit.data import augment
from cxrkit.data.augment import Augmentation, augmentation, augmentation_seeds, warp, warp_boxes, warp_masks
from cxrkit.data.dataset import Batch
from cxrkit.data.geometry import box_masks
from cxrkit.errors import ParameterError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=3, height=40, width=48):
    return torch.rand(n, 1, height, width, generator=seeded(99))


def fixed(**values):
    """A stand-in for the random draws: uniform() and normal() give chosen values."""

    def give(name):
        return lambda like, shape=(): torch.full((len(like), *shape), float(values[name]))

    return SimpleNamespace(uniform=give("uniform"), normal=give("normal"))


@pytest.mark.parametrize("name", ["none", "light", "heavy"])
@pytest.mark.parametrize("reference", ["after_resize", "original"])
def test_same_seed_same_result(name, reference):
    change = augmentation(name, reference)
    state = torch.random.get_rng_state()
    one, two = change(images(), seeded(1)), change(images(), seeded(1))
    assert torch.equal(one, two)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.shape == images().shape
    assert one.dtype == torch.float32
    assert one.min() >= 0
    assert one.max() <= 1
    assert torch.equal(change(images(), seeded(2)), one) == (name == "none")


def test_no_strength_no_change():
    assert torch.equal(Augmentation()(images(), seeded()), images())
    assert torch.equal(augmentation("none")(images(), seeded()), images())


def test_strengths_of_the_paper():
    assert augmentation("light").translate == pytest.approx(32 / 224)
    assert augmentation("light", "original").translate == pytest.approx(32 / 1024)
    assert augmentation("light").flip == augmentation("light").noise == 0
    heavy = augmentation("heavy")
    assert (heavy.scale, heavy.rotate, heavy.shear, heavy.perspective) == (0.15, 6, 4, 0.15)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"name": "strong"}, "augment='strong'"), ({"reference": "crop"}, "reference='crop'")],
)
def test_unknown_names(wrong, word):
    with pytest.raises(ParameterError, match=word):
        augmentation(**wrong)


def test_strengths_out_of_range():
    for wrong in ({"flip": 1.5}, {"scale": -1}, {"gamma": float("nan")}, {"perspective": 1}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            Augmentation(**wrong)
    with pytest.raises(ParameterError, match=r"float \[B, C, H, W\]"):
        Augmentation()(torch.zeros(3, 3), seeded())


def test_known_translation_moves_a_pixel():
    image = torch.zeros(1, 1, 32, 64)
    image[0, 0, 10, 20] = 1
    # uniform = 1 means the largest shift: 8 of 64 columns, and as large a share of the rows, 4 of 32.
    change = Augmentation(translate=8 / 64)
    moved = warp(image, change.homographies(image, fixed(uniform=1)))
    assert moved[0, 0].argmax() == 14 * 64 + 28
    assert torch.isclose(moved[0, 0, 14, 28], torch.tensor(1.0), atol=1e-4)
    # What comes in from outside is zero.
    assert (warp(torch.ones(1, 1, 32, 64), change.homographies(image, fixed(uniform=1)))[0, 0, :3] == 0).all()


def test_translation_is_uniform_within_its_bounds():
    many = torch.zeros(4000, 1, 4, 4)
    shift = Augmentation(translate=0.2).homographies(many, augment._Draw(4000, seeded()))[:, :2, 2] / 2
    assert shift.abs().max() <= 0.2
    assert shift.abs().max() > 0.19
    assert abs(float(shift.std()) - 0.2 / 3**0.5) < 0.005


def test_flip():
    flipped = Augmentation(flip=1)(images(), seeded())
    torch.testing.assert_close(flipped, images().flip(-1), atol=1e-5, rtol=0)
    many = Augmentation(flip=0.5).homographies(torch.zeros(2000, 1, 4, 4), augment._Draw(2000, seeded()))
    assert abs(float((many[:, 0, 0] < 0).float().mean()) - 0.5) < 0.05


def test_scale_is_a_power_of_two():
    many = torch.zeros(4000, 1, 4, 4)
    total = Augmentation(scale=0.1).homographies(many, augment._Draw(4000, seeded()))
    assert abs(float(total[:, 0, 0].log2().std()) - 0.1) < 0.005
    torch.testing.assert_close(total[:, 0, 0], total[:, 1, 1])


def test_quarter_turn_of_an_oblong_image_is_in_pixels():
    image = torch.zeros(1, 1, 32, 64)
    image[0, 0, 11:13, 36:40] = 1
    # 6 right of and 4 above the centre; a turn by +90 degrees, y pointing down, brings it 4 right of and 6 below.
    turned = warp(image, Augmentation(rotate=90).homographies(image, _turn()))
    spot = (turned[0, 0] > 0.5).nonzero().float()
    assert len(spot) == 8
    assert (spot.mean(0) - torch.tensor([21.5, 35.5])).abs().max() < 0.01


def _turn():
    angles = iter([1.0, 0.0])
    return SimpleNamespace(normal=lambda like, shape=(): torch.full((len(like),), next(angles)))


def test_perspective_agrees_with_torchvision():
    from torchvision.transforms.v2.functional import perspective as torchvision_perspective

    smooth = torch.from_numpy(gaussian_filter(np.random.default_rng(0).random((60, 60)), 3)).float()[None, None]
    inward = torch.tensor([[[0.2, 0.1], [0.0, 0.3], [0.1, 0.1], [0.25, 0.0]]])
    ours = warp(smooth, augment._perspective(inward))
    corners = torch.tensor([[0.0, 0], [60, 0], [60, 60], [0, 60]])
    inside = torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]])
    moved = corners + inside * inward[0] * 30
    theirs = torchvision_perspective(smooth, corners.tolist(), moved.tolist(), interpolation="bilinear")
    inner = (slice(None), slice(None), slice(15, 45), slice(15, 45))
    torch.testing.assert_close(ours[inner], theirs[inner], atol=1e-4, rtol=0)


def test_steps_make_one_homography_in_the_stated_order():
    change = Augmentation(translate=0.1, scale=0.5, rotate=20, shear=10, perspective=0.2)
    n = 5
    total = change.homographies(images(n), augment._Draw(n, seeded(3)))
    parts = torch.eye(3).expand(n, 3, 3)
    draw = augment._Draw(n, seeded(3))
    for names in (["translate"], ["scale"], ["rotate", "shear"], ["perspective"]):
        single = Augmentation(**{name: getattr(change, name) for name in names})
        parts = single.homographies(images(n), draw) @ parts
    torch.testing.assert_close(total, parts)


def test_gamma():
    change = Augmentation(gamma=0.2)
    changed = change(images(2000, 2, 2), seeded())
    exponent = changed[:, 0, 0, 0].log() / images(2000, 2, 2)[:, 0, 0, 0].log()
    torch.testing.assert_close(changed, images(2000, 2, 2) ** exponent.view(-1, 1, 1, 1), atol=1e-4, rtol=1e-3)
    assert abs(float(exponent.log2().std()) - 0.2) < 0.01


def test_blur_agrees_with_scipy():
    sigma = torch.tensor([0.0, 0.8, 2.0])
    blurred = augment._gaussian_blur(images(), sigma, 2.0)
    torch.testing.assert_close(blurred[0], images()[0])
    for index in (1, 2):
        expected = gaussian_filter(images()[index, 0].numpy(), float(sigma[index]), mode="nearest", radius=6)
        np.testing.assert_allclose(blurred[index, 0], expected, atol=1e-5)


def test_salt_and_pepper_is_coarse_and_rare():
    grey = torch.full((200, 1, 100, 100), 0.5)
    spotted = Augmentation(pepper=0.5, pepper_share=0.1)(grey, seeded())
    touched = spotted != 0.5
    assert set(spotted.unique().tolist()) == {0.0, 0.5, 1.0}
    assert 0.35 < float(touched.flatten(1).any(1).float().mean()) < 0.65
    share = touched.flatten(1).float().mean(1)
    assert abs(float(share[share > 0].mean()) - 0.1) < 0.02
    # A spot is 5 to 10 pixels wide: a touched pixel nearly always has a touched neighbour.
    assert float((touched[..., 1:] & touched[..., :-1]).sum() / touched.sum()) > 0.75


def test_noise_stays_in_range():
    noisy = Augmentation(noise=0.04)(torch.full((400, 1, 16, 16), 0.5), seeded())
    spread = noisy.flatten(1).std(1)
    assert spread.max() < 0.05
    assert 0.35 < float((spread == 0).float().mean()) < 0.65


# Masks and boxes move with the images


def batch(n=6, height=64, width=64, labels=3):
    """Images that are their own masks: bright where the first label's mask is."""
    masks = torch.zeros(n, labels, height, width, dtype=torch.bool)
    boxes = []
    for index in range(n):
        x, y = 10 + 3 * index, 18 + 2 * index
        boxes.append((x, y, x + 14, y + 9))
        masks[index, 0, y : y + 9, x : x + 14] = True
        masks[index, 1, y + 3, x : x + 14] = True
    names = tuple(f"i{index}" for index in range(n))
    made = Batch(
        images=masks[:, :1].float(),
        targets=torch.ones(n, labels),
        masks=masks,
        image_ids=names,
        patient_ids=names,
        truth=masks.clone(),
        shortcut=masks[:, 0].clone(),
    )
    return made, torch.tensor(boxes, dtype=torch.float32)


MOVES = replace(augmentation("heavy"), gamma=0, pepper=0, blur=0, noise=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["light", "heavy"]))
def test_image_mask_truth_and_shortcut_move_together(seed, name):
    given_batch, boxes = batch()
    change = replace(augmentation(name), gamma=0, pepper=0, blur=0, noise=0)
    seeds = augmentation_seeds(seed, 1, given_batch.image_ids)
    moved = change(given_batch, seeds=seeds)
    assert moved.masks.dtype == moved.truth.dtype == moved.shortcut.dtype == torch.bool
    # A pixel's centre from inside the mask is bright by at least a quarter of its four neighbours, and vice versa.
    assert (moved.images[:, 0][moved.masks[:, 0]] >= 0.24).all()
    assert (moved.images[:, 0][~moved.masks[:, 0]] <= 0.76).all()
    assert torch.equal(moved.masks, moved.truth)
    assert torch.equal(moved.shortcut, moved.masks[:, 0])
    assert not moved.masks[:, 2].any()
    assert torch.equal(moved.targets, given_batch.targets)
    assert moved.image_ids == given_batch.image_ids
    # METHODS 0.2: the light stays in the moved box, and the moved box is no larger than it must be.
    around = change.boxes(boxes, range(6), given_batch.images, seeds)
    for index in range(6):
        x0, y0, x1, y1 = around[index].tolist()
        rows, columns = (moved.images[index, 0] > 0.5).nonzero(as_tuple=True)
        if len(rows):
            assert columns.min() + 0.5 >= x0 - 0.51
            assert columns.max() + 0.5 <= x1 + 0.51
            assert rows.min() + 0.5 >= y0 - 0.51
            assert rows.max() + 0.5 <= y1 + 0.51
        if (around[index] > 0).all() and (around[index] < 64).all():
            assert x1 - x0 <= columns.max() - columns.min() + 3.5
            assert y1 - y0 <= rows.max() - rows.min() + 3.5


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_agrees_with_torchvision_on_image_mask_and_boxes(seed):
    """All our steps make one homography; torchvision is handed the four corners that it moves."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    given_batch, boxes = batch(1)
    image = torch.from_numpy(gaussian_filter(np.random.default_rng(seed).random((64, 64)), 3)).float()[None, None]
    seeds = [seed]
    moves = MOVES.homographies(image, augment._SeededDraw(seeds))
    corners = torch.tensor([[0.0, 0], [64, 0], [64, 64], [0, 64]])
    ends = augment._moved_points(corners, moves[0], (64, 64))
    points = {"startpoints": corners.tolist(), "endpoints": ends.tolist()}
    theirs = functional.perspective(image[0], **points, interpolation="bilinear")
    ours = MOVES(image, seeds=seeds)[0]
    coverage = warp(torch.ones(1, 1, 64, 64), moves)[0]
    torch.testing.assert_close(ours[coverage > 0.999], theirs[coverage > 0.999], atol=2e-3, rtol=0)
    mask = functional.perspective(tv_tensors.Mask(given_batch.masks[0]), **points)
    moved = warp_masks(given_batch.masks, moves)[0]
    # A centre that falls on the edge between two pixels may go either way.
    assert (mask[0] != moved[0]).sum() <= 2
    theirs = functional.perspective(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(64, 64)), **points)
    torch.testing.assert_close(warp_boxes(boxes, moves, (64, 64)), theirs.as_subclass(torch.Tensor), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        (Augmentation(translate=0.125), {"translate": [8, 8]}),
        (Augmentation(scale=0.5), {"scale": 2**-0.5}),
        (Augmentation(rotate=20), {"angle": 20}),
        (Augmentation(shear=15), {"shear": [-15.0, 0.0]}),
        (Augmentation(rotate=20, shear=15), {"angle": 20, "shear": [-15.0, 0.0]}),
    ],
)
def test_each_step_agrees_with_torchvision_affine(change, arguments):
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    given_batch, boxes = batch(1)
    arguments = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | arguments
    moves = change.homographies(given_batch.images, fixed(uniform=1, normal=1))
    theirs = functional.affine(given_batch.images, **arguments, interpolation=functional.InterpolationMode.BILINEAR)
    torch.testing.assert_close(warp(given_batch.images, moves), theirs, atol=1e-3, rtol=0)
    mask = functional.affine(tv_tensors.Mask(given_batch.masks[0]), **arguments)
    assert (mask != warp_masks(given_batch.masks, moves)[0]).sum() <= 2
    theirs = functional.affine(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(64, 64)), **arguments)
    torch.testing.assert_close(warp_boxes(boxes, moves, (64, 64)), theirs.as_subclass(torch.Tensor), atol=1e-3, rtol=0)


def test_boxes_by_hand():
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    shift = torch.eye(3)
    shift[0, 2] = 2 * 20 / 40
    boxes = torch.tensor([[2.0, 3, 10, 8], [2.0, 3, 10, 8], [30.0, 3, 39, 8]])
    moved = warp_boxes(boxes, torch.stack([flip, shift, shift]), (16, 40))
    torch.testing.assert_close(moved[:2], torch.tensor([[30.0, 3, 38, 8], [22, 3, 30, 8]]))
    # The third has left the image: no area, but still in its place.
    assert moved[2, 0] == moved[2, 2] == 40
    assert not box_masks(moved[2:], 40).any()
    assert warp_boxes(torch.empty(0, 4), torch.empty(0, 3, 3), (16, 40)).shape == (0, 4)


def test_thin_findings_do_not_vanish():
    masks = torch.zeros(40, 2, 64, 64, dtype=torch.bool)
    masks[:, 0, 10, 40] = True
    smaller = torch.diag(torch.tensor([0.3, 0.3, 1.0])).repeat(40, 1, 1)
    smaller[:, 0, 2] = torch.linspace(-0.5, 0.5, 40)
    moved = warp_masks(masks, smaller)
    image, row, column = moved[:, 0].nonzero(as_tuple=True)
    assert image.unique().tolist() == list(range(40))
    # Towards the centre of 64 by 0.3, then to the side: where a pixel holds that point, or nearly does.
    assert ((row + 0.5) - (32 + 0.3 * (10.5 - 32))).abs().max() < 1
    assert ((column + 0.5) - (32 + 0.3 * (40.5 - 32) + 32 * smaller[image, 0, 2])).abs().max() < 1
    assert not moved[:, 1].any()
    # One that leaves the image does vanish.
    smaller[:, 0, 2] = 2
    assert not warp_masks(masks, smaller).any()
    assert warp_masks(masks[:, 0], smaller).shape == (40, 64, 64)


def test_masks_that_are_not_there():
    given_batch, _ = batch()
    moved = MOVES(replace(given_batch, truth=None, shortcut=None), seeds=range(6))
    assert moved.truth is None
    assert moved.shortcut is None
    none = augmentation("none")(given_batch, seeds=range(6))
    assert torch.equal(none.masks, given_batch.masks)
    assert torch.equal(none.images, given_batch.images)


# Seeds


@pytest.mark.parametrize("name", ["light", "heavy"])
def test_seeds_make_an_image_independent_of_its_batch(name):
    change = augmentation(name)
    given_images = images(6, 40, 40)
    seeds = augmentation_seeds(7, 3, range(6))
    whole = change(given_images, seeds=seeds)
    parts = torch.cat([change(given_images[part], seeds=seeds[part]) for part in (slice(0, 1), slice(1, 6))])
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    order = torch.tensor([5, 2, 0, 1, 3, 4])
    torch.testing.assert_close(change(given_images[order], seeds=seeds[order]), whole[order], atol=1e-5, rtol=0)
    assert not torch.allclose(change(given_images, seeds=augmentation_seeds(7, 4, range(6))), whole)
    state = torch.random.get_rng_state()
    change(given_images, seeds=seeds)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seeds_are_told_by_seed_epoch_and_key():
    seeds = augmentation_seeds(0, 1, ["a", "b"])
    assert seeds.dtype == torch.int64
    assert (seeds >= 0).all()
    # Written down: a resumed run on another machine must make the same.
    assert seeds.tolist() == [4994886724436472275, 1265038575081901071]
    assert torch.equal(seeds, augmentation_seeds(0, 1, ("a", "b")))
    others = [augmentation_seeds(s, e, ["a"]) for s, e in ((1, 1), (0, 2), (1, 11), (11, 1))]
    assert len({int(seed) for seed in [*others, *seeds]}) == 6
    many = augmentation_seeds(0, 0, range(2000))
    assert len(many.unique()) == 2000
    assert abs(float((many % 1000).float().mean()) - 499.5) < 25
    assert augmentation_seeds(0, 0, []).shape == (0,)


def test_draws_by_seed_are_distributed_alike():
    many = torch.zeros(1500, 1, 2, 2)
    draw = augment._SeededDraw(augmentation_seeds(0, 0, range(1500)))
    total = Augmentation(scale=0.1).homographies(many, draw)
    assert abs(float(total[:, 0, 0].log2().std()) - 0.1) < 0.008


def test_generator_or_seeds():
    for wrong in ({}, {"generator": seeded(), "seeds": [1, 2, 3]}):
        with pytest.raises(ParameterError, match="either a generator or seeds"):
            augmentation("light")(images(), **wrong)
    with pytest.raises(ParameterError, match="2 seeds were given for 3 images"):
        augmentation("light")(images(), seeds=[1, 2])
