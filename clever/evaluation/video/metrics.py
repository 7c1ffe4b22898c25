"""The J&F measure of DAVIS 2017, semi-supervised: region overlap (J) and boundary accuracy (F), and their tables.

Definitions: Perazzi et al., CVPR 2016; Pont-Tuset et al., arXiv 1704.00675.

Shapes: n number of objects, T scored frames (all frames of a video except the first and the last).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from clever.evaluation.tables import save_csv
from clever.utils import InputError

STATISTICS = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
VOID = 255  # label of pixels that are scored as background


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels [H, W] that differ from their right, lower or lower right neighbour; the border of the frame is no boundary."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    inner = padded[:-1, :-1]
    return (inner ^ padded[:-1, 1:]) | (inner ^ padded[1:, :-1]) | (inner ^ padded[1:, 1:])


def boundary_f(predicted: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """F of two boolean masks [H, W]: harmonic mean of precision and recall of the boundary pixels.

    A boundary pixel is correct if its distance to the other boundary is at most `tolerance`: pixels if it is 1 or greater,
    else a fraction of the diagonal of the frame.
    """
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*truth.shape))
    window = _bounding_box(predicted | truth)
    predicted_points, true_points = (np.argwhere(boundary(mask[window])) for mask in (predicted, truth))  # points, 2
    if len(predicted_points) == 0 or len(true_points) == 0:
        return float(len(predicted_points) == len(true_points))
    precision = _fraction_near(predicted_points, true_points, radius)
    recall = _fraction_near(true_points, predicted_points, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a mask, with a margin of one pixel: they contain all boundaries."""
    spans = []
    for axis in (1, 0):
        (occupied,) = np.nonzero(mask.any(axis))
        spans.append(slice(max(occupied[0] - 1, 0), occupied[-1] + 2) if len(occupied) else slice(0, 1))
    return spans[0], spans[1]


def _fraction_near(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    """Fraction of the points that have one of the others within the radius."""
    limit = math.sqrt(math.floor(radius**2) + 0.5)  # squared distances are integers: rounding errors have no influence
    distance, _ = KDTree(others).query(points, distance_upper_bound=limit)
    return float(np.isfinite(distance).mean())


def score_frame(predicted: np.ndarray, truth: np.ndarray, objects: Sequence[int]) -> tuple[list[float], list[float]]:
    """J and F of each of the objects, which are labels in two label images [H, W]; other labels of the truth are background.

    Raises InputError if the sizes differ or if a predicted label is not one of the objects.
    """
    if predicted.shape != truth.shape:
        raise InputError(f"a mask of {predicted.shape[::-1]} pixels, its annotation has {truth.shape[::-1]}")
    unknown = np.setdiff1d(predicted, [0, *objects])
    if len(unknown):
        raise InputError(f"the mask has the label {unknown[0]}, the first annotation has {list(objects)}")
    masks = [(predicted == label, truth == label) for label in objects]
    unions = [np.count_nonzero(p | t) for p, t in masks]
    j = [np.count_nonzero(p & t) / union if union else 1.0 for (p, t), union in zip(masks, unions, strict=True)]
    return j, [boundary_f(p, t) for p, t in masks]


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall (fraction above 0.5) and decay (mean of the first quarter minus mean of the last) of values [T].

    Adjacent quarters share a frame, as in DAVIS.
    """
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    quarters = [values[first : last + 1] for first, last in zip(edges[:-1], edges[1:], strict=True)]
    return float(values.mean()), float((values > 0.5).mean()), float(quarters[0].mean() - quarters[3].mean())


@dataclass
class VideoScores:
    """J and F of the objects of a video in its scored frames."""

    video: str
    j: np.ndarray  # T, n
    f: np.ndarray  # T, n
    labels: list[int]  # of the n objects

    def objects(self) -> dict[str, dict[str, float]]:
        """{<video>_<object>: {statistic: value}} with the names of STATISTICS."""
        rows = {}
        for label, j, f in zip(self.labels, self.j.T, self.f.T, strict=True):
            rows[f"{self.video}_{label}"] = dict(zip(STATISTICS, (*statistics(j), *statistics(f)), strict=True))
        return rows


def global_scores(objects: dict[str, dict[str, float]]) -> dict[str, float]:
    """J&F-Mean and the means of STATISTICS over all objects of all videos."""
    means = {name: float(np.mean([row[name] for row in objects.values()])) for name in STATISTICS}
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}


def print_scores(objects: dict[str, dict[str, float]]) -> None:
    """Print a line per object, then the global scores."""
    for name, row in objects.items():
        print(f"{name:<24} J {row['J-Mean']:.3f}  F {row['F-Mean']:.3f}")
    print("  ".join(f"{name} {value:.3f}" for name, value in global_scores(objects).items()))


def save_tables(folder: str | Path, subset: str, objects: dict[str, dict[str, float]]) -> list[Path]:
    """Write the two tables of the DAVIS tool, with its file names and columns; returns their paths."""
    overall = global_scores(objects)
    paths = [Path(folder, name) for name in table_names(subset)]
    save_csv([list(overall), [f"{value:.3f}" for value in overall.values()]], paths[0])
    rows = [[name, f"{row['J-Mean']:.3f}", f"{row['F-Mean']:.3f}"] for name, row in objects.items()]
    save_csv([["Sequence", "J-Mean", "F-Mean"], *rows], paths[1])
    return paths


def table_names(subset: str) -> tuple[str, str]:
    """File names of the tables of the DAVIS tool."""
    return f"global_results-{subset}.csv", f"per-sequence_results-{subset}.csv"
