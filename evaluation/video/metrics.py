"""The J&F measure of DAVIS 2017, semi-supervised: overlap (J) and boundary accuracy (F) of tracked objects, and their tables.

Definitions: Perazzi et al., CVPR 2016; Pont-Tuset et al., arXiv 1704.00675.

Letters: H W size of a frame in pixels, n number of objects, T scored frames (all of a video but its first and its last).
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from utils import InputError, write_text_atomically

STATISTICS = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
VOID = 255  # a label that is scored as background


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels [H, W] that differ from their right, lower or lower right neighbour; the frame's border is no boundary."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    inner = padded[:-1, :-1]
    return (inner ^ padded[:-1, 1:]) | (inner ^ padded[1:, :-1]) | (inner ^ padded[1:, 1:])


def boundary_f(predicted: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """F of two masks [H, W] of booleans: harmonic mean of precision and recall of their boundary pixels.

    A pixel is right if the other boundary is at most `tolerance` away: pixels from 1 on, below that a share of the diagonal.
    """
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*truth.shape))
    window = _surroundings(predicted | truth)
    found, wanted = (np.argwhere(boundary(mask[window])) for mask in (predicted, truth))  # points, 2
    if len(found) == 0 or len(wanted) == 0:
        return float(len(found) == len(wanted))
    precision, recall = _share_near(found, wanted, radius), _share_near(wanted, found, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _surroundings(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of a mask and those next to it: all boundaries lie there."""
    spans = []
    for axis in (1, 0):
        (hit,) = np.nonzero(mask.any(axis))
        spans.append(slice(max(hit[0] - 1, 0), hit[-1] + 2) if len(hit) else slice(0, 1))
    return spans[0], spans[1]


def _share_near(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    """Share of the points that have one of the others within the radius."""
    limit = math.sqrt(math.floor(radius**2) + 0.5)  # squared distances are whole numbers: no rounding decides
    distance, _ = KDTree(others).query(points, distance_upper_bound=limit)
    return float(np.isfinite(distance).mean())


def score_frame(predicted: np.ndarray, truth: np.ndarray, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """J and F [n] of the objects 1..n between two label images [H, W]; void pixels of the truth are background.

    Other labels of the truth count as background too. Raises InputError if sizes differ or if a predicted label exceeds n.
    """
    if predicted.shape != truth.shape:
        raise InputError(f"the mask is of size {_size(predicted)}, its annotation {_size(truth)}")
    if predicted.max() > objects:
        raise InputError(f"the mask has the label {predicted.max()}: the first annotation has {objects} objects")
    labels = range(1, objects + 1)
    masks = [(predicted == label, truth == label) for label in labels]
    unions = [np.count_nonzero(p | t) for p, t in masks]
    j = [np.count_nonzero(p & t) / union if union else 1.0 for (p, t), union in zip(masks, unions, strict=True)]
    return np.array(j), np.array([boundary_f(p, t) for p, t in masks])


def _size(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape[::-1]))


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall (share above 0.5) and decay (mean of the first quarter minus that of the last) of values [T].

    Neighbouring quarters share the frame between them, as in DAVIS. NaN is left out.
    """
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    quarters = [values[first : last + 1] for first, last in zip(edges[:-1], edges[1:], strict=True)]
    known = values[~np.isnan(values)]
    return float(known.mean()), float((known > 0.5).mean()), float(np.nanmean(quarters[0]) - np.nanmean(quarters[3]))


@dataclass
class Scores:
    """J and F [T, n] of a video's objects over its scored frames."""

    video: str
    j: np.ndarray
    f: np.ndarray

    def objects(self) -> dict[str, dict[str, float]]:
        """{<video>_<object>: STATISTICS of the object}."""
        values = [(*statistics(j), *statistics(f)) for j, f in zip(self.j.T, self.f.T, strict=True)]
        return {f"{self.video}_{i}": dict(zip(STATISTICS, row, strict=True)) for i, row in enumerate(values, 1)}


def global_scores(objects: dict[str, dict[str, float]]) -> dict[str, float]:
    """J&F-Mean and the means of STATISTICS over all objects of all videos."""
    means = {name: float(np.mean([row[name] for row in objects.values()])) for name in STATISTICS}
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}


def print_scores(objects: dict[str, dict[str, float]]) -> None:
    """A line per object, then what counts."""
    for name, row in objects.items():
        print(f"{name:<24} J {row['J-Mean']:.3f}  F {row['F-Mean']:.3f}")
    print("  ".join(f"{name} {value:.3f}" for name, value in global_scores(objects).items()))


def write_csv(folder: str | Path, subset: str, objects: dict[str, dict[str, float]]) -> list[Path]:
    """The two tables of the DAVIS tool, under its names and with its columns; returns their paths."""
    overall = global_scores(objects)
    columns = ("J-Mean", "F-Mean")
    tables = {
        f"global_results-{subset}.csv": [list(overall), [f"{value:.3f}" for value in overall.values()]],
        f"per-sequence_results-{subset}.csv": [
            ["Sequence", *columns],
            *([name, *(f"{row[column]:.3f}" for column in columns)] for name, row in objects.items()),
        ],
    }
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text_atomically(text.getvalue(), Path(folder) / name)
    return [Path(folder) / name for name in tables]
