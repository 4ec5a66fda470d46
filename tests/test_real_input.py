"""Real radiographs go through readers, networks and every method: one DICOM, and images of each set kept beside the
project."""

from __future__ import annotations

import pytest
import torch
from pydicom.data import get_testdata_file

import cxrkit

SIZE = 64
NETWORKS = (("resnet18", "none"), ("bcos_resnet18", "none"), ("bcos_resnet18", "flc"), ("bcos_resnet18", "blur"))


def check_every_method(model, images):
    with torch.no_grad():
        logits = model(images)
    for card in cxrkit.attribution.methods(model):
        options = {"n_steps": 4} if card.name == "integrated_gradients" else {}
        maps = cxrkit.attribute(model, images, method=card.name, **options)
        assert maps.shape == (len(images), len(model.labels), SIZE, SIZE), card.name
        assert maps.dtype == torch.float32
        assert torch.isfinite(maps).all()
        assert maps.any(), f"{card.name}: empty maps"
        if card.name == "bcos":
            assert torch.allclose(maps.sum((2, 3)), logits - model.logit_bias, atol=1e-4)


@pytest.mark.parametrize(("name", "antialias"), NETWORKS)
def test_a_dicom_radiograph_is_explained_by_every_method(name, antialias):
    path = get_testdata_file("RG1_UNCR.dcm", download=False)
    image = cxrkit.data.image_tensor(path, SIZE)
    assert 0 <= image.min() < 0.3 < 0.7 < image.max() <= 1
    model = cxrkit.models.create(name, ["a", "b", "c"], antialias=antialias).eval()
    images = image[None]
    if name.startswith("bcos_"):
        from cxrkit.models import calibrate

        model = calibrate(model, torch.cat([images, 1 - images]))
    check_every_method(model.eval(), images)


@pytest.mark.parametrize("name", ["nih", "covid_cohen", "kermany", "brain_mri"])
def test_images_of_every_set_are_explained_by_every_method(shared_data, name):
    data = cxrkit.data.load("folder", root=shared_data / name, size=SIZE)
    batch = data.batch([0, len(data) // 2])
    from cxrkit.models import calibrate

    model = cxrkit.models.create("bcos_resnet18", data.labels[:2], antialias="blur")
    check_every_method(calibrate(model, batch.images).eval(), batch.images)
    assert batch.masks.shape == (2, len(data.labels), SIZE, SIZE)
