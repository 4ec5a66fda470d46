"""From a trained network and images to the scores that a paper's pages show: what the notebooks `*_scores` run."""
