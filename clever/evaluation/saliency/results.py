"""Results of the saliency evaluation: a row per image, and the means over a set."""

from pathlib import Path
from typing import Any

from clever.evaluation.saliency.data import Example
from clever.evaluation.saliency.detection import Detection
from clever.evaluation.saliency.metrics import mean_scores, score_image
from clever.evaluation.tables import save_csv

METHODS = ("TokenCut", "TokenCut + bilateral solver")
COLUMNS = (
    "image", "IoU", "accuracy", "F_max", "solver_IoU", "solver_accuracy", "solver_F_max", "patches", "foreground",
    "degenerate", "error",
)  # fmt: skip
Row = dict[str, Any]  # COLUMNS of results.csv, as far as they apply, and "scores": the ImageScores of each of METHODS


def result_row(example: Example, detection: Detection) -> Row:
    """The row of an image. It is scored if it has a ground truth."""
    h, w = detection.cut.mask.shape
    row: Row = {
        "image": example.pair.name, "patches": f"{w}x{h}", "foreground": float(detection.mask.mean()),
        "degenerate": detection.cut.degenerate,
    }  # fmt: skip
    if example.truth is not None:
        masks = detection.mask, detection.refined
        row["scores"] = [score_image(mask, example.truth) for mask in masks]
        for prefix, scores in zip(("", "solver_"), row["scores"], strict=True):
            row |= {prefix + name: value for name, value in mean_scores([scores]).items()}
    return row


def set_means(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """{method: IoU, accuracy and F_max of the set}"""
    scored = [row["scores"] for row in rows if "scores" in row]
    return {method: mean_scores([scores[i] for scores in scored]) for i, method in enumerate(METHODS)}


def save_table(rows: list[Row], path: Path) -> None:
    """Write results.csv, one line per image; values that do not apply are empty."""
    lines = [[row.get(column) for column in COLUMNS] for row in rows]
    save_csv([COLUMNS, *([f"{x:.6f}" if isinstance(x, float) else x for x in line] for line in lines)], path)
