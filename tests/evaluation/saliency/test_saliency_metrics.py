"""IoU, accuracy and F measure: the golden table, the loop over thresholds, means over images."""

import math
import time

import numpy as np
import pytest
from support.saliency_reference import looped_f_curve

from clever.evaluation.saliency.metrics import (
    SaliencyMeter,
    accuracy,
    f_curve,
    iou,
)

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
        ([NOTHING], [NOTHING], (math.nan, 1, 1)),
        ([NOTHING], [ALL], (0, 0, 0)),
    ],
)
def test_golden_table(predictions, truths, expected):
    meter = SaliencyMeter()
    for prediction, truth in zip(predictions, truths, strict=True):
        meter.add(prediction, truth > 0)
    assert tuple(meter.means().values()) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_image_without_iou_does_not_spoil_the_others():
    meter = SaliencyMeter()
    meter.add(P, G > 0)
    assert math.isnan(meter.add(NOTHING, NOTHING > 0)["IoU"])
    assert meter.means()["IoU"] == pytest.approx(2 / 3) and (meter.images, meter.iou_images) == (2, 1)
    assert all(math.isnan(value) for value in SaliencyMeter().means().values())


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


def test_all_thresholds_of_a_mask_give_the_same():
    curve = f_curve((P > 0.5).astype(float), G > 0)
    assert np.ptp(curve) == 0 and 0 < curve[0] < 1


def test_f_of_a_set_is_the_maximum_of_the_mean_curve():
    truth = np.zeros((10, 10), bool)
    truth[:, :5] = True
    low, high = np.where(truth, 0.2, 0.1), np.where(truth, 0.9, 0.8)
    meter = SaliencyMeter()
    own = [meter.add(prediction, truth)["F_max"] for prediction in (low, high)]
    mean = (looped_f_curve(low, truth) + looped_f_curve(high, truth)) / 2
    assert own == [1, 1] and meter.means()["F_max"] == pytest.approx(mean.max()) and mean.max() < 0.9


def test_scores_of_processes_add_up():
    rng = np.random.default_rng(0)
    images = [(rng.random((9, 8)), rng.random((9, 8)) > 0.5) for _ in range(5)]
    whole, parts = SaliencyMeter(), [SaliencyMeter(), SaliencyMeter()]
    for number, image in enumerate(images):
        whole.add(*image)
        parts[number % 2].add(*image)
    assert (parts[0] + parts[1]).means() == pytest.approx(whole.means()) and (parts[0] + parts[1]).images == 5


def test_decisions_are_taken_above_one_half():
    half = np.full((2, 2), 0.5)
    truth = np.array([[True, False], [False, False]])
    assert (iou(half, truth), accuracy(half, truth)) == (0, 0.75)


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def test_curve_takes_a_twentieth_of_the_loop():
    rng = np.random.default_rng(0)
    prediction, truth = rng.random((300, 400)), rng.random((300, 400)) > 0.7
    own, looped = [], []
    for _ in range(4):
        own.append(seconds(f_curve, prediction, truth))
        looped.append(seconds(looped_f_curve, prediction, truth))
    assert min(looped) > 20 * min(own), f"{1e3 * min(own):.1f} ms, loop {1e3 * min(looped):.1f} ms"
