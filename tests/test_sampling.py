"""Oversampling: who is drawn how often, as published and corrected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrkit.data.sampling import sample_weights
from cxrkit.errors import ParameterError


def slow_weights(targets, protocol):
    """Image by image, label by label, straight from METHODS 1.7."""
    weights = []
    counts = np.nansum(targets, axis=0)
    healthy = sum(not np.nansum(row) for row in targets)
    for row in targets:
        inverse = [1 / counts[k] for k, value in enumerate(row) if value == 1]
        if protocol == "authors":
            weights.append(sum(min(max(one, 1 / 3), 3) for one in inverse))
        else:
            weights.append(sum(inverse) if inverse else 1 / healthy)
    return weights


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    labels=st.integers(2, 5),
    seed=st.integers(0, 999),
    rate=st.floats(0.05, 0.9),
    protocol=st.sampled_from(["paper", "authors", "corrected"]),
)
def test_weights_by_their_definition(n, labels, seed, rate, protocol):
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, labels)) < rate).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    targets[0, 0] = 1
    got = sample_weights(torch.from_numpy(targets), protocol)
    assert got.shape == (n,)
    np.testing.assert_allclose(got, slow_weights(targets, protocol), rtol=1e-5)


def test_one_label_balances_the_classes():
    targets = torch.tensor([[1.0], [0.0], [0.0], [torch.nan]])
    for protocol in ("paper", "authors", "corrected"):
        assert sample_weights(targets, protocol).tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert sample_weights(torch.zeros(3, 1)).tolist() == pytest.approx([1 / 3] * 3)


def chest_like(n=3000):
    """Seven of ten without finding, as in VinBigData; labels of very different frequency, which overlap."""
    rng = np.random.default_rng(0)
    targets = rng.random((n, 4)) < [0.3, 0.2, 0.05, 0.01]
    targets[rng.random(n) < 0.45] = False
    targets[:5] = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    return torch.from_numpy(targets.astype(np.float32))


def drawn(targets, protocol):
    """Share of the draws that show each label, and none: [L + 1]."""
    weights = sample_weights(targets, protocol).double()
    members = torch.cat([targets > 0.5, ~(targets > 0.5).any(1, keepdim=True)], 1)
    return (members * weights[:, None]).sum(0) / weights.sum()


def test_authors_never_draw_a_healthy_image():
    """METHODS 1.7: "oversampling" there means "train on diseased images only", in proportion to their labels."""
    targets = chest_like()
    healthy = ~targets.bool().any(1)
    assert healthy.double().mean() > 0.5
    authors, corrected = (drawn(targets, protocol) for protocol in ("authors", "corrected"))
    assert not sample_weights(targets, "authors")[healthy].any()
    assert sample_weights(targets, "corrected").all()
    # Rare labels stay as rare as they were among the diseased: nothing is oversampled.
    ill = targets[~healthy]
    counts = ill.sum(1, keepdim=True)
    np.testing.assert_allclose(authors[:4], (ill * counts).sum(0) / counts.sum(), rtol=1e-5)
    assert authors[3] < 0.1
    assert corrected[3] > 0.19
    assert corrected[4] == pytest.approx(1 / 5)


def test_classes_that_exclude_each_other():
    targets = torch.tensor([[1.0, 0, 0]] * 6 + [[0, 1.0, 0]] * 2)
    for protocol in ("paper", "authors", "corrected"):
        assert sample_weights(targets, protocol, exclusive=True).tolist() == pytest.approx([1 / 6] * 6 + [1 / 2] * 2)


def test_refusals():
    with pytest.raises(ParameterError, match=r"got \(3,\)"):
        sample_weights(torch.ones(3))
    with pytest.raises(ParameterError, match="protocol='published'"):
        sample_weights(torch.ones(3, 2), "published")
    with pytest.raises(ParameterError, match="no image has a finding"):
        sample_weights(torch.zeros(3, 2), "authors")
