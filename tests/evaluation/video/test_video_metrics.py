"""J and F against values of the DAVIS tool, and F against dilation by a disc."""

import csv

import numpy as np
import pytest
from scipy import ndimage

from clever.evaluation.video.metrics import VideoScores, boundary, boundary_f, save_tables, score_frame, statistics

EMPTY, FULL = np.zeros((100, 100), bool), np.ones((100, 100), bool)


def square(top, left, side=20):
    mask = EMPTY.copy()
    mask[top : top + side, left : left + side] = True
    return mask


def blobs(seed):
    """A mask of blobs [60, 80], some cut by the border."""
    return ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((60, 80)), 4) > 0.03


GT = square(40, 40)
# Prediction, truth, J and F of the DAVIS tool at 100x100, where the tolerance is 2 pixels.
GOLDEN = {
    "identical": (GT, GT, 1, 1),
    "right 2": (square(40, 42), GT, 0.818182, 1),
    "right 3": (square(40, 43), GT, 0.739130, 0.550),
    "right 10": (square(40, 50), GT, 0.333333, 0.375),
    "right 20": (square(40, 60), GT, 0, 0.3125),
    "smaller": (square(40, 40, 10), GT, 0.25, 0.416667),
    "two borders": (square(80, 80), square(79, 79), 361 / 439, 0.740157),
    "all ones": (FULL, GT, 0.04, 0),
    "nothing predicted": (EMPTY, GT, 0, 0),
    "nothing there": (GT, EMPTY, 0, 0),
    "both empty": (EMPTY, EMPTY, 1, 1),
    "both full": (FULL, FULL, 1, 1),
}


def approx(value):
    return pytest.approx(value, abs=6e-7)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values_of_a_frame(case):
    predicted, truth, j, f = GOLDEN[case]
    assert score_frame(predicted.astype(np.uint8), truth.astype(np.uint8), [1]) == ([approx(j)], [approx(f)])


@pytest.mark.parametrize("size, radius", [((480, 854), 8), ((480, 910), 9), ((480, 1152), 10), ((96, 160), 2)])
def test_tolerance_grows_with_the_diagonal(size, radius):
    truth, near, far = (np.zeros(size, bool) for _ in range(3))
    truth[30], near[30 + radius], far[30 + radius + 1] = True, True, True
    assert boundary_f(near, truth) == 1 and boundary_f(far, truth) == 0.5  # of the two sides of a line one is still in reach


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_f_is_that_of_boundaries_dilated_by_a_disc(radius):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    for seed in range(12):
        predicted, truth = blobs(seed), blobs(seed + 100 * (seed % 2)) ^ (blobs(seed + 200) & blobs(seed + 300))
        edges = [boundary(mask) for mask in (predicted, truth)]
        dilated = [ndimage.binary_dilation(edge, x**2 + y**2 <= radius**2) for edge in edges]
        precision, recall = (edges[i][dilated[1 - i]].sum() / edges[i].sum() for i in (0, 1))
        expected = 2 * precision * recall / (precision + recall)
        assert boundary_f(predicted, truth, tolerance=radius) == pytest.approx(expected, abs=1e-12) and 0.1 < expected < 1


def test_objects_are_scored_apart_and_those_that_are_missing_are_empty():
    truth = np.zeros((100, 100), np.uint8)
    truth[square(10, 10)], truth[square(60, 60)], truth[square(35, 35)] = 1, 3, 4  # 4 is not in the first frame: background
    predicted = np.zeros_like(truth)
    predicted[square(10, 10)] = 1
    assert score_frame(predicted, truth, [1, 2, 3]) == ([1, 1, 0], [1, 1, 0])  # nowhere there is object 2; object 3 is missed


@pytest.mark.parametrize(
    "n, expected",
    [(4, (0.5, 0.5, 2 / 3)), (5, (0.5, 0.4, 0.75)), (10, (0.5, 0.5, 7 / 9)), (67, (0.5, 33 / 67, 0.75))],
)
def test_statistics_of_a_ramp(n, expected):
    assert statistics(np.linspace(1, 0, n)) == pytest.approx(expected, abs=1e-9)


def two_videos():
    first = VideoScores("a", np.array([[1.0, 0.0], [1.0, 0.2]]), np.array([[0.5, 1.0], [0.7, 0.8]]), [1, 2])
    second = VideoScores("b-c", np.array([[0.4]]), np.array([[0.0]]), [1])
    return first.objects() | second.objects()


def test_tables_have_the_columns_of_the_davis_tool_and_means_over_objects_not_over_videos(tmp_path):
    paths = save_tables(tmp_path, "val", two_videos())
    assert [path.name for path in paths] == ["global_results-val.csv", "per-sequence_results-val.csv"]
    overall, objects = (list(csv.reader(path.open())) for path in paths)
    assert overall == [
        ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"],
        ["0.500", "0.500", "0.333", "-0.067", "0.500", "0.500", "0.000"],
    ]
    assert objects == [
        ["Sequence", "J-Mean", "F-Mean"],
        ["a_1", "1.000", "0.600"], ["a_2", "0.100", "0.900"], ["b-c_1", "0.400", "0.000"],
    ]  # fmt: skip
