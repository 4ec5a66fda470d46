"""The leakage check: it finds what is on two sides, refuses it by name, and leaves clean splits alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import idctn
from sklearn.model_selection import train_test_split

import cxrkit
from cxrkit.data import leakage
from cxrkit.data.dataset import Dataset, Rendered
from cxrkit.data.leakage import check_parts, check_split, find_leaks, near_pairs, patient_overlap, structure_hash
from cxrkit.errors import DataError, ParameterError


def smooth(count, seed=0, size=48):
    """Images of a few blobs each, unlike one another."""
    coarse = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[:, 0].clamp(0, 1)


class Held:
    def __init__(self, images):
        self.images = images

    def render(self, row, size):
        return Rendered(self.images[row].clone())


def dataset(images, split=None, patients=None, ids=None, paths=""):
    n = len(images)
    table = pd.DataFrame(
        {
            "image_id": ids if ids is not None else [f"i{k}" for k in range(n)],
            "patient_id": patients if patients is not None else [f"p{k}" for k in range(n)],
            "path": paths,
            "A": 0.0,
            "orig_width": 48,
            "orig_height": 48,
        }
    )
    if split is not None:
        table["split"] = split
    return Dataset("held", ["A"], table, None, Held(images), images.shape[-1])


SPLIT = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2


def test_clean_split_passes():
    clean = dataset(smooth(8), SPLIT)
    for content in ("none", "pixels", "near"):
        check_split(clean, content)
        assert find_leaks(clean, content).empty
        assert list(find_leaks(clean, content)) == ["kind", "key", "part", "image_id", "patient_id"]


def test_patients_are_compared_as_text():
    """METHODS 3.9: ids that are numbers in one row and text in another are the same patient."""
    leaking = dataset(smooth(8), SPLIT, patients=[7, 1, 2, 3, 4, 5, "7 ", 8])
    with pytest.raises(DataError) as caught:
        check_split(leaking)
    assert str(caught.value) == ("held: train and test share patients (1): '7' ('i0' in train and 'i6' in test)")
    found = find_leaks(leaking)
    assert found["image_id"].tolist() == ["i0", "i6"]
    assert set(found["kind"]) == {"patient"}


def test_message_names_a_few_and_counts_the_rest():
    leaking = dataset(smooth(12), ["train"] * 6 + ["test"] * 6, patients=list("abcdef") + list("abcdea"))
    with pytest.raises(
        DataError, match=r"patients \(5\): 'a' \('i0' in train and 'i6' in test, 1 more images\).*and 2 more"
    ):
        check_split(leaking)


def test_images_in_no_part_are_not_looked_at():
    leaking = dataset(smooth(8), ["train"] * 4 + ["unused", "", "test", "test"], patients=list("abcdabef"))
    check_split(leaking)


def test_same_pixels_are_found_whatever_the_patient_is_called():
    images = smooth(8)
    images[6] = images[1]
    leaking = dataset(images, SPLIT)
    check_split(leaking)
    with pytest.raises(DataError, match=r"share images of identical pixels \(1\): 'i1' in train"):
        check_split(leaking, "pixels")
    assert set(find_leaks(leaking, "near")["kind"]) == {"pixels"}
    # Twice in one part is no leak.
    images[6] = smooth(9)[8]
    images[3] = images[1]
    check_split(dataset(images, SPLIT), "near")


@pytest.mark.parametrize(
    "alter",
    [
        lambda image: image**1.2,
        lambda image: 0.8 * image + 0.1,
        lambda image: (image + 0.02 * torch.randn(image.shape)).clamp(0, 1),
        lambda image: (image * 255).round() / 255,
        lambda image: F.interpolate(
            F.interpolate(image[None, None], size=(36, 36), mode="area"), size=(48, 48), mode="bilinear"
        )[0, 0],
    ],
    ids=["gamma", "contrast", "noise", "eight bits", "resized"],
)
def test_altered_copies_are_near(alter):
    images = smooth(8)
    images[7] = alter(images[2])
    leaking = dataset(images, SPLIT)
    check_split(leaking, "pixels")
    with pytest.raises(DataError, match=r"pairs of near duplicates \(1\): 'i2' in train and 'i7' in test"):
        check_split(leaking, "near")
    found = find_leaks(leaking, "near")
    assert found["kind"].tolist() == ["near", "near"]
    assert found["part"].tolist() == ["train", "test"]


def test_like_structure_alone_is_no_duplicate():
    """Two images of the same hash whose thumbnails differ: frequencies of the same order, not of the same strength."""
    low = np.random.default_rng(0).normal(size=(8, 8))
    images = []
    for power in (1, 2.5):
        frequencies = np.zeros((32, 32))
        frequencies[:8, :8] = np.sign(low - np.median(low)) * abs(low - np.median(low)) ** power
        waves = idctn(frequencies, norm="ortho")
        images.append(torch.from_numpy((waves - waves.min()) / np.ptp(waves)).float())
    hashes = structure_hash((torch.stack(images) * 255).round())
    assert np.bitwise_count(hashes[0] ^ hashes[1]) <= 2
    assert np.corrcoef(images[0].flatten(), images[1].flatten())[0, 1] < 0.95
    check_split(dataset(torch.stack(images), ["train", "test"]), "near")


def test_files(tmp_path):
    paths = []
    for index in range(8):
        paths.append(tmp_path / f"{index}.png")
        pixels = (smooth(8)[1 if index == 6 else index].numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    files = dataset(smooth(8), SPLIT, paths=[str(path) for path in paths])
    with pytest.raises(DataError, match=r"share identical files \(1\): 'i1' in train and 'i6' in test"):
        check_split(files, "files")
    # The same pixels in another file: only a look at the pixels tells.
    with Image.open(paths[1]) as picture:
        picture.save(paths[6], compress_level=0)
    check_split(files, "files")
    paths[3].unlink()
    with pytest.raises(DataError, match=r"3\.png: can't be opened"):
        check_split(files, "files")
    with pytest.raises(ParameterError, match="some images have no file; use content='pixels'"):
        check_split(dataset(smooth(8), SPLIT), "files")


def test_parts_of_different_sources():
    one = dataset(smooth(4), ids=["a", "b", "c", "d"])
    other = dataset(torch.cat([smooth(3, 1), smooth(4)[2:3]]), ids=["e", "b ", "f", "g"])
    found = find_leaks({"one": one, "other": other}, "pixels", patients=False)
    assert found.groupby("kind")["image_id"].apply(list).to_dict() == {"image_id": ["b", "b"], "pixels": ["c", "g"]}
    with pytest.raises(DataError, match=r"the parts: one and other share image ids \(1\): 'b' in one"):
        check_parts({"one": one, "other": other}, patients=False)
    assert (find_leaks({"one": one, "other": other})["kind"] == "patient").sum() == 8
    check_parts({"one": one.select([0]), "other": other.select([0])}, "near", patients=False)


def test_refusals():
    with pytest.raises(ParameterError, match="content='everything'"):
        check_split(dataset(smooth(8), SPLIT), "everything")
    with pytest.raises(DataError, match="held: no split is known"):
        check_split(dataset(smooth(8)))


# Hashes


def slow_hash(image):
    """One image, straight from the definition: cosine sums, then the median of 63 of 64."""
    n = 32
    block = image.reshape(n, image.shape[0] // n, n, image.shape[1] // n).mean(axis=(1, 3))
    waves = np.array([[np.cos(np.pi * (2 * x + 1) * k / (2 * n)) for x in range(n)] for k in range(8)])
    waves *= np.sqrt(np.where(np.arange(8) == 0, 1, 2) / n)[:, None]
    low = (waves @ block @ waves.T).round(6).ravel()
    bits = low > np.median(low[1:])
    return sum(int(bit) << (8 * (k // 8) + 7 - k % 8) for k, bit in enumerate(bits))


def test_hash_by_its_definition():
    images = smooth(20, size=64)
    assert structure_hash(images).tolist() == [slow_hash(image.double().numpy()) for image in images]
    assert structure_hash(images).dtype == np.uint64


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(0, 40), m=st.integers(0, 40), distance=st.integers(0, 30))
def test_near_pairs_are_all_pairs(seed, n, m, distance):
    rng = np.random.default_rng(seed)
    one, other = (rng.integers(0, 2**63, count, dtype=np.uint64) for count in (n, m))
    found = {
        (int(a), int(b)) for left, right in near_pairs(one, other, distance) for a, b in zip(left, right, strict=True)
    }
    expected = {
        (a, b) for a in range(n) for b in range(m) if bin(int(one[a]) ^ int(other[b])).count("1") <= distance
    }  # fmt: skip
    assert found == expected


def test_blocks_do_not_matter(monkeypatch):
    hashes = structure_hash(smooth(30))
    whole = [pair for left, right in near_pairs(hashes, hashes, 20) for pair in zip(left, right, strict=True)]
    monkeypatch.setattr(leakage, "_BLOCK", 70)
    parts = [pair for left, right in near_pairs(hashes, hashes, 20) for pair in zip(left, right, strict=True)]
    assert parts == whole


# Tables


def test_patient_overlap():
    patients = ["a", "a", "b", "c", "c", 7, "7"]
    split = ["train", "test", "test", "train", "test", "train", "test"]
    assert patient_overlap(patients, split).to_dict() == {"patients": 3, "images": 3, "share": 0.75}
    assert np.isnan(patient_overlap(patients, ["train"] * 7)["share"])


def test_image_wise_splits_of_nih_leak():
    """From the real table: four of five test images are of a patient who was trained on."""
    spec = __import__("importlib.util").util.find_spec("torchxrayvision")
    if spec is None:
        pytest.skip("torchxrayvision, which carries the table, is not installed")
    path = f"{spec.submodule_search_locations[0]}/data/Data_Entry_2017_v2020.csv.gz"
    patients = pd.read_csv(path, usecols=["Patient ID"])["Patient ID"]
    assert len(patients) == 112_120
    assert patients.nunique() == 30_805
    split = np.full(len(patients), "train", dtype=object)
    split[train_test_split(np.arange(len(patients)), test_size=0.2, random_state=0)[1]] = "test"
    leaked = patient_overlap(patients, split)
    assert leaked["patients"] == 7977
    assert leaked["share"] == pytest.approx(0.8285, abs=1e-4)


# The door


def folder(tmp_path, patients, split):
    for index in range(6):
        Image.fromarray((smooth(6)[index].numpy() * 255).astype(np.uint8)).save(tmp_path / f"{index}.png")
    lines = [f"i{k},{k}.png,{patients[k]},A,{split[k]}" for k in range(6)]
    (tmp_path / "images.csv").write_text("image_id,file,patient_id,labels,split\n" + "\n".join(lines) + "\n")
    return cxrkit.data.load("folder", root=tmp_path, size=48)


def test_load_refuses_a_leaking_split_unless_it_was_asked_for(tmp_path, monkeypatch):
    split = ["train"] * 3 + ["validation", "test", "test"]
    assert len(folder(tmp_path, "abcdef", split)) == 6
    whole = dataset(smooth(6), split, patients=list("abcdea"))
    monkeypatch.setattr("cxrkit.data.folder.load_folder", lambda root, size, seed: whole)
    with pytest.raises(DataError, match=r"train and test share patients \(1\): 'a'"):
        cxrkit.data.load("folder", root=tmp_path)
    whole.leak = "Slices were dealt, not patients."
    with pytest.warns(UserWarning, match=r"held: Slices were dealt, not patients. Of the test images, 1 \(50%\) are"):
        assert len(cxrkit.data.load("folder", root=tmp_path, split="test")) == 2


def test_real_duplicates_are_found(shared_data):
    """Both were not known beforehand: pairs of the same image under the names of different patients."""
    cohen = cxrkit.data.load("folder", root=shared_data / "covid_cohen", size=64)
    halves = [
        cohen.table["image_id"].str.startswith("covid-19-rapidly"),
        cohen.table["image_id"].str.startswith("16660"),
    ]
    found = find_leaks({"one": cohen.select(halves[0].to_numpy()), "other": cohen.select(halves[1].to_numpy())}, "near")
    assert found["kind"].value_counts().to_dict() == {"near": 8}
    assert found["patient_id"].nunique() == 2
    kermany = cxrkit.data.load("folder", root=shared_data / "kermany", size=64)
    pair = [kermany.select((kermany.table["image_id"] == f"NORMAL2-IM-{k}-0001").to_numpy()) for k in ("0095", "0096")]
    assert find_leaks({"one": pair[0], "other": pair[1]}, "pixels")["kind"].tolist() == ["pixels"] * 2
