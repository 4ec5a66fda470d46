"""Learning curves and the trials of a search: what is drawn is what the table says."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from cxrkit import ParameterError
from cxrkit.view import figures

HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3],
        "train_loss": [0.7, 0.6, 0.5],
        "validation_loss": [0.7, 0.65, 0.66],
        "validation_auc": [0.6, 0.8, 0.7],
        "test_loss": [0.7, 0.6, 0.6],
        "test_auc": [0.6, 0.7, 0.75],
        "learning_rate": [1e-3, 1e-3, 1e-4],
    }
)
TRIALS = pd.DataFrame({"evaluation": [0, 1, 2], "epochs": [1, 1, 3], "score": [0.5, np.nan, 0.7], "best": 0.7})


def drawn(figure):
    figure.savefig(io.BytesIO(), format="png")


def test_a_training_chosen_on_the_test_split_shows_both_splits_and_the_epoch_that_was_kept():
    figure = figures.training_curves(HISTORY, best_epoch=3)
    assert len(figure.axes) == 3
    assert "highest, 0.800, in epoch 2. Kept is epoch 3, 0.700." in figure.alt_text
    assert "from 1.0e-03 to 1.0e-04" in figure.alt_text
    assert any(line.get_xydata().tolist() == [[3, 0.7]] for line in figure.axes[1].lines)
    assert figure.axes[2].get_yscale() == "log"
    drawn(figure)
    assert len(figures.training_curves(HISTORY.assign(learning_rate=1e-3)).axes) == 2


def test_trials_are_marked_by_their_epochs():
    figure = figures.search_trials(TRIALS, "F1")
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["best so far", "1 epoch", "3 epochs"]
    assert figure.alt_text == "3 trials. The best F1, 0.700, is that of trial 2, after 3 epochs."
    assert figure.axes[0].lines[2].get_xydata().tolist() == [[2, 0.7]]
    drawn(figure)
    assert "none with a score" in figures.search_trials(TRIALS.assign(score=np.nan)).alt_text
    for wrong in (TRIALS.head(0), TRIALS.drop(columns="epochs")):
        with pytest.raises(ParameterError):
            figures.search_trials(wrong)
