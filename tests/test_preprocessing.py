"""Pre-processing: pixels by a second implementation, and boxes that stay on what they enclose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

import cxrkit
from cxrkit.data import geometry
from cxrkit.data import preprocessing as preprocessing_module
from cxrkit.data.intensity import EightBit, Levels, Percentiles
from cxrkit.data.preprocessing import (
    SQUASH,
    Chain,
    ForgottenCrop,
    PadToSquare,
    Place,
    ResizeAndCrop,
    Squash,
    Toned,
    preprocessing,
)
from cxrkit.errors import ParameterError

GEOMETRIES = {
    "squash": SQUASH,
    "bicubic": Squash("bicubic"),
    "lanczos": Squash("lanczos"),
    "gaussian": Squash("gaussian"),
    "crop": ResizeAndCrop(),
    "tight crop": ResizeAndCrop(resized=128, crop=64, interpolation="lanczos"),
    "pad": PadToSquare(),
    "vinbigdata": Chain(Squash("gaussian"), ResizeAndCrop(), at=64),
    "padded at 96": Chain(PadToSquare(), SQUASH, at=96),
    "eight bits": Toned(ResizeAndCrop(), before=EightBit()),
}


def noise(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((height, width), dtype=np.float32))


def picture(image):
    return Image.fromarray(image.numpy())


# Pixels, written a second time


@pytest.mark.parametrize("frame", [(90, 70), (70, 90), (64, 64), (40, 300)])
def test_resize_and_crop_agrees_with_torchvision_on_pictures(frame):
    from torchvision.transforms.v2.functional import center_crop
    from torchvision.transforms.v2.functional import resize as torchvision_resize

    image = noise(*frame[::-1])
    small = center_crop(torchvision_resize(picture(image), [64]), [56])
    np.testing.assert_allclose(ResizeAndCrop(64, 56).image(image, 56), np.asarray(small), atol=1e-5)


@pytest.mark.parametrize("frame", [(100, 50), (50, 100), (61, 60), (60, 61), (64, 64), (200, 3)])
def test_pad_to_square_agrees_with_pillow(frame):
    image = noise(*frame[::-1])
    longest, shortest = max(frame), min(frame)
    short = int(64 * (shortest / longest))
    wide, high = (64, short) if frame[0] == longest else (short, 64)
    wide, high = max(wide, 1), max(high, 1)
    small = np.asarray(picture(image).resize((wide, high), Image.Resampling.BICUBIC)).clip(0, 1)
    left, top = (64 - wide) // 2, (64 - high) // 2
    expected = np.pad(small, ((top, 64 - high - top), (left, 64 - wide - left)))
    np.testing.assert_allclose(PadToSquare().image(image, 64), expected, atol=1e-5)


def test_pad_to_square_on_eight_bits():
    """The authors' own steps: an 8-bit picture is resized and expanded; ours differs by its rounding alone."""
    smooth = gaussian_filter(np.random.default_rng(0).random((75, 100)), 2)
    eight = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    small = Image.fromarray(eight).resize((64, 48), Image.Resampling.BICUBIC)
    expected = np.asarray(ImageOps.expand(small, (0, 8, 0, 8))) / 255
    got = PadToSquare().image(torch.from_numpy(eight / np.float32(255)), 64)
    np.testing.assert_allclose(got, expected, atol=1.01 / 255)


def test_sizes_of_the_paper():
    """METHODS 3.8, test 1."""
    assert PadToSquare().place((1000, 500), 512) == Place(512, 256, 0, 128)
    assert PadToSquare().place((512, 513), 512) == Place(511, 512, 0, 0)
    assert PadToSquare().place((3, 5000), 512).width == 1
    assert ResizeAndCrop().place((1024, 1024), 224) == Place(256, 256, -16, -16)
    assert ResizeAndCrop().place((1024, 1024), 448) == Place(512, 512, -32, -32)
    assert ResizeAndCrop().place((2500, 2048), 224) == Place(312, 256, -44, -16)


