"""IoU, accuracy and F measure: the golden table, the loop over thresholds, means over images."""

import numpy as np
import pytest
from support.saliency_reference import looped_f_curve

from clever.evaluation.saliency.metrics import f_curve, mean_scores, score_image

G = np.zeros((4, 4), int)
G[1:3, 1:3] = 255
G1 = G.copy()
G1[0, 0] = 1
P = np.zeros((4, 4))
P[1:3, 1:4] = 0.6
P[0, 0] = 0.2
P2 = np.zeros((4, 4))
P2[1:3, 1:3] = 0.9
P2[3, 3] = 0.95
NOTHING, ALL = np.zeros((4, 4)), np.full((4, 4), 255)


@pytest.mark.parametrize(
    "predictions, truths, expected",
    [
        ([P], [G], (0.666667, 0.875, 0.722222)),
        ([P, P2], [G, G], (0.733333, 0.90625, 0.780466)),
        ([P], [G1], (0.571429, 0.8125, 0.764706)),
        ([NOTHING], [NOTHING], (None, 1, 1)),  # NaN in the original, which spoils the mean over images
        ([P, NOTHING], [G, NOTHING], (0.666667, 0.9375, 0.861111)),
        ([NOTHING], [ALL], (0, 0, 0)),
        ([np.full((4, 4), 0.5)], [G], (0, 0.75, 0.302326)),  # pixels above one half are object
        ([], [], (None, None, None)),
    ],
)
def test_golden_table(predictions, truths, expected):
    means = mean_scores([score_image(*pair) for pair in zip(predictions, [truth > 0 for truth in truths], strict=True)])
    assert tuple(means.values()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["random", "levels", "binary", "slightly outside", "constant"])
def test_histogram_is_the_loop_over_thresholds(kind):
    rng = np.random.default_rng(0)
    prediction = {
        "random": rng.random((30, 40)),
        "levels": rng.integers(0, 256, (30, 40)) / 255,  # on the thresholds: > is strict
        "binary": (rng.random((30, 40)) > 0.7).astype(float),
        "slightly outside": rng.choice([-1e-14, 0.3, 1 + 1e-14], (30, 40)),
        "constant": np.full((30, 40), 0.4),
    }[kind]
    for truth in (rng.random((30, 40)) > 0.6, np.zeros((30, 40), bool), np.ones((30, 40), bool)):
        np.testing.assert_allclose(f_curve(prediction, truth), looped_f_curve(prediction, truth), atol=1e-12)
