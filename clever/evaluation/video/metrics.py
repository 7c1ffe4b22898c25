"""The J&F measure of DAVIS 2017, semi-supervised: region overlap (J) and boundary accuracy (F), and their tables.

Definitions: Perazzi et al., CVPR 2016; Pont-Tuset et al., arXiv 1704.00675.

Shapes: n number of objects, T scored frames (all frames of a video except the first and the last).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from clever.utils import InputError, save_csv

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


def score_frame(predicted: np.ndarray, truth: np.ndarray, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """J and F [n] of the objects 1..n in two label images [H, W]; all other labels of the truth count as background.

    Raises InputError if the sizes differ or if a predicted label exceeds n.
    """
    if predicted.shape != truth.shape:
        raise InputError(f"the mask is of size {_size(predicted)}, its annotation {_size(truth)}")
    if predicted.max() > objects:
        raise InputError(f"the mask has the label {predicted.max()}: the first annotation has {objects} objects")
    masks = [(predicted == label, truth == label) for label in range(1, objects + 1)]
    unions = [np.count_nonzero(p | t) for p, t in masks]
    j = [np.count_nonzero(p & t) / union if union else 1.0 for (p, t), union in zip(masks, unions, strict=True)]
    return np.array(j), np.array([boundary_f(p, t) for p, t in masks])


def _size(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape[::-1]))


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall (fraction above 0.5) and decay (mean of the first quarter minus mean of the last) of values [T].

    Adjacent quarters share a frame, as in DAVIS. NaN values are ignored.
    """
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    quarters = [values[first : last + 1] for first, last in zip(edges[:-1], edges[1:], strict=True)]
    known = values[~np.isnan(values)]
    return float(known.mean()), float((known > 0.5).mean()), float(np.nanmean(quarters[0]) - np.nanmean(quarters[3]))


@dataclass
class VideoScores:
    """J and F of the objects of a video in its scored frames."""

    video: str
    j: np.ndarray  # T, n
    f: np.ndarray  # T, n
    labels: list[int] | None = None  # of the n objects; None: 1..n

    def objects(self) -> dict[str, dict[str, float]]:
        """{<video>_<object>: {statistic: value}} with the names of STATISTICS."""
        values = [(*statistics(j), *statistics(f)) for j, f in zip(self.j.T, self.f.T, strict=True)]
        labels = self.labels or range(1, len(values) + 1)
        return {f"{self.video}_{i}": dict(zip(STATISTICS, row, strict=True)) for i, row in zip(labels, values, strict=True)}


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
    columns = ("J-Mean", "F-Mean")
    global_table = [list(overall), [f"{value:.3f}" for value in overall.values()]]
    object_table = [["Sequence", *columns]]
    object_table += [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in objects.items()]
    paths = [Path(folder, name) for name in table_names(subset)]
    save_csv(global_table, paths[0])
    save_csv(object_table, paths[1])
    return paths


def table_names(subset: str) -> tuple[str, str]:
    """File names of the tables of the DAVIS tool."""
    return f"global_results-{subset}.csv", f"per-sequence_results-{subset}.csv"