def lanczos_matrix(n, m):
    """Weights of m output pixels over n input pixels: a sinc windowed by a wider sinc, three lobes, widened."""
    scale = n / m
    width = max(scale, 1)
    rows = np.zeros((m, n))
    for i in range(m):
        centre = (i + 0.5) * scale
        low, high = int(max(centre - 3 * width + 0.5, 0)), int(min(centre + 3 * width + 0.5, n))
        for j in range(low, high):
            x = (j + 0.5 - centre) / width
            rows[i, j] = np.sinc(x) * np.sinc(x / 3) if -3 <= x < 3 else 0
    return rows / rows.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("frame", [(90, 70), (40, 33)])
def test_lanczos_by_its_formula(frame):
    image = noise(*frame[::-1])
    expected = lanczos_matrix(frame[1], 48) @ image.numpy() @ lanczos_matrix(frame[0], 48).T
    np.testing.assert_allclose(geometry.resize(image, 48, "lanczos"), expected, atol=1e-5)
    assert geometry.resize((image > 0.5).float(), 48, "lanczos").max() > 1.01
    assert Squash("lanczos").image((image > 0.5).float(), 48).max() == 1


def bilinear_at(image, n_rows, n_columns):
    """Pixel by pixel: the four neighbours of each half-pixel centre, edges repeated."""
    height, width = image.shape
    out = np.zeros((n_rows, n_columns))
    for i in range(n_rows):
        for j in range(n_columns):
            y = min(max((i + 0.5) * height / n_rows - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / n_columns - 0.5, 0), width - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            v, u = y - top, x - left
            out[i, j] = (
                (1 - v) * ((1 - u) * image[top, left] + u * image[top, right])
                + v * ((1 - u) * image[bottom, left] + u * image[bottom, right])
            )  # fmt: skip
    return out


def test_aliased_by_its_formula():
    image = noise(90, 70)
    np.testing.assert_allclose(geometry.resize(image, 32, "aliased"), bilinear_at(image.numpy(), 32, 32), atol=1e-5)
    # A chequerboard: what anti-aliasing turns grey, its absence turns into a pattern that was never there.
    board = torch.from_numpy(np.indices((64, 64)).sum(0) % 2).float()
    assert geometry.resize(board, 26, "aliased")[2:-2, 2:-2].std() > 0.15
    assert geometry.resize(board, 26)[2:-2, 2:-2].std() < 0.05


def test_gaussian_is_blur_then_interpolation():
    image = noise(96, 64)
    blurred = gaussian_filter(image.numpy().astype(np.float64), ((96 / 32 - 1) / 2, (64 / 32 - 1) / 2), mode="mirror")
    got = geometry.resize(image, 32, "gaussian").numpy()
    np.testing.assert_allclose(got[1:-1, 1:-1], bilinear_at(blurred, 32, 32)[1:-1, 1:-1], atol=1e-5)


@pytest.mark.parametrize("interpolation", geometry.INTERPOLATIONS)
def test_every_interpolation_keeps_shape_and_constants(interpolation):
    assert geometry.resize(torch.rand(2, 3, 50, 41), (32, 40), interpolation).shape == (2, 3, 32, 40)
    grey = geometry.resize(torch.full((1, 33, 47), 0.25), 40, interpolation)
    torch.testing.assert_close(grey, torch.full((1, 40, 40), 0.25), atol=1e-6, rtol=0)
    assert torch.equal(geometry.resize(noise(32, 32), 32, interpolation), noise(32, 32))


def test_unknown_interpolation():
    with pytest.raises(ParameterError, match=r"interpolation='nearest'.*'bilinear'"):
        Squash("nearest").image(noise(9, 9), 4)


# One transform for pixels, masks and boxes


def off_target(change, frame, box, size):
    """How far the light of a box drawn in the image is from the moved box: pixels, 0 when all lies inside.

    Bright is what reaches half of the brightest pixel; a bright pixel counts by its centre, and one pixel (of the
    coarser grid) is the resolution of any drawing. None when the box lies outside the square.
    """
    (width, height), (x0, y0, x1, y1) = frame, box
    image = torch.zeros(height, width)
    image[y0:y1, x0:x1] = 1
    small = change.image(image, size)
    low_x, low_y, high_x, high_y = change.boxes([box], frame, size)[0]
    if small.max() < 0.02 or low_x >= high_x or low_y >= high_y:
        return None
    rows, columns = (small > small.max() / 2).nonzero(as_tuple=True)
    # Where an image is enlarged, one source pixel is the resolution; moved edges tell by how much.
    slack_x = max(1, (high_x - low_x) / (x1 - x0))
    slack_y = max(1, (high_y - low_y) / (y1 - y0))
    return max(
        float((low_x - slack_x - (columns + 0.5)).max()),
        float((columns + 0.5 - high_x - slack_x).max()),
        float((low_y - slack_y - (rows + 0.5)).max()),
        float((rows + 0.5 - high_y - slack_y).max()),
        0.0,
    )


@st.composite
def thin_boxes(draw):
    """A frame and a box in it that is one pixel wide, or high, or both."""
    width, height = draw(st.integers(48, 260)), draw(st.integers(48, 260))
    x = draw(st.integers(0, width - 1))
    y = draw(st.integers(0, height - 1))
    upright = draw(st.sampled_from(["column", "row", "dot"]))
    x1 = x + 1 if upright != "row" else draw(st.integers(x + 1, width))
    y1 = y + 1 if upright != "column" else draw(st.integers(y + 1, height))
    return (width, height), (x, y, x1, y1)


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=60, deadline=None)
@given(placed=thin_boxes(), size=st.sampled_from([32, 48, 64]))
def test_thin_bright_box_stays_inside_the_moved_box(name, placed, size):
    """METHODS 0.2, for every geometry, whatever the aspect ratio."""
    frame, box = placed
    far = off_target(GEOMETRIES[name], frame, box, size)
    assert far is None or far == 0


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=25, deadline=None)
@given(placed=thin_boxes(), size=st.sampled_from([32, 64]))
def test_brightest_pixel_is_in_the_mask(name, placed, size):
    frame, (x0, y0, x1, y1) = placed
    image = torch.zeros(frame[1], frame[0])
    image[y0:y1, x0:x1] = 1
    change = GEOMETRIES[name]
    small = change.image(image, size)
    mask = geometry.box_masks(change.boxes([(x0, y0, x1, y1)], frame, size), size)[0]
    if small.max() >= 0.02 and mask.any() and min(frame) >= size:
        grown = torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0
        assert grown.flatten()[small.argmax()]
        # The mask is no wider than its box needs.
        assert mask.any(0).sum() <= math.ceil((x1 - x0) * 2 * size / 56) + 1


