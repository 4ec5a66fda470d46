"""Augmentation: what each strength does, alone, and that it is repeatable."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cxrkit.data import augment
from cxrkit.data.augment import Augmentation, augmentation, warp
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
    from torchvision.transforms.v2 import functional

    image = images(1, 64, 64)
    arguments = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | arguments
    moved = warp(image, change.homographies(image, fixed(uniform=1, normal=1)))
    theirs = functional.affine(image, **arguments, interpolation=functional.InterpolationMode.BILINEAR)
    torch.testing.assert_close(moved, theirs, atol=1e-3, rtol=0)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ParameterError, match=r"float \[B, C, H, W\]"):
        Augmentation()(torch.zeros(3, 3), seeded())