def test_boxes_of_the_authors_miss_their_findings():
    """The finding, in pixels: up to 16 at the border, nothing at the centre (METHODS 1.6)."""
    right, wrong = preprocessing("bcos/rsna"), preprocessing("bcos/rsna/authors")
    frame = (1024, 1024)
    misses = {x: off_target(wrong, frame, (x, 0, x + 1, 1024), 224) for x in range(64, 960, 64)}
    assert all(off_target(right, frame, (x, 0, x + 1, 1024), 224) == 0 for x in misses)
    assert misses[512] < 0.1
    assert misses[64] > 12
    assert misses[896] > 10
    edges = np.arange(0, 1025, 32)
    columns = np.column_stack([edges, edges, edges, edges])
    shift = wrong.boxes(columns, frame, 224)[:, 0] - (columns[:, 0] / 4 - 16)
    np.testing.assert_allclose(shift, 16 - edges / 32)
    # Pixels are not what differs.
    image = noise(80, 80)
    assert torch.equal(wrong.image(image, 32), right.image(image, 32))
    assert torch.equal(wrong.masks(image[None] > 0.5, 32), right.masks(image[None] > 0.5, 32))


def test_vinbigdata_of_the_authors_rounds_and_forgets():
    right, wrong = preprocessing("bcos/vinbigdata"), preprocessing("bcos/vinbigdata", protocol="authors")
    frame, box = (2000, 3000), [(100.0, 1500.0, 2000.0, 3000.0)]
    np.testing.assert_array_equal(wrong.boxes(box, frame, 224), [[11, 112, 223, 223]])
    np.testing.assert_allclose(right.boxes(box, frame, 224), [[0, 112, 224, 224]])
    plain = preprocessing("bcos/vinbigdata/baseline")
    np.testing.assert_allclose(plain.boxes(box, frame, 224), [[11.2, 112, 224, 224]])


@settings(max_examples=60, deadline=None)
@given(
    frame=st.tuples(st.integers(40, 200), st.integers(40, 200)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    size=st.sampled_from([32, 56]),
    name=st.sampled_from(sorted(GEOMETRIES)),
)
def test_masks_follow_boxes(frame, corners, size, name):
    """A box drawn as a mask, moved as a mask, is the box moved as a box, up to a pixel along its rim."""
    x0, x1 = sorted(round(corner * frame[0]) for corner in corners[:2])
    y0, y1 = sorted(round(corner * frame[1]) for corner in corners[2:])
    mask = torch.zeros(1, frame[1], frame[0], dtype=torch.bool)
    mask[:, y0:y1, x0:x1] = True
    change = GEOMETRIES[name]
    moved = change.masks(mask, size)
    assert moved.dtype == torch.bool
    assert moved.shape == (1, size, size)
    edges = change.boxes([(x0, y0, x1, y1)], frame, size)
    grown = edges + np.array([-1, -1, 1, 1])
    shrunk = edges + np.array([1.5, 1.5, -1.5, -1.5])
    assert not (moved[0] & ~geometry.box_masks(grown, size)[0]).any()
    if (shrunk[0, 2:] > shrunk[0, :2]).all():
        assert not (geometry.box_masks(shrunk, size)[0] & ~moved[0]).any()


def test_bands_are_black_and_outside_every_mask():
    image = torch.ones(50, 100)
    padded = PadToSquare().image(image, 64)
    assert (padded[16:48] > 0.999).all()
    assert padded[:16].sum() == padded[48:].sum() == 0
    assert PadToSquare().masks(torch.ones(2, 50, 100, dtype=torch.bool), 64).sum() == 2 * 32 * 64


# Grey values


def test_levels():
    """METHODS 3.8, test 2."""
    image = torch.tensor([[0.0, 0.2, 0.5, 0.8, 1.0]])
    got = Levels(0.2, 0.8)(image)
    torch.testing.assert_close(got, torch.tensor([[0, 0, 0.5, 1, 1]]))
    assert torch.equal(Levels(0, 1)(got), got)
    assert Levels(0.3, 0.3)(image).sum() == 0


def test_percentiles_of_each_image():
    images = torch.stack([noise(40, 30, 1), noise(40, 30, 2) * 0.5])
    got = Percentiles(5, 90)(images)
    for one, image in zip(got, images.numpy(), strict=True):
        low, high = np.percentile(image, [5, 90])
        np.testing.assert_allclose(one, (image.clip(low, high) - low) / (high - low), atol=1e-5)
    assert Percentiles()(torch.full((1, 4, 4), 0.5)).sum() == 0


def test_black_bands_move_the_percentiles_unless_corrected():
    """A narrow image and a square one of the same pixels: corrected gives both the same grey, the text does not."""
    square = noise(96, 96)
    narrow = torch.cat([square, square], dim=0)
    inner = (slice(32, 64), slice(26, 38))
    kept = {}
    for protocol in ("paper", "corrected"):
        change = preprocessing("covid", protocol=protocol)
        one, two = change.image(square, 64), change.image(narrow, 64)
        kept[protocol] = abs(float(one[inner].mean() - two[inner].mean()))
    assert kept["corrected"] < 0.02
    assert kept["paper"] > 0.03


def test_authors_levels_are_one_pair():
    change = preprocessing("covid/authors")
    assert change.image(torch.full((64, 64), 207 / 255), 64).min() > 0.9999
    assert change.image(torch.full((64, 64), 103.5 / 255), 64).mean() == pytest.approx(0.5, abs=1e-4)


def test_eight_bits_between_extremes():
    raw = np.random.default_rng(0).integers(100, 3900, (50, 40))
    expected = (((raw - raw.min()) / (raw.max() - raw.min())) * 255).astype(np.uint8)
    got = EightBit()(torch.from_numpy(raw / 4095))
    # A quotient that ends exactly on a level may fall to either side of it.
    assert (abs((got * 255).round().numpy() - expected) > 0).mean() < 0.01
    assert len(got.unique()) <= 256
    assert (got.min(), got.max()) == (0, 1)
    assert EightBit()(torch.full((3, 3), 0.7)).sum() == 0


# Names


@pytest.mark.parametrize("name", preprocessing_module.named())
@pytest.mark.parametrize("protocol", ["paper", "authors", "corrected"])
def test_every_name_works(name, protocol):
    change = preprocessing(name, protocol=protocol)
    assert change == preprocessing(f"{name}/{protocol}")
    small = change.image(noise(70, 90), 48)
    assert small.shape == (48, 48)
    assert small.dtype == torch.float32
    assert 0 <= small.min() <= small.max() <= 1
    assert change.boxes(np.empty((0, 4)), (90, 70), 48).shape == (0, 4)
    # The printed form is a whole key: it makes the same object again.
    assert eval(repr(change)) == change


def test_names_default_to_corrected():
    assert preprocessing("covid") == preprocessing("covid/corrected") != preprocessing("covid/paper")
    with pytest.raises(ParameterError, match=r"'bcos' is unknown.*'bcos/rsna'"):
        preprocessing("bcos")
    with pytest.raises(ParameterError, match="protocol='published'"):
        preprocessing("covid", protocol="published")


def test_load_takes_a_name_or_an_object(tmp_path):
    image = np.zeros((512, 512), dtype=np.uint8)
    image[100:200, 40:60] = 255
    Image.fromarray(image).save(tmp_path / "one.png")
    (tmp_path / "images.csv").write_text("image_id,file,patient_id,labels\none,one.png,p,spot\n")
    (tmp_path / "boxes.csv").write_text("image_id,label,x_min,y_min,x_max,y_max\none,spot,40,100,60,200\n")

    def overlap(chosen):
        sample = cxrkit.data.load("folder", root=tmp_path, preprocessing=chosen)[0]
        bright = sample.image[0] > 0.5
        return float((bright & sample.mask[0]).sum() / (bright | sample.mask[0]).sum())

    assert overlap("bcos/rsna") > 0.85
    assert overlap(PadToSquare()) > 0.85
    assert overlap("bcos/rsna/authors") == 0
    with pytest.raises(ParameterError, match="preprocessing='bcos/rsnaa'"):
        overlap("bcos/rsnaa")
    with pytest.raises(ParameterError, match="'phantom' takes no preprocessing"):
        cxrkit.data.load("phantom", preprocessing="squash", images=5)


def test_forgotten_crop_without_a_crop_is_right():
    boxes = [(3.0, 4.0, 20.0, 30.0)]
    np.testing.assert_array_equal(ForgottenCrop(SQUASH).boxes(boxes, (64, 48), 32), SQUASH.boxes(boxes, (64, 48), 32))
